//! Deletes what is old. A run goes at once, its items and claims after that in bounded steps, so that nothing live ever
//! waits for long. People stay: they remember that they were emailed.

use std::time::Duration;

use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

use crate::config::DAY;

/// Published messages, ended workers with their receipts, and tests are of no use after a day.
const SCRAPS_AFTER: Duration = DAY;
/// A run whose counters moved so lately is under way.
const STILL_MOVING: Duration = Duration::from_secs(5);

/// Deletes the oldest runs that were over for `after`, at most `limit`, and returns how many. Their items remain for
/// [`step`]. A run with unknown items stays until a person has decided: without them, those people might be written to
/// twice, and nobody would know.
///
/// # Errors
/// The database's.
pub async fn delete_runs(pool: &PgPool, after: Duration, limit: i64) -> sqlx::Result<usize> {
    let mut tx = pool.begin().await?;
    let old = sqlx::query_scalar!(
        "SELECT p.run_id FROM run_progress p
         WHERE p.finished_at < now() - make_interval(secs => $1) AND p.unknown = 0
           AND NOT EXISTS (SELECT FROM run_passes pass WHERE pass.run_id = p.run_id AND pass.done_at IS NULL)
           AND NOT EXISTS (SELECT FROM outbox o WHERE o.published_at IS NULL AND o.message->>'run_id' = p.run_id::text)
         ORDER BY p.finished_at LIMIT $2
         FOR UPDATE SKIP LOCKED",
        after.as_secs_f64(),
        limit,
    )
    .fetch_all(&mut *tx)
    .await?;
    sqlx::query!("INSERT INTO pruned_runs (run_id) SELECT unnest($1::uuid[])", &old).execute(&mut *tx).await?;
    sqlx::query!("DELETE FROM run_samples WHERE run_id = ANY($1)", &old).execute(&mut *tx).await?;
    sqlx::query!("DELETE FROM run_passes WHERE run_id = ANY($1)", &old).execute(&mut *tx).await?;
    sqlx::query!("DELETE FROM sweeps WHERE run_id = ANY($1)", &old).execute(&mut *tx).await?;
    sqlx::query!("DELETE FROM run_progress WHERE run_id = ANY($1)", &old).execute(&mut *tx).await?;
    sqlx::query!("DELETE FROM runs WHERE id = ANY($1)", &old).execute(&mut *tx).await?;
    tx.commit().await?;
    Ok(old.len())
}

/// What a step deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Items of a deleted run.
    pub items: u64,
    /// Whether another run was moving meanwhile.
    pub beside_others: bool,
}

/// Deletes at most `limit` items of deleted runs, with their claims. None: nothing is left, or somebody else is at it.
///
/// # Errors
/// The database's.
pub async fn step(pool: &PgPool, limit: i64) -> sqlx::Result<Option<Step>> {
    let mut tx = pool.begin().await?;
    let Some(run_id) = next(&mut tx).await? else { return Ok(None) };
    let beside_others = is_any_moving(&mut tx).await?;
    let items = sqlx::query_scalar!(
        "DELETE FROM run_items WHERE id IN (SELECT id FROM run_items WHERE run_id = $1 ORDER BY position LIMIT $2)
         RETURNING id",
        run_id,
        limit,
    )
    .fetch_all(&mut *tx)
    .await?;
    if items.is_empty() {
        sqlx::query!("DELETE FROM pruned_runs WHERE run_id = $1", run_id).execute(&mut *tx).await?;
    } else {
        sqlx::query!("DELETE FROM attempts WHERE item_id = ANY($1)", &items).execute(&mut *tx).await?;
    }
    tx.commit().await?;
    Ok(Some(Step { items: items.len() as u64, beside_others }))
}

async fn next(conn: &mut PgConnection) -> sqlx::Result<Option<Uuid>> {
    sqlx::query_scalar!("SELECT run_id FROM pruned_runs ORDER BY pruned_at LIMIT 1 FOR UPDATE SKIP LOCKED")
        .fetch_optional(conn)
        .await
}

async fn is_any_moving(conn: &mut PgConnection) -> sqlx::Result<bool> {
    sqlx::query_scalar!(
        r#"SELECT EXISTS (SELECT FROM run_progress
                          WHERE finished_at IS NULL AND mailrun_is_recent(updated_at, $1)) AS "moving!""#,
        STILL_MOVING.as_secs_f64(),
    )
    .fetch_one(conn)
    .await
}

/// Deletes at most `limit` of each kind of scrap: published messages, workers that ended or died with their receipts, and
/// tests, of a day ago or more. Returns how many there were.
///
/// # Errors
/// The database's.
pub async fn scraps(pool: &PgPool, limit: i64) -> sqlx::Result<u64> {
    let after = SCRAPS_AFTER.as_secs_f64();
    let messages = sqlx::query!(
        "DELETE FROM outbox WHERE id IN (SELECT id FROM outbox WHERE published_at < now() - make_interval(secs => $1)
                                         ORDER BY id LIMIT $2)",
        after,
        limit,
    )
    .execute(pool)
    .await?;
    // A claim whose worker is not known counts as one of a dead worker, which it is.
    let workers = sqlx::query!(
        "DELETE FROM workers WHERE id IN (SELECT id FROM workers WHERE heartbeat_at < now() - make_interval(secs => $1)
                                          ORDER BY id LIMIT $2)",
        after,
        limit,
    )
    .execute(pool)
    .await?;
    let receipts = sqlx::query!(
        "DELETE FROM receipts WHERE (worker_id, number) IN (
             SELECT worker_id, number FROM receipts r WHERE NOT EXISTS (SELECT FROM workers w WHERE w.id = r.worker_id)
             LIMIT $1)",
        limit,
    )
    .execute(pool)
    .await?;
    let tests = sqlx::query!(
        "DELETE FROM test_sends WHERE id IN (SELECT id FROM test_sends WHERE created_at < now() - make_interval(secs => $1)
                                             ORDER BY created_at LIMIT $2)",
        after,
        limit,
    )
    .execute(pool)
    .await?;
    Ok([messages, workers, receipts, tests].into_iter().map(|deleted| deleted.rows_affected()).sum())
}
