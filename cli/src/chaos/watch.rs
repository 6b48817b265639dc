//! Follows a run from outside: how far it is, how long its counters stood still, and when it was over.

use std::time::Duration;

use sqlx::PgPool;
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};
use uuid::Uuid;

/// How often the counters are looked at.
const POLL: Duration = Duration::from_millis(50);
/// A database that is being killed may leave a question unanswered.
const ANSWER: Duration = Duration::from_secs(2);

/// How far a run is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Stage {
    /// The settled share of it, from 0 to 1.
    pub(super) settled: f64,
    /// Whether it is over.
    pub(super) over: bool,
}

/// What was seen of a run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen {
    /// When it was over; none: it was not, in the time it had.
    pub(super) over_at: Option<Instant>,
    /// The longest time for which no counter changed.
    pub(super) longest_stall: Duration,
}

/// Follows a run until it is over, or `limit` has passed; `stage` always says how far it is.
pub(super) async fn follow(pool: &PgPool, run_id: Uuid, limit: Duration, stage: &watch::Sender<Stage>) -> Seen {
    let end = Instant::now() + limit;
    let mut moved_at = Instant::now();
    let mut longest_stall = Duration::ZERO;
    let mut before = None;
    loop {
        // A database that does not answer is a time without progress like any other.
        if let Ok(Ok(Some(now))) = timeout(ANSWER, counters(pool, run_id)).await {
            longest_stall = longest_stall.max(moved_at.elapsed());
            if before != Some(now) {
                moved_at = Instant::now();
                before = Some(now);
            }
            let over = now.finished;
            stage.send_replace(Stage { settled: f64::from(now.settled) / f64::from(now.total.max(1)), over });
            if over {
                return Seen { over_at: Some(Instant::now()), longest_stall };
            }
        }
        if Instant::now() > end {
            return Seen { over_at: None, longest_stall: longest_stall.max(moved_at.elapsed()) };
        }
        sleep(POLL).await;
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, sqlx::FromRow)]
struct Counters {
    total: i32,
    settled: i32,
    retrying: i32,
    finished: bool,
}

async fn counters(pool: &PgPool, run_id: Uuid) -> sqlx::Result<Option<Counters>> {
    sqlx::query_as(
        "SELECT total, total - pending - retrying AS settled, retrying, finished_at IS NOT NULL AS finished
         FROM run_progress WHERE run_id = $1",
    )
    .bind(run_id)
    .fetch_optional(pool)
    .await
}
