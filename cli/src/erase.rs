//! `mailrun people erase`.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use mailrun_app::config::Config;
use mailrun_broker::marker::{Claim, Marker};
use mailrun_core::address::Address;
use mailrun_ledger::{installation, people};
use mailrun_worker::scrub::scrub;
use tokio::time::{sleep, timeout};

use crate::ledger::Ledger;

/// What is being sent to the person at this moment ends within this time, or a worker finishes the rest.
const DELIVERED: Duration = Duration::from_secs(30);
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Erases a person.
///
/// # Errors
/// When that is no address, or the database's; nothing is erased then.
pub async fn run(config: &Config, ledger: &Ledger, address: &str) -> Result<()> {
    let Address { email, .. } = address.parse().map_err(|_| anyhow!("{address} is not an email address"))?;
    let erased = people::erase(&mut *ledger.pool.acquire().await?, &email).await?;
    match (erased.known, erased.suppressed) {
        (true, _) => {
            println!("The person is erased. A keyed hash of the address is kept, so that nothing is sent there twice.");
        }
        (false, true) => println!("The address was only on the suppression list. It is kept there as a keyed hash."),
        (false, false) => println!("Nobody with this address was in the ledger."),
    }
    let (tests, texts) = (erased.tests, erased.texts);
    println!(
        "Deleted: {tests} test mails. Scrubbed: {texts} replies, invalid entries and other texts with the address."
    );
    if erased.known {
        match timeout(2 * DELIVERED, finish(config, ledger)).await {
            Ok(Ok(0)) => println!("Nothing of the person is left on the dead-letter queue."),
            Ok(Err(error)) => println!("The dead letters are left to the workers, who go over them: {error:#}."),
            _ => println!(
                "Something is being sent at this moment. The workers go over the dead letters when that is over."
            ),
        }
    }
    Ok(())
}

/// Goes over the dead letters. Returns how many people something is still being sent to.
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
        let left = scrubbed.await.context("the dead-letter queue")?;
        if left == 0 || begun.elapsed() > DELIVERED {
            return Ok(left);
        }
        sleep(LOOK_EVERY).await;
    }
}
