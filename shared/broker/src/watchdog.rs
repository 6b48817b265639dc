//! Replaces the connection of a consumer that is connected but receives nothing.
//!
//! Heartbeats may get through while deliveries don't. So the watchdog compares what the broker has for the consumer, what the
//! consumer holds, and whether it makes progress. The broker delivers up to the prefetch, whatever delays the consumer here. So
//! slow sends, a closed gate or a paused run do not explain why a consumer with free capacity receives nothing.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use mailrun_core::metric;
use metrics::counter;
use tokio::{sync::Mutex, time::sleep};
use tracing::debug;

use crate::{Broker, outlook::Outlook};

/// This many checks in a row make `idle_after_ms`. Checks are counted instead of time, since a process that was suspended has not
/// checked.
const CHECKS: u32 = 4;
/// While new connections do not help, the number of checks before the next one grows up to this multiple of the first.
const MAX_BACKOFF: u32 = 60;

/// What a consumer has counted on its current connection.
#[derive(Debug, Default)]
pub struct Tally {
    /// Deliveries received.
    pub delivered: AtomicU64,
    /// Deliveries that the handler has acked.
    pub finished: AtomicU64,
    /// Deliveries whose ack was sent to the broker.
    pub acknowledged: AtomicU64,
}

/// The state of a consumer at one check.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Snapshot {
    delivered: u64,
    finished: u64,
    /// It has fewer unacked messages than its prefetch, and buffer space for the next one.
    has_room: bool,
    /// Whether messages are ready on its queue. `None`: the broker did not answer.
    ready: Option<bool>,
    /// A run that should be in progress has not moved since the last check.
    run_stalled: bool,
}

impl Snapshot {
    fn of(tally: &Tally, prefetch: u16, places: usize) -> Self {
        // Read in this order, so that each count is at least the one read before it.
        let acknowledged = tally.acknowledged.load(Ordering::Relaxed);
        let finished = tally.finished.load(Ordering::Relaxed);
        let delivered = tally.delivered.load(Ordering::Relaxed);
        let has_room = delivered.saturating_sub(acknowledged) < u64::from(prefetch) && places > 0;
        Self { delivered, finished, has_room, ..Self::default() }
    }

    fn in_hand(&self) -> u64 {
        self.delivered.saturating_sub(self.finished)
    }
}

/// What to do with a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Keep,
    /// Replace it, for this reason.
    Rebuild(&'static str),
}

const STARVED: &str = "messages wait on the queue, and none is delivered";
const STALLED: &str = "a run is stalled, and nothing is delivered";
const STUCK: &str = "none of the messages in progress is finished";

/// Counts consecutive checks with the same problem. If a new connection does not solve it, the limit doubles: each new connection
/// returns the messages in progress, and the broker counts how often a message is returned.
#[derive(Clone, Copy, Debug)]
struct Streak {
    checks: u32,
    limit: u32,
    first_limit: u32,
}

impl Streak {
    fn with_limit(checks: u32) -> Self {
        Self { checks: 0, limit: checks, first_limit: checks }
    }

    /// Counts a check. Returns true when the problem has lasted for more checks than the limit.
    fn exceeds_limit(&mut self, has_problem: bool) -> bool {
        self.checks = if has_problem { self.checks + 1 } else { 0 };
        if self.checks <= self.limit {
            return false;
        }
        self.limit = self.limit.saturating_mul(2).min(self.first_limit.saturating_mul(MAX_BACKOFF));
        true
    }

    fn reset_limit(&mut self) {
        self.limit = self.first_limit;
    }
}

/// The watchdog's state for one consumer. It survives the consumer's connections.
#[derive(Debug)]
pub struct Watch {
    last: Snapshot,
    /// Messages are ready and there is capacity, but none arrives.
    starved: Streak,
    /// A run is stalled, and nothing arrives or is in progress.
    stalled: Streak,
    /// Messages are in progress, but none is finished and none arrives.
    stuck: Streak,
}

