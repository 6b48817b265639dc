//! The outbox relay: takes messages that were committed to PostgreSQL and marks them once RabbitMQ has confirmed them.

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

/// Messages in one transaction.
const BATCH: i64 = 100;
/// Other processes put messages into the outbox as well, and nobody wakes the relay for them.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// A message that this program does not understand is left for so long, …
const NOT_UNDERSTOOD: Duration = Duration::from_secs(60);
/// … and one that RabbitMQ rejects for so long: the others go on meanwhile.
const REJECTED: Duration = Duration::from_secs(5);

/// Why nothing can be handed over at the moment.
#[derive(Debug, thiserror::Error)]
enum RelayError {
    #[error("PostgreSQL: {0}")]
    Database(#[from] sqlx::Error),
    #[error("{0}")]
    Broker(#[from] BrokerError),
}

/// Hands over whatever is in the outbox, until `stop` is cancelled. Several relays may run at once.
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
        // What is cut off here was not marked: it is handed over again at the next start, and a doubled message changes
        // nothing.
        let relayed = tokio::select! {
            () = stop.cancelled() => return,
            relayed = in_time(limit, relay(pool, publisher)) => relayed,
        };
        let more = match relayed {
            Ok(count) => {
                // An empty outbox proves nothing about RabbitMQ.
                if down && count > 0 {
                    info!("the outbox is handed over again");
                    down = false;
                }
                count == BATCH as usize
            }
            Err(error) => {
                if !down {
                    warn!(%error, "messages wait in the outbox; they are handed over as soon as possible");
                    down = true;
                }
                false
            }
        };
        if !more {
            tokio::select! {
                () = stop.cancelled() => return,
                () = wake.notified() => {}
                () = sleep(LOOK_EVERY) => {}
            }
        }
    }
}

/// Hands over one batch, and returns how many messages that was.
async fn relay(pool: &PgPool, publisher: &Publisher) -> Result<usize, RelayError> {
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
            // A newer Mailrun wrote it, which may understand it as well; the others must not wait for that.
            Err(error) => {
                warn!(outbox_id = id, %error, "a message in the outbox is not understood; it is left for a minute");
                postponed.push(id);
            }
        }
    }
    // The limit of this batch ends the wait.
    let rejected = publisher.offer(messages).await?;
    let rejected: Vec<i64> = rejected.iter().filter_map(|message| offered.remove(&message.id())).collect();
    let published: Vec<i64> = offered.into_values().collect();
    outbox::mark_published(&mut tx, &published).await?;
    outbox::postpone(&mut tx, &postponed, NOT_UNDERSTOOD).await?;
    outbox::postpone(&mut tx, &rejected, REJECTED).await?;
    tx.commit().await?;
    Ok(count)
}
