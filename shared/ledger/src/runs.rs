//! Runs as shown on pages, and what a person may request.

use chrono::{DateTime, TimeDelta, Utc};
use serde::Serialize;
use sqlx::{PgConnection, PgPool, types::Json};
use uuid::Uuid;

use crate::{
    outbox,
    stored::{SqlState, SqlWanted, Stored},
    submit::{InvalidEntry, Tally},
};
use mailrun_core::{
    item::ItemState,
    message::{Command, Replay, RunMessage},
    run::{Counters, Phase, Wanted},
};

/// The period over which the current rate is measured, in seconds.
const RATE_OVER_S: f64 = 5.0;

/// A run's progress at one moment.
#[derive(Clone, Debug)]
pub struct Progress {
    /// The run.
    pub run_id: Uuid,
    /// The kind of its job.
    pub kind: String,
    /// When it was accepted.
    pub created_at: DateTime<Utc>,
    /// Its wanted state.
    pub wanted: Wanted,
    /// The wanted state, if only a later version knows it: this version leaves the run alone.
    pub later: Option<String>,
    /// The number of items in each state.
    pub counters: Counters,
    /// When it was accepted, or restarted by a replay.
    pub started_at: DateTime<Utc>,
    /// When a counter last moved.
    pub updated_at: DateTime<Utc>,
    /// When the last open item was settled.
    pub finished_at: Option<DateTime<Utc>>,
    /// Items settled per second, recently.
    pub rate: f64,
    /// Whether the ledger was restored from a backup that contains the run.
    pub restored: bool,
    /// Why no worker sends at present: the mail server's reply.
    pub held_up: Option<String>,
    /// The database's clock.
    pub now: DateTime<Utc>,
}

impl Progress {
    /// The phase of the run.
    #[must_use]
    pub fn phase(&self) -> Phase {
        Phase::of(self.wanted, &self.counters)
    }

    /// How long it has been running, or how long it took.
    #[must_use]
    pub fn elapsed(&self) -> TimeDelta {
        (self.finished_at.unwrap_or(self.now) - self.started_at).max(TimeDelta::zero())
    }
}

/// An item that needs a person's attention.
#[derive(Clone, Debug, Serialize)]
pub struct Trouble {
    /// Its position in the run, from 1.
    pub position: i32,
    /// The recipient as written in the list, or the data of an item about no person.
    pub email: String,
    /// `failed` or `unknown`.
    pub state: Stored<ItemState>,
    /// The number of attempts.
    pub attempts: i32,
    /// The error.
    pub error: Option<String>,
    /// When it was settled.
    pub finished_at: Option<DateTime<Utc>>,
}

/// One run's progress. `None`: there is no such run.
pub async fn progress(pool: &PgPool, run_id: Uuid) -> sqlx::Result<Option<Progress>> {
    Ok(list_where(pool, Some(run_id), None, 1).await?.pop())
}

/// The newest runs, optionally only those before a moment.
pub async fn list(pool: &PgPool, before: Option<DateTime<Utc>>, limit: i64) -> sqlx::Result<Vec<Progress>> {
    list_where(pool, None, before, limit).await
}

async fn list_where(
    pool: &PgPool,
    run_id: Option<Uuid>,
    before: Option<DateTime<Utc>>,
    limit: i64,
) -> sqlx::Result<Vec<Progress>> {
    let rows = sqlx::query!(
        r#"SELECT r.id, r.kind, r.created_at, r.restored_at IS NOT NULL AS "restored!", r.wanted AS "wanted: Stored<Wanted>", p.total AS "total!", p.counts AS "counts!",
                  p.started_at AS "started_at!", p.updated_at AS "updated_at!", p.finished_at, clock_timestamp() AS "now!",
                  coalesce((SELECT (max(s.settled) - min(s.settled))::float8
                                   / greatest(extract(epoch FROM max(s.at) - min(s.at))::float8, 1)
                            FROM run_samples s
                            WHERE s.run_id = r.id AND s.at > clock_timestamp() - make_interval(secs => $4)), 0) AS "rate!",
                  (SELECT max(w.lane_reason) FROM live_workers w
                   WHERE w.lane_until > clock_timestamp()) AS held_up
           FROM (SELECT * FROM runs
                 WHERE NOT hidden AND ($1::uuid IS NULL OR id = $1) AND ($2::timestamptz IS NULL OR created_at < $2)
                 ORDER BY created_at DESC, id DESC LIMIT $3) r
           JOIN run_counters p ON p.run_id = r.id
           ORDER BY r.created_at DESC, r.id DESC"#,
        run_id,
        before,
        limit,
        RATE_OVER_S,
    )
    .fetch_all(pool)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| Progress {
            run_id: row.id,
            kind: row.kind,
            created_at: row.created_at,
            later: row.wanted.later().map(str::to_owned),
            wanted: row.wanted.acted_on(),
            counters: Counters::new(row.total, &row.counts),
            started_at: row.started_at,
            updated_at: row.updated_at,
            finished_at: row.finished_at,
            rate: row.rate,
            restored: row.restored,
            held_up: row.held_up.filter(|_| row.finished_at.is_none()),
            now: row.now,
        })
        .collect())
}

