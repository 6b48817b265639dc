//! `mailrun backup`: writes the ledger to a file with pg_dump.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use mailrun_app::config::Config;
use mailrun_broker::marker::Marker;
use mailrun_ledger::installation;
use secrecy::ExposeSecret as _;
use tokio::process::Command;
use url::Url;

use crate::{ledger::Ledger, postgres_program};

/// The connection parameters that pg_dump also supports.
const PARAMETERS: [&str; 7] = ["sslmode", "sslrootcert", "sslcert", "sslkey", "host", "port", "connect_timeout"];

/// Options of `backup`.
#[derive(Args, Debug)]
pub struct Options {
    /// The file to write, in pg_dump's custom format.
    file: PathBuf,
}

/// Writes the backup while all processes run, then starts a new epoch, so that a restored ledger is recognised as older than
/// anything published after the backup. The file must not exist.
pub async fn run(config: &Config, ledger: &Ledger, options: &Options) -> Result<()> {
    let file = &options.file;
    if file.exists() {
        bail!("{} exists: choose another name or remove it", file.display());
    }
    let Some(pg_dump) = postgres_program("pg_dump") else {
        bail!("pg_dump is not installed: install PostgreSQL's client programs (postgresql-client)");
    };
    let (url, password) = without_password(config.database.url.expose_secret())?;
    eprintln!("Writing the ledger to {}…", file.display());
    // A file with the final name is a complete backup.
    let part = part_of(file);
    let mut command = Command::new(pg_dump);
    command
        .arg("--format=custom")
        .args(["--no-owner", "--no-privileges"])
        .arg("--file")
        .arg(&part)
        .arg("--dbname")
        .arg(url);
    if let Some(password) = password {
        command.env("PGPASSWORD", password);
    }
    let done = command.status().await.context("cannot run pg_dump")?;
    if !done.success() {
        let _ = fs::remove_file(&part);
        bail!("pg_dump failed; its output is above");
    }
    fs::rename(&part, file).with_context(|| format!("cannot write {}", file.display()))?;
    let mut conn = ledger.pool.acquire().await?;
    let (id, epoch) = (installation::read(&mut conn).await?.id, installation::begin_epoch(&mut conn).await?);
    let broker = config.broker("mailrun backup");
    let mark = async {
        let marker = Marker::open(&broker).await?;
        let marked = marker.write_epoch(id, epoch).await;
        marker.close().await;
        marked
    };
    if let Err(error) = mark.await {
        eprintln!(
            "The backup is complete, but recording its epoch in RabbitMQ failed ({error}). Workers record it within a minute."
        );
    }
    println!(
        "The ledger was written to {}. To restore it: stop all processes, restore the file into an empty database with pg_restore, \
        run `mailrun setup`, then `mailrun restored`.",
        file.display()
    );
    Ok(())
}

fn part_of(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(".part");
    name.into()
}

/// Removes the password from the URL, because all users of the machine can read it in the process list, and the parameters that
/// only sqlx supports.
fn without_password(url: &str) -> Result<(String, Option<String>)> {
    let mut url: Url = url.parse().context("database.url is not a PostgreSQL URL")?;
    let password =
        url.password().map(|password| percent_encoding::percent_decode_str(password).decode_utf8_lossy().into_owned());
    let parameters: Vec<(String, String)> = url
        .query_pairs()
        .filter(|(key, _)| PARAMETERS.contains(&key.as_ref()))
        .map(|(key, value)| (key.into_owned(), value.into_owned()))
        .collect();
    let _ = url.set_password(None);
    url.set_query(None);
    if !parameters.is_empty() {
        url.query_pairs_mut().extend_pairs(parameters);
    }
    Ok((url.into(), password))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_password_is_removed_from_the_arguments() {
        let (url, password) =
            without_password("postgres://me:p%40ss@db:5432/mail?sslmode=require&statement-cache-capacity=9").unwrap();
        assert_eq!(url, "postgres://me@db:5432/mail?sslmode=require");
        assert_eq!(password.as_deref(), Some("p@ss"));
        assert_eq!(without_password("postgres://db/mail").unwrap(), ("postgres://db/mail".into(), None));
    }
}
