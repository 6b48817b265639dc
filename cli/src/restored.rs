//! `mailrun restored`: declares that the ledger was restored from a backup, so that nothing is sent twice without a decision.

use std::{
    fs::File,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use mailrun_core::message_id::{MessageIds, find_unsigned};
use mailrun_ledger::{installation, restore, schema, signing};
use uuid::Uuid;

use crate::ledger::Ledger;

#[derive(Args, Debug)]
pub struct Options {
    /// A relay's log, or any text with the Message-IDs that it accepted since the backup; these invitations are settled as sent
    #[arg(long, value_name = "FILE")]
    sent_log: Option<PathBuf>,
}

/// Pauses all runs, settles what may have been sent since the backup, and starts a new epoch. It can be repeated after an
/// interruption. No workers may be connected, and the schema must be up to date.
pub async fn run(ledger: &Ledger, options: &Options) -> Result<()> {
    let mut conn = ledger.pool.acquire().await.context("cannot connect to PostgreSQL")?;
    if schema::difference(&mut conn).await? != schema::Difference::default() {
        bail!("the backup has the schema of another version of Mailrun: run `mailrun setup` first");
    }
    let workers = restore::connected_workers(&mut conn).await?;
    if !workers.is_empty() {
        bail!("stop the workers first: {} is connected to the ledger", workers.join(", "));
    }
    let sent = match &options.sent_log {
        Some(file) => read_sent_log(file, &MessageIds::new(&signing::key(&mut conn).await?))
            .with_context(|| format!("cannot read {}", file.display()))?,
        None => Vec::new(),
    };
    let backup = installation::read(&mut conn).await?;
    let stopped = restore::stop_all(&mut conn).await?;
    let settled = restore::settle_sent(&mut conn, &sent).await?;
    let unknown = restore::settle_open(&mut conn, |settled| eprintln!("{settled} invitations settled…")).await?;
    installation::declare_restored(&mut conn).await?;

    let since = backup.epoch_at.format("%F %T UTC");
    println!("The ledger is marked as restored. The backup was taken about {since}, or up to a minute later.");
    println!("{}", counted(stopped.runs, "run is in the backup", "runs are in the backup"));
    if options.sent_log.is_some() {
        println!(
            "{} in the log; {}",
            counted(sent.len(), "known Message-ID is", "known Message-IDs are"),
            counted(settled, "invitation was settled as sent", "invitations were settled as sent")
        );
    }
    println!(
        "{}: they may have been sent after the backup. They are only sent again on request",
        counted(unknown, "invitation is unknown", "invitations are unknown")
    );
    println!("{}", counted(stopped.paused, "run is paused", "runs are paused"));
    if stopped.messages > 0 {
        println!(
            "{}",
            counted(stopped.messages, "unpublished command was removed", "unpublished commands were removed")
        );
    }
    println!(
        "\nNot in the backup, and lost unless recorded elsewhere, is everything since {since}:\n\
        - unsubscribes, complaints and bounces: people who unsubscribed may receive mail again\n\
        - addresses added to or removed from the suppression list manually\n\
        - accepted lists, and what was sent from them\n\
        - retries, pauses and cancellations of runs, answers to relay stops, and reviewed suppressions\n\
        - erasures: erase these people again (mailrun people erase)\n\n\
        Start the web server and the workers, check the runs, and resume the paused ones. Messages from before the restore \
        become dead letters; results that say *sent* are still counted."
    );
    Ok(())
}

/// The invitations whose Message-IDs are in a file, without duplicates.
fn read_sent_log(file: &Path, ids: &MessageIds) -> Result<Vec<(Uuid, i64)>> {
    let mut reader = BufReader::new(File::open(file)?);
    let (mut sent, mut line) = (Vec::new(), Vec::new());
    while reader.read_until(b'\n', &mut line)? > 0 {
        let text = String::from_utf8_lossy(&line);
        let found = ids.find(&text).into_iter().chain(find_unsigned(&text));
        sent.extend(found.map(|named| (named.run_id, named.item_id)));
        line.clear();
    }
    sent.sort_unstable();
    sent.dedup();
    Ok(sent)
}

fn counted<N: TryInto<i64>>(count: N, one: &str, many: &str) -> String {
    let count = count.try_into().unwrap_or(i64::MAX);
    if count == 1 { format!("1 {one}") } else { format!("{} {many}", mailrun_web::grouped(count)) }
}
