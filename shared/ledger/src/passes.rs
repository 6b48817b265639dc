//! The state of the fan-out in each run: passes, their cursors, steps and rate budgets.

use std::time::Duration;

use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use uuid::Uuid;

use crate::stored::{InLedger, SqlState, Stored};
use mailrun_core::{
    item::ItemState,
    message::{ItemMessage, Replay},
    run::{Counters, Flow, Wanted},
};

/// The purpose of a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, sqlx::Type)]
#[sqlx(type_name = "pass_kind", rename_all = "snake_case")]
pub enum PassKind {
    /// Releases every item once.
    First,
    /// Releases failed or unknown items again.
    Replay,
    /// Settles items that were not claimed.
    Cancel,
}

impl InLedger for PassKind {
    type Sql = Self;
}

/// The current pass of a run.
#[derive(Clone, Debug)]
pub struct Pass {
    /// The run.
    pub run_id: Uuid,
    /// The number of the pass, from 1.
    pub number: i32,
    /// Its purpose. `None`: a kind of a later version.
    pub kind: Option<PassKind>,
    /// replay: the requested states.
    pub states: Vec<ItemState>,
    /// replay: the requested error; `None` for all.
    pub error: Option<String>,
    /// Items up to this position are released.
    pub cursor: i32,
    /// The cursor before the newest chunk.
    pub chunk_start: i32,
    /// The next step.
    pub step: i32,
    /// Under a rate limit, when the next item may be released.
    pub next_due_at: DateTime<Utc>,
    /// When it began.
    pub created_at: DateTime<Utc>,
    /// When it was finished.
    pub done_at: Option<DateTime<Utc>>,
    /// The number of items it has released.
    pub released: i32,
    /// When the newest chunk was released.
    pub chunk_at: DateTime<Utc>,
    /// The speed of the run when it was last measured.
    pub flow: Flow,
}

/// What the fan-out needs to know about a run besides its pass.
#[derive(Clone, Copy, Debug)]
pub struct Situation {
    /// Its wanted state.
    pub wanted: Wanted,
    /// Its rate limit.
    pub sends_per_second: Option<i32>,
    /// Its counters.
    pub counters: Counters,
    /// The number of items released by its first pass.
    pub first_released: i32,
    /// The permits of all live workers.
    pub permits: i32,
    /// The permits in use, according to the last heartbeats.
    pub in_flight: i32,
    /// The database's clock.
    pub now: DateTime<Utc>,
}

/// An item to release.
#[derive(Clone, Copy, Debug)]
pub struct Item {
    /// The item.
    pub id: i64,
    /// Its position in the run.
    pub position: i32,
    /// The attempt that its state refers to.
    pub attempt: i32,
    /// Its state.
    pub state: ItemState,
    /// The number of tries used of its budget.
    pub tries: i16,
    /// How often it was replayed.
    pub replays: i16,
    /// See [`ItemMessage::impersonal`].
    pub impersonal: bool,
}

impl Item {
    /// The message of the attempt that its state refers to.
    #[must_use]
    pub fn message(&self, run_id: Uuid) -> ItemMessage {
        let Self { id: item_id, attempt, tries, replays, impersonal, .. } = *self;
        ItemMessage { run_id, item_id, attempt, tries, replays, impersonal }
    }
}

/// Locks a run for the fan-out until the transaction ends, creates the first pass if it is missing, and returns the current
/// pass. `None`: there is no such run.
pub async fn lock(conn: &mut PgConnection, run_id: Uuid) -> sqlx::Result<Option<Pass>> {
    sqlx::query!(
        "INSERT INTO run_passes (run_id, number, kind) SELECT id, 1, 'first' FROM runs WHERE id = $1 ON CONFLICT DO NOTHING",
        run_id
    )
    .execute(&mut *conn)
    .await?;
    // The lock is on the first pass: locking the newest one would miss a pass that is begun in the meantime.
    sqlx::query!("SELECT number FROM run_passes WHERE run_id = $1 AND number = 1 FOR UPDATE", run_id)
        .fetch_optional(&mut *conn)
        .await?;
    let row = sqlx::query!(
        r#"SELECT number, kind AS "kind: Stored<PassKind>", states AS "states: Vec<Stored<ItemState>>", error, cursor, chunk_start, step,
                  next_due_at, created_at, done_at, released, chunk_at, looked_at, drained, per_second
           FROM run_passes WHERE run_id = $1 ORDER BY number DESC LIMIT 1"#,
        run_id
    )
    .fetch_optional(conn)
    .await?;
    Ok(row.map(|row| {
        let states = known(row.states);
        Pass {
            run_id,
            number: row.number,
            kind: row.kind.known().filter(|_| states.is_some()),
            states: states.unwrap_or_default(),
            error: row.error,
            cursor: row.cursor,
            chunk_start: row.chunk_start,
            step: row.step,
            next_due_at: row.next_due_at,
            created_at: row.created_at,
            done_at: row.done_at,
            released: row.released,
            chunk_at: row.chunk_at,
            flow: Flow { looked_at: row.looked_at, drained: row.drained, per_second: row.per_second },
        }
    }))
}

