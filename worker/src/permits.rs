//! Permits: how many attempts of this worker may be under way of which nothing but the claim is on disk.
//!
//! If the worker is killed, just those become unknown. A permit comes before the claim, and is free again as soon as the
//! outcome is on disk: when RabbitMQ has confirmed the result or, sooner, when the next claim has taken a receipt along.

use std::{
    collections::HashSet,
    sync::{Mutex, MutexGuard, PoisonError},
};

use mailrun_core::item::{ItemState, Key};
use tokio::sync::Notify;

/// The permits of a sender. Any number of tasks may give them back, and one takes them.
#[derive(Debug)]
pub struct Permits {
    all: usize,
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug)]
struct State {
    free: usize,
    /// Accepted by the mail server, and not on disk: a claim that takes a receipt for them along may use their permits.
    accepted: HashSet<Key>,
}

impl Permits {
    /// All of them are free.
    pub fn new(all: usize) -> Self {
        Self { all, state: Mutex::new(State { free: all, accepted: HashSet::new() }), changed: Notify::new() }
    }

    /// How many attempts may be claimed, if the claim takes a [`Self::receipt`] along.
    pub fn room(&self) -> usize {
        let state = self.state();
        state.free + state.accepted.len()
    }

    /// Waits until there is room.
    pub async fn some(&self) {
        while self.room() == 0 {
            self.changed.notified().await;
        }
    }

    /// How many there are.
    pub fn all(&self) -> usize {
        self.all
    }

    /// How many are in use.
    pub fn in_use(&self) -> usize {
        self.all - self.state().free
    }

    /// So many attempts begin, which are claimed.
    pub fn begin(&self, attempts: usize) {
        let mut state = self.state();
        state.free = state.free.saturating_sub(attempts);
    }

    /// The mail server has accepted this one.
    pub fn accepted(&self, key: Key) {
        self.state().accepted.insert(key);
        self.changed.notify_one();
    }

    /// What a receipt has to name.
    pub fn receipt(&self) -> Vec<Key> {
        self.state().accepted.iter().copied().collect()
    }

    /// The receipt for these is on disk.
    pub fn receipt_written(&self, keys: &[Key]) {
        let mut state = self.state();
        for key in keys {
            // Unless its result was confirmed meanwhile.
            state.free += usize::from(state.accepted.remove(key));
        }
    }

    /// The results of these attempts are on disk.
    pub fn confirmed(&self, results: impl IntoIterator<Item = (Key, ItemState)>) {
        let mut state = self.state();
        for (key, result) in results {
            // What was sent may have a receipt, which has freed the permit.
            state.free += usize::from(result != ItemState::Sent || state.accepted.remove(&key));
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
    fn a_permit_is_free_when_the_outcome_is_on_disk() {
        let permits = Permits::new(3);
        permits.begin(3);
        assert_eq!((permits.room(), permits.in_use()), (0, 3));
        permits.accepted(key(1));
        permits.accepted(key(2));
        assert_eq!((permits.room(), permits.in_use()), (2, 3), "a claim may use them, if it takes a receipt along");
        // One is confirmed while the receipt is on its way, and then the other one as well.
        let receipt = permits.receipt();
        permits.confirmed([(key(1), ItemState::Sent)]);
        permits.receipt_written(&receipt);
        permits.confirmed([(key(2), ItemState::Sent)]);
        assert_eq!((permits.room(), permits.in_use()), (2, 1), "none is given back twice");
        permits.confirmed([(key(3), ItemState::Failed)]);
        assert_eq!(permits.in_use(), 0);
    }

    #[tokio::test]
    async fn who_waits_for_room_is_woken() {
        let permits = Permits::new(1);
        permits.begin(1);
        tokio::join!(permits.some(), async { permits.accepted(key(1)) });
        permits.receipt_written(&permits.receipt());
        assert_eq!(permits.in_use(), 0);
    }
}
