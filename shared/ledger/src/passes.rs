//! The pump's place in each run: passes, their cursors, steps and rate budgets.

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

/// Why the pump goes over a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, sqlx::Type)]
#[sqlx(type_name = "pass_kind", rename_all = "snake_case")]
pub enum PassKind {
    /// Releases every item once.
    First,
    /// Releases failed or unknown items again.
    Replay,
    /// Settles what nobody has begun to send.
    Cancel,
}

impl InLedger for PassKind {
    type Sql = Self;
}

/// A run's present pass.
#[derive(Clone, Debug)]
pub struct Pass {
    /// The run.
    pub run_id: Uuid,
    /// Passes count from 1.
    pub number: i32,
    /// What it is for; none: something that a later version knows.
    pub kind: Option<PassKind>,
    /// replay: the states asked for.
    pub states: Vec<ItemState>,
    /// replay: the error asked for; none: all.
    pub error: Option<String>,
    /// Items up to this position are released.
    pub cursor: i32,
    /// The cursor before the newest chunk.
    pub chunk_start: i32,
    /// The step that comes next.
    pub step: i32,
    /// The next item may be released from this moment on, under a rate limit.
    pub next_due_at: DateTime<Utc>,
    /// When it began.
    pub created_at: DateTime<Utc>,
    /// When it had gone over the whole run.
    pub done_at: Option<DateTime<Utc>>,
    /// Items it has released.
    pub released: i32,
    /// When the newest chunk was released.
    pub chunk_at: DateTime<Utc>,
    /// How fast the run went when the pump last looked.
    pub flow: Flow,
}

/// What the pump has to know of a run besides its pass.
#[derive(Clone, Copy, Debug)]
pub struct Situation {
    /// What a person wants of it.
    pub wanted: Wanted,
    /// Its rate limit.
    pub sends_per_second: Option<i32>,
    /// Its counters.
    pub counters: Counters,
    /// What its first pass has released.
    pub first_released: i32,
    /// Sends that all the workers that live may have in flight.
    pub permits: i32,
    /// How many they have, at their last heartbeats.
    pub in_flight: i32,
    /// The database's clock.
    pub now: DateTime<Utc>,
}

/// An item for the pump.
#[derive(Clone, Copy, Debug)]
pub struct Item {
    /// The item.
    pub id: i64,
    /// Its place in the run.
    pub position: i32,
    /// The attempt its state speaks of.
    pub attempt: i32,
    /// Its state.
    pub state: ItemState,
    /// The tries used of its budget.
    pub tries: i16,
    /// How often it was asked for again.
    pub replays: i16,
    /// See [`ItemMessage::impersonal`].
    pub impersonal: bool,
}

/// Locks a run for the pump until the transaction ends, making its first pass if need be, and returns the present pass.
/// None: there is no such run.
///
/// # Errors
/// The database's.
pub async fn lock(conn: &mut PgConnection, run_id: Uuid) -> sqlx::Result<Option<Pass>> {
    sqlx::query!(
        "INSERT INTO run_passes (run_id, number, kind) SELECT id, 1, 'first' FROM runs WHERE id = $1 ON CONFLICT DO NOTHING",
        run_id
    )
    .execute(&mut *conn)
    .await?;
    // The first pass stands for the run: locking the newest one would miss one that is begun meanwhile.
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

/// None: one of them is a later version's.
fn known(states: Vec<Stored<ItemState>>) -> Option<Vec<ItemState>> {
    states.into_iter().map(Stored::known).collect()
}

/// Begins the replay that comes after the pass `last`, and returns its number. The caller holds the run's lock, and has
/// seen that the command has not begun one before.
///
/// # Errors
/// The database's.
pub async fn begin_replay(conn: &mut PgConnection, last: &Pass, replay: &Replay) -> sqlx::Result<i32> {
    begin(conn, last, PassKind::Replay, replay.command_id, &replay.states, replay.error.as_deref()).await
}

/// Begins a pass that settles everything open, in the same way.
///
/// # Errors
/// The database's.
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

/// Whether a command has begun a pass already, and which.
///
/// # Errors
/// The database's.
pub async fn begun_by(conn: &mut PgConnection, command_id: Uuid) -> sqlx::Result<Option<i32>> {
    sqlx::query_scalar!("SELECT number FROM run_passes WHERE command_id = $1", command_id).fetch_optional(conn).await
}

/// The run's wishes and counters, and who is there to send. None: there is no such run.
///
/// # Errors
/// The database's.
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

/// The items that the pass, which is of this kind, releases next, in order of position.
///
/// # Errors
/// The database's.
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

/// Whether items of a replay's newest chunk are still shown as they were before: their results are on the way.
///
/// # Errors
/// The database's.
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
    /// How many there were.
    pub released: i32,
    /// The next item may be released from this moment on.
    pub next_due_at: DateTime<Utc>,
    /// How fast the run goes.
    pub flow: Flow,
}

