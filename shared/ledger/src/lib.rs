//! PostgreSQL, the truth: one file for each part of the ledger, one function for each intent.
//!
//! Functions take a connection, so that their callers own the transaction.

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

/// Whether the data itself is refused, so that it will be refused every time: a value that is out of range (class 22), or a
/// constraint that is violated (class 23). Everything else is the server's state, which somebody will mend.
#[must_use]
pub fn is_about_data(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Database(error) => {
            error.code().is_some_and(|code| ["22", "23"].iter().any(|class| code.starts_with(class)))
        }
        _ => false,
    }
}

/// Whether the same transaction may succeed when it is simply run again: the connection was lost, the server is starting
/// or ending, or it chose this transaction to resolve a deadlock.
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
