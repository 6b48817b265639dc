//! Messages that can't be acted on: they go to the dead letters as they came, with the reason.

use mailrun_shared::{
    broker::{Outgoing, Publisher},
    message::{DeadReason, Message, decode},
};
use tracing::warn;

use crate::consumer::Delivery;

/// Why a message of an earlier state of the ledger is dead.
pub const STALE: &str =
    "it was published before the ledger was restored from a backup, and may have been acted on since";

/// Reads a message that is to be acted on.
///
/// # Errors
/// The reason for the dead letter.
pub fn read<M: Message>(delivery: &Delivery) -> Result<M, String> {
    if delivery.is_stale {
        return Err(STALE.to_owned());
    }
    decode(delivery.kind(), &delivery.body).map_err(|error| error.to_string())
}

/// Dead-letters `delivery` and acknowledges it once that is confirmed.
pub async fn bury(publisher: &Publisher, delivery: Delivery, reason: &str) {
    warn!(reason, "message moved to the dead letters");
    let kind = delivery.kind().unwrap_or_default().to_owned();
    let dead = Outgoing::raw("", kind, delivery.body.clone())
        .with_headers_of(&delivery.properties)
        .dead(DeadReason::Poison, reason);
    if publisher.publish(vec![dead]).await.is_ok() {
        delivery.ack();
    }
}
