//! What this process knows about the ledger's epoch. Consumers wait here until the ledger is at least as new as a message.

use std::{
    sync::atomic::{AtomicI64, Ordering},
    time::Duration,
};

use mailrun_core::epoch::{Admission, Epochs, admission};
use tokio::{
    sync::{Notify, watch},
    time::timeout,
};

/// How long a message of a later epoch waits for a new read of the ledger.
const WAIT_FOR_LEDGER: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug, Default)]
struct Known {
    epochs: Option<Epochs>,
    /// The latest known epoch when this read began.
    latest_before: i64,
    /// Whether the ledger's epoch is earlier than that.
    behind: bool,
}

/// What this process knows about the ledger's epoch.
#[derive(Debug, Default)]
pub struct Epoch {
    known: watch::Sender<Known>,
    /// The latest epoch seen in the ledger, in a message or in the broker's marker.
    latest: AtomicI64,
    ask: Notify,
}

impl Epoch {
    /// The latest epoch seen anywhere. Read it before reading the ledger, and pass it to [`Self::record`].
    #[must_use]
    pub fn latest(&self) -> i64 {
        self.latest.load(Ordering::Acquire)
    }

    /// Records an epoch found in a message or in the broker's marker.
    pub fn observe(&self, epoch: i64) {
        self.latest.fetch_max(epoch, Ordering::AcqRel);
    }

    /// Records a read of the ledger. `latest_before` is [`Self::latest`] before the read, since an epoch seen during the read may be
    /// later than the one read. Returns true if the ledger has fallen behind or has caught up.
    pub fn record(&self, epochs: Epochs, latest_before: i64) -> bool {
        let behind = epochs.present < latest_before;
        self.observe(epochs.present);
        let mut changed = false;
        self.known.send_modify(|known| {
            changed = known.behind != behind;
            *known = Known { epochs: Some(epochs), latest_before, behind };
        });
        changed
    }

    /// The epoch to publish messages in. None: the ledger has not been read yet.
    #[must_use]
    pub fn present(&self) -> Option<i64> {
        self.known.borrow().epochs.map(|epochs| epochs.present)
    }

    /// Whether the ledger was read and is not behind.
    #[must_use]
    pub fn is_current(&self) -> bool {
        is_current(&self.known.borrow())
    }

    /// Whether the ledger is known to be behind.
    #[must_use]
    pub fn is_behind(&self) -> bool {
        self.known.borrow().behind
    }

    /// Waits until the ledger is current.
    pub async fn current(&self) {
        // The sender lives in `self`, so this can't fail.
        let _ = self.known.subscribe().wait_for(is_current).await;
    }

    /// Waits until the ledger is found to be behind.
    pub async fn behind(&self) {
        let _ = self.known.subscribe().wait_for(|known| known.behind).await;
    }

    /// Returns when the ledger should be read again at once.
    pub async fn asked(&self) {
        self.ask.notified().await;
    }

    /// What to do with a message of this epoch, if that is known without reading the ledger again.
    fn admit_now(&self, epoch: Option<i64>) -> Option<Admission> {
        let known = self.known.borrow();
        let is_known = epoch.is_none_or(|epoch| known.epochs.is_some_and(|epochs| epoch <= epochs.present));
        is_known.then(|| admission(known.epochs, known.behind, epoch))
    }

    /// What to do with a message of this epoch. A message without one was published by hand or by an older version. If the epoch is
    /// later than the one last read, requests a new read of the ledger and waits for it.
    pub async fn admit(&self, epoch: Option<i64>) -> Admission {
        if let Some(admission) = self.admit_now(epoch) {
            return admission;
        }
        let epoch = epoch.unwrap_or_default();
        let mut reads = self.known.subscribe();
        self.observe(epoch);
        self.ask.notify_one();
        // A read that is in progress may have begun before the epoch was observed.
        let read = timeout(WAIT_FOR_LEDGER, reads.wait_for(|known| known.latest_before >= epoch)).await;
        match read {
            Ok(Ok(known)) => admission(known.epochs, known.behind, Some(epoch)),
            _ => Admission::Behind,
        }
    }
}

fn is_current(known: &Known) -> bool {
    known.epochs.is_some() && !known.behind
}

#[cfg(test)]
mod tests {
    use super::*;

    fn epochs(present: i64) -> Epochs {
        Epochs { present, restored: 0 }
    }

    #[tokio::test]
    async fn a_restored_ledger_is_behind_until_the_restore_is_declared() {
        let epoch = Epoch::default();
        assert_eq!((epoch.present(), epoch.admit(None).await), (None, Admission::Behind));
        assert!(!epoch.record(epochs(7), epoch.latest()));
        assert_eq!(epoch.admit(Some(7)).await, Admission::Current);
        assert!(epoch.record(epochs(5), epoch.latest()), "the ledger was restored from a backup");
        assert!(epoch.is_behind() && !epoch.is_current());
        assert_eq!(epoch.admit(Some(4)).await, Admission::Behind);
        // The restore is declared.
        assert!(epoch.record(Epochs { present: 1_000, restored: 1_000 }, epoch.latest()));
        assert_eq!(epoch.admit(Some(7)).await, Admission::Stale);
        assert_eq!(epoch.admit(Some(1_000)).await, Admission::Current);
        assert_eq!(epoch.admit(None).await, Admission::Current, "published by hand");
    }

    #[tokio::test]
    async fn a_message_of_a_later_epoch_waits_for_the_ledger() {
        let epoch = Epoch::default();
        epoch.record(epochs(7), 0);
        let ledger = async |present| {
            epoch.asked().await;
            epoch.record(epochs(present), epoch.latest());
        };
        let (admitted, ()) = tokio::join!(epoch.admit(Some(8)), ledger(8));
        assert_eq!(admitted, Admission::Current, "another process has begun it");
        let (admitted, ()) = tokio::join!(epoch.admit(Some(9)), ledger(8));
        assert_eq!(admitted, Admission::Behind);
        assert!(epoch.is_behind());
    }

    #[test]
    fn an_epoch_seen_during_a_read_does_not_put_the_ledger_behind() {
        let epoch = Epoch::default();
        epoch.record(epochs(7), 0);
        let before = epoch.latest();
        epoch.observe(8);
        epoch.record(epochs(7), before);
        assert!(epoch.is_current());
    }
}
