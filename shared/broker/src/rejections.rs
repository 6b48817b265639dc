//! The queues whose messages the broker currently rejects: logged at most once a minute each, and reported to callers.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use tracing::{debug, error};

/// The shortest time between two log lines about the same queue.
const LOG_EVERY: Duration = Duration::from_secs(60);
/// A queue to which nothing was published for this time is no longer reported.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(300);

/// Why the broker rejected a message.
pub(super) const NO_QUEUE: &str = "there is no such queue";
pub(super) const NO_ROOM: &str = "it is full, or its disk or memory is";

/// A queue whose messages the broker currently rejects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    /// The queue.
    pub queue: String,
    /// Why.
    pub why: &'static str,
    /// For how long.
    pub for_time: Duration,
}

#[derive(Debug)]
struct Entry {
    why: &'static str,
    /// Whether no message was accepted on this queue since the last rejection.
    is_current: bool,
    since: Instant,
    newest: Instant,
    logged: Option<Instant>,
    /// Rejections since the last log line.
    count: u64,
}

/// The rejections of a process. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Rejections(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// Avoids the lock while there are no rejections.
    any: AtomicBool,
    queues: Mutex<BTreeMap<String, Entry>>,
}

impl Rejections {
    fn queues(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        self.0.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records a rejected message.
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
            error!(
                queue,
                why,
                rejected = entry.count,
                "RabbitMQ rejects messages; they are kept, other queues continue"
            );
            (entry.logged, entry.count) = (Some(now), 0);
        }
    }

    /// Whether there are rejections, without taking the lock.
    pub(super) fn any(&self) -> bool {
        self.0.any.load(Ordering::Relaxed)
    }

    /// Records that a message was accepted on this queue.
    pub(super) fn end(&self, queue: &str) {
        let mut queues = self.queues();
        // The entry stays for a while, so that a queue that accepts some messages and rejects others is not logged each time.
        if let Some(entry) = queues.get_mut(queue).filter(|entry| entry.is_current) {
            entry.is_current = false;
            debug!(queue, why = entry.why, "RabbitMQ accepts messages for this queue again");
        }
        self.0.any.store(queues.values().any(|entry| entry.is_current), Ordering::Relaxed);
    }

    /// The queues that currently reject messages.
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

    /// The same as text. None if there are no rejections.
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
    fn a_rejection_is_reported_until_a_message_is_accepted_or_nothing_is_published() {
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
            // Accepting a message in between does not log more often.
            rejections.end("a");
        }
        assert_eq!(logged(&rejections), Some(now + LOG_EVERY));
        assert_eq!(rejections.queues()["a"].count, 39);
    }
}
