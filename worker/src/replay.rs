//! After replays: removes the replayed dead letters from the queue.
//!
//! The ledger decides what is replayed; this only keeps the view of `mailrun.dead` in the management console accurate. It runs
//! alongside the runs: one walk over the queue for all replays that have ended by then. A walk acknowledges the matching dead
//! letters and moves the others to the tail, each confirmed there before it is acknowledged here. A crash may leave a
//! duplicate, which the fence refuses, but never loses a dead dead.

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

/// How often the ledger is queried for ended replays.
const READ_EVERY: Duration = Duration::from_secs(1);
/// The wait before a failed walk is repeated grows from the first to the second.
const FIRST_WAIT: Duration = Duration::from_secs(1);
const LAST_WAIT: Duration = Duration::from_secs(60);

/// Why a walk failed.
#[derive(Debug, thiserror::Error)]
enum TidyError {
    #[error(transparent)]
    Ledger(#[from] sqlx::Error),
    #[error(transparent)]
    Broker(#[from] BrokerError),
    #[error("scrubbing erased people: {0}")]
    Scrub(#[from] ScrubError),
}

/// Removes replayed dead letters until `stop`. Only one process walks at a time.
pub(crate) async fn run(context: Context, stop: CancellationToken) {
    let Context { pool, broker, publisher, answer_timeout: limit, .. } = context;
    let mut backoff = Reconnect::between(FIRST_WAIT, LAST_WAIT);
    let mut wait = READ_EVERY;
    while stop.run_until_cancelled(sleep(wait)).await.is_some() {
        if !broker.epoch().is_current() {
            wait = READ_EVERY;
            continue;
        }
        let result = async {
            tidy(&pool, &broker, &publisher, limit).await?;
            scrub(&pool, &broker, &publisher, limit).await?;
            Ok::<_, TidyError>(())
        };
        let Some(result) = stop.run_until_cancelled(result).await else { return };
        wait = match result {
            Ok(()) => {
                backoff.reset();
                READ_EVERY
            }
            Err(error) => {
                // Harmless: the ledger is the source of truth, and the fence refuses a dead dead that stays behind.
                warn!(%error, "replayed dead letters stay on the queue, trying again");
                backoff.next_wait()
            }
        };
    }
}

async fn tidy(pool: &PgPool, broker: &Broker, publisher: &Publisher, limit: Duration) -> Result<(), TidyError> {
    if in_time(limit, passes::to_tidy(&mut *pool.acquire().await?)).await?.is_empty() {
        return Ok(());
    }
    // Detached from the pool: closing the connection releases the lock, however the walk ends.
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
        walk_over(broker, publisher, |delivery| if was_replayed(delivery, &by_run) { Fate::Goes } else { Fate::Stays });
    let Walked { changed, left } = walked.await?;
    info!(replays = replays.len(), taken = changed, left, "replayed dead letters are off the queue");
    if left == 0 {
        in_time(limit, passes::mark_tidied(&mut conn, &replays)).await?;
    }
    Ok(())
}

/// Whether a replay has released this dead dead's item again: it belongs to the run, died before the replay began, and matches the
/// replay's filter.
fn was_replayed(delivery: &Delivery, replays: &HashMap<Uuid, Vec<&Replayed>>) -> bool {
    let kind = delivery.properties.kind().as_ref().map(lapin::types::ShortString::as_str);
    let Ok(item) = decode::<ItemMessage>(kind, &delivery.data) else { return false };
    let state = match header_text(delivery, REASON_HEADER).as_deref() {
        Some("failed") => ItemState::Failed,
        Some("unknown") => ItemState::Unknown,
        _ => return false,
    };
    let header = |key: &str| delivery.properties.headers().as_ref()?.inner().get(key).cloned();
    let Some(AMQPValue::LongLongInt(died_at)) = header(DIED_AT_HEADER) else { return false };
    let matches = |replay: &&Replayed| {
        died_at <= replay.created_at.timestamp_millis()
            && replay.states.contains(&state)
            && replay.error.as_ref().is_none_or(|error| header_text(delivery, ERROR_HEADER).as_ref() == Some(error))
    };
    replays.get(&item.run_id).is_some_and(|replays| replays.iter().any(matches))
}
