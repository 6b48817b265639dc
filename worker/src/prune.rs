//! Retention: deletes old runs, on schedule or on request, in small steps that leave capacity for live runs.

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use mailrun_ledger::{in_time, prune};
use sqlx::PgPool;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::context::Context;

/// How often old runs are deleted.
const INTERVAL: Duration = Duration::from_secs(3_600);

/// Runs deleted in one transaction.
const RUNS: i64 = 20;
/// Items deleted in one transaction, which takes a few milliseconds.
const ITEMS: i64 = 1_000;
/// After each of these transactions, the pause is this many times its duration while other runs are in progress, so that they
/// hardly notice. Otherwise the pause equals its duration, which leaves at least half of the database's capacity.
const PAUSE_BESIDE_OTHERS: u32 = 19;
/// How often deleting runs is tried while claims are locked.
const TRIES: u32 = 5;
/// The delay of the first prune, to stay out of the load of a restart.
const FIRST_PRUNE: Duration = Duration::from_secs(60);

/// What was deleted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pruned {
    /// Runs.
    pub runs: usize,
    /// Their items.
    pub items: u64,
}

/// Deletes all runs that ended more than `after` ago (`None`: none), the remains of an interrupted prune, and housekeeping
/// rows. Each step may take `limit`. `progress` is called after each step. Processes may do this concurrently.
pub async fn prune(
    pool: &PgPool,
    after: Option<Duration>,
    limit: Duration,
    mut progress: impl FnMut(Pruned),
) -> sqlx::Result<Pruned> {
    let mut pruned = Pruned::default();
    in_time(limit, prune::cancel_hidden(pool)).await?;
    loop {
        let runs = delete_runs(pool, after, limit).await?;
        pruned.runs += runs;
        let mut begun = Instant::now();
        let mut waiting = HashSet::new();
        while let Some(step) = in_time(limit, prune::step(pool, ITEMS)).await? {
            if step.waits && !waiting.insert(step.run_id) {
                // The remaining items are being sent. The next prune deletes them.
                break;
            }
            pruned.items += step.items;
            progress(pruned);
            sleep(begun.elapsed() * if step.beside_others { PAUSE_BESIDE_OTHERS } else { 1 }).await;
            begun = Instant::now();
        }
        if runs == 0 {
            break;
        }
    }
    while in_time(limit, prune::housekeeping(pool, ITEMS)).await? > 0 {}
    Ok(pruned)
}

/// Retries while claims are briefly locked.
async fn delete_runs(pool: &PgPool, after: Option<Duration>, limit: Duration) -> sqlx::Result<usize> {
    let mut tries = 1;
    loop {
        match in_time(limit, prune::delete_runs(pool, after, RUNS)).await {
            Err(error) if tries < TRIES && prune::is_held_up(&error) => tries += 1,
            deleted => return deleted,
        }
    }
}

/// Prunes on schedule until `stop`.
pub(crate) async fn run(context: Context, keep: Option<Duration>, stop: CancellationToken) {
    let mut wait = FIRST_PRUNE;
    while stop.run_until_cancelled(sleep(wait)).await.is_some() {
        wait = INTERVAL;
        let prune = prune(&context.pool, keep, context.answer_timeout, |_| {});
        let Some(pruned) = stop.run_until_cancelled(prune).await else { return };
        match pruned {
            Ok(pruned) if pruned == Pruned::default() => {}
            Ok(Pruned { runs, items }) => info!(runs, items, "old runs deleted"),
            Err(error) => warn!(%error, "can't delete old runs, trying again later"),
        }
    }
}