/// `None`: one of the states belongs to a later version.
fn known(states: Vec<Stored<ItemState>>) -> Option<Vec<ItemState>> {
    states.into_iter().map(Stored::known).collect()
}

/// Begins the replay that follows the pass `last`, and returns its number. The caller holds the run's lock and has checked that the
/// command has not begun a pass before.
pub async fn begin_replay(conn: &mut PgConnection, last: &Pass, replay: &Replay) -> sqlx::Result<i32> {
    begin(conn, last, PassKind::Replay, replay.command_id, &replay.states, replay.error.as_deref()).await
}

/// Begins a pass that settles all open items, under the same conditions.
pub async fn begin_cancel(conn: &mut PgConnection, last: &Pass, command_id: Uuid) -> sqlx::Result<i32> {
    begin(conn, last, PassKind::Cancel, command_id, &[], None).await
}

async fn begin(
    conn: &mut PgConnection,
    last: &Pass,
    kind: PassKind,
    command_id: Uuid,
    states: &[ItemState],
    error: Option<&str>,
) -> sqlx::Result<i32> {
    sqlx::query_scalar!(
        "INSERT INTO run_passes (run_id, number, kind, command_id, states, error)
         VALUES ($1, $2, $3, $4, $5, $6) RETURNING number",
        last.run_id,
        last.number + 1,
        kind as _,
        command_id,
        SqlState::all(states) as _,
        error,
    )
    .fetch_one(conn)
    .await
}

/// The pass that a command has begun, if any.
pub async fn begun_by(conn: &mut PgConnection, command_id: Uuid) -> sqlx::Result<Option<i32>> {
    sqlx::query_scalar!("SELECT number FROM run_passes WHERE command_id = $1", command_id).fetch_optional(conn).await
}

/// The run's wanted state and counters, and the capacity of the senders. `None`: there is no such run.
pub async fn situation(conn: &mut PgConnection, run_id: Uuid) -> sqlx::Result<Option<Situation>> {
    let row = sqlx::query!(
        r#"SELECT r.wanted AS "wanted: Stored<Wanted>", r.sends_per_second, p.total AS "total!", p.counts AS "counts!", f.released, clock_timestamp() AS "now!",
                  w.permits AS "permits!", w.in_flight AS "in_flight!"
           FROM runs r JOIN run_counters p ON p.run_id = r.id JOIN run_passes f ON f.run_id = r.id AND f.number = 1
           CROSS JOIN (SELECT coalesce(sum(permits), 0)::integer AS permits, coalesce(sum(in_flight), 0)::integer AS in_flight
                       FROM live_workers) w
           WHERE r.id = $1"#,
        run_id,
    )
    .fetch_optional(conn)
    .await?;
    Ok(row.map(|row| Situation {
        wanted: row.wanted.acted_on(),
        sends_per_second: row.sends_per_second,
        counters: Counters::new(row.total, &row.counts),
        first_released: row.released,
        permits: row.permits,
        in_flight: row.in_flight,
        now: row.now,
    }))
}

