//! Signs of life: each worker process writes its own row, and nobody else's.

use std::time::Duration;

use sqlx::PgConnection;

/// Registers this process and returns its id, which is never used again. `permits` is how many sends it may have in
/// flight.
///
/// # Errors
/// The database's.
pub async fn register(conn: &mut PgConnection, roles: &str, host: &str, pid: i32, permits: i32) -> sqlx::Result<i64> {
    sqlx::query_scalar!(
        "INSERT INTO workers (roles, host, pid, permits) VALUES ($1, $2, $3, $4) RETURNING id",
        roles,
        host,
        pid,
        permits
    )
    .fetch_one(conn)
    .await
}

/// Says that the worker lives, how often it has built a consumer's connection anew, and why and for how long it sends nothing,
/// if so.
///
/// # Errors
/// The database's; `RowNotFound` if the worker was silent for so long that its row is pruned.
pub async fn heartbeat(
    conn: &mut PgConnection,
    worker_id: i64,
    in_flight: i32,
    rebuilds: i32,
    closed: Option<(String, Duration)>,
) -> sqlx::Result<()> {
    let (reason, seconds) = closed.map(|(reason, time)| (reason, time.as_secs_f64())).unzip();
    let written = sqlx::query!(
        "UPDATE workers SET heartbeat_at = now(), in_flight = $2, rebuilds = $3, lane_reason = $4,
                    lane_until = now() + make_interval(secs => $5)
             WHERE id = $1",
        worker_id,
        in_flight,
        rebuilds,
        reason,
        seconds,
    )
    .execute(conn)
    .await?;
    if written.rows_affected() == 1 { Ok(()) } else { Err(sqlx::Error::RowNotFound) }
}

/// Says that the worker has ended. A claim that it leaves open is `unknown` from now on.
///
/// # Errors
/// The database's.
pub async fn stop(conn: &mut PgConnection, worker_id: i64, in_flight: i32) -> sqlx::Result<()> {
    sqlx::query!(
        "UPDATE workers SET heartbeat_at = now(), stopped_at = now(), in_flight = $2, lane_until = NULL WHERE id = $1",
        worker_id,
        in_flight
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// A worker process, as its row tells.
#[derive(Clone, Debug, PartialEq)]
pub struct Worker {
    /// Its id.
    pub id: i64,
    /// Its roles, with commas between them.
    pub roles: String,
    /// The machine it is on.
    pub host: String,
    /// Its process there.
    pub pid: i32,
    /// Whether it has ended in good order.
    pub stopped: bool,
    /// Seconds since its last sign of life.
    pub silent_s: f64,
    /// Why it sends nothing at present; none: it may.
    pub closed: Option<String>,
}

/// All of them, past and present, oldest first.
///
/// # Errors
/// The database's.
pub async fn all(conn: &mut PgConnection) -> sqlx::Result<Vec<Worker>> {
    sqlx::query_as!(
        Worker,
        r#"SELECT id, roles, host, pid, stopped_at IS NOT NULL AS "stopped!",
                  extract(epoch FROM clock_timestamp() - heartbeat_at)::float8 AS "silent_s!",
                  CASE WHEN lane_until > clock_timestamp() THEN coalesce(lane_reason, '') END AS closed
           FROM workers ORDER BY id"#
    )
    .fetch_all(conn)
    .await
}