impl Watch {
    fn new(stuck_for: u32) -> Self {
        let soon = Streak::with_limit(CHECKS);
        Self { last: Snapshot::default(), starved: soon, stalled: soon, stuck: Streak::with_limit(stuck_for) }
    }

    /// Starts over with a new connection, whose tally starts at 0.
    fn reconnected(&mut self) {
        self.last = Snapshot::default();
        for streak in [&mut self.starved, &mut self.stalled, &mut self.stuck] {
            streak.checks = 0;
        }
    }

    /// Decides by comparing this snapshot with the previous one.
    fn check(&mut self, now: Snapshot) -> Action {
        let received = now.delivered > self.last.delivered;
        let finished = now.finished > self.last.finished;
        let in_hand = now.in_hand() > 0;
        self.last = now;
        if received {
            self.starved.reset_limit();
            self.stalled.reset_limit();
        }
        if finished {
            self.stuck.reset_limit();
        }
        // Without an answer from the broker, a check neither confirms nor refutes that messages are waiting.
        let starved = now.ready.is_some_and(|ready| self.starved.exceeds_limit(!received && now.has_room && ready));
        // With nothing in progress, a new connection costs nothing. It recovers messages that the broker considers delivered but
        // that never arrived.
        let stalled = self.stalled.exceeds_limit(!received && !in_hand && now.run_stalled);
        let stuck = self.stuck.exceeds_limit(!received && !finished && in_hand);
        match (starved, stalled, stuck) {
            (true, ..) => Action::Rebuild(STARVED),
            (_, true, _) => Action::Rebuild(STALLED),
            (.., true) => Action::Rebuild(STUCK),
            _ => Action::Keep,
        }
    }
}

/// Returns true if a run that should be in progress has not moved for this long. False also if that can't be determined.
pub type Standstill = Box<dyn Fn(Duration) -> Pin<Box<dyn Future<Output = bool> + Send>> + Send + Sync>;

/// The watchdog of one process.
pub struct Watchdog {
    broker: Arc<Broker>,
    standstill: Standstill,
    idle_after: Duration,
    stuck_after: Duration,
    /// Queries the queues, over a connection other than those that are being checked.
    outlook: Mutex<Outlook>,
}

impl Watchdog {
    /// A consumer that receives nothing for `idle_after`, although messages or a stalled run are waiting for it, gets a new
    /// connection. So does one that has messages in progress and finishes none for `stuck_after`.
    #[must_use]
    pub fn new(broker: Arc<Broker>, idle_after: Duration, stuck_after: Duration, standstill: Standstill) -> Arc<Self> {
        Arc::new(Self {
            standstill,
            idle_after,
            stuck_after,
            outlook: Mutex::new(Outlook::new(Arc::clone(&broker))),
            broker,
        })
    }

    fn interval(&self) -> Duration {
        self.idle_after / CHECKS
    }

    /// The state for a consumer that is not connected yet.
    pub fn begin(&self) -> Watch {
        let checks = self.stuck_after.as_millis() / self.interval().as_millis().max(1);
        Watch::new(u32::try_from(checks).unwrap_or(u32::MAX))
    }

