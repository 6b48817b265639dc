//! How many attempts are claimed ahead of the connections that make them. Pure.
//!
//! A connection must never wait for a claim, and an attempt should not wait long for a connection: a killed worker leaves what it
//! has claimed unknown. By Little's law the number needed is the rate of the connections, times the duration of a claim. Claims
//! are made in batches, since a large one costs little more than a small one.

use std::time::{Duration, Instant};

/// The rate is measured over periods of at least this length.
const PERIOD: Duration = Duration::from_millis(100);
/// The weight of the newest measurement in each average.
const NEWEST: f64 = 0.3;
/// How often attempts are claimed, if they end faster than that.
const EVERY_S: f64 = 0.05;

/// The number of attempts to claim.
#[derive(Debug)]
pub struct Ahead {
    /// How many attempts are made at the same time.
    lanes: usize,
    most: usize,
    /// The duration of a claim, in seconds.
    claim_s: f64,
    /// Attempts per second.
    rate: f64,
    since: Instant,
    finished: usize,
}

impl Ahead {
    /// For this many connections, and at most this many attempts.
    pub fn new(lanes: usize, most: usize, now: Instant) -> Self {
        Self { lanes, most, claim_s: 0.0, rate: 0.0, since: now, finished: 0 }
    }

    /// Attempts have ended.
    pub fn finished(&mut self, attempts: usize) {
        self.finished += attempts;
    }

    /// A claim was answered after this time.
    pub fn claimed(&mut self, took: Duration, now: Instant) {
        self.claim_s += (took.as_secs_f64() - self.claim_s) * NEWEST;
        let period = now.duration_since(self.since);
        if period >= PERIOD {
            let rate = self.finished as f64 / period.as_secs_f64();
            self.rate += (rate - self.rate) * NEWEST;
            (self.since, self.finished) = (now, 0);
        }
    }

    /// How many attempts to claim when `unfinished` are claimed and not finished. None, as long as there is one in progress and
    /// the next one for each connection, and what they process during a claim; then also what they process until the next claim.
    pub fn room(&self, unfinished: usize) -> usize {
        let busy = 2 * self.lanes;
        let until_claimed = (self.rate * self.claim_s).ceil() as usize;
        let until_next = (self.rate * (self.claim_s + EVERY_S)).ceil() as usize;
        let high = (busy + until_claimed + until_next.max(1)).min(self.most);
        let low = (busy + until_claimed).min(high - 1);
        if unfinished <= low { high - unfinished } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// After three seconds of claims that take 10 ms each.
    fn measured(lanes: usize, per_second: usize) -> Ahead {
        let begin = Instant::now();
        let mut ahead = Ahead::new(lanes, 200, begin);
        for claim in 1..=300_u32 {
            ahead.finished(per_second / 100);
            ahead.claimed(Duration::from_millis(10), begin + claim * Duration::from_millis(10));
        }
        ahead
    }

    #[test]
    fn claims_what_the_connections_need_in_batches() {
        let unmeasured = Ahead::new(20, 200, Instant::now());
        assert_eq!((unmeasured.room(0), unmeasured.room(40), unmeasured.room(41)), (41, 1, 0));
        let slow = measured(20, 100);
        assert_eq!((slow.room(41), slow.room(42)), (6, 0), "one in progress, the next one, and a few more");
        let fast = measured(20, 1_000);
        assert_eq!((fast.room(50), fast.room(51)), (60, 0), "what 60 ms take");
        let faster = measured(20, 100_000);
        assert_eq!((faster.room(0), faster.room(199), faster.room(200)), (200, 1, 0), "never more than allowed");
        let one = Ahead::new(5, 1, Instant::now());
        assert_eq!((one.room(0), one.room(1)), (1, 0));
    }
}
