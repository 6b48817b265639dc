//! Retention: deletes old runs, on a schedule or at an operator's word, in steps that leave room for live ones.

use std::time::{Duration, Instant};

use mailrun_shared::{config::RetentionConfig, store::prune};
use sqlx::PgPool;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// Runs deleted in one transaction.
const RUNS: i64 = 20;
/// Items deleted in one transaction: a few milliseconds' work.
const ITEMS: i64 = 1_000;
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

/// Deletes all runs that were over for `after`, calling `progress` after each step. Any number of processes may do so at
/// once; what one leaves behind when it is stopped, the next one finishes.
///
/// # Errors
/// The database's.
pub async fn prune(pool: &PgPool, after: Duration, mut progress: impl FnMut(Pruned)) -> sqlx::Result<Pruned> {
    let mut pruned = Pruned::default();
    loop {
        let runs = prune::delete_runs(pool, after, RUNS).await?;
        pruned.runs += runs;
        loop {
            let begun = Instant::now();
            let Some(items) = prune::step(pool, ITEMS).await? else { break };
            pruned.items += items;
            progress(pruned);
            // As long a rest as the step took: at least half of the database is for the others.
            sleep(begun.elapsed()).await;
        }
        if runs == 0 {
            break;
        }
    }
    while prune::scraps(pool, ITEMS).await? > 0 {}
    Ok(pruned)
}

/// Prunes on schedule until `stop`.
pub(crate) async fn run(pool: PgPool, config: RetentionConfig, stop: CancellationToken) {
    let mut wait = FIRST_LOOK;
    while stop.run_until_cancelled(sleep(wait)).await.is_some() {
        wait = Duration::from_secs(config.interval_s);
        let Some(pruned) = stop.run_until_cancelled(once(&pool, &config)).await else { return };
        match pruned {
            Ok(pruned) if pruned == Pruned::default() => {}
            Ok(Pruned { runs, items }) => info!(runs, items, "old runs are deleted"),
            Err(error) => warn!(%error, "old runs could not be deleted; trying again later"),
        }
    }
}

async fn once(pool: &PgPool, config: &RetentionConfig) -> sqlx::Result<Pruned> {
    match config.keep() {
        Some(keep) => prune(pool, keep, |_| {}).await,
        None => {
            while prune::scraps(pool, ITEMS).await? > 0 {}
            Ok(Pruned::default())
        }
    }
}
