//! Messages that can't be understood: they go to the dead letters as they came, with the reason, and never round in circles.

use std::time::Duration;

use mailrun_shared::{
    broker::{Outgoing, Publisher},
    message::DeadReason,
};
use tokio::time::timeout;
use tracing::warn;

use crate::consumer::Delivery;

/// While there is no dead-letter queue, a message is held for so long.
const INSIST: Duration = Duration::from_secs(60);

/// Dead-letters `delivery` and acknowledges it once that is confirmed.
pub async fn bury(publisher: &Publisher, delivery: Delivery, reason: &str) {
    warn!(reason, "a message can't be understood; it goes to the dead letters");
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