/// The next items to release in a pass of this kind, by position.
pub async fn next_items(conn: &mut PgConnection, pass: &Pass, kind: PassKind, limit: i32) -> sqlx::Result<Vec<Item>> {
    let limit = i64::from(limit);
    match kind {
        PassKind::First => {
            sqlx::query_as!(
                Item,
                r#"SELECT id, position, attempt, state AS "state: SqlState", tries, replays,
                          user_id IS NULL AS "impersonal!" FROM run_items
                   WHERE run_id = $1 AND position > $2 AND state = ANY($4) ORDER BY position LIMIT $3"#,
                pass.run_id,
                pass.cursor,
                limit,
                SqlState::all(&ItemState::ALL) as _,
            )
            .fetch_all(conn)
            .await
        }
        PassKind::Replay => {
            sqlx::query_as!(
                Item,
                r#"SELECT id, position, attempt, state AS "state: SqlState", tries, replays,
                          user_id IS NULL AS "impersonal!" FROM run_items
                   WHERE run_id = $1 AND position > $2 AND troubled
                     AND state = ANY($4) AND ($5::text IS NULL OR error = $5)
                   ORDER BY position LIMIT $3"#,
                pass.run_id,
                pass.cursor,
                limit,
                SqlState::all(&pass.states) as _,
                pass.error,
            )
            .fetch_all(conn)
            .await
        }
        PassKind::Cancel => {
            sqlx::query_as!(
                Item,
                r#"SELECT id, position, attempt, state AS "state: SqlState", tries, replays,
                          user_id IS NULL AS "impersonal!" FROM run_items
                   WHERE run_id = $1 AND position > $2 AND state IN ('pending', 'retrying')
                   ORDER BY position LIMIT $3"#,
                pass.run_id,
                pass.cursor,
                limit
            )
            .fetch_all(conn)
            .await
        }
    }
}

/// Whether results of a replay's newest chunk are still on their way: some of its items have their old state.
pub async fn is_unapplied(conn: &mut PgConnection, pass: &Pass) -> sqlx::Result<bool> {
    sqlx::query_scalar!(
        r#"SELECT EXISTS (SELECT FROM run_items
           WHERE run_id = $1 AND position > $2 AND position <= $3 AND troubled
             AND state = ANY($4) AND ($5::text IS NULL OR error = $5) AND finished_at < $6) AS "exists!""#,
        pass.run_id,
        pass.chunk_start,
        pass.cursor,
        SqlState::all(&pass.states) as _,
        pass.error,
        pass.created_at,
    )
    .fetch_one(conn)
    .await
}

/// What a step released.
#[derive(Clone, Copy, Debug)]
pub struct Advance {
    /// The position of the last item released.
    pub cursor: i32,
    /// The number of items.
    pub released: i32,
    /// When the next item may be released.
    pub next_due_at: DateTime<Utc>,
    /// The measured speed of the run.
    pub flow: Flow,
}

