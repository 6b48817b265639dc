//! `mailrun people erase`: erases a person.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use mailrun_app::config::Config;
use mailrun_broker::marker::{Claim, Marker};
use mailrun_core::address::Address;
use mailrun_ledger::{installation, people};
use mailrun_worker::scrub::scrub;
use tokio::time::{sleep, timeout};

use crate::ledger::Ledger;

/// Sends in progress to the person end within this time; otherwise a worker finishes the rest.
const SENDS_END: Duration = Duration::from_secs(30);
const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// Erases a person. Nothing is erased if it fails.
pub async fn run(config: &Config, ledger: &Ledger, address: &str) -> Result<()> {
    let Address { email, .. } = address.parse().map_err(|_| anyhow!("{address} is not an email address"))?;
    let erased = people::erase(&mut *ledger.pool.acquire().await?, &email).await?;
    match (erased.known, erased.suppressed) {
        (true, _) => {
            println!("Person erased. A keyed hash of the address is kept, so that the person is not invited twice.");
        }
        (false, true) => println!("The address was only on the suppression list. It stays there as a keyed hash."),
        (false, false) => println!("The address was not in the ledger."),
    }
    let (tests, texts) = (erased.tests, erased.texts);
    println!(
        "Erased the recipient of {tests} test mails. Scrubbed {texts} replies, invalid entries and other texts with the address."
    );
    if erased.known {
        match timeout(2 * SENDS_END, finish(config, ledger)).await {
            Ok(Ok(0)) => println!("The dead-letter queue is scrubbed."),
            Ok(Err(error)) => println!("Scrubbing the dead-letter queue failed, workers will do it: {error:#}."),
            _ => println!("A mail to this person is being sent. Workers scrub the dead-letter queue afterwards."),
        }
    }
    Ok(())
}

/// Scrubs the dead-letter queue. Returns for how many people sends are still in progress.
async fn finish(config: &Config, ledger: &Ledger) -> Result<usize> {
    let broker = config.broker("mailrun operator");
    let installation = installation::read(&mut *ledger.pool.acquire().await?).await?;
    let marker = Marker::open(&broker).await?;
    marker.claim(installation.id, Claim::Verify).await?;
    marker.close().await;
    broker.epoch().record(installation.epochs, 0);
    let publisher = broker.publisher(1);
    let begun = Instant::now();
    loop {
        let scrubbed = scrub(&ledger.pool, &broker, &publisher, config.database.answer_timeout);
        let left = scrubbed.await.context("scrubbing the dead-letter queue")?;
        if left == 0 || begun.elapsed() > SENDS_END {
            return Ok(left);
        }
        sleep(POLL_INTERVAL).await;
    }
}
