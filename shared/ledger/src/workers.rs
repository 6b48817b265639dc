//! Heartbeats: each worker process writes only its own row.

use std::time::Duration;

use chrono::{DateTime, Utc};
use mailrun_core::{
    agreement::{Agreement, Difference},
    observer::Beat,
};
use sqlx::{Connection as _, PgConnection, types::Json};

/// What a worker records when it registers.
#[derive(Clone, Debug)]
pub struct Registration<'a> {
    /// Its roles, separated by commas.
    pub roles: &'a str,
    /// Its host.
    pub host: &'a str,
    /// Its process id.
    pub pid: i32,
    /// Its number of permits.
    pub permits: i32,
    /// The settings that must be equal in all workers.
    pub settings: &'a Agreement,
}

/// A live worker with different settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disagreeing {
    /// Its heartbeat.
    pub beat: Beat,
    /// Its host.
    pub host: String,
    /// Its process id.
    pub pid: i32,
    /// How long it may be silent before others declare it dead.
    pub dead_after: Duration,
    /// The differences.
    pub differences: Vec<Difference>,
}

/// Serializes registrations, so that two workers with different settings do not both find themselves alone.
const REGISTRATION_LOCK: i64 = 0x6d61_696c_726f_7367;

/// Registers this process and returns its id, which is never reused. Returns the live workers with different settings instead
/// if there are any. Workers without recorded or readable settings are not compared.
pub async fn register(
    conn: &mut PgConnection,
    worker: &Registration<'_>,
) -> sqlx::Result<Result<i64, Vec<Disagreeing>>> {
    let mut tx = conn.begin().await?;
    sqlx::query!("SELECT pg_advisory_xact_lock($1)", REGISTRATION_LOCK).fetch_one(&mut *tx).await?;
    let others = sqlx::query!(
        r#"SELECT w.id, w.heartbeat_at, w.host, w.pid, w.settings AS "settings!"
           FROM workers w JOIN live_workers l ON l.id = w.id WHERE w.settings IS NOT NULL"#
    )
    .fetch_all(&mut *tx)
    .await?;
    let disagreeing: Vec<Disagreeing> = others
        .into_iter()
        .filter_map(|row| {
            let theirs: Agreement = serde_json::from_value(row.settings).ok()?;
            let differences = worker.settings.differences(&theirs);
            (!differences.is_empty()).then(|| Disagreeing {
                beat: Beat { worker_id: row.id, at: row.heartbeat_at },
                host: row.host,
                pid: row.pid,
                dead_after: Duration::from_millis(theirs.dead_after_ms),
                differences,
            })
        })
        .collect();
    if !disagreeing.is_empty() {
        return Ok(Err(disagreeing));
    }
    let id = sqlx::query_scalar!(
        "INSERT INTO workers (roles, host, pid, permits, settings) VALUES ($1, $2, $3, $4, $5) RETURNING id",
        worker.roles,
        worker.host,
        worker.pid,
        worker.permits,
        Json(worker.settings) as _,
    )
    .fetch_one(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(Ok(id))
}

/// The heartbeats of all workers that have neither stopped nor been declared dead.
pub async fn beats(conn: &mut PgConnection) -> sqlx::Result<Vec<Beat>> {
    sqlx::query_as!(Beat, r#"SELECT id AS "worker_id!", heartbeat_at AS "at!" FROM live_workers"#).fetch_all(conn).await
}

/// Declares workers dead whose heartbeat has not changed since it was seen. Returns those that are dead now.
pub async fn declare_dead(conn: &mut PgConnection, beats: &[Beat]) -> sqlx::Result<Vec<i64>> {
    let (ids, at): (Vec<i64>, Vec<DateTime<Utc>>) = beats.iter().map(|beat| (beat.worker_id, beat.at)).unzip();
    sqlx::query_scalar!(
        "UPDATE workers w SET died_at = clock_timestamp() FROM unnest($1::bigint[], $2::timestamptz[]) AS seen (id, at)
         WHERE w.id = seen.id AND w.heartbeat_at = seen.at AND w.stopped_at IS NULL AND w.died_at IS NULL
         RETURNING w.id",
        &ids,
        &at,
    )
    .fetch_all(conn)
    .await
}

/// Writes a heartbeat: that the worker lives, how often it has rebuilt a consumer's connection, why and for how long its gate
/// is closed, and which messages RabbitMQ rejects.
///
/// False: the row is gone, or the worker was declared dead. Others act on that, so the worker must end.
pub async fn heartbeat(
    conn: &mut PgConnection,
    worker_id: i64,
    in_flight: i32,
    rebuilds: i32,
    closed: Option<(String, Duration)>,
    rejected: Option<String>,
) -> sqlx::Result<bool> {
    let (reason, seconds) = closed.map(|(reason, time)| (reason, time.as_secs_f64())).unzip();
    let written = sqlx::query!(
        "UPDATE workers SET heartbeat_at = now(), in_flight = $2, rebuilds = $3, lane_reason = $4,
                    lane_until = now() + make_interval(secs => $5), rejected = $6
             WHERE id = $1 AND died_at IS NULL",
        worker_id,
        in_flight,
        rebuilds,
        reason,
        seconds,
        rejected,
    )
    .execute(conn)
    .await?;
    Ok(written.rows_affected() == 1)
}

/// Records that the worker has ended. Claims that it leaves open become `unknown`.
pub async fn stop(conn: &mut PgConnection, worker_id: i64, in_flight: i32) -> sqlx::Result<()> {
    sqlx::query!(
        "UPDATE workers SET heartbeat_at = now(), stopped_at = now(), in_flight = $2, lane_until = NULL, rejected = NULL
         WHERE id = $1",
        worker_id,
        in_flight
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// A worker's row.
#[derive(Clone, Debug, PartialEq)]
pub struct Worker {
    /// Its id.
    pub id: i64,
    /// Its roles, separated by commas.
    pub roles: String,
    /// Its host.
    pub host: String,
    /// Its process id.
    pub pid: i32,
    /// Whether it ended cleanly.
    pub stopped: bool,
    /// Whether it was declared dead.
    pub dead: bool,
    /// Seconds since its last heartbeat.
    pub silent_s: f64,
    /// Why its gate is closed. `None`: it is open.
    pub closed: Option<String>,
    /// The queues that reject its messages, and why. `None`: none does.
    pub rejected: Option<String>,
}

/// All workers, past and present, oldest first.
pub async fn all(conn: &mut PgConnection) -> sqlx::Result<Vec<Worker>> {
    sqlx::query_as!(
        Worker,
        r#"SELECT id, roles, host, pid, stopped_at IS NOT NULL AS "stopped!", died_at IS NOT NULL AS "dead!",
                  extract(epoch FROM clock_timestamp() - heartbeat_at)::float8 AS "silent_s!",
                  CASE WHEN lane_until > clock_timestamp() THEN coalesce(lane_reason, '') END AS closed, rejected
           FROM workers ORDER BY id"#
    )
    .fetch_all(conn)
    .await
}