/// Advances the pass by one step. The caller has already published the chunk and the message for the next step.
pub async fn advance(conn: &mut PgConnection, pass: &Pass, by: Advance) -> sqlx::Result<()> {
    sqlx::query!(
        "UPDATE run_passes SET step = step + 1, chunk_start = cursor, cursor = $3, released = released + $4,
                next_due_at = $5, seen_at = clock_timestamp(), chunk_at = clock_timestamp(), looked_at = $6, drained = $7,
                per_second = $8
         WHERE run_id = $1 AND number = $2",
        pass.run_id,
        pass.number,
        by.cursor,
        by.released,
        by.next_due_at,
        by.flow.looked_at,
        by.flow.drained,
        by.flow.per_second,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// The number of runs that have something to send and are not paused: they share the installation's rate limit.
pub async fn count_running(conn: &mut PgConnection) -> sqlx::Result<i64> {
    sqlx::query_scalar!(
        r#"SELECT count(*) AS "count!" FROM run_progress p JOIN runs r ON r.id = p.run_id
           WHERE p.finished_at IS NULL AND r.wanted = 'running' AND NOT r.hidden"#
    )
    .fetch_one(conn)
    .await
}

/// Locks the installation's rate budget until the transaction ends, and returns when the next item may be released.
pub async fn lock_budget(conn: &mut PgConnection) -> sqlx::Result<DateTime<Utc>> {
    sqlx::query_scalar!("SELECT next_due_at FROM sending_budget FOR UPDATE").fetch_one(conn).await
}

/// Spends from the installation's rate budget. The caller has locked it.
pub async fn spend_budget(conn: &mut PgConnection, next_due_at: DateTime<Utc>) -> sqlx::Result<()> {
    sqlx::query!("UPDATE sending_budget SET next_due_at = $1", next_due_at).execute(conn).await?;
    Ok(())
}

/// Marks the pass as finished.
pub async fn finish(conn: &mut PgConnection, pass: &Pass) -> sqlx::Result<()> {
    sqlx::query!(
        "UPDATE run_passes SET done_at = clock_timestamp(), seen_at = clock_timestamp() WHERE run_id = $1 AND number = $2",
        pass.run_id,
        pass.number
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// A finished replay whose dead letters may still be on the queue.
#[derive(Clone, Debug)]
pub struct Replayed {
    /// The run.
    pub run_id: Uuid,
    /// The pass.
    pub number: i32,
    /// The requested states.
    pub states: Vec<ItemState>,
    /// The requested error; `None` for all.
    pub error: Option<String>,
    /// When it began.
    pub created_at: DateTime<Utc>,
}

/// All such replays.
pub async fn to_tidy(conn: &mut PgConnection) -> sqlx::Result<Vec<Replayed>> {
    let rows = sqlx::query!(
        r#"SELECT run_id, number, states AS "states: Vec<Stored<ItemState>>", error, created_at FROM run_passes
           WHERE kind = 'replay' AND done_at IS NOT NULL AND tidied_at IS NULL"#
    )
    .fetch_all(conn)
    .await?;
    let replayed = rows.into_iter().filter_map(|row| {
        let states = known(row.states)?;
        let (run_id, number, error, created_at) = (row.run_id, row.number, row.error, row.created_at);
        Some(Replayed { run_id, number, states, error, created_at })
    });
    Ok(replayed.collect())
}

/// The advisory lock of tidying. Arbitrary, but the same for all processes.
const TIDYING: i64 = 0x6d61_696c_7275_6e02;

/// Makes this connection the only one that removes dead letters, until it is closed. False: another one does.
pub async fn lock_tidying(conn: &mut PgConnection) -> sqlx::Result<bool> {
    sqlx::query_scalar!(r#"SELECT pg_try_advisory_lock($1) AS "locked!""#, TIDYING).fetch_one(conn).await
}

/// Records that the dead letters of these replays are removed.
pub async fn mark_tidied(conn: &mut PgConnection, replays: &[Replayed]) -> sqlx::Result<()> {
    let (runs, numbers): (Vec<Uuid>, Vec<i32>) = replays.iter().map(|replay| (replay.run_id, replay.number)).unzip();
    sqlx::query!(
        "UPDATE run_passes p SET tidied_at = clock_timestamp() FROM unnest($1::uuid[], $2::integer[]) AS done (run_id, number)
         WHERE p.run_id = done.run_id AND p.number = done.number",
        &runs,
        &numbers,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Records that a message for this pass exists, although it releases nothing yet. At most once a second, because the message of
/// a waiting run arrives ten times as often.
pub async fn touch(conn: &mut PgConnection, pass: &Pass) -> sqlx::Result<()> {
    sqlx::query!(
        "UPDATE run_passes SET seen_at = clock_timestamp()
         WHERE run_id = $1 AND number = $2 AND NOT mailrun_is_recent(seen_at, 1)",
        pass.run_id,
        pass.number
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// An item whose message senders may have dropped while the run was paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dropped {
    /// The next attempt of the item.
    pub next: ItemMessage,
    /// Its position in the run.
    pub position: i32,
}

/// The released, open items of a run after position `after` whose next attempt is due and not claimed.
///
/// Progress records when an attempt is due a little after its message has reached the retry queue. So items due within `soon` are
/// included: their messages may have been dropped too.
pub async fn dropped_items(
    conn: &mut PgConnection,
    run_id: Uuid,
    soon: Duration,
    after: i32,
    limit: i64,
) -> sqlx::Result<Vec<Dropped>> {
    let items = sqlx::query_as!(
        Item,
        r#"SELECT i.id, i.position, i.attempt, i.state AS "state: SqlState", i.tries, i.replays,
                  i.user_id IS NULL AS "impersonal!"
           FROM run_items i
           WHERE i.run_id = $1 AND i.position > $2 AND i.state IN ('pending', 'retrying')
             AND (i.due_at IS NULL OR i.due_at < clock_timestamp() + make_interval(secs => $3))
             AND (i.attempt > 1 OR i.state = 'retrying'
                  OR i.position <= (SELECT cursor FROM run_passes f WHERE f.run_id = $1 AND f.number = 1))
             AND NOT EXISTS (SELECT FROM attempts a WHERE a.item_id = i.id
                             AND a.number = i.attempt + CASE WHEN i.state = 'retrying' THEN 1 ELSE 0 END)
           ORDER BY i.position LIMIT $4"#,
        run_id,
        after,
        soon.as_secs_f64(),
        limit,
    )
    .fetch_all(conn)
    .await?;
    let dropped = |item: Item| Dropped { next: item.message(run_id).awaited(item.state), position: item.position };
    Ok(items.into_iter().map(dropped).collect())
}
