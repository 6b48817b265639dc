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

/// Options of `restored`.
#[derive(Args, Debug)]
pub struct Options {
    /// A log of the relay, or any text with the Message-IDs that it accepted since the backup: those invitations count as
    /// sent.
    #[arg(long, value_name = "FILE")]
    sent_log: Option<PathBuf>,
}

/// Pauses all runs, settles what may have been sent since the backup, and begins a new epoch. It can be repeated after an
/// interruption.
///
/// # Errors
/// When workers are connected, the log can't be read, or the schema is not up to date.
pub async fn run(ledger: &Ledger, options: &Options) -> Result<()> {
    let mut conn = ledger.pool.acquire().await.context("PostgreSQL can't be reached")?;
    if schema::difference(&mut conn).await? != schema::Difference::default() {
        bail!("the backup holds the schema of another version of Mailrun: run `mailrun setup` first");
    }
    let workers = restore::connected_workers(&mut conn).await?;
    if !workers.is_empty() {
        bail!("stop the workers first: {} is connected to the ledger", workers.join(", "));
    }
    let sent = match &options.sent_log {
        Some(file) => read_sent_log(file, &MessageIds::new(&signing::key(&mut conn).await?))
            .with_context(|| format!("{} can't be read", file.display()))?,
        None => Vec::new(),
    };
    let backup = installation::read(&mut conn).await?;
    let stopped = restore::stop_all(&mut conn).await?;
    let settled = restore::settle_sent(&mut conn, &sent).await?;
    let unknown = restore::settle_open(&mut conn, |settled| eprintln!("{settled} invitations settled …")).await?;
    installation::declare_restored(&mut conn).await?;

    let since = backup.epoch_at.format("%F %T UTC");
    println!("The ledger counts as restored. The backup was taken about {since}, or up to a minute later.");
    println!("{}", counted(stopped.runs, "run is in it", "runs are in it"));
    if options.sent_log.is_some() {
        println!(
            "{} in the log; {}",
            counted(sent.len(), "Message-ID of ours is", "Message-IDs of ours are"),
            counted(settled, "invitation counts as sent because of it", "invitations count as sent because of it")
        );
    }
    println!(
        "{}: it is not known whether they were sent after the backup. They are sent again only if you ask for it",
        counted(unknown, "invitation is unknown", "invitations are unknown")
    );
    println!("{}", counted(stopped.paused, "run is paused", "runs are paused"));
    if stopped.messages > 0 {
        println!(
            "{}",
            counted(stopped.messages, "unpublished command was removed", "unpublished commands were removed")
        );
    }
    if stopped.tests > 0 {
        println!("{}", counted(stopped.tests, "test mail is unknown", "test mails are unknown"));
    }
    println!(
        "\nNot in the backup, and lost unless you have them elsewhere, is what came in since {since}:\n\
         - unsubscribes, complaints and bounces: people who asked not to be written to may be written to again\n\
         - addresses that were added to or removed from the suppression list by hand\n\
         - lists that were accepted, and what was sent from them\n\
         - retries, pauses and cancellations of runs, answers for stopped relays and reviewed suppressions\n\
         - erased people: erase them once more (mailrun people erase)\n\n\
         Start the web server and the workers, look at the runs, and resume the paused ones. Messages from before the restore \
         go to the dead letters; results that say *sent* are still counted."
    );
    Ok(())
}

/// The invitations whose Message-IDs stand in a file, each once.
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
