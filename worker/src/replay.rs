//! After a replay: takes the dead letters that it has sent on their way again off the queue.
//!
//! The ledger decides what is replayed; this only keeps the management console's view of `mailrun.dead` true. One walk
//! over the queue acknowledges the letters that match and moves the others to the tail, each confirmed there before it is
//! acknowledged here. A crash may leave a letter too many, which the fence refuses, and never loses one.

use futures::StreamExt;
use lapin::{
    message::Delivery,
    options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions},
    types::{AMQPValue, FieldTable},
};
use std::time::Duration;

use mailrun_shared::{
    broker::{Broker, BrokerError, DIED_AT_HEADER, ERROR_HEADER, Outgoing, Publisher, REASON_HEADER, depth, hang_up},
    item::ItemState,
    message::{ItemMessage, decode},
    store::passes::Pass,
    topology,
};
use tokio::time::timeout;
use tracing::info;

/// Letters looked at together.
const BATCH: u16 = 200;

/// A walk ends after this time, well before the broker loses patience with the run message that is held meanwhile.
const LONGEST_WALK: Duration = Duration::from_secs(600);
/// When no letter comes for so long, the queue holds fewer than it did.
const LONGEST_WAIT: Duration = Duration::from_secs(2);

/// Walks once over the dead letters.
///
/// # Errors
/// The broker's; the letters not reached yet stay where they are.
pub async fn tidy_dead_letters(broker: &Broker, publisher: &Publisher, pass: &Pass) -> Result<(), BrokerError> {
    let (taken, left) = take_off(broker, publisher, |letter| was_replayed(letter, pass)).await?;
    info!(run_id = %pass.run_id, pass = pass.number, taken, left, "replayed dead letters are off the queue");
    Ok(())
}

/// Walks once over the dead letters and takes off those of which `goes` says so. Returns how many these were, and how many
/// letters it has not reached.
///
/// # Errors
/// The broker's; the letters not reached yet stay where they are.
pub async fn take_off(
    broker: &Broker,
    publisher: &Publisher,
    goes: impl Fn(&Delivery) -> bool,
) -> Result<(usize, u32), BrokerError> {
    timeout(LONGEST_WALK, walk(broker, publisher, goes)).await.map_err(|_| BrokerError::Timeout)?
}

async fn walk(
    broker: &Broker,
    publisher: &Publisher,
    goes: impl Fn(&Delivery) -> bool,
) -> Result<(usize, u32), BrokerError> {
    let connection = broker.connect("tidy mailrun.dead").await?;
    let channel = connection.create_channel().await?;
    let total = depth(&channel, topology::DEAD).await?;
    channel.basic_qos(BATCH, BasicQosOptions::default()).await?;
    let mut letters = channel
        .basic_consume(topology::DEAD.into(), "mailrun".into(), BasicConsumeOptions::default(), FieldTable::default())
        .await?;
    let (mut seen, mut taken) = (0, 0);
    while seen < total {
        let mut batch = Vec::new();
        let room = u32::from(BATCH).min(total - seen);
        while u32::try_from(batch.len()).is_ok_and(|count| count < room) {
            // Somebody else may have taken letters meanwhile: then there are fewer than were counted.
            let Ok(Some(letter)) = timeout(LONGEST_WAIT, letters.next()).await else { break };
            batch.push(letter?);
        }
        let Some(last) = batch.last().map(|letter| letter.delivery_tag) else { break };
        let (gone, others): (Vec<_>, Vec<_>) = batch.into_iter().partition(&goes);
        taken += gone.len();
        seen += u32::try_from(gone.len() + others.len()).unwrap_or(u32::MAX);
        publisher.publish(others.iter().map(to_the_tail).collect()).await?;
        channel.basic_ack(last, BasicAckOptions { multiple: true }).await?;
    }
    hang_up(&connection).await;
    Ok((taken, total.saturating_sub(seen)))
}

fn to_the_tail(letter: &Delivery) -> Outgoing {
    let kind = letter.properties.kind().as_ref().map_or_else(String::new, ToString::to_string);
    Outgoing::raw(topology::DEAD, kind, letter.data.clone()).with_headers_of(&letter.properties)
}

/// Whether the pass has sent this letter's item on its way again: it is of the run, was dead when the pass began, and is
/// what the pass was asked for.
fn was_replayed(letter: &Delivery, pass: &Pass) -> bool {
    let kind = letter.properties.kind().as_ref().map(lapin::types::ShortString::as_str);
    let Ok(item) = decode::<ItemMessage>(kind, &letter.data) else { return false };
    let state = match header_text(letter, REASON_HEADER).as_deref() {
        Some("failed") => ItemState::Failed,
        Some("unknown") => ItemState::Unknown,
        _ => return false,
    };
    let header = |key: &str| letter.properties.headers().as_ref()?.inner().get(key).cloned();
    let died_before =
        matches!(header(DIED_AT_HEADER), Some(AMQPValue::LongLongInt(ms)) if ms <= pass.created_at.timestamp_millis());
    item.run_id == pass.run_id
        && died_before
        && pass.states.contains(&state)
        && pass.error.as_ref().is_none_or(|error| header_text(letter, ERROR_HEADER).as_ref() == Some(error))
}

/// A header of a letter, if it holds text.
#[must_use]
pub fn header_text(letter: &Delivery, header: &str) -> Option<String> {
    match letter.properties.headers().as_ref()?.inner().get(header)? {
        AMQPValue::LongString(text) => Some(String::from_utf8_lossy(text.as_bytes()).into_owned()),
        _ => None,
    }
}