/// The contents of the list that a run was made from. `None`: there is no such run.
pub async fn tally(pool: &PgPool, run_id: Uuid) -> sqlx::Result<Option<Tally>> {
    let row = sqlx::query!(
        r#"SELECT total, already_invited, already_failed, suppressed, repeated, invalid,
                  invalid_entries AS "invalid_entries: Json<Vec<InvalidEntry>>"
           FROM runs WHERE id = $1"#,
        run_id
    )
    .fetch_optional(pool)
    .await?;
    Ok(row.map(|row| Tally {
        accepted: row.total,
        already_invited: row.already_invited,
        already_failed: row.already_failed,
        suppressed: row.suppressed,
        repeated: row.repeated,
        invalid: row.invalid,
        invalid_entries: row.invalid_entries.0,
    }))
}

/// A run's rate limit. `None`: it has none.
pub async fn rate_limit(pool: &PgPool, run_id: Uuid) -> sqlx::Result<Option<i32>> {
    let limit = sqlx::query_scalar("SELECT sends_per_second FROM runs WHERE id = $1").bind(run_id);
    Ok(limit.fetch_optional(pool).await?.flatten())
}

/// The kinds of these runs, including pruned runs whose items are not all deleted. Missing runs do not exist.
pub async fn kinds(conn: &mut PgConnection, run_ids: &[Uuid]) -> sqlx::Result<Vec<(Uuid, String)>> {
    let rows = sqlx::query!(
        r#"SELECT id AS "id!", kind AS "kind!" FROM runs WHERE id = ANY($1)
           UNION ALL SELECT run_id, kind FROM pruned_runs WHERE run_id = ANY($1)"#,
        run_ids,
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|row| (row.id, row.kind)).collect())
}

/// A run's subject and text.
///
/// # Errors
/// `RowNotFound` if there is no such run.
pub async fn text(conn: &mut PgConnection, run_id: Uuid) -> sqlx::Result<(String, String)> {
    let row = sqlx::query!("SELECT subject, body FROM runs WHERE id = $1", run_id).fetch_one(conn).await?;
    Ok((row.subject, row.body))
}

/// The failed and unknown items of a run after a position.
pub async fn troubles(pool: &PgPool, run_id: Uuid, after: i32, limit: i64) -> sqlx::Result<Vec<Trouble>> {
    sqlx::query_as!(
        Trouble,
        r#"SELECT i.position, coalesce(i.typed, u.email, left(i.data::text, 200), '') AS "email!", i.state AS "state: Stored<ItemState>", i.attempt AS attempts, i.error, i.finished_at
           FROM run_items i LEFT JOIN users u ON u.id = i.user_id
           WHERE i.run_id = $1 AND i.position > $2 AND i.troubled
           ORDER BY i.position LIMIT $3"#,
        run_id,
        after,
        limit
    )
    .fetch_all(pool)
    .await
}

/// The errors of failed and unknown items, most frequent first: state, error, count.
pub async fn dead_by_error(pool: &PgPool) -> sqlx::Result<Vec<(Stored<ItemState>, String, i64)>> {
    let rows = sqlx::query!(
        r#"SELECT state AS "state: Stored<ItemState>", coalesce(error, '') AS "error!", count(*) AS "count!"
           FROM run_items i JOIN runs r ON r.id = i.run_id AND NOT r.hidden
           WHERE troubled GROUP BY state, error ORDER BY count(*) DESC LIMIT 50"#
    )
    .fetch_all(pool)
    .await?;
    Ok(rows.into_iter().map(|row| (row.state, row.error, row.count)).collect())
}

/// The result of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Granted {
    /// Committed. It will be carried out.
    Yes,
    /// Not possible in the run's present state, for example because it has ended.
    NotNow,
    /// There is no such run.
    NoSuchRun,
}

/// Those of these runs that are paused or cancelled.
pub async fn stopped(conn: &mut PgConnection, run_ids: &[Uuid]) -> sqlx::Result<Vec<Uuid>> {
    sqlx::query_scalar!("SELECT id FROM runs WHERE id = ANY($1) AND wanted <> 'running'", run_ids).fetch_all(conn).await
}

/// Pauses or resumes a run. Resuming also commits a command that republishes what senders have dropped in the meantime.
pub async fn set_paused(pool: &PgPool, run_id: Uuid, paused: bool) -> sqlx::Result<Granted> {
    let (from, to) = if paused { (Wanted::Running, Wanted::Paused) } else { (Wanted::Paused, Wanted::Running) };
    let mut tx = pool.begin().await?;
    let changed = sqlx::query!(
        "UPDATE runs SET wanted = $2 WHERE id = $1 AND wanted = $3",
        run_id,
        SqlWanted::from(to) as _,
        SqlWanted::from(from) as _
    )
    .execute(&mut *tx)
    .await?;
    let changed = changed.rows_affected() == 1;
    if changed {
        // From now on this person decides when the run continues, not the operator who answers for a stopped relay.
        sqlx::query!(
            "UPDATE relay_stops SET runs = array_remove(runs, $1) WHERE answered_at IS NULL AND $1 = ANY(runs)",
            run_id
        )
        .execute(&mut *tx)
        .await?;
    }
    if changed && !paused {
        outbox::put(&mut tx, &RunMessage { run_id, command: Command::Resume }).await?;
    }
    let granted = granted(&mut tx, run_id, changed).await?;
    tx.commit().await?;
    Ok(granted)
}

