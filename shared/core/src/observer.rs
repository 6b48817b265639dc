//! Detects dead workers: those whose heartbeat does not change. A pure function of the observed heartbeats and of the time during
//! which this process was running to observe them.

use std::{collections::HashMap, time::Duration};

use chrono::{DateTime, Utc};

/// The longest time, in intervals, that counts between two observations: a process that was suspended observed nothing.
const LONGEST_GAP: u32 = 2;

/// A worker's heartbeat, as stored in its row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Beat {
    /// The worker.
    pub worker_id: i64,
    /// The latest heartbeat by the database's clock. Only changes matter, not the value.
    pub at: DateTime<Utc>,
}

/// What is known about the heartbeats of other workers.
#[derive(Debug)]
pub struct Observer {
    interval: Duration,
    dead_after: Duration,
    seen: HashMap<i64, Seen>,
}

#[derive(Debug)]
struct Seen {
    beat: Beat,
    unchanged_for: Duration,
}

impl Observer {
    /// Nothing is observed yet. Workers write a heartbeat every `interval`; one without for `dead_after` is dead.
    #[must_use]
    pub fn new(interval: Duration, dead_after: Duration) -> Self {
        Self { interval, dead_after, seen: HashMap::new() }
    }

    /// Observes the heartbeats of all workers that count as alive, `elapsed` after the last observation. Returns those that have
    /// not changed for too long.
    pub fn look(&mut self, beats: &[Beat], elapsed: Duration) -> Vec<Beat> {
        let elapsed = elapsed.min(self.interval * LONGEST_GAP);
        let mut seen = HashMap::with_capacity(beats.len());
        for beat in beats {
            let unchanged_for = match self.seen.get(&beat.worker_id) {
                Some(before) if before.beat == *beat => before.unchanged_for + elapsed,
                _ => Duration::ZERO,
            };
            seen.insert(beat.worker_id, Seen { beat: *beat, unchanged_for });
        }
        self.seen = seen;
        let mut dead: Vec<Beat> =
            self.seen.values().filter(|seen| seen.unchanged_for >= self.dead_after).map(|seen| seen.beat).collect();
        dead.sort_unstable_by_key(|beat| beat.worker_id);
        dead
    }
}

#[cfg(test)]
mod tests {
    use chrono::{DateTime, TimeDelta};
    use proptest::prelude::*;

    use super::*;

    fn beat(worker_id: i64, at_s: i64) -> Beat {
        Beat { worker_id, at: DateTime::UNIX_EPOCH + TimeDelta::seconds(at_s) }
    }

    fn observer() -> Observer {
        Observer::new(Duration::from_secs(1), Duration::from_secs(8))
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_worker_whose_heartbeat_does_not_change_is_dead() {
        let mut observer = observer();
        for second in 0..8 {
            assert_eq!(observer.look(&[beat(1, second), beat(2, 0)], SECOND), []);
        }
        assert_eq!(observer.look(&[beat(1, 8), beat(2, 0)], SECOND), [beat(2, 0)]);
    }

    #[test]
    fn setting_the_clock_neither_kills_nor_revives_a_worker() {
        let mut observer = observer();
        observer.look(&[beat(1, 0), beat(2, 0)], SECOND);
        for second in 0..7 {
            let hours = if second % 2 == 0 { 20_000 } else { -20_000 };
            assert_eq!(observer.look(&[beat(1, hours + second), beat(2, 0)], SECOND), []);
        }
        assert_eq!(observer.look(&[beat(1, 9), beat(2, 0)], SECOND), [beat(2, 0)]);
    }

    #[test]
    fn an_observer_that_was_suspended_counts_only_observed_time() {
        let mut observer = observer();
        observer.look(&[beat(1, 0)], SECOND);
        assert_eq!(observer.look(&[beat(1, 0)], Duration::from_secs(3_600)), []);
    }

    proptest! {
        #[test]
        fn a_worker_with_a_heartbeat_is_never_dead(looks in prop::collection::vec((0..3_000u64, -50_000..50_000i64), 1..60)) {
            let mut observer = observer();
            let mut silent_ms = 0;
            let mut last = None;
            for (elapsed_ms, at_s) in looks {
                silent_ms = if last == Some(at_s) { silent_ms + elapsed_ms } else { 0 };
                last = Some(at_s);
                let dead = observer.look(&[beat(1, at_s)], Duration::from_millis(elapsed_ms));
                prop_assert!(dead.is_empty() || silent_ms >= 8_000);
            }
        }
    }
}
