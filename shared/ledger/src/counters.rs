//! Writes the counters of runs. They are read through the view `run_counters`.

use mailrun_core::item::{CounterDelta, ItemState};
use sqlx::PgConnection;
use uuid::Uuid;

/// A change of a run's counters.
#[derive(Default)]
pub(crate) struct Change {
    pub(crate) items: CounterDelta,
    /// The correction of the total, after manual changes of the items.
    pub(crate) total: i32,
    /// Attempts that must be repeated.
    pub(crate) repeats: i32,
    /// Whether the counters were wrong and no item changed: then the run neither restarts nor progresses.
    pub(crate) corrects: bool,
}

/// These rows are the most contended of the pipeline. They are written once per batch, and last, to hold their locks only briefly.
pub(crate) async fn change(conn: &mut PgConnection, run_id: Uuid, change: &Change) -> sqlx::Result<()> {
    let by = |state| change.items.of(state);
    sqlx::query!(
        "WITH moved AS (
             UPDATE run_progress
             SET pending = pending + $2, retrying = retrying + $3, cancelled = cancelled + $4,
                 skipped = skipped + $5, unknown = unknown + $6, failed = failed + $7, sent = sent + $8,
                 repeats = repeats + $9, total = total + $10,
                 updated_at = clock_timestamp(),
                 started_at = CASE WHEN NOT $11 AND finished_at IS NOT NULL AND pending + $2 + retrying + $3 > 0
                                   THEN clock_timestamp() ELSE started_at END,
                 finished_at = CASE WHEN pending + $2 + retrying + $3 = 0
                                    THEN coalesce(finished_at, clock_timestamp()) END
             WHERE run_id = $1
             RETURNING total - pending - retrying AS settled
         )
         INSERT INTO run_samples (run_id, at, settled)
         SELECT $1, date_trunc('second', clock_timestamp()), settled FROM moved WHERE NOT $11
         ON CONFLICT (run_id, at) DO UPDATE SET settled = excluded.settled",
        run_id,
        by(ItemState::Pending),
        by(ItemState::Retrying),
        by(ItemState::Cancelled),
        by(ItemState::Skipped),
        by(ItemState::Unknown),
        by(ItemState::Failed),
        by(ItemState::Sent),
        change.repeats,
        change.total,
        change.corrects,
    )
    .execute(conn)
    .await?;
    Ok(())
}