/// Moves the pass on by one step. The caller has published the chunk and the message for the next step by then.
///
/// # Errors
/// The database's.
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

/// How many runs have something to send and are not paused: they share the installation's rate limit.
///
/// # Errors
/// The database's.
pub async fn count_running(conn: &mut PgConnection) -> sqlx::Result<i64> {
    sqlx::query_scalar!(
        r#"SELECT count(*) AS "count!" FROM run_progress p JOIN runs r ON r.id = p.run_id
           WHERE p.finished_at IS NULL AND r.wanted = 'running' AND NOT r.hidden"#
    )
    .fetch_one(conn)
    .await
}

/// Locks the rate budget of the installation until the transaction ends, and returns from when on the next item may be
/// released.
///
/// # Errors
/// The database's.
pub async fn lock_budget(conn: &mut PgConnection) -> sqlx::Result<DateTime<Utc>> {
    sqlx::query_scalar!("SELECT next_due_at FROM sending_budget FOR UPDATE").fetch_one(conn).await
}

/// Spends of the rate budget of the installation. The caller has locked it.
///
/// # Errors
/// The database's.
pub async fn spend_budget(conn: &mut PgConnection, next_due_at: DateTime<Utc>) -> sqlx::Result<()> {
    sqlx::query!("UPDATE sending_budget SET next_due_at = $1", next_due_at).execute(conn).await?;
    Ok(())
}

/// Notes that the pass has gone over the whole run.
///
/// # Errors
/// The database's.
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

/// A replay that has gone over the whole run, and whose dead letters may still be on their queue.
#[derive(Clone, Debug)]
pub struct Replayed {
    /// The run.
    pub run_id: Uuid,
    /// The pass.
    pub number: i32,
    /// The states asked for.
    pub states: Vec<ItemState>,
    /// The error asked for; none: all.
    pub error: Option<String>,
    /// When it began.
    pub created_at: DateTime<Utc>,
}

/// All such replays.
///
/// # Errors
/// The database's.
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

/// Any number will do, as long as it is the same for all processes.
const TIDYING: i64 = 0x6d61_696c_7275_6e02;

/// Makes the connection the only one that takes dead letters off, until it is closed. False: there is one.
///
/// # Errors
/// The database's.
pub async fn lock_tidying(conn: &mut PgConnection) -> sqlx::Result<bool> {
    sqlx::query_scalar!(r#"SELECT pg_try_advisory_lock($1) AS "locked!""#, TIDYING).fetch_one(conn).await
}

/// Notes that the dead letters of these replays are off their queue.
///
/// # Errors
/// The database's.
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

/// Notes that a message for this pass goes round, though it releases nothing yet. At most once a second, since a waiting
/// run comes by ten times as often.
///
/// # Errors
/// The database's.
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

/// An item whose message senders may have dropped, since the run was paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dropped {
    /// The attempt that the item waits for.
    pub next: ItemMessage,
    /// Its place in the run.
    pub position: i32,
}

/// The released and open items of a run, behind position `after`, whose next attempt is due and that nobody has claimed.
///
/// Progress writes down when an attempt is due a little after the message is on its retry queue, so what is due within
/// `soon` may have been dropped as well.
///
/// # Errors
/// The database's.
pub async fn dropped_items(
    conn: &mut PgConnection,
    run_id: Uuid,
    soon: Duration,
    after: i32,
    limit: i64,
) -> sqlx::Result<Vec<Dropped>> {
    let rows = sqlx::query!(
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
    Ok(rows
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
            Dropped { next: present.awaited(row.state.into()), position: row.position }
        })
        .collect())
}
