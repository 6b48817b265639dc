//! After replays: takes the dead letters that they have sent on their way again off the queue.
//!
//! The ledger decides what is replayed; this only keeps the management console's view of `mailrun.dead` true. It goes on beside
//! the runs, one walk over the queue for all replays that have ended by then. A walk acknowledges the letters that match and
//! moves the others to the tail, each confirmed there before it is acknowledged here. A crash may leave a letter too many, which
//! the fence refuses, and never loses one.

use std::{collections::HashMap, time::Duration};

use lapin::{message::Delivery, types::AMQPValue};
use mailrun_broker::{
    Broker, BrokerError, DIED_AT_HEADER, ERROR_HEADER, Publisher, REASON_HEADER,
    dead_letters::{Fate, Walked, header_text, walk_over},
};
use mailrun_core::{
    item::ItemState,
    message::{ItemMessage, decode},
    retry::Reconnect,
};
use mailrun_ledger::{
    in_time,
    passes::{self, Replayed},
};
use sqlx::PgPool;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use uuid::Uuid;

use crate::{
    context::Context,
    scrub::{ScrubError, scrub},
};

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
pub(crate) async fn run(context: Context, stop: CancellationToken) {
    let Context { pool, broker, publisher, answer_timeout: limit, .. } = context;
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
