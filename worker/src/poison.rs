//! Messages that no worker can act on: moved to the dead letters unchanged, with a reason.

use std::{sync::Once, time::Duration};

use mailrun_broker::{Outgoing, Publisher};
use mailrun_core::message::{DeadReason, DecodeError, Message, decode};
use mailrun_core::queue;
use tokio::time::timeout;
use tracing::warn;

use mailrun_broker::consumer::Delivery;

/// How long publishing is retried while the dead-letter queue is missing.
const RETRY_FOR: Duration = Duration::from_secs(60);
/// The dead-letter reason of a message from before a restore.
pub const STALE: &str =
    "it was published before the ledger was restored from a backup, and may have been acted on since";

/// Why a message is not acted on.
#[derive(Debug)]
pub enum Refusal {
    /// No worker can act on it.
    Dead(String),
    /// It is from a newer version: it waits on a queue for a worker that understands it.
    Newer {
        /// The wait queue.
        wait_queue: &'static str,
    },
}

/// Decodes a message and checks that it is not stale.
///
/// # Errors
/// Why the message must not be acted on.
pub fn read<M: Message>(delivery: &Delivery) -> Result<M, Refusal> {
    if delivery.is_stale { Err(Refusal::Dead(STALE.to_owned())) } else { understand(delivery) }
}

/// Decodes a message, stale or not.
///
/// # Errors
/// Why the message can't be decoded.
pub fn understand<M: Message>(delivery: &Delivery) -> Result<M, Refusal> {
    decode(delivery.kind(), &delivery.body).map_err(|error| match error {
        DecodeError::Newer { .. } => Refusal::Newer { wait_queue: queue::waiting_room_of(M::QUEUE) },
        error => Refusal::Dead(error.to_string()),
    })
}

/// Moves `delivery` to the dead letters or a wait queue, and acknowledges it once that is confirmed.
pub async fn refuse(publisher: &Publisher, delivery: Delivery, refusal: Refusal) {
    match refusal {
        Refusal::Dead(reason) => bury(publisher, delivery, &reason).await,
        Refusal::Newer { wait_queue } => defer(publisher, delivery, wait_queue).await,
    }
}

async fn defer(publisher: &Publisher, delivery: Delivery, wait_queue: &'static str) {
    let kind = delivery.kind().unwrap_or_default().to_owned();
    let same = Outgoing::raw(wait_queue, kind, delivery.body.clone()).with_headers_of(&delivery.properties);
    // If rejected, the message is redelivered when the consumer reconnects.
    if set_aside(publisher, vec![same]).await {
        delivery.ack();
    }
}

/// Publishes messages that only a later version understands to a wait queue, from which they return every few seconds until the
/// workers are upgraded. False: not all of them were accepted.
pub async fn set_aside(publisher: &Publisher, messages: Vec<Outgoing>) -> bool {
    static LOGGED: Once = Once::new();
    LOGGED.call_once(|| warn!("messages from a newer version are waiting for a worker that understands them"));
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
            // Other messages must not wait for it.
            let publisher = publisher.clone();
            tokio::spawn(async move {
                // If this fails too, the message is redelivered when the consumer reconnects.
                if let Ok(Ok(())) = timeout(RETRY_FOR, publisher.publish(rejected)).await {
                    delivery.ack();
                }
            });
        }
        Err(_) => {}
    }
}
