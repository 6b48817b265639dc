//! When to try again. The only file that uses the `backoff` crate: short tries in process, reconnects, and the durable rungs.

use std::time::Duration;

use backoff::{ExponentialBackoff, ExponentialBackoffBuilder, backoff::Backoff};

/// Waits between attempts to reach a server: from a tenth of a second to five seconds, for as long as it takes.
#[derive(Debug)]
pub struct Reconnect(ExponentialBackoff);

impl Default for Reconnect {
    fn default() -> Self {
        Self::between(Duration::from_millis(100), Duration::from_secs(5))
    }
}

impl Reconnect {
    /// Waits that begin with `first`, and double up to `longest`; each up to a half longer or shorter, by chance.
    #[must_use]
    pub fn between(first: Duration, longest: Duration) -> Self {
        Self(endless(first, longest))
    }

    /// How long to wait before the next attempt.
    pub fn next_wait(&mut self) -> Duration {
        self.0.next_backoff().unwrap_or(self.0.max_interval)
    }

    /// Whether the last attempt failed as well.
    #[must_use]
    pub fn is_under_way(&self) -> bool {
        self.0.current_interval > self.0.initial_interval
    }

    /// The server was reached: the next failure starts from the shortest wait again.
    pub fn reset(&mut self) {
        self.0.reset();
    }
}

/// The waits between the tries that a worker makes while it holds the delivery: `count` of them, jittered, starting from
/// `first` and doubling. They are short, since nobody else gets that place in the prefetch meanwhile.
pub fn in_process(first: Duration, count: u32) -> impl Iterator<Item = Duration> {
    let mut schedule = endless(first, first * 8);
    std::iter::from_fn(move || schedule.next_backoff()).take(count as usize)
}

/// `max_elapsed_time` is cleared because it defaults to a quarter of an hour, after which the crate gives up.
fn endless(initial: Duration, max: Duration) -> ExponentialBackoff {
    ExponentialBackoffBuilder::default()
        .with_initial_interval(initial)
        .with_max_interval(max)
        .with_multiplier(2.0)
        .with_max_elapsed_time(None)
        .build()
}

/// The rung on which try `tries` (from 1) waits for the next one; none: the budget is spent.
///
/// With the rungs 250 ms, 1 s and 5 s, an item is tried four times: at once, and after each rung.
#[must_use]
pub fn rung(rungs: &[Duration], tries: i16) -> Option<Duration> {
    usize::try_from(tries).ok().and_then(|tries| rungs.get(tries.checked_sub(1)?)).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_try_waits_on_its_rung_and_then_the_budget_is_spent() {
        let rungs = [Duration::from_millis(250), Duration::from_secs(1)];
        assert_eq!([1, 2, 3, i16::MAX].map(|tries| rung(&rungs, tries)), [Some(rungs[0]), Some(rungs[1]), None, None]);
        assert_eq!([0, -1].map(|tries| rung(&rungs, tries)), [None, None]);
        assert_eq!(rung(&[], 1), None);
    }

    #[test]
    fn tries_in_process_are_few_and_short() {
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
