//! What the broker does not take at present: logged at a low rate, and shown to whoever asks.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use tracing::{debug, error};

/// While a queue's messages are rejected, that is logged as often as this.
const LOG_EVERY: Duration = Duration::from_secs(60);
/// A queue that nothing was published to for so long is not reported any more.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(300);

/// Why the broker did not take a message.
pub(super) const NO_QUEUE: &str = "there is no such queue";
pub(super) const NO_ROOM: &str = "it is full, or its disk or memory is";

/// A queue whose messages the broker rejects at present.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    /// The queue.
    pub queue: String,
    /// Why.
    pub why: &'static str,
    /// For how long that has been so.
    pub for_time: Duration,
}

#[derive(Debug)]
struct Entry {
    why: &'static str,
    /// Whether nothing was taken for this queue since the newest rejection.
    is_current: bool,
    since: Instant,
    newest: Instant,
    logged: Option<Instant>,
    /// Since it was logged last.
    count: u64,
}

/// The rejections of a process. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Rejections(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// So that a broker that takes everything costs no lock.
    any: AtomicBool,
    queues: Mutex<BTreeMap<String, Entry>>,
}

impl Rejections {
    fn queues(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        self.0.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A message was rejected.
    pub(super) fn add(&self, queue: &str, why: &'static str, now: Instant) {
        self.0.any.store(true, Ordering::Relaxed);
        let mut queues = self.queues();
        let entry = queues.entry(queue.to_owned()).or_insert(Entry {
            why,
            is_current: false,
            since: now,
            newest: now,
            logged: None,
            count: 0,
        });
        if !entry.is_current {
            (entry.is_current, entry.since) = (true, now);
        }
        (entry.why, entry.newest, entry.count) = (why, now, entry.count + 1);
        if entry.logged.is_none_or(|logged| now.duration_since(logged) >= LOG_EVERY) {
            error!(queue, why, rejected = entry.count, "RabbitMQ rejects messages; others go on, and these are kept");
            (entry.logged, entry.count) = (Some(now), 0);
        }
    }

    /// Whether there are any, as far as is known without a lock.
    pub(super) fn any(&self) -> bool {
        self.0.any.load(Ordering::Relaxed)
    }

    /// A message for this queue was taken.
    pub(super) fn end(&self, queue: &str) {
        let mut queues = self.queues();
        // It stays for a while: a queue that takes some messages and rejects others is not logged each time.
        if let Some(entry) = queues.get_mut(queue).filter(|entry| entry.is_current) {
            entry.is_current = false;
            debug!(queue, why = entry.why, "RabbitMQ takes messages for this queue again");
        }
        self.0.any.store(queues.values().any(|entry| entry.is_current), Ordering::Relaxed);
    }

    /// The queues whose messages are rejected at present.
    #[must_use]
    pub fn current(&self) -> Vec<Rejection> {
        self.at(Instant::now())
    }

    fn at(&self, now: Instant) -> Vec<Rejection> {
        let mut queues = self.queues();
        queues.retain(|_, entry| now.saturating_duration_since(entry.newest) < FORGOTTEN_AFTER);
        self.0.any.store(queues.values().any(|entry| entry.is_current), Ordering::Relaxed);
        queues
            .iter()
            .filter(|(_, entry)| entry.is_current)
            .map(|(queue, entry)| Rejection {
                queue: queue.clone(),
                why: entry.why,
                for_time: now.saturating_duration_since(entry.since),
            })
            .collect()
    }

    /// The same in words; none: the broker takes everything.
    #[must_use]
    pub fn words(&self) -> Option<String> {
        let all: Vec<String> =
            self.current().into_iter().map(|Rejection { queue, why, .. }| format!("{queue}: {why}")).collect();
        (!all.is_empty()).then(|| all.join("; "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rejection_is_shown_until_the_queue_takes_messages_or_nothing_is_published_to_it() {
        let (rejections, now) = (Rejections::default(), Instant::now());
        assert!(!rejections.any() && rejections.words().is_none());
        rejections.add("a", NO_QUEUE, now);
        rejections.add("b", NO_ROOM, now);
        rejections.add("a", NO_QUEUE, now + Duration::from_secs(5));
        let at = |seconds| rejections.at(now + Duration::from_secs(seconds));
        let queues = |list: Vec<Rejection>| list.into_iter().map(|one| one.queue).collect::<Vec<_>>();
        assert_eq!(at(7)[0], Rejection { queue: "a".into(), why: NO_QUEUE, for_time: Duration::from_secs(7) });
        rejections.end("b");
        assert_eq!(queues(at(8)), ["a"]);
        assert_eq!(queues(at(304)), ["a"]);
        assert!(queues(at(305)).is_empty() && !rejections.any());
    }

    #[test]
    fn many_rejections_are_logged_once_a_minute() {
        let (rejections, now) = (Rejections::default(), Instant::now());
        let logged = |rejections: &Rejections| rejections.queues()["a"].logged;
        for second in 0..100 {
            rejections.add("a", NO_QUEUE, now + Duration::from_secs(second));
            // Also if some are taken in between.
            rejections.end("a");
        }
        assert_eq!(logged(&rejections), Some(now + LOG_EVERY));
        assert_eq!(rejections.queues()["a"].count, 39);
    }
}
