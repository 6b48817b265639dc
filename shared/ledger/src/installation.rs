//! The installation that this ledger belongs to, and its epochs, which distinguish the ledger from older copies of itself.

use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use uuid::Uuid;

use mailrun_core::epoch::Epochs;

/// The duration of an epoch while a process runs, in seconds.
const EPOCH_S: f64 = 60.0;
/// A restore skips this many epochs, so that the next one is later than any that began after the backup.
const EPOCHS_SKIPPED: i64 = 1_000_000_000;
/// A restore skips this many values of each sequence, so that no id issued after the backup is issued again.
const IDS_SKIPPED: i64 = 1 << 36;

/// The identity and epoch of the ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Installation {
    /// Created with the schema and kept by backups.
    pub id: Uuid,
    /// Its epochs.
    pub epochs: Epochs,
    /// When the current epoch began.
    pub epoch_at: DateTime<Utc>,
    /// Whether the current epoch is a minute old.
    pub is_due: bool,
    /// When a restore was last declared. `None`: never.
    pub restored_at: Option<DateTime<Utc>>,
}

/// Reads the installation.
pub async fn read(conn: &mut PgConnection) -> sqlx::Result<Installation> {
    let row = sqlx::query!(
        r#"SELECT id, epoch, restored_epoch, epoch_at, restored_at, NOT mailrun_is_recent(epoch_at, $1) AS "is_due!"
           FROM installation"#,
        EPOCH_S,
    )
    .fetch_one(conn)
    .await?;
    let epochs = Epochs { present: row.epoch, restored: row.restored_epoch };
    Ok(Installation { id: row.id, epochs, epoch_at: row.epoch_at, is_due: row.is_due, restored_at: row.restored_at })
}

/// Locks the installation until the caller's transaction ends: starting processes compare ledger and broker one at a time.
pub async fn lock(conn: &mut PgConnection) -> sqlx::Result<()> {
    sqlx::query!("SELECT FROM installation FOR UPDATE").fetch_one(conn).await?;
    Ok(())
}

/// Begins a new epoch and returns it.
pub async fn begin_epoch(conn: &mut PgConnection) -> sqlx::Result<i64> {
    sqlx::query_scalar!("UPDATE installation SET epoch = epoch + 1, epoch_at = clock_timestamp() RETURNING epoch")
        .fetch_one(conn)
        .await
}

/// Begins a new epoch if `present` is still the current one. `None`: another process has begun one.
pub async fn begin_epoch_after(conn: &mut PgConnection, present: i64) -> sqlx::Result<Option<i64>> {
    sqlx::query_scalar!(
        "UPDATE installation SET epoch = epoch + 1, epoch_at = clock_timestamp() WHERE epoch = $1 RETURNING epoch",
        present
    )
    .fetch_optional(conn)
    .await
}

/// Declares a restore: begins an epoch that is later than all earlier ones, and makes every sequence skip the values that may
/// have been issued since the backup. Returns the new epoch.
pub async fn declare_restored(conn: &mut PgConnection) -> sqlx::Result<i64> {
    let epoch = sqlx::query_scalar!(
        "UPDATE installation
         SET epoch = epoch + $1, restored_epoch = epoch + $1, epoch_at = clock_timestamp(), restored_at = clock_timestamp()
         RETURNING epoch",
        EPOCHS_SKIPPED,
    )
    .fetch_one(&mut *conn)
    .await?;
    // Sequences of identity and serial columns that have been used.
    sqlx::query!(
        "SELECT setval(format('%I.%I', schemaname, sequencename)::regclass, last_value + $1)
         FROM pg_sequences WHERE schemaname = current_schema() AND last_value IS NOT NULL
           AND last_value + $1 < max_value",
        IDS_SKIPPED,
    )
    .fetch_all(conn)
    .await?;
    Ok(epoch)
}
