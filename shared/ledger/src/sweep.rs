//! Finds what may be missing from the broker: runs that have stalled, and the items they wait for.

use std::{ops::AddAssign, time::Duration};

use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

use crate::{
    attempts::{self, Held},
    stored::{SqlState, Stored},
};
use mailrun_core::claim::Owner;
use mailrun_core::{message::ItemMessage, run::Wanted};

/// The advisory lock of sweepers. Arbitrary, but the same for all.
const ADVISORY_LOCK: i64 = 0x6d61_696c_7275_6e01;

/// Makes the caller the only sweeper until its transaction ends. False: there is another one.
pub async fn try_lock(conn: &mut PgConnection) -> sqlx::Result<bool> {
    sqlx::query_scalar!(r#"SELECT pg_try_advisory_xact_lock($1) AS "locked!""#, ADVISORY_LOCK).fetch_one(conn).await
}

/// A run whose counters have not moved for a while.
#[derive(Clone, Debug)]
pub struct Stalled {
    /// The run.
    pub run_id: Uuid,
    /// Its kind.
    pub kind: String,
    /// Its wanted state.
    pub wanted: Wanted,
    /// Whether a message that drives its current pass was seen lately, or none is needed.
    pub driven: bool,
    /// Whether a cancel pass has begun.
    pub cancel_begun: bool,
}

/// The unfinished runs whose counters have not moved for `stalled_after`.
pub async fn stalled_runs(conn: &mut PgConnection, stalled_after: Duration) -> sqlx::Result<Vec<Stalled>> {
    let rows = sqlx::query!(
        r#"SELECT p.run_id, r.kind, r.wanted AS "wanted: Stored<Wanted>",
                  coalesce(last.done_at IS NOT NULL
                           OR mailrun_is_recent(last.seen_at, $1), false) AS "driven!",
                  coalesce(last.kind = 'cancel', false) AS "cancel_begun!"
           FROM run_progress p
           JOIN runs r ON r.id = p.run_id
           LEFT JOIN LATERAL (
               SELECT kind, seen_at, done_at FROM run_passes WHERE run_id = p.run_id ORDER BY number DESC LIMIT 1
           ) last ON true
           WHERE p.finished_at IS NULL AND NOT mailrun_is_recent(p.updated_at, $1)"#,
        stalled_after.as_secs_f64(),
    )
    .fetch_all(conn)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| Stalled {
            run_id: row.run_id,
            kind: row.kind,
            wanted: row.wanted.acted_on(),
            driven: row.driven,
            cancel_begun: row.cancel_begun,
        })
        .collect())
}

/// Whether there is an unfinished run that is not paused and whose counters have not moved for `still_for`.
pub async fn is_standstill(conn: &mut PgConnection, still_for: Duration) -> sqlx::Result<bool> {
    sqlx::query_scalar!(
        r#"SELECT EXISTS (SELECT FROM run_progress p JOIN runs r ON r.id = p.run_id
                          WHERE p.finished_at IS NULL AND r.wanted IN ('running', 'cancelled')
                            AND NOT mailrun_is_recent(p.updated_at, $1)) AS "still!""#,
        still_for.as_secs_f64(),
    )
    .fetch_one(conn)
    .await
}

/// The repairs of one sweep, or of all sweeps of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Repairs {
    /// Republished run messages.
    pub driven: i64,
    /// Republished item messages.
    pub put_back: i64,
    /// Claims of dead workers whose items became unknown.
    pub buried: i64,
    /// Items whose result was reported again: no worker will send them, or their worker sent them and died.
    pub told_again: i64,
}