/// Cancels a run permanently. The wanted state and the command that settles its open items are committed together.
pub async fn cancel(pool: &PgPool, run_id: Uuid) -> sqlx::Result<Granted> {
    let mut tx = pool.begin().await?;
    let changed = sqlx::query!(
        "UPDATE runs SET wanted = 'cancelled' WHERE id = $1 AND wanted <> 'cancelled'
           AND EXISTS (SELECT FROM run_progress p WHERE p.run_id = $1 AND p.finished_at IS NULL)",
        run_id
    )
    .execute(&mut *tx)
    .await?;
    if changed.rows_affected() == 1 {
        let command = Command::Cancel { command_id: Uuid::new_v4() };
        outbox::put(&mut tx, &RunMessage { run_id, command }).await?;
    }
    let granted = granted(&mut tx, run_id, changed.rows_affected() == 1).await?;
    tx.commit().await?;
    Ok(granted)
}

async fn granted(conn: &mut PgConnection, run_id: Uuid, changed: bool) -> sqlx::Result<Granted> {
    if changed {
        return Ok(Granted::Yes);
    }
    let exists = sqlx::query_scalar!(r#"SELECT EXISTS (SELECT FROM runs WHERE id = $1) AS "exists!""#, run_id)
        .fetch_one(conn)
        .await?;
    Ok(if exists { Granted::NotNow } else { Granted::NoSuchRun })
}

/// Which failed or unknown items to replay.
#[derive(Clone, Debug)]
pub struct ReplayWish {
    /// Only items of this run; `None` for all runs.
    pub run_id: Option<Uuid>,
    /// `failed`, `unknown` or both.
    pub states: Vec<ItemState>,
    /// Only items with this error; `None` for all.
    pub error: Option<String>,
    /// Distinguishes a repeated request (a second click) from a new one.
    pub token: Uuid,
    /// Whether to include runs that were restored from a backup, whose failed items may have been sent since.
    pub restored: bool,
}

/// The result of a replay request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Replayed {
    /// Runs that restart.
    pub runs: usize,
    /// Runs restored from a backup, which the request did not confirm.
    pub unconfirmed: usize,
}

/// Requests a replay of every run with matching items. Cancelled runs stay cancelled.
pub async fn replay(pool: &PgPool, wish: &ReplayWish) -> sqlx::Result<Replayed> {
    let mut tx = pool.begin().await?;
    let matching = sqlx::query!(
        r#"SELECT DISTINCT i.run_id, r.restored_at IS NOT NULL AS "restored!" FROM run_items i JOIN runs r ON r.id = i.run_id
         WHERE ($1::uuid IS NULL OR i.run_id = $1) AND i.troubled AND i.state = ANY($2)
           AND ($3::text IS NULL OR i.error = $3) AND r.wanted <> 'cancelled'
           AND NOT r.hidden"#,
        wish.run_id,
        SqlState::all(&wish.states) as _,
        wish.error,
    )
    .fetch_all(&mut *tx)
    .await?;
    let mut replayed = Replayed::default();
    let mut runs = Vec::new();
    for run in matching {
        if run.restored && !wish.restored {
            replayed.unconfirmed += 1;
        } else {
            runs.push(run.run_id);
        }
    }
    // Runs that are being pruned right now are gone. The others stay until the replay has begun.
    let runs = sqlx::query_scalar!(
        "SELECT run_id FROM run_progress WHERE run_id = ANY($1) ORDER BY run_id FOR KEY SHARE",
        &runs
    )
    .fetch_all(&mut *tx)
    .await?;
    replayed.runs = runs.len();
    for run_id in &runs {
        let replay = Replay {
            command_id: Uuid::new_v5(&wish.token, run_id.as_bytes()),
            states: wish.states.clone(),
            error: wish.error.clone(),
        };
        outbox::put(&mut tx, &RunMessage { run_id: *run_id, command: Command::Replay(replay) }).await?;
    }
    tx.commit().await?;
    Ok(replayed)
}

/// How many people of a mail domain have been emailed. The demo's final check, directly on the table.
pub async fn emailed_in_domain(pool: &PgPool, domain: &str) -> sqlx::Result<i64> {
    sqlx::query_scalar!(
        r#"SELECT count(*) AS "count!" FROM users WHERE emailed_at IS NOT NULL AND split_part(email, '@', 2) = $1"#,
        domain
    )
    .fetch_one(pool)
    .await
}
