//! Walks the dead-letter queue. A dead letter that stays is published to the tail, and acked at the head only after its confirm: a
//! crash may duplicate a dead letter, but never loses one.

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

/// Dead letters handled together.
const BATCH: u16 = 200;
/// The longest time for one walk. The next one continues where it ended.
const LONGEST_WALK: Duration = Duration::from_secs(600);
/// If no dead letter arrives for this time, the queue holds fewer than were counted.
const LONGEST_WAIT: Duration = Duration::from_secs(2);

/// What to do with a dead letter.
#[derive(Debug)]
pub enum Fate {
    /// Keep it.
    Stays,
    /// Remove it.
    Goes,
    /// Replace it.
    Becomes(Box<Outgoing>),
}

/// The result of a walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Walked {
    /// Dead letters removed or replaced.
    pub changed: usize,
    /// Dead letters not reached.
    pub left: u32,
}

/// Walks the dead-letter queue once and applies `fate` to each dead letter.
///
/// # Errors
/// The dead letters not reached yet stay in the queue.
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
                // Another consumer may have taken some since they were counted.
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
    // Close before `letters` is dropped: lapin cancels a dropped consumer, which fails while the connection is closing.
    link.close().await;
    walked
}

/// A copy of the dead letter, for the tail of the queue.
#[must_use]
pub fn to_the_tail(letter: &Delivery) -> Outgoing {
    let kind = letter.properties.kind().as_ref().map_or_else(String::new, ToString::to_string);
    Outgoing::raw(queue::DEAD, kind, letter.data.clone()).with_headers_of(&letter.properties)
}

/// A header of a dead letter, if it holds text.
#[must_use]
pub fn header_text(letter: &Delivery, header: &str) -> Option<String> {
    match letter.properties.headers().as_ref()?.inner().get(header)? {
        AMQPValue::LongString(text) => Some(String::from_utf8_lossy(text.as_bytes()).into_owned()),
        _ => None,
    }
}
