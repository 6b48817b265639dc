//! PostgreSQL, the truth: one file for each part of the ledger, one function for each intent.
//!
//! Functions take a connection, so that their callers own the transaction.

pub mod attempts;
pub mod outbox;
pub mod passes;
pub mod progress;
pub mod prune;
pub mod runs;
pub mod submit;
pub mod suppressions;
pub mod sweep;
pub mod test_sends;
pub mod workers;

use std::time::Duration;

use secrecy::ExposeSecret;
use sqlx::{
    PgPool,
    migrate::Migrator,
    postgres::{PgConnectOptions, PgPoolOptions},
};

use crate::config::DatabaseConfig;

/// The schema, as a list of steps. One that has landed is never edited.
static MIGRATIONS: Migrator = sqlx::migrate!("../migrations");

/// Opens the pool. It connects when first used, so PostgreSQL may still be starting.
///
/// Every statement here looks rows up by an index. PostgreSQL plans such a statement once a session then, and not by what it
/// believes to know of a table that has just grown by a million rows: so a step never reads the whole run. Nor does it compile
/// them (`jit`), which takes a tenth of a second where it believes that they are costly.
///
/// # Errors
/// When `database.url` is no PostgreSQL address.
pub fn open(config: &DatabaseConfig, name: &str) -> sqlx::Result<PgPool> {
    let options: PgConnectOptions = config.url.expose_secret().parse()?;
    Ok(PgPoolOptions::new()
        .max_connections(config.max_connections)
        .acquire_timeout(Duration::from_millis(config.acquire_timeout_ms))
        // A lost connection is an error like others, and everyone tries again after one: no need to ask before each use.
        .test_before_acquire(false)
        .connect_lazy_with(
            options.application_name(name).options([("plan_cache_mode", "force_generic_plan"), ("jit", "off")]),
        ))
}

/// Brings the schema up to date. Safe from several processes at once.
///
/// # Errors
/// When PostgreSQL can't be reached, or holds another schema.
pub async fn migrate(pool: &PgPool) -> Result<(), sqlx::migrate::MigrateError> {
    MIGRATIONS.run(pool).await
}

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
            // 08 connection, 40 rollback (deadlock, serialization), 53 resources, 57 operator intervention
            ["08", "40", "53", "57"].iter().any(|class| code.starts_with(class))
        }),
        _ => false,
    }
}
