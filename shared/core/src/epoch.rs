//! Whether the ledger is older than the messages. If it is, it was restored from a backup, and nothing may be sent until an
//! operator has declared the restore.
//!
//! The ledger counts epochs. A new one begins with each start of a process and each minute in which one runs. Every message
//! carries the epoch in which it was published, so a message of a later epoch than the ledger's was published on behalf of a
//! later state of this ledger.

/// What an operator has to do about a ledger that is older than its messages.
pub const BEHIND: &str = "the ledger is older than the messages on the broker: it was restored from a backup. Nothing is sent \
     until you stop the workers and run `mailrun restored`";

/// The ledger's epochs, read at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Epochs {
    /// The present one.
    pub present: i64,
    /// The one that began with the last restore; 0: never restored. Messages of earlier epochs are stale.
    pub restored: i64,
}

/// What to do with a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// Act on it.
    Current,
    /// Published before the last restore: what it asks for may have been done since the backup.
    Stale,
    /// The ledger is older than the message, or has not been read yet: keep the message and do nothing.
    Behind,
}

/// What to do with a message of this epoch, by what was read of the ledger; none: it was not read yet. A message without an epoch
/// was published by hand or by an older version. `behind`: a later epoch than the ledger's was seen.
#[must_use]
pub fn admission(read: Option<Epochs>, behind: bool, epoch: Option<i64>) -> Admission {
    match (read, epoch) {
        (None, _) => Admission::Behind,
        _ if behind => Admission::Behind,
        (Some(epochs), Some(epoch)) if epoch > epochs.present => Admission::Behind,
        (Some(epochs), Some(epoch)) if epoch < epochs.restored => Admission::Stale,
        _ => Admission::Current,
    }
}
