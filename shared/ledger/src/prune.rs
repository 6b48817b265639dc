//! Deletes old data. A run is deleted at once, its items and claims afterwards in bounded steps, so that live runs never wait
//! for long. People stay, because they record who was emailed.

use std::time::Duration;

use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

use mailrun_core::setting::DAY;

/// Published messages and ended workers are kept for a day.
const KEPT_FOR: Duration = DAY;
/// Hidden runs are kept for a day.
const HIDDEN_FOR: Duration = DAY;
/// Results are not repeated after this time.
const BURIED_FOR: Duration = Duration::from_secs(30 * 24 * 60 * 60);
/// A run whose counters moved within this time counts as in progress.
const STILL_MOVING: Duration = Duration::from_secs(5);

/// Deletes the oldest runs that ended more than `after` ago (`None`: none), and hidden runs older than a day, at most `limit`.
/// Returns how many. Their items remain for [`step`].
///
/// A run stays if it has unknown items that a person must decide about: without them, those people might be mailed twice
/// unnoticed. It also stays if its suppressions are held for review, or if a replay was just requested. Unfinished passes of a
/// cancelled run do not count.
///
/// After the commit no item of these runs can be claimed, and [`step`] sees every earlier claim: the claim's transaction has either
/// ended by then, or waits and then sees that the run is deleted.
///
/// # Errors
/// 55P03 if claims are locked for too long.
pub async fn delete_runs(pool: &PgPool, after: Option<Duration>, limit: i64) -> sqlx::Result<usize> {
    let mut tx = pool.begin().await?;
    let candidates = sqlx::query_scalar!(
        "SELECT p.run_id FROM run_progress p JOIN runs r ON r.id = p.run_id
         WHERE CASE WHEN r.hidden THEN r.created_at < now() - make_interval(secs => $3) AND p.finished_at IS NOT NULL
                    ELSE p.finished_at < now() - make_interval(secs => $1) AND p.unknown = 0 END
           AND (r.wanted = 'cancelled'
                OR NOT EXISTS (SELECT FROM run_passes pass WHERE pass.run_id = p.run_id AND pass.done_at IS NULL))
           AND NOT EXISTS (SELECT FROM suppression_reviews s WHERE s.run_id = p.run_id AND s.decided_at IS NULL)
         ORDER BY p.finished_at LIMIT $2
         FOR UPDATE SKIP LOCKED",
        after.map(|after| after.as_secs_f64()),
        limit,
        HIDDEN_FOR.as_secs_f64(),
    )
    .fetch_all(&mut *tx)
    .await?;
    if candidates.is_empty() {
        return Ok(0);
    }
    // A replay request locks the run: earlier requests are visible now, and no further one is possible.
    let old = sqlx::query_scalar!(
        r#"SELECT old.run_id AS "run_id!" FROM unnest($1::uuid[]) AS old (run_id)
           WHERE NOT EXISTS (
               SELECT FROM outbox o
               WHERE o.message->>'run_id' = old.run_id::text
                 AND (o.published_at IS NULL
                      OR (o.message->'command'->'replay' IS NOT NULL
                          AND NOT EXISTS (SELECT FROM run_passes pass
                                          WHERE pass.command_id::text = o.message->'command'->'replay'->>'command_id'))))"#,
        &candidates,
    )
    .fetch_all(&mut *tx)
    .await?;
    if old.is_empty() {
        return Ok(0);
    }
    sqlx::query("SET LOCAL lock_timeout = '2s'").execute(&mut *tx).await?;
    sqlx::query("LOCK TABLE attempts IN SHARE MODE").execute(&mut *tx).await?;
    sqlx::query!("INSERT INTO pruned_runs (run_id, kind) SELECT id, kind FROM runs WHERE id = ANY($1)", &old)
        .execute(&mut *tx)
        .await?;
    sqlx::query!("DELETE FROM run_samples WHERE run_id = ANY($1)", &old).execute(&mut *tx).await?;
    sqlx::query!("DELETE FROM run_passes WHERE run_id = ANY($1)", &old).execute(&mut *tx).await?;
    sqlx::query!("DELETE FROM sweeps WHERE run_id = ANY($1)", &old).execute(&mut *tx).await?;
    sqlx::query!("DELETE FROM pacing WHERE run_id = ANY($1)", &old).execute(&mut *tx).await?;
    sqlx::query!("DELETE FROM buried_results WHERE run_id = ANY($1)", &old).execute(&mut *tx).await?;
    sqlx::query!("DELETE FROM suppression_reviews WHERE run_id = ANY($1)", &old).execute(&mut *tx).await?;
    sqlx::query!("DELETE FROM run_progress WHERE run_id = ANY($1)", &old).execute(&mut *tx).await?;
    sqlx::query!("DELETE FROM runs WHERE id = ANY($1)", &old).execute(&mut *tx).await?;
    tx.commit().await?;
    Ok(old.len())
}

