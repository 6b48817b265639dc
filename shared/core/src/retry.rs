//! Retry timing: short retries in the process, reconnects, and the retry schedule. The only file that uses the `backoff` crate.

use std::time::Duration;

use backoff::{ExponentialBackoff, ExponentialBackoffBuilder, backoff::Backoff};

/// Delays between attempts to reach a server: by default from 100 ms to 5 s, without end.
#[derive(Debug)]
pub struct Reconnect(ExponentialBackoff);

impl Default for Reconnect {
    fn default() -> Self {
        Self::between(Duration::from_millis(100), Duration::from_secs(5))
    }
}

impl Reconnect {
    /// Delays that start at `first` and double up to `longest`, each with a random jitter of up to 50%.
    #[must_use]
    pub fn between(first: Duration, longest: Duration) -> Self {
        Self(endless(first, longest))
    }

    /// The delay before the next attempt.
    pub fn next_wait(&mut self) -> Duration {
        self.0.next_backoff().unwrap_or(self.0.max_interval)
    }

    /// Whether the last attempt failed.
    #[must_use]
    pub fn is_under_way(&self) -> bool {
        self.0.current_interval > self.0.initial_interval
    }

    /// Call it when the server was reached: the next failure starts with the shortest delay again.
    pub fn reset(&mut self) {
        self.0.reset();
    }
}

/// The delays between the retries that a worker makes while it holds the delivery: `count` of them, with jitter, starting at
/// `first` and doubling. They are short, because they occupy a place in the prefetch.
pub fn in_process(first: Duration, count: u32) -> impl Iterator<Item = Duration> {
    let mut schedule = endless(first, first * 8);
    std::iter::from_fn(move || schedule.next_backoff()).take(count as usize)
}

/// `max_elapsed_time` is cleared, because the crate stops after 15 minutes by default.
fn endless(initial: Duration, max: Duration) -> ExponentialBackoff {
    ExponentialBackoffBuilder::default()
        .with_initial_interval(initial)
        .with_max_interval(max)
        .with_multiplier(2.0)
        .with_max_elapsed_time(None)
        .build()
}

/// The retry delay after try number `tries` (from 1). None: the budget is spent.
///
/// With the schedule 250 ms, 1 s and 5 s, an item has four tries: one at once, and one after each delay.
#[must_use]
pub fn rung(rungs: &[Duration], tries: i16) -> Option<Duration> {
    usize::try_from(tries).ok().and_then(|tries| rungs.get(tries.checked_sub(1)?)).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_try_gets_the_next_delay_until_the_budget_is_spent() {
        let rungs = [Duration::from_millis(250), Duration::from_secs(1)];
        assert_eq!([1, 2, 3, i16::MAX].map(|tries| rung(&rungs, tries)), [Some(rungs[0]), Some(rungs[1]), None, None]);
        assert_eq!([0, -1].map(|tries| rung(&rungs, tries)), [None, None]);
        assert_eq!(rung(&[], 1), None);
    }

    #[test]
    fn retries_in_the_process_are_few_and_short() {
        let waits: Vec<_> = in_process(Duration::from_millis(20), 3).collect();
        assert_eq!(waits.len(), 3);
        assert!(waits.iter().sum::<Duration>() < Duration::from_secs(1));
    }

    #[test]
    fn reconnecting_never_gives_up_and_never_waits_long() {
        let mut reconnect = Reconnect::default();
        for _ in 0..100 {
            assert!(reconnect.next_wait() <= Duration::from_millis(7_500));
        }
        reconnect.reset();
        assert!(reconnect.next_wait() <= Duration::from_millis(150));
    }
}
