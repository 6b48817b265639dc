//! Retention: deletes old runs, on a schedule or at an operator's word, in steps that leave room for live ones.

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

/// How often runs are looked for that can be deleted.
const INTERVAL: Duration = Duration::from_secs(3_600);

/// Runs deleted in one transaction.
const RUNS: i64 = 20;
/// Items deleted in one transaction: a few milliseconds' work.
const ITEMS: i64 = 1_000;
/// After each of those, a rest that is so many times as long while other runs are under way, so that they hardly notice; else
/// it is as long: at least half of the database is for the others.
const REST_BESIDE_OTHERS: u32 = 19;
/// So often runs are tried to be deleted while somebody holds up the claims.
const TRIES: u32 = 5;
/// The first look after a start: not in the rush of a restart.
const FIRST_LOOK: Duration = Duration::from_secs(60);

/// What was deleted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pruned {
    /// Runs.
    pub runs: usize,
    /// Their items.
    pub items: u64,
}

/// Deletes all runs that were over for `after` (none: none of them), what an earlier prune has left behind, and scraps.
/// Each step may take `limit`, and `progress` is called after it. Any number of processes may do so at once.
///
/// # Errors
/// The database's.
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
                // All that is left is being sent: the next prune deletes it.
                break;
            }
            pruned.items += step.items;
            progress(pruned);
            sleep(begun.elapsed() * if step.beside_others { REST_BESIDE_OTHERS } else { 1 }).await;
            begun = Instant::now();
        }
        if runs == 0 {
            break;
        }
    }
    while in_time(limit, prune::scraps(pool, ITEMS)).await? > 0 {}
    Ok(pruned)
}

/// Tries again where somebody holds up the claims for a moment.
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
    let mut wait = FIRST_LOOK;
    while stop.run_until_cancelled(sleep(wait)).await.is_some() {
        wait = INTERVAL;
        let prune = prune(&context.pool, keep, context.answer_timeout, |_| {});
        let Some(pruned) = stop.run_until_cancelled(prune).await else { return };
        match pruned {
            Ok(pruned) if pruned == Pruned::default() => {}
            Ok(Pruned { runs, items }) => info!(runs, items, "old runs are deleted"),
            Err(error) => warn!(%error, "old runs could not be deleted; trying again later"),
        }
    }
}
