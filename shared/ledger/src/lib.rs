//! The ledger: PostgreSQL as the source of truth. One module for each part, one function for each operation.
//!
//! Functions take a connection, so that the caller owns the transaction.

pub mod attempts;
pub mod audit;
mod connections;
mod counters;
pub mod durability;
pub mod gauges;
pub mod grants;
pub mod held_suppressions;
pub mod installation;
pub mod invitations;
pub mod mailboxes;
pub mod outbox;
pub mod pacing;
pub mod passes;
pub mod people;
pub mod progress;
pub mod prune;
pub mod receipts;
pub mod relay_stops;
pub mod restore;
pub mod runs;
pub mod schema;
mod scram;
pub mod settings;
pub mod settle;
pub mod signing;
pub mod stored;
pub mod submit;
pub mod suppressions;
pub mod sweep;
pub mod test_mails;
pub mod workers;

pub use self::{
    connections::{Session, in_time, open},
    schema::migrate,
};

/// Whether the data itself is invalid, so that every retry fails: a value out of range (class 22), or a violated constraint (class
/// 23). All other errors depend on the state of the server, which can be repaired.
#[must_use]
pub fn is_about_data(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Database(error) => {
            error.code().is_some_and(|code| ["22", "23"].iter().any(|class| code.starts_with(class)))
        }
        _ => false,
    }
}

/// Whether the same transaction may succeed when it is run again: the connection was lost, the server is starting or stopping, or
/// the server chose this transaction to resolve a deadlock.
#[must_use]
pub fn may_pass(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_) | sqlx::Error::PoolTimedOut | sqlx::Error::Protocol(_) | sqlx::Error::WorkerCrashed => true,
        sqlx::Error::Database(error) => error.code().is_some_and(|code| {
            // 08 connection, 25P03 a transaction that was idle for too long, 40 rollback (deadlock, serialization),
            // 53 resources, 57 operator intervention
            ["08", "25P03", "40", "53", "57"].iter().any(|class| code.starts_with(class))
        }),
        _ => false,
    }
}
