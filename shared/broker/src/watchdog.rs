//! Watches over a consumer: one whose connection lives and is of no use gets a new one.
//!
//! Heartbeats may pass while deliveries don't. So what the broker has for the consumer, what the consumer has in hand, and
//! whether there is progress are compared. The broker hands messages out up to the prefetch, whatever holds them up here:
//! that sends take long, a lane is closed or a run is paused excuses nobody who has room and gets nothing.

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

/// So many looks in a row make `idle_after_ms`. Looks are counted and not the time, since a process that was stopped meanwhile
/// has not looked.
const LOOKS: u32 = 4;
/// Trouble that new connections do not end calls for another one after at most so many times as long as at first.
const LONGEST: u32 = 60;

/// What a consumer has done with its present connection, in its own words.
#[derive(Debug, Default)]
pub struct Tally {
    /// Deliveries that came.
    pub delivered: AtomicU64,
    /// Deliveries that are done with.
    pub finished: AtomicU64,
    /// Deliveries that the broker has been told are done with.
    pub acknowledged: AtomicU64,
}

/// What is seen of a consumer at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Look {
    delivered: u64,
    finished: u64,
    /// It has fewer messages than it asked for, and place for the next one.
    has_room: bool,
    /// Messages that wait on its queue.
    ready: u32,
    /// A run that should be under way has not moved since the last look.
    standstill: bool,
}

