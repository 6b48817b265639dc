//! Messages that can't be acted on: they go to the dead letters as they came, with the reason.

use std::{sync::Once, time::Duration};

use mailrun_broker::{Outgoing, Publisher};
use mailrun_core::message::{DeadReason, DecodeError, Message, decode};
use mailrun_core::queue;
use tokio::time::timeout;
use tracing::warn;

use mailrun_broker::consumer::Delivery;

/// While there is no dead-letter queue, a message is held for so long.
const INSIST: Duration = Duration::from_secs(60);
/// Why a message of an earlier state of the ledger is dead.
pub const STALE: &str =
    "it was published before the ledger was restored from a backup, and may have been acted on since";

/// Why a message is not acted on.
#[derive(Debug)]
pub enum Refusal {
    /// It never can be.
    Dead(String),
    /// It is of a newer version: it waits here for a worker that understands it.
    Newer {
        /// The queue.
        waiting_room: &'static str,
    },
}

/// Reads a message that is to be acted on.
///
/// # Errors
/// Why it must not be.
pub fn read<M: Message>(delivery: &Delivery) -> Result<M, Refusal> {
    if delivery.is_stale { Err(Refusal::Dead(STALE.to_owned())) } else { understand(delivery) }
}

/// Reads a message, whenever it was published.
///
/// # Errors
/// Why it can't be understood.
pub fn understand<M: Message>(delivery: &Delivery) -> Result<M, Refusal> {
    decode(delivery.kind(), &delivery.body).map_err(|error| match error {
        DecodeError::Newer { .. } => Refusal::Newer { waiting_room: queue::waiting_room_of(M::QUEUE) },
        error => Refusal::Dead(error.to_string()),
    })
}

/// Puts `delivery` where it belongs, and acknowledges it once that is confirmed.
pub async fn refuse(publisher: &Publisher, delivery: Delivery, refusal: Refusal) {
    match refusal {
        Refusal::Dead(reason) => bury(publisher, delivery, &reason).await,
        Refusal::Newer { waiting_room } => put_off(publisher, delivery, waiting_room).await,
    }
}

async fn put_off(publisher: &Publisher, delivery: Delivery, waiting_room: &'static str) {
    let kind = delivery.kind().unwrap_or_default().to_owned();
    let same = Outgoing::raw(waiting_room, kind, delivery.body.clone()).with_headers_of(&delivery.properties);
    // Rejected, it comes again when the consumer connects anew.
    if set_aside(publisher, vec![same]).await {
        delivery.ack();
    }
}

/// Publishes what only a worker of a later version understands to a waiting room, from which it comes back every few seconds
/// until the workers are upgraded. False: not all of it was accepted.
pub async fn set_aside(publisher: &Publisher, messages: Vec<Outgoing>) -> bool {
    static SAID: Once = Once::new();
    SAID.call_once(|| warn!("messages of a newer version, or of its items, wait for a worker that understands them"));
    publisher.offer(messages).await.is_ok_and(|rejected| rejected.is_empty())
}

/// Dead-letters `delivery` and acknowledges it once that is confirmed.
pub async fn bury(publisher: &Publisher, delivery: Delivery, reason: &str) {
    warn!(reason, "message moved to the dead letters");
    let kind = delivery.kind().unwrap_or_default().to_owned();
    let dead = Outgoing::raw("", kind, delivery.body.clone())
        .with_headers_of(&delivery.properties)
        .dead(DeadReason::Poison, reason);
    match publisher.offer(vec![dead]).await {
        Ok(rejected) if rejected.is_empty() => delivery.ack(),
        Ok(rejected) => {
            // The others must not wait for it.
            let publisher = publisher.clone();
            tokio::spawn(async move {
                // Given up, it comes again when the consumer connects anew.
                if let Ok(Ok(())) = timeout(INSIST, publisher.publish(rejected)).await {
                    delivery.ack();
                }
            });
        }
        Err(_) => {}
    }
}
