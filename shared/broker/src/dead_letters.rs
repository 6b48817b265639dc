//! Walks over the dead-letter queue. What stays goes to the tail, confirmed there before it is acknowledged here: a crash may leave
//! a dead letter too many, and never loses one.

use std::time::Duration;

use futures::StreamExt;
use lapin::{
    message::Delivery,
    options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions},
    types::{AMQPValue, FieldTable},
};
use mailrun_core::queue;
use tokio::time::timeout;

use crate::{Broker, BrokerError, Link, Outgoing, Publisher, topology::depth};

/// Letters looked at together.
const BATCH: u16 = 200;
/// A walk ends after this time; the next one goes on where it ended.
const LONGEST_WALK: Duration = Duration::from_secs(600);
/// When no letter comes for so long, the queue holds fewer than it did.
const LONGEST_WAIT: Duration = Duration::from_secs(2);

/// What becomes of a dead letter.
#[derive(Debug)]
pub enum Fate {
    /// It stays.
    Stays,
    /// It is taken off.
    Goes,
    /// It is replaced by this one.
    Becomes(Box<Outgoing>),
}

/// What a walk over the dead letters has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Walked {
    /// Letters that were taken off or replaced.
    pub changed: usize,
    /// Letters that were not reached.
    pub left: u32,
}

/// Walks once over the dead letters, and does with each what `fate` says.
///
/// # Errors
/// The broker's; the letters not reached yet stay where they are.
pub async fn walk_over(
    broker: &Broker,
    publisher: &Publisher,
    fate: impl Fn(&Delivery) -> Fate,
) -> Result<Walked, BrokerError> {
    let link = broker.connect("tidy mailrun.dead").await?;
    let walked = timeout(LONGEST_WALK, walk(&link, publisher, fate)).await;
    link.close().await;
    walked.map_err(|_| BrokerError::Timeout)?
}

async fn walk(link: &Link, publisher: &Publisher, fate: impl Fn(&Delivery) -> Fate) -> Result<Walked, BrokerError> {
    let channel = link.channel().await?;
    let total = depth(&channel, queue::DEAD).await?;
    channel.basic_qos(BATCH, BasicQosOptions::default()).await?;
    let mut letters = channel
        .basic_consume(queue::DEAD.into(), "mailrun".into(), BasicConsumeOptions::default(), FieldTable::default())
        .await?;
    let (mut seen, mut changed) = (0, 0);
    let walked = async {
        while seen < total {
            let mut batch = Vec::new();
            let room = u32::from(BATCH).min(total - seen);
            while u32::try_from(batch.len()).is_ok_and(|count| count < room) {
                // Somebody else may have taken letters meanwhile: then there are fewer than were counted.
                let Ok(Some(letter)) = timeout(LONGEST_WAIT, letters.next()).await else { break };
                batch.push(letter?);
            }
            let Some(last) = batch.last().map(|letter| letter.delivery_tag) else { break };
            seen += u32::try_from(batch.len()).unwrap_or(u32::MAX);
            let mut stay = Vec::new();
            for letter in &batch {
                match fate(letter) {
                    Fate::Stays => stay.push(to_the_tail(letter)),
                    Fate::Goes => changed += 1,
                    Fate::Becomes(other) => {
                        changed += 1;
                        stay.push(*other);
                    }
                }
            }
            publisher.publish_soon(stay).await?;
            channel.basic_ack(last, BasicAckOptions { multiple: true }).await?;
        }
        Ok(Walked { changed, left: total.saturating_sub(seen) })
    };
    let walked = walked.await;
    // Before the consumer is dropped, which lapin cancels then: that fails while the connection is being closed.
    link.close().await;
    walked
}

/// The same letter once more.
#[must_use]
pub fn to_the_tail(letter: &Delivery) -> Outgoing {
    let kind = letter.properties.kind().as_ref().map_or_else(String::new, ToString::to_string);
    Outgoing::raw(queue::DEAD, kind, letter.data.clone()).with_headers_of(&letter.properties)
}

/// A header of a letter, if it holds text.
#[must_use]
pub fn header_text(letter: &Delivery, header: &str) -> Option<String> {
    match letter.properties.headers().as_ref()?.inner().get(header)? {
        AMQPValue::LongString(text) => Some(String::from_utf8_lossy(text.as_bytes()).into_owned()),
        _ => None,
    }
}
