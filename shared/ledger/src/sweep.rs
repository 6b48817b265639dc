//! What may be missing from the conveyor: runs that have not moved for long, and the items they wait for.

use std::{ops::AddAssign, time::Duration};

use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

use crate::{
    attempts::{self, Held},
    stored::{SqlState, Stored},
};
use mailrun_core::claim::Owner;
use mailrun_core::{message::ItemMessage, run::Wanted};

/// Any number will do, as long as it is the same for all sweepers.
const ADVISORY_LOCK: i64 = 0x6d61_696c_7275_6e01;

/// Makes the caller the only sweeper until its transaction ends. False: there is one.
///
/// # Errors
/// The database's.
pub async fn try_lock(conn: &mut PgConnection) -> sqlx::Result<bool> {
    sqlx::query_scalar!(r#"SELECT pg_try_advisory_xact_lock($1) AS "locked!""#, ADVISORY_LOCK).fetch_one(conn).await
}

/// A run whose counters have not moved for long.
#[derive(Clone, Debug)]
pub struct Stalled {
    /// The run.
    pub run_id: Uuid,
    /// Its kind.
    pub kind: String,
    /// What a person wants of it.
    pub wanted: Wanted,
    /// Whether a message that drives its present pass has been seen lately, or none is needed.
    pub driven: bool,
    /// Whether a pass that cancels it has begun.
    pub cancel_begun: bool,
}

/// The unfinished runs whose counters have not moved for `stalled_after`.
///
/// # Errors
/// The database's.
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

/// Whether there is a run that nobody has paused, that is not over, and whose counters have not moved for so long.
///
/// # Errors
/// The database's.
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

/// What a sweep has repaired in a run, or all sweeps together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Repairs {
    /// Run messages that were put back.
    pub driven: i64,
    /// Item messages that were put back.
    pub put_back: i64,
    /// Claims of dead workers whose items became unknown.
    pub buried: i64,
    /// Items whose end was told once more: nobody will send them, or their worker had, and died.
    pub told_again: i64,
}

impl Repairs {
    /// Each kind of repair, and how often it was made.
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

/// Writes down what a sweep has repaired; nothing is not worth a line.
///
/// # Errors
/// The database's.
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

/// What all sweeps have repaired in a run.
///
/// # Errors
/// The database's.
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

/// Whether there are senders, and none of them sends anything at present: then nothing is missing, everything waits.
///
/// # Errors
/// The database's.
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
    /// The attempt it waits for.
    pub next: ItemMessage,
    /// Its place in the run.
    pub position: i32,
    /// Who has claimed that attempt.
    pub owner: Option<Owner>,
}

/// The released and open items of a run, behind position `after`, whose next attempt is overdue.
///
/// # Errors
/// The database's.
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
