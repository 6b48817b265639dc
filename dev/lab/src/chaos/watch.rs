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
#[derive(Clone, Debug)]
pub(super) struct Seen {
    /// When it was over; none: it was not, in the time it had.
    pub(super) over_at: Option<Instant>,
    /// When a counter changed, and the beginning and the end of it all.
    pub(super) moments: Vec<Instant>,
}

impl Seen {
    /// The longest time for which no counter changed.
    pub(super) fn longest_stall(&self) -> Duration {
        self.longest_stall_outside(&[])
    }

    /// The longest time for which no counter changed although none of these faults, each with its beginning and its end,
    /// was under way.
    pub(super) fn longest_stall_outside(&self, faults: &[(Instant, Instant)]) -> Duration {
        let stalls = self.moments.iter().zip(self.moments.iter().skip(1));
        stalls.map(|(from, to)| longest_outside(*from, *to, faults)).max().unwrap_or_default()
    }
}

/// The longest part between `from` and `to` that is outside of all `faults`.
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

/// Follows a run until it is over, or `limit` has passed; `stage` always says how far it is.
pub(super) async fn follow(pool: &PgPool, run_id: Uuid, limit: Duration, stage: &watch::Sender<Stage>) -> Seen {
    let end = Instant::now() + limit;
    let mut moments = vec![Instant::now()];
    let mut before = None;
    loop {
        // A database that does not answer is a time without progress like any other.
        if let Ok(Ok(Some(now))) = timeout(ANSWER, counters(pool, run_id)).await {
            if before != Some(now) {
                moments.push(Instant::now());
                before = Some(now);
            }
            let over = now.finished;
            stage.send_replace(Stage { settled: f64::from(now.settled) / f64::from(now.total.max(1)), over });
            if over {
                return Seen { over_at: Some(Instant::now()), moments };
            }
        }
        if Instant::now() > end {
            moments.push(Instant::now());
            return Seen { over_at: None, moments };
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
    fn a_stall_counts_as_such_while_no_fault_is_under_way() {
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        let seen = Seen { over_at: Some(at(30)), moments: [0, 1, 11, 12, 30].map(at).to_vec() };
        let outside = |faults: &[(u64, u64)]| {
            let faults: Vec<_> = faults.iter().map(|(from, to)| (at(*from), at(*to))).collect();
            seen.longest_stall_outside(&faults).as_secs()
        };
        assert_eq!(seen.longest_stall().as_secs(), 18);
        assert_eq!(outside(&[(13, 20)]), 10, "what is left of the longest one is as long as the other");
        assert_eq!(outside(&[(13, 25), (2, 4), (3, 8)]), 5);
        assert_eq!(outside(&[(14, 29), (15, 16), (0, 11)]), 2);
        assert_eq!(outside(&[(13, 13)]), 17, "it strikes and is over");
        assert_eq!(outside(&[(0, 30)]), 0);
    }
}