impl Repairs {
    /// The count of each kind of repair, by name.
    #[must_use]
    pub fn by_name(&self) -> [(&'static str, i64); 4] {
        let Self { driven, put_back, buried, told_again } = *self;
        [("driven", driven), ("put_back", put_back), ("buried", buried), ("told_again", told_again)]
    }
}

impl AddAssign for Repairs {
    fn add_assign(&mut self, other: Self) {
        self.driven += other.driven;
        self.put_back += other.put_back;
        self.buried += other.buried;
        self.told_again += other.told_again;
    }
}

/// Records the repairs of a sweep, unless there were none.
pub async fn record(conn: &mut PgConnection, run_id: Uuid, repairs: Repairs) -> sqlx::Result<()> {
    if repairs == Repairs::default() {
        return Ok(());
    }
    let Repairs { driven, put_back, buried, told_again } = repairs;
    sqlx::query!(
        "INSERT INTO sweeps (run_id, driven, put_back, buried, told_again) VALUES ($1, $2, $3, $4, $5)",
        run_id,
        driven,
        put_back,
        buried,
        told_again,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// All repairs of a run.
pub async fn repairs(pool: &PgPool, run_id: Uuid) -> sqlx::Result<Repairs> {
    sqlx::query_as!(
        Repairs,
        r#"SELECT coalesce(sum(driven)::bigint, 0) AS "driven!", coalesce(sum(put_back)::bigint, 0) AS "put_back!",
                  coalesce(sum(buried)::bigint, 0) AS "buried!", coalesce(sum(told_again)::bigint, 0) AS "told_again!"
           FROM sweeps WHERE run_id = $1"#,
        run_id,
    )
    .fetch_one(pool)
    .await
}

/// Whether there are senders and all their gates are closed: then nothing is missing, everything waits.
pub async fn all_lanes_closed(conn: &mut PgConnection) -> sqlx::Result<bool> {
    sqlx::query_scalar!(
        r#"SELECT coalesce(bool_and(coalesce(lane_until > clock_timestamp(), false)), false) AS "closed!" FROM live_workers
           WHERE permits > 0"#,
    )
    .fetch_one(conn)
    .await
}

/// A released item that is still open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenItem {
    /// Its next attempt.
    pub next: ItemMessage,
    /// Its position in the run.
    pub position: i32,
    /// Who has claimed that attempt.
    pub owner: Option<Owner>,
}

/// The released, open items of a run after position `after` whose next attempt is overdue.
pub async fn open_items(
    conn: &mut PgConnection,
    run_id: Uuid,
    stalled_after: Duration,
    after: i32,
    limit: i64,
) -> sqlx::Result<Vec<OpenItem>> {
    let rows = sqlx::query!(
        r#"SELECT i.id, i.position, i.attempt, i.state AS "state: SqlState", i.tries, i.replays, i.user_id IS NULL AS "impersonal!",
                  a.worker_id AS "worker_id?",
                  w.id IS NOT NULL AS "alive!"
           FROM run_items i
           LEFT JOIN attempts a ON a.item_id = i.id
                 AND a.number = i.attempt + CASE WHEN i.state = 'retrying' THEN 1 ELSE 0 END
           LEFT JOIN live_workers w ON w.id = a.worker_id
           WHERE i.run_id = $1 AND i.position > $3 AND i.state IN ('pending', 'retrying')
             AND (i.due_at IS NULL OR i.due_at < clock_timestamp() - make_interval(secs => $2))
             AND (i.attempt > 1 OR i.state = 'retrying' OR a.worker_id IS NOT NULL
                  OR i.position <= (SELECT cursor FROM run_passes f WHERE f.run_id = $1 AND f.number = 1))
           ORDER BY i.position LIMIT $4"#,
        run_id,
        stalled_after.as_secs_f64(),
        after,
        limit,
    )
    .fetch_all(&mut *conn)
    .await?;
    let (items, held): (Vec<(ItemMessage, i32)>, Vec<Held>) = rows
        .into_iter()
        .map(|row| {
            let present = ItemMessage {
                run_id,
                item_id: row.id,
                attempt: row.attempt,
                tries: row.tries,
                replays: row.replays,
                impersonal: row.impersonal,
            };
            let next = present.awaited(row.state.into());
            let held = Held { item_id: row.id, number: next.attempt, worker_id: row.worker_id, alive: row.alive };
            ((next, row.position), held)
        })
        .unzip();
    let owners = attempts::owners(conn, &held).await?;
    Ok(items.into_iter().zip(owners).map(|((next, position), owner)| OpenItem { next, position, owner }).collect())
}