impl Look {
    fn of(tally: &Tally, prefetch: u16, places: usize) -> Self {
        // In this order: what is finished was delivered before.
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

/// What is to be done with a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Leave,
    /// Build it anew, because of this.
    Rebuild(&'static str),
}

const OWED: &str = "messages wait on the queue, and none is delivered";
const SILENT: &str = "a run stands still, and nothing is delivered";
const STUCK: &str = "of the messages in hand none is finished";

/// Looks in a row at the same trouble, and how many are too many. A new connection that did not end it calls for another one
/// after twice as many: each gives back what is in hand, and the broker counts how often a message comes back.
#[derive(Clone, Copy, Debug)]
struct Trouble {
    looks: u32,
    limit: u32,
    first_limit: u32,
}

impl Trouble {
    fn after(looks: u32) -> Self {
        Self { looks: 0, limit: looks, first_limit: looks }
    }

    /// Whether this look at it is one too many.
    fn is_too_much(&mut self, there: bool) -> bool {
        self.looks = if there { self.looks + 1 } else { 0 };
        if self.looks <= self.limit {
            return false;
        }
        self.limit = self.limit.saturating_mul(2).min(self.first_limit.saturating_mul(LONGEST));
        true
    }

    fn is_over(&mut self) {
        self.limit = self.first_limit;
    }
}

/// The judgement over one consumer, through all of its connections.
#[derive(Debug)]
pub struct Watch {
    last: Look,
    /// Messages waited, and there was room, and nothing came.
    owed: Trouble,
    /// A run stood still, and nothing came or was in hand.
    silent: Trouble,
    /// Nothing of what was in hand was finished, and nothing came.
    stuck: Trouble,
}

impl Watch {
    fn new(stuck_for: u32) -> Self {
        let soon = Trouble::after(LOOKS);
        Self { last: Look::default(), owed: soon, silent: soon, stuck: Trouble::after(stuck_for) }
    }

    /// The tally begins anew.
    fn reconnected(&mut self) {
        self.last = Look::default();
        for trouble in [&mut self.owed, &mut self.silent, &mut self.stuck] {
            trouble.looks = 0;
        }
    }

    /// Judges by what is seen now and was seen before.
    fn judge(&mut self, look: Look) -> Verdict {
        let came = look.delivered > self.last.delivered;
        let went = look.finished > self.last.finished;
        let in_hand = look.in_hand() > 0;
        self.last = look;
        if came {
            self.owed.is_over();
            self.silent.is_over();
        }
        if went {
            self.stuck.is_over();
        }
        let owed = self.owed.is_too_much(!came && look.has_room && look.ready > 0);
        // With nothing in hand, a new connection costs nobody anything. It is the way to get back what the broker takes for
        // delivered, and what has never arrived.
        let silent = self.silent.is_too_much(!came && !in_hand && look.standstill);
        let stuck = self.stuck.is_too_much(!came && !went && in_hand);
        match (owed, silent, stuck) {
            (true, ..) => Verdict::Rebuild(OWED),
            (_, true, _) => Verdict::Rebuild(SILENT),
            (.., true) => Verdict::Rebuild(STUCK),
            _ => Verdict::Leave,
        }
    }
}

/// Asks whether a run that should be under way has not moved for so long. False: so it is not, or nobody knows.
pub type Standstill = Box<dyn Fn(Duration) -> Pin<Box<dyn Future<Output = bool> + Send>> + Send + Sync>;

/// The watchdog of one process.
pub struct Watchdog {
    broker: Arc<Broker>,
    standstill: Standstill,
    idle_after: Duration,
    stuck_after: Duration,
    /// Where the queues are looked at: not over a connection that is itself in doubt.
    outlook: Mutex<Outlook>,
}

impl Watchdog {
    /// The watchdog of this process. A consumer that has got nothing for `idle_after`, although there is something for it, gets a
    /// new connection; so does one that has messages in hand and has finished none for `stuck_after`.
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
        self.idle_after / LOOKS
    }

    /// The judgement over a consumer that has no connection yet.
    pub fn begin(&self) -> Watch {
        let looks = self.stuck_after.as_millis() / self.interval().as_millis().max(1);
        Watch::new(u32::try_from(looks).unwrap_or(u32::MAX))
    }

    /// Watches over a connection, and returns when it is to be given up, and why. `places` is how many deliveries the consumer has
    /// place for at present.
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
            // Whoever gets something, or wants nothing, is not asked about.
            let mut ready = 0;
            let before = Look::of(tally, prefetch, places());
            let idle = before.delivered == watch.last.delivered;
            if idle && before.has_room {
                match self.ready(queue).await {
                    Some(now) => ready = now,
                    // Nobody knows anything without the broker.
                    None => continue,
                }
            }
            let standstill = idle && before.in_hand() == 0 && (self.standstill)(self.interval()).await;
            let look = Look { ready, standstill, ..Look::of(tally, prefetch, places()) };
            if let Verdict::Rebuild(why) = watch.judge(look) {
                self.broker.add_rebuild();
                counter!(metric::REBUILDS, "queue" => queue.to_owned()).increment(1);
                return why;
            }
        }
    }

    /// How many messages wait on a queue. None: the broker does not say.
    async fn ready(&self, queue: &str) -> Option<u32> {
        let looked = self.outlook.lock().await.depth(queue).await;
        looked.inspect_err(|error| debug!(queue, %error, "the queue can't be looked at")).ok().flatten()
    }

    /// Closes what it has opened.
    pub async fn close(&self) {
        self.outlook.lock().await.close().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STUCK_FOR: u32 = 40;

    /// Looks that follow each other, and after how many of them the connection is given up.
    fn given_up(watch: &mut Watch, look: impl Fn(u64) -> Look) -> Option<(u64, &'static str)> {
        (1..=1_000).find_map(|number| match watch.judge(look(number)) {
            Verdict::Leave => None,
            Verdict::Rebuild(why) => Some((number, why)),
        })
    }

    fn fresh() -> Watch {
        Watch::new(STUCK_FOR)
    }

    #[test]
    fn whoever_is_owed_messages_and_gets_none_is_given_up_soon() {
        let owed = Look { has_room: true, ready: 7, ..Look::default() };
        assert_eq!(given_up(&mut fresh(), |_| owed), Some((5, OWED)));
        // Whatever it still has in hand, and finishes meanwhile.
        assert_eq!(given_up(&mut fresh(), |number| Look { delivered: 900, finished: number, ..owed }), Some((6, OWED)));
    }

    #[test]
    fn whoever_gets_something_now_and_then_is_left_alone() {
        let looks =
            |number| Look { delivered: number / 4, has_room: true, ready: 7, standstill: true, ..Look::default() };
        assert_eq!(given_up(&mut fresh(), looks), None);
    }

    #[test]
    fn whoever_has_no_room_is_owed_nothing_until_it_is_stuck() {
        let full = Look { delivered: 400, ready: 9_000, standstill: true, ..Look::default() };
        assert_eq!(given_up(&mut fresh(), |number| Look { finished: number / 30, ..full }), None);
        let mut watch = fresh();
        for looks in [u64::from(STUCK_FOR) + 2, 2 * u64::from(STUCK_FOR) + 2] {
            assert_eq!(given_up(&mut watch, |_| full), Some((looks, STUCK)), "each time after twice as long");
            watch.reconnected();
        }
    }

    #[test]
    fn an_empty_queue_is_no_trouble_unless_a_run_stands_still() {
        let quiet = Look { has_room: true, ..Look::default() };
        assert_eq!(given_up(&mut fresh(), |_| quiet), None);
        let mut watch = fresh();
        let standstill = Look { standstill: true, ..quiet };
        for looks in [5, 9, 17] {
            assert_eq!(given_up(&mut watch, |_| standstill), Some((looks, SILENT)), "each time after twice as long");
            watch.reconnected();
        }
        watch.judge(Look { delivered: 1, finished: 1, ..quiet });
        let served = Look { delivered: 1, finished: 1, ..standstill };
        assert_eq!(
            given_up(&mut watch, |_| served),
            Some((5, SILENT)),
            "what has been of use is given up as soon as at first"
        );
    }
}