    /// Watches a connection until it has to be replaced, and returns the reason. `places` returns the free space in the consumer's
    /// buffer.
    pub async fn watch(
        &self,
        watch: &mut Watch,
        queue: &str,
        prefetch: u16,
        tally: &Tally,
        places: impl Fn() -> usize,
    ) -> &'static str {
        watch.reconnected();
        loop {
            sleep(self.interval()).await;
            // Query the broker only for a consumer that received nothing and has capacity.
            let before = Snapshot::of(tally, prefetch, places());
            let idle = before.delivered == watch.last.delivered;
            let ready = if idle && before.has_room { self.is_ready(queue).await } else { Some(false) };
            let run_stalled = idle && before.in_hand() == 0 && (self.standstill)(self.interval()).await;
            let now = Snapshot { ready, run_stalled, ..Snapshot::of(tally, prefetch, places()) };
            if let Action::Rebuild(why) = watch.check(now) {
                self.broker.add_rebuild();
                counter!(metric::REBUILDS, "queue" => queue.to_owned()).increment(1);
                return why;
            }
        }
    }

    /// Whether messages are ready on a queue. `None`: the query failed or the queue does not exist.
    async fn is_ready(&self, queue: &str) -> Option<bool> {
        let looked = self.outlook.lock().await.depth(queue).await;
        looked.inspect_err(|error| debug!(queue, %error, "can't query the queue")).ok().flatten().map(|ready| ready > 0)
    }

    /// Closes the connection that it opened for queries.
    pub async fn close(&self) {
        self.outlook.lock().await.close().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STUCK_FOR: u32 = 40;

    /// Feeds snapshots until the connection is given up. Returns the number of checks and the reason.
    fn given_up(watch: &mut Watch, snapshot: impl Fn(u64) -> Snapshot) -> Option<(u64, &'static str)> {
        (1..=1_000).find_map(|number| match watch.check(snapshot(number)) {
            Action::Keep => None,
            Action::Rebuild(why) => Some((number, why)),
        })
    }

    fn fresh() -> Watch {
        Watch::new(STUCK_FOR)
    }

    #[test]
    fn rebuilds_a_starved_consumer() {
        let starved = Snapshot { has_room: true, ready: Some(true), ..Snapshot::default() };
        assert_eq!(given_up(&mut fresh(), |_| starved), Some((5, STARVED)));
        // Even if it still finishes earlier deliveries.
        let finishing = |number| Snapshot { delivered: 900, finished: number, ..starved };
        assert_eq!(given_up(&mut fresh(), finishing), Some((6, STARVED)));
    }

    #[test]
    fn keeps_a_consumer_that_receives_something_now_and_then() {
        let snapshots = |number| Snapshot {
            delivered: number / 4,
            has_room: true,
            ready: Some(true),
            run_stalled: true,
            ..Snapshot::default()
        };
        assert_eq!(given_up(&mut fresh(), snapshots), None);
    }

    #[test]
    fn a_full_consumer_is_rebuilt_only_when_it_is_stuck() {
        let full = Snapshot { delivered: 400, ready: Some(true), run_stalled: true, ..Snapshot::default() };
        assert_eq!(given_up(&mut fresh(), |number| Snapshot { finished: number / 30, ..full }), None);
        let mut watch = fresh();
        for checks in [u64::from(STUCK_FOR) + 2, 2 * u64::from(STUCK_FOR) + 2] {
            assert_eq!(given_up(&mut watch, |_| full), Some((checks, STUCK)), "the limit doubles each time");
            watch.reconnected();
        }
    }

    #[test]
    fn a_stuck_consumer_is_rebuilt_although_the_broker_does_not_answer() {
        let silent = Snapshot { delivered: 7, has_room: true, ready: None, ..Snapshot::default() };
        assert_eq!(given_up(&mut fresh(), |_| silent), Some((u64::from(STUCK_FOR) + 2, STUCK)));
        // Nor does silence count as an empty queue.
        let mut watch = fresh();
        for ready in [Some(true), None, Some(true), None, Some(true), Some(true), Some(true)] {
            assert_eq!(watch.check(Snapshot { ready, ..silent }), Action::Keep);
        }
        assert_eq!(watch.check(Snapshot { ready: Some(true), ..silent }), Action::Rebuild(STARVED));
    }

    #[test]
    fn an_empty_queue_is_normal_unless_a_run_is_stalled() {
        let quiet = Snapshot { has_room: true, ready: Some(false), ..Snapshot::default() };
        assert_eq!(given_up(&mut fresh(), |_| quiet), None);
        let mut watch = fresh();
        let stalled = Snapshot { run_stalled: true, ..quiet };
        for checks in [5, 9, 17] {
            assert_eq!(given_up(&mut watch, |_| stalled), Some((checks, STALLED)), "the limit doubles each time");
            watch.reconnected();
        }
        watch.check(Snapshot { delivered: 1, finished: 1, ..quiet });
        let served = Snapshot { delivered: 1, finished: 1, ..stalled };
        assert_eq!(given_up(&mut watch, |_| served), Some((5, STALLED)), "a delivery resets the limit");
    }
}
