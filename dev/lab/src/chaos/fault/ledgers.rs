//! Faults of ledgers: a backup in place of the ledger, and another installation on the same virtual host.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mailrun_core::run::Wanted;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use tokio::{
    process::Command,
    time::{Instant, sleep},
};
use uuid::Uuid;

use super::{super::site::Site, Fault, run_commands, some_seconds};
use mailrun::postgres_program;

/// Time limit of each command.
const COMMAND: Duration = Duration::from_secs(60);
/// Time limit for renaming a database while the services keep connecting to it.
const RENAMED: Duration = Duration::from_secs(20);
/// Time limit for refusing a worker of another installation.
const REFUSED: Duration = Duration::from_secs(20);

/// The faults of this file.
pub(super) const FAULTS: &[Fault] = &[
    Fault::new(
        "restore",
        "Replace the ledger by a backup of some seconds ago, and declare the restore",
        |site, rng, _| Box::pin(restore(site, some_seconds(rng))),
    )
    .heavy()
    .ends_the_run(),
    Fault::new(
        "second-installation",
        "Set up another installation on the same virtual host, and start a worker there",
        |site, _, _| Box::pin(second_installation(site)),
    ),
];

/// Backs up the ledger, continues the run for `time`, replaces the ledger by the backup, declares the restore, and resumes the run.
async fn restore(site: &Site<'_>, time: Duration) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let backup = folder.path().join("backup");
    let file = backup.to_str().context("the path of the backup is not text")?;
    let (lost, restored) = (format!("{}-lost", site.name()), format!("{}-restored", site.name()));
    let run_id: Uuid = sqlx::query_scalar("SELECT id FROM runs").fetch_one(&site.pool).await?;
    site.run(site.name(), &["backup", file], COMMAND).await?;
    sleep(time).await;
    rename(site, site.name(), &lost).await?;
    let prepared = async {
        site.stack.create_database(&restored).await?;
        let program = postgres_program("pg_restore").context("pg_restore not found")?;
        let url = site.stack.database_url(&restored);
        let ended =
            Command::new(program).args(["--no-owner", "--exit-on-error", "--dbname", &url, file]).status().await?;
        ensure!(ended.success(), "pg_restore failed");
        site.run(&restored, &["setup"], COMMAND).await?;
        site.run(&restored, &["restored"], COMMAND).await
    };
    match prepared.await {
        Ok(()) => {
            rename(site, &restored, site.name()).await?;
            site.stack.drop_database(&lost).await?;
            run_commands::press(site, run_id, "resume", Wanted::Running).await
        }
        Err(error) => {
            rename(site, &lost, site.name()).await?;
            site.stack.drop_database(&restored).await?;
            Err(error)
        }
    }
}

/// Sets up another installation's ledger on the same virtual host, and starts a worker there.
async fn second_installation(site: &Site<'_>) -> Result<()> {
    let other = format!("{}-other", site.name());
    site.stack.create_database(&other).await?;
    let set_up = site.run(&other, &["setup"], COMMAND).await;
    let worked = site.run(&other, &["worker"], REFUSED).await;
    site.stack.drop_database(&other).await?;
    ensure!(set_up.is_err(), "setup accepted another installation's virtual host");
    let refused = worked.is_err_and(|error| error.to_string().ends_with("failed"));
    ensure!(refused, "a worker accepted another installation's virtual host");
    Ok(())
}

/// Renames a database. It must have no connections, and the services keep connecting to it.
async fn rename(site: &Site<'_>, from: &str, to: &str) -> Result<()> {
    let mut conn = PgConnection::connect_with(&site.database().database("postgres")).await?;
    let end = Instant::now() + RENAMED;
    loop {
        sqlx::query("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1")
            .bind(from)
            .execute(&mut conn)
            .await?;
        // The names are the bench's own and contain no quotes.
        let rename = AssertSqlSafe(format!(r#"ALTER DATABASE "{from}" RENAME TO "{to}""#));
        match sqlx::raw_sql(rename).execute(&mut conn).await {
            Ok(_) => return Ok(conn.close().await?),
            Err(error) if Instant::now() > end => return Err(error.into()),
            Err(_) => sleep(Duration::from_millis(20)).await,
        }
    }
}
