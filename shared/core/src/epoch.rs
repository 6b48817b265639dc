//! Detects that the ledger is older than the messages: it was restored from a backup, and nothing may be sent until an operator
//! declares the restore.
//!
//! The ledger counts epochs. A new one begins with each start of a process, and once a minute while one runs. Every message carries
//! the epoch in which it was published. So a message with a later epoch than the ledger's belongs to a later state of this ledger.

/// What an operator must do about a ledger that is older than its messages.
pub const BEHIND: &str = "the ledger is older than the messages on the broker: it was restored from a backup. Nothing is sent \
     until you stop the workers and run `mailrun restored`";

/// The ledger's epochs, read at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Epochs {
    /// The current one.
    pub present: i64,
    /// The one that began with the last restore; 0: never restored. Messages of earlier epochs are stale.
    pub restored: i64,
}

/// What to do with a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// Act on it.
    Current,
    /// Published before the last restore. What it asks for may have been done after the backup.
    Stale,
    /// The ledger is older than the message, or has not been read yet. Keep the message and do nothing.
    Behind,
}

/// What to do with a message of this epoch. `read` is None if the ledger has not been read yet. `behind`: an epoch later than the
/// ledger's was seen. A message without an epoch was published by hand or by an older version.
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
