//! Permits limit how many attempts of this worker may be in progress with only their claim on disk.
//!
//! If the worker is killed, exactly those become unknown. A permit is taken before the claim. It is released when the outcome is
//! on disk: when RabbitMQ has confirmed the result or, sooner, when the next claim has stored a receipt. With few connections,
//! fewer attempts are claimed than there are permits: see `ahead`.

use std::{
    collections::HashSet,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use mailrun_core::item::{ItemState, Key};
use tokio::sync::Notify;

use crate::ahead::Ahead;

/// The permits of a sender. One task takes them; any number of tasks release them.
#[derive(Debug)]
pub struct Permits {
    all: usize,
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug)]
struct State {
    free: usize,
    /// Accepted by the mail server, not yet on disk. A claim that stores a receipt for them may use their permits.
    accepted: HashSet<Key>,
    /// `None`: as many as there are permits.
    ahead: Option<Ahead>,
}

impl State {
    /// Attempts have ended.
    fn finished(&mut self, attempts: usize) {
        if let Some(ahead) = &mut self.ahead {
            ahead.finished(attempts);
        }
    }
}

impl Permits {
    /// `lanes`: how many attempts are made at the same time, if that is limited.
    pub fn new(all: usize, lanes: Option<usize>) -> Self {
        let ahead = lanes.map(|lanes| Ahead::new(lanes, all, Instant::now()));
        Self { all, state: Mutex::new(State { free: all, accepted: HashSet::new(), ahead }), changed: Notify::new() }
    }

    /// How many attempts may be claimed, if the claim stores the [`Self::receipt`].
    pub fn room(&self) -> usize {
        let state = self.state();
        let room = state.free + state.accepted.len();
        let unfinished = self.all - room;
        state.ahead.as_ref().map_or(room, |ahead| ahead.room(unfinished).min(room))
    }

    /// A claim was answered after this time.
    pub fn claimed(&self, took: Duration) {
        if let Some(ahead) = &mut self.state().ahead {
            ahead.claimed(took, Instant::now());
        }
    }

    /// Waits until an attempt may be claimed.
    pub async fn available(&self) {
        while self.room() == 0 {
            self.changed.notified().await;
        }
    }

    /// The number of permits.
    pub fn all(&self) -> usize {
        self.all
    }

    /// The number of permits in use.
    pub fn in_use(&self) -> usize {
        self.all - self.state().free
    }

    /// Takes permits for attempts that were claimed.
    pub fn begin(&self, attempts: usize) {
        let mut state = self.state();
        state.free = state.free.saturating_sub(attempts);
    }

    /// The mail server has accepted this attempt's mail.
    pub fn accepted(&self, key: Key) {
        let mut state = self.state();
        state.accepted.insert(key);
        state.finished(1);
        drop(state);
        self.changed.notify_one();
    }

    /// The attempts that a receipt must name.
    pub fn receipt(&self) -> Vec<Key> {
        self.state().accepted.iter().copied().collect()
    }

    /// The receipt for these attempts is on disk.
    pub fn receipt_written(&self, keys: &[Key]) {
        let mut state = self.state();
        for key in keys {
            // Unless its result was confirmed in the meantime.
            state.free += usize::from(state.accepted.remove(key));
        }
    }

    /// The results of these attempts are on disk.
    pub fn confirmed(&self, results: impl IntoIterator<Item = (Key, ItemState)>) {
        let mut state = self.state();
        for (key, result) in results {
            let is_sent = result == ItemState::Sent;
            // The permit of a sent item may have been released by a receipt.
            state.free += usize::from(!is_sent || state.accepted.remove(&key));
            // Sent ones were counted when they were accepted.
            state.finished(usize::from(!is_sent));
        }
        drop(state);
        self.changed.notify_one();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(item_id: i64) -> Key {
        Key { run_id: uuid::Uuid::nil(), item_id, attempt: 1 }
    }

    #[test]
    fn a_permit_is_released_when_the_outcome_is_on_disk() {
        let permits = Permits::new(3, None);
        permits.begin(3);
        assert_eq!((permits.room(), permits.in_use()), (0, 3));
        permits.accepted(key(1));
        permits.accepted(key(2));
        assert_eq!((permits.room(), permits.in_use()), (2, 3), "a claim may use them if it stores a receipt");
        // One result is confirmed while the receipt is being written, then the other one too.
        let receipt = permits.receipt();
        permits.confirmed([(key(1), ItemState::Sent)]);
        permits.receipt_written(&receipt);
        permits.confirmed([(key(2), ItemState::Sent)]);
        assert_eq!((permits.room(), permits.in_use()), (2, 1), "none is released twice");
        permits.confirmed([(key(3), ItemState::Failed)]);
        assert_eq!(permits.in_use(), 0);
    }

    #[tokio::test]
    async fn a_waiting_claim_is_woken() {
        let permits = Permits::new(1, None);
        permits.begin(1);
        tokio::join!(permits.available(), async { permits.accepted(key(1)) });
        permits.receipt_written(&permits.receipt());
        assert_eq!(permits.in_use(), 0);
    }
}
