//! The outbox relay: takes run messages that were committed to PostgreSQL and marks them once RabbitMQ has confirmed them.

use std::time::Duration;

use mailrun_shared::{
    broker::{BrokerError, Outgoing, Publisher},
    store::outbox,
};
use sqlx::PgPool;
use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// Messages in one transaction.
const BATCH: i64 = 100;
/// Other processes put messages into the outbox as well, and nobody wakes the relay for them.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long a batch may wait for RabbitMQ: a transaction is open meanwhile, and this is all that it may cost.
const CONFIRMED_WITHIN: Duration = Duration::from_secs(10);

/// Why nothing can be handed over at the moment.
#[derive(Debug, thiserror::Error)]
enum RelayError {
    #[error("PostgreSQL: {0}")]
    Database(#[from] sqlx::Error),
    #[error("{0}")]
    Broker(#[from] BrokerError),
    #[error("RabbitMQ has not confirmed anything for {} s", CONFIRMED_WITHIN.as_secs())]
    Unconfirmed,
}

/// Hands over whatever is in the outbox, until `stop` is cancelled. Several relays may run at once.
pub(crate) async fn run(pool: &PgPool, publisher: &Publisher, wake: &Notify, stop: &CancellationToken) {
    let mut down = false;
    loop {
        // What is cut off here was not marked: it is handed over again at the next start, and a doubled message changes
        // nothing.
        let relayed = tokio::select! {
            () = stop.cancelled() => return,
            relayed = relay(pool, publisher) => relayed,
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
                    warn!(%error, "run messages wait in the outbox; they are handed over as soon as possible");
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
    let messages = waiting.iter().map(|waiting| Outgoing::new(&waiting.message).of_run(waiting.message.run_id));
    timeout(CONFIRMED_WITHIN, publisher.publish(messages.collect())).await.map_err(|_| RelayError::Unconfirmed)??;
    let ids: Vec<i64> = waiting.iter().map(|waiting| waiting.id).collect();
    outbox::mark_published(&mut tx, &ids).await?;
    tx.commit().await?;
    Ok(waiting.len())
}
