//! Follows a run from outside: its progress, its longest stall, and its end.

use std::time::Duration;

use sqlx::PgPool;
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};
use uuid::Uuid;

/// How often the counters are polled.
const POLL: Duration = Duration::from_millis(50);
/// Timeout of a query: a database that is being killed may not answer.
const ANSWER: Duration = Duration::from_secs(2);

/// The progress of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Stage {
    /// The settled share, from 0 to 1.
    pub(super) settled: f64,
    /// Whether it is over.
    pub(super) over: bool,
}

/// Observations of a run.
#[derive(Clone, Debug)]
pub(super) struct Observed {
    /// When it was over; none if it was not over in time.
    pub(super) over_at: Option<Instant>,
    /// When a counter changed, including the beginning and the end.
    pub(super) moments: Vec<Instant>,
}

impl Observed {
    /// The longest time without a change of the counters.
    pub(super) fn longest_stall(&self) -> Duration {
        self.longest_stall_outside(&[])
    }

    /// The longest time without a change of the counters outside of these faults, each with its beginning and end.
    pub(super) fn longest_stall_outside(&self, faults: &[(Instant, Instant)]) -> Duration {
        let stalls = self.moments.iter().zip(self.moments.iter().skip(1));
        stalls.map(|(from, to)| longest_outside(*from, *to, faults)).max().unwrap_or_default()
    }
}

/// The longest part between `from` and `to` outside of all `faults`.
fn longest_outside(from: Instant, to: Instant, faults: &[(Instant, Instant)]) -> Duration {
    let within = faults.iter().filter(|(begin, end)| *begin < to && *end > from);
    let mut within: Vec<(Instant, Instant)> = within.copied().collect();
    within.sort();
    let (mut longest, mut free_since) = (Duration::ZERO, from);
    for (begin, end) in within {
        longest = longest.max(begin.saturating_duration_since(free_since));
        free_since = free_since.max(end);
    }
    longest.max(to.saturating_duration_since(free_since))
}

/// Follows a run until it is over, or `limit` has passed; `stage` always has its progress.
pub(super) async fn follow(pool: &PgPool, run_id: Uuid, limit: Duration, stage: &watch::Sender<Stage>) -> Observed {
    let end = Instant::now() + limit;
    let mut moments = vec![Instant::now()];
    let mut before = None;
    loop {
        // A database that does not answer counts as time without progress.
        if let Ok(Ok(Some(now))) = timeout(ANSWER, counters(pool, run_id)).await {
            if before != Some(now) {
                moments.push(Instant::now());
                before = Some(now);
            }
            let over = now.finished;
            stage.send_replace(Stage { settled: f64::from(now.settled) / f64::from(now.total.max(1)), over });
            if over {
                return Observed { over_at: Some(Instant::now()), moments };
            }
        }
        if Instant::now() > end {
            moments.push(Instant::now());
            return Observed { over_at: None, moments };
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_stalls_outside_of_faults_count() {
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        let seen = Observed { over_at: Some(at(30)), moments: [0, 1, 11, 12, 30].map(at).to_vec() };
        let outside = |faults: &[(u64, u64)]| {
            let faults: Vec<_> = faults.iter().map(|(from, to)| (at(*from), at(*to))).collect();
            seen.longest_stall_outside(&faults).as_secs()
        };
        assert_eq!(seen.longest_stall().as_secs(), 18);
        assert_eq!(outside(&[(13, 20)]), 10, "the rest of the longest one equals the other");
        assert_eq!(outside(&[(13, 25), (2, 4), (3, 8)]), 5);
        assert_eq!(outside(&[(14, 29), (15, 16), (0, 11)]), 2);
        assert_eq!(outside(&[(13, 13)]), 17, "a fault without duration");
        assert_eq!(outside(&[(0, 30)]), 0);
    }
}
