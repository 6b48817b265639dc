//! The outbox publisher: publishes the messages that were committed to PostgreSQL, and marks them once RabbitMQ has confirmed them.

use std::{collections::HashMap, time::Duration};

use mailrun_broker::{BrokerError, Outgoing, Publisher, epoch::Epoch};
use mailrun_ledger::{
    in_time,
    outbox::{self, Waiting},
};
use sqlx::PgPool;
use tokio::{sync::Notify, time::sleep};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// Messages per transaction.
const BATCH: i64 = 100;
/// Other processes also insert into the outbox, and do not wake the publisher.
const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// A message that cannot be parsed is postponed for this long, …
const UNPARSED_DELAY: Duration = Duration::from_secs(60);
/// … and one that RabbitMQ rejects for this long; the others are published meanwhile.
const REJECTED_DELAY: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
enum PublishError {
    #[error("PostgreSQL: {0}")]
    Database(#[from] sqlx::Error),
    #[error("{0}")]
    Broker(#[from] BrokerError),
}

/// Publishes the outbox until `stop` is cancelled. Several publishers may run at once.
/// One batch may take `limit`.
pub(crate) async fn run(
    pool: &PgPool,
    limit: Duration,
    publisher: &Publisher,
    epoch: &Epoch,
    wake: &Notify,
    stop: &CancellationToken,
) {
    let mut down = false;
    // A ledger that is older than the broker's messages publishes nothing.
    while stop.run_until_cancelled(epoch.current()).await.is_some() {
        // A batch that is cut off here was not marked: it is published again at the next start, and a duplicate message changes
        // nothing.
        let published = tokio::select! {
            () = stop.cancelled() => return,
            published = in_time(limit, publish_batch(pool, publisher)) => published,
        };
        let more = match published {
            Ok(count) => {
                // An empty outbox proves nothing about RabbitMQ.
                if down && count > 0 {
                    info!("outbox publishing resumed");
                    down = false;
                }
                count == BATCH as usize
            }
            Err(error) => {
                if !down {
                    warn!(%error, "publishing the outbox failed, retrying");
                    down = true;
                }
                false
            }
        };
        if !more {
            tokio::select! {
                () = stop.cancelled() => return,
                () = wake.notified() => {}
                () = sleep(POLL_INTERVAL) => {}
            }
        }
    }
}

/// Publishes one batch, and returns its size.
async fn publish_batch(pool: &PgPool, publisher: &Publisher) -> Result<usize, PublishError> {
    let mut tx = pool.begin().await?;
    let waiting = outbox::take(&mut tx, BATCH).await?;
    if waiting.is_empty() {
        return Ok(0);
    }
    let count = waiting.len();
    let (mut messages, mut offered, mut postponed) = (Vec::new(), HashMap::new(), Vec::new());
    for Waiting { id, kind, message } in waiting {
        match Outgoing::read(&kind, message) {
            Ok(message) => {
                offered.insert(message.id(), id);
                messages.push(message);
            }
            // A newer version may have written it and can parse it; the others must not wait for that.
            Err(error) => {
                warn!(outbox_id = id, %error, "outbox message cannot be parsed, postponed for a minute");
                postponed.push(id);
            }
        }
    }
    // The caller's time limit bounds this wait.
    let rejected = publisher.offer(messages).await?;
    let rejected: Vec<i64> = rejected.iter().filter_map(|message| offered.remove(&message.id())).collect();
    let published: Vec<i64> = offered.into_values().collect();
    outbox::mark_published(&mut tx, &published).await?;
    outbox::postpone(&mut tx, &postponed, UNPARSED_DELAY).await?;
    outbox::postpone(&mut tx, &rejected, REJECTED_DELAY).await?;
    tx.commit().await?;
    Ok(count)
}
