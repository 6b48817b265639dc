//! Faults within PostgreSQL.

use std::time::Duration;

use anyhow::Result;
use tokio::time::{Instant, sleep};

use super::super::site::Site;

/// Sessions are ended so often while they are.
const BETWEEN_TERMINATIONS: Duration = Duration::from_millis(250);

/// Ends all sessions but the bench's own, again and again for some time.
pub(super) async fn terminate_backends(site: &Site<'_>, time: Duration) -> Result<()> {
    let end = Instant::now() + time;
    while Instant::now() < end {
        sqlx::query(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
             WHERE datname = current_database() AND application_name <> current_setting('application_name')",
        )
        .execute(&site.pool)
        .await?;
        sleep(BETWEEN_TERMINATIONS).await;
    }
    Ok(())
}

/// Holds an old snapshot for twice this time, and for the second half a lock on the counters.
pub(super) async fn open_transaction(site: &Site<'_>, time: Duration) -> Result<()> {
    let mut tx = site.pool.begin().await?;
    sqlx::query("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ").execute(&mut *tx).await?;
    sqlx::query("SELECT count(*) FROM run_items").execute(&mut *tx).await?;
    sleep(time).await;
    // The snapshot is old by now, so a row can be locked by another transaction alone.
    let mut other = site.pool.begin().await?;
    sqlx::query("SELECT 1 FROM run_progress FOR UPDATE").execute(&mut *other).await?;
    sleep(time).await;
    other.rollback().await?;
    Ok(tx.rollback().await?)
}
