//! After replays: takes the dead letters that they have sent on their way again off the queue.
//!
//! The ledger decides what is replayed; this only keeps the management console's view of `mailrun.dead` true. It goes on beside
//! the runs, one walk over the queue for all replays that have ended by then. A walk acknowledges the letters that match and
//! moves the others to the tail, each confirmed there before it is acknowledged here. A crash may leave a letter too many, which
//! the fence refuses, and never loses one.

use std::{collections::HashMap, sync::Arc, time::Duration};

use futures::StreamExt;
use lapin::{
    message::Delivery,
    options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions},
    types::{AMQPValue, FieldTable},
};
use mailrun_shared::{
    broker::{Broker, BrokerError, DIED_AT_HEADER, ERROR_HEADER, Link, Outgoing, Publisher, REASON_HEADER, depth},
    item::ItemState,
    message::{ItemMessage, decode},
    retry::Reconnect,
    store::{
        in_time,
        passes::{self, Replayed},
    },
    topology,
};
use sqlx::PgPool;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use uuid::Uuid;

use crate::scrub::{ScrubError, scrub};

/// Letters looked at together.
const BATCH: u16 = 200;

/// A walk ends after this time; the next one goes on where it ended.
const LONGEST_WALK: Duration = Duration::from_secs(600);
/// When no letter comes for so long, the queue holds fewer than it did.
const LONGEST_WAIT: Duration = Duration::from_secs(2);
/// How often the ledger is asked for replays that have ended.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A walk that failed is tried again after this time, and later after up to the other.
const FIRST_AGAIN: Duration = Duration::from_secs(1);
const LAST_AGAIN: Duration = Duration::from_secs(60);

/// Why a walk was broken off.
#[derive(Debug, thiserror::Error)]
enum TidyError {
    #[error(transparent)]
    Ledger(#[from] sqlx::Error),
    #[error(transparent)]
    Broker(#[from] BrokerError),
    #[error("of erased people: {0}")]
    Scrub(#[from] ScrubError),
}

/// Takes replayed dead letters off the queue until `stop`. Of several processes, one walks at a time.
pub(crate) async fn run(
    pool: PgPool,
    broker: Arc<Broker>,
    publisher: Publisher,
    limit: Duration,
    stop: CancellationToken,
) {
    let mut trouble = Reconnect::between(FIRST_AGAIN, LAST_AGAIN);
    let mut wait = LOOK_EVERY;
    while stop.run_until_cancelled(sleep(wait)).await.is_some() {
        if !broker.epoch().is_current() {
            wait = LOOK_EVERY;
            continue;
        }
        let tidied = async {
            tidy(&pool, &broker, &publisher, limit).await?;
            scrub(&pool, &broker, &publisher, limit).await?;
            Ok::<_, TidyError>(())
        };
        let Some(tidied) = stop.run_until_cancelled(tidied).await else { return };
        wait = match tidied {
            Ok(()) => {
                trouble.reset();
                LOOK_EVERY
            }
            Err(error) => {
                // The ledger is the truth: a dead letter that stays behind is refused by the fence.
                warn!(%error, "replayed dead letters stay on the queue; trying again");
                trouble.next_wait()
            }
        };
    }
}

async fn tidy(pool: &PgPool, broker: &Broker, publisher: &Publisher, limit: Duration) -> Result<(), TidyError> {
    if in_time(limit, passes::to_tidy(&mut *pool.acquire().await?)).await?.is_empty() {
        return Ok(());
    }
    // Out of the pool: closing the connection gives the lock back, whatever becomes of the walk.
    let mut conn = pool.acquire().await?.detach();
    if !in_time(limit, passes::lock_tidying(&mut conn)).await? {
        return Ok(());
    }
    let replays = in_time(limit, passes::to_tidy(&mut conn)).await?;
    let mut by_run: HashMap<Uuid, Vec<&Replayed>> = HashMap::new();
    for replay in &replays {
        by_run.entry(replay.run_id).or_default().push(replay);
    }
    let walked =
        walk_over(broker, publisher, |letter| if was_replayed(letter, &by_run) { Fate::Goes } else { Fate::Stays });
    let Walked { changed, left } = walked.await?;
    info!(replays = replays.len(), taken = changed, left, "replayed dead letters are off the queue");
    if left == 0 {
        in_time(limit, passes::mark_tidied(&mut conn, &replays)).await?;
    }
    Ok(())
}

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
    let total = depth(&channel, topology::DEAD).await?;
    channel.basic_qos(BATCH, BasicQosOptions::default()).await?;
    let mut letters = channel
        .basic_consume(topology::DEAD.into(), "mailrun".into(), BasicConsumeOptions::default(), FieldTable::default())
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
    Outgoing::raw(topology::DEAD, kind, letter.data.clone()).with_headers_of(&letter.properties)
}

/// Whether a replay has sent this letter's item on its way again: it is of the run, was dead when the replay began, and is what
/// the replay was asked for.
fn was_replayed(letter: &Delivery, replays: &HashMap<Uuid, Vec<&Replayed>>) -> bool {
    let kind = letter.properties.kind().as_ref().map(lapin::types::ShortString::as_str);
    let Ok(item) = decode::<ItemMessage>(kind, &letter.data) else { return false };
    let state = match header_text(letter, REASON_HEADER).as_deref() {
        Some("failed") => ItemState::Failed,
        Some("unknown") => ItemState::Unknown,
        _ => return false,
    };
    let header = |key: &str| letter.properties.headers().as_ref()?.inner().get(key).cloned();
    let Some(AMQPValue::LongLongInt(died_at)) = header(DIED_AT_HEADER) else { return false };
    let matches = |replay: &&Replayed| {
        died_at <= replay.created_at.timestamp_millis()
            && replay.states.contains(&state)
            && replay.error.as_ref().is_none_or(|error| header_text(letter, ERROR_HEADER).as_ref() == Some(error))
    };
    replays.get(&item.run_id).is_some_and(|replays| replays.iter().any(matches))
}

/// A header of a letter, if it holds text.
#[must_use]
pub fn header_text(letter: &Delivery, header: &str) -> Option<String> {
    match letter.properties.headers().as_ref()?.inner().get(header)? {
        AMQPValue::LongString(text) => Some(String::from_utf8_lossy(text.as_bytes()).into_owned()),
        _ => None,
    }
}