/// Cancels hidden runs that are still open after a day. They are deleted once they have ended.
pub async fn cancel_hidden(pool: &PgPool) -> sqlx::Result<u64> {
    // The sweeper finds that they have no cancel command yet, and publishes it.
    let cancelled = sqlx::query!(
        "UPDATE runs r SET wanted = 'cancelled' FROM run_progress p
         WHERE p.run_id = r.id AND p.finished_at IS NULL AND r.wanted <> 'cancelled'
           AND r.hidden AND r.created_at < now() - make_interval(secs => $1)",
        HIDDEN_FOR.as_secs_f64(),
    )
    .execute(pool)
    .await?;
    Ok(cancelled.rows_affected())
}

/// Whether [`delete_runs`] failed because claims were locked.
#[must_use]
pub fn is_held_up(error: &sqlx::Error) -> bool {
    matches!(error, sqlx::Error::Database(error) if error.code().is_some_and(|code| code == "55P03"))
}

/// The effect of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// The run.
    pub run_id: Uuid,
    /// The number of its items that were deleted.
    pub items: u64,
    /// Whether all its remaining items are being sent: the run is tried again after the others.
    pub waits: bool,
    /// Whether another run was in progress.
    pub beside_others: bool,
}

/// Deletes at most `limit` items of deleted runs, with their claims. `None`: nothing is left, or another process is deleting.
///
/// A dead letter of the run may have been requeued by hand just before the run was deleted. An item that is being sent stays
/// until its outcome is known, so that the person counts as emailed. If the worker has died, the person may have received the
/// mail and counts as emailed.
pub async fn step(pool: &PgPool, limit: i64) -> sqlx::Result<Option<Step>> {
    let mut tx = pool.begin().await?;
    let Some(run_id) = next(&mut tx).await? else { return Ok(None) };
    let beside_others = is_any_moving(&mut tx).await?;
    let chunk = sqlx::query!(
        r#"SELECT i.id, i.user_id, claim.alive AS "alive?"
           FROM run_items i
           LEFT JOIN LATERAL (
               SELECT w.id IS NOT NULL AS alive
               FROM attempts a LEFT JOIN live_workers w ON w.id = a.worker_id
               WHERE a.item_id = i.id AND a.worker_id > 0 AND i.state <> 'sent'
                 AND (a.number > i.attempt OR (a.number = i.attempt AND i.state = 'pending'))
               ORDER BY a.number DESC LIMIT 1
           ) claim ON true
           WHERE i.run_id = $1 AND claim.alive IS NOT TRUE
           ORDER BY i.position LIMIT $2"#,
        run_id,
        limit,
    )
    .fetch_all(&mut *tx)
    .await?;
    let perhaps_sent: Vec<i64> = chunk.iter().filter(|row| row.alive.is_some()).filter_map(|row| row.user_id).collect();
    if !perhaps_sent.is_empty() {
        sqlx::query!("UPDATE users SET emailed_at = now() WHERE id = ANY($1) AND emailed_at IS NULL", &perhaps_sent)
            .execute(&mut *tx)
            .await?;
    }
    let items: Vec<i64> = chunk.iter().map(|row| row.id).collect();
    let mut waits = false;
    if items.is_empty() {
        let deleted = sqlx::query!(
            "DELETE FROM pruned_runs WHERE run_id = $1 AND NOT EXISTS (SELECT FROM run_items WHERE run_id = $1)",
            run_id,
        )
        .execute(&mut *tx)
        .await?;
        waits = deleted.rows_affected() == 0;
        if waits {
            sqlx::query!("UPDATE pruned_runs SET pruned_at = clock_timestamp() WHERE run_id = $1", run_id)
                .execute(&mut *tx)
                .await?;
        }
    } else {
        sqlx::query!("DELETE FROM run_items WHERE id = ANY($1)", &items).execute(&mut *tx).await?;
        sqlx::query!("DELETE FROM attempts WHERE item_id = ANY($1)", &items).execute(&mut *tx).await?;
    }
    tx.commit().await?;
    Ok(Some(Step { run_id, items: items.len() as u64, waits, beside_others }))
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

/// Deletes housekeeping rows, at most `limit` of each kind: published messages, and workers that ended or died, after a day;
/// receipts that no item needs; results that were buried long ago; meters of deleted runs. Returns how many.
///
/// A receipt of an ended worker is needed until all its items are shown as sent.
pub async fn housekeeping(pool: &PgPool, limit: i64) -> sqlx::Result<u64> {
    let after = KEPT_FOR.as_secs_f64();
    let messages = sqlx::query!(
        "DELETE FROM outbox WHERE id IN (SELECT id FROM outbox WHERE published_at < now() - make_interval(secs => $1)
                                         ORDER BY id LIMIT $2)",
        after,
        limit,
    )
    .execute(pool)
    .await?;
    // A claim whose worker has no row counts as a dead worker's, which is right.
    let workers = sqlx::query!(
        "DELETE FROM workers WHERE id IN (SELECT id FROM workers w
                                          WHERE heartbeat_at < now() - make_interval(secs => $1)
                                            AND NOT EXISTS (SELECT FROM live_workers l WHERE l.id = w.id)
                                          ORDER BY id LIMIT $2)",
        after,
        limit,
    )
    .execute(pool)
    .await?;
    let receipts = sqlx::query!(
        "DELETE FROM receipts WHERE (worker_id, number) IN (
             SELECT worker_id, number FROM receipts r
             WHERE NOT EXISTS (SELECT FROM workers w WHERE w.id = r.worker_id)
               AND NOT EXISTS (SELECT FROM run_items i WHERE i.id = ANY(r.item_ids) AND i.state <> 'sent')
             LIMIT $1)",
        limit,
    )
    .execute(pool)
    .await?;
    let buried = sqlx::query!(
        "DELETE FROM buried_results WHERE (run_id, item_id, attempt, state) IN (
             SELECT run_id, item_id, attempt, state FROM buried_results
             WHERE buried_at < now() - make_interval(secs => $1) LIMIT $2)",
        BURIED_FOR.as_secs_f64(),
        limit,
    )
    .execute(pool)
    .await?;
    // A claim in progress when its run was deleted may have written a meter.
    let meters = sqlx::query!(
        "DELETE FROM pacing WHERE run_id IN (
             SELECT run_id FROM pacing p WHERE run_id <> '00000000-0000-0000-0000-000000000000'
               AND NOT EXISTS (SELECT FROM runs r WHERE r.id = p.run_id) LIMIT $1)",
        limit,
    )
    .execute(pool)
    .await?;
    Ok([messages, workers, receipts, buried, meters].into_iter().map(|deleted| deleted.rows_affected()).sum())
}
