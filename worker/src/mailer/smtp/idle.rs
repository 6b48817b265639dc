//! Idle connections. The most recently used one is taken first, so that surplus ones expire.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::session::Session;

struct Waiting {
    relay: usize,
    session: Session,
    since: Instant,
}

/// Idle connections to all relays, oldest first.
pub struct Idle {
    keep: Duration,
    waiting: Mutex<Vec<Waiting>>,
}

impl Idle {
    /// Connections expire after `keep`.
    pub fn new(keep: Duration) -> Self {
        Self { keep, waiting: Mutex::default() }
    }

    /// Takes a connection to this relay. Expired ones are left to [`Self::expired`].
    pub fn take(&self, relay: usize, now: Instant) -> Option<Session> {
        let mut waiting = self.waiting();
        let fresh = |waiting: &Waiting| waiting.relay == relay && now.duration_since(waiting.since) < self.keep;
        let index = waiting.iter().rposition(fresh)?;
        Some(waiting.remove(index).session)
    }

    /// Keeps a connection for reuse.
    pub fn put(&self, relay: usize, session: Session, now: Instant) {
        self.waiting().push(Waiting { relay, session, since: now });
    }

    /// Takes the expired connections.
    pub fn expired(&self, now: Instant) -> Vec<Session> {
        let mut waiting = self.waiting();
        let old = |waiting: &mut Waiting| now.duration_since(waiting.since) >= self.keep;
        waiting.extract_if(.., old).map(|waiting| waiting.session).collect()
    }

    /// Takes the oldest connection if there are more than `count`.
    pub fn beyond(&self, count: usize) -> Option<Session> {
        let mut waiting = self.waiting();
        (waiting.len() > count).then(|| waiting.remove(0).session)
    }

    fn waiting(&self) -> MutexGuard<'_, Vec<Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
