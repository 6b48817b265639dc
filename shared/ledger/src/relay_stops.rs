//! Relays that are stopped because of many unexplained refusals, until an operator answers whose fault they were.

use chrono::{DateTime, Utc};
use sqlx::{Connection as _, PgConnection};
use uuid::Uuid;

use super::{outbox, stored::Stored};
use crate::stored::InLedger;
use mailrun_core::message::{Command, RunMessage};

/// Whose fault the refusals were.
#[derive(Clone, Copy, Debug, PartialEq, Eq, sqlx::Type)]
#[sqlx(type_name = "relay_fault", rename_all = "snake_case")]
pub enum Fault {
    /// The relay refused the sender: the recipients are retried.
    Us,
    /// Each recipient was refused for its own reason.
    Them,
}

impl InLedger for Fault {
    type Sql = Self;
}

/// A relay stop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RelayStop {
    /// Its number: higher is newer.
    pub number: i64,
    /// The relay, as `host:port`.
    pub relay: String,
    /// When.
    pub stopped_at: DateTime<Utc>,
    /// The counts, and the relay's last reply.
    pub reason: String,
    /// The normalized texts of the refusals.
    pub alike: Vec<String>,
    /// The runs paused with it.
    pub runs: Vec<Uuid>,
    /// The answer. `None`: the relay is still stopped.
    pub fault: Option<Stored<Fault>>,
}

/// Stops a relay and pauses those of these runs that are running. If the relay is already stopped, the runs are added to its stop.
pub async fn stop(
    conn: &mut PgConnection,
    relay: &str,
    reason: &str,
    alike: &[String],
    runs: &[Uuid],
) -> sqlx::Result<()> {
    let mut tx = conn.begin().await?;
    let paused = sqlx::query_scalar!(
        "WITH going_on AS (SELECT id FROM runs WHERE id = ANY($1) AND wanted = 'running' ORDER BY id FOR UPDATE)
         UPDATE runs SET wanted = 'paused' FROM going_on WHERE runs.id = going_on.id RETURNING runs.id",
        runs
    )
    .fetch_all(&mut *tx)
    .await?;
    sqlx::query!(
        "INSERT INTO relay_stops (relay, reason, alike, runs) VALUES ($1, $2, $3, $4)
         ON CONFLICT (relay) WHERE answered_at IS NULL
         DO UPDATE SET runs = relay_stops.runs || excluded.runs, alike = relay_stops.alike || excluded.alike",
        relay,
        reason,
        alike,
        &paused,
    )
    .execute(&mut *tx)
    .await?;
    tx.commit().await
}

/// The stopped relays, and those answered within the last week; oldest first.
pub async fn recent(conn: &mut PgConnection) -> sqlx::Result<Vec<RelayStop>> {
    sqlx::query_as!(
        RelayStop,
        r#"SELECT number, relay, stopped_at, reason, alike, runs, fault AS "fault: Stored<Fault>" FROM relay_stops
           WHERE answered_at IS NULL OR answered_at > now() - interval '7 days' ORDER BY number"#
    )
    .fetch_all(conn)
    .await
}

/// Answers whose fault the refusals were: the relay and the runs paused with it continue. `number`: `None` for all stopped
/// relays. Returns how many stops were answered.
pub async fn answer(conn: &mut PgConnection, number: Option<i64>, fault: Fault) -> sqlx::Result<usize> {
    let mut tx = conn.begin().await?;
    let answered = sqlx::query_scalar!(
        "UPDATE relay_stops SET fault = $2, answered_at = now()
         WHERE answered_at IS NULL AND ($1::bigint IS NULL OR number = $1) RETURNING runs",
        number,
        fault as _,
    )
    .fetch_all(&mut *tx)
    .await?;
    let runs: Vec<Uuid> = answered.iter().flatten().copied().collect();
    let resumed = sqlx::query_scalar!(
        "WITH paused AS (SELECT id FROM runs WHERE id = ANY($1) AND wanted = 'paused' ORDER BY id FOR UPDATE)
         UPDATE runs SET wanted = 'running' FROM paused WHERE runs.id = paused.id RETURNING runs.id",
        &runs
    )
    .fetch_all(&mut *tx)
    .await?;
    for run_id in resumed {
        outbox::put(&mut tx, &RunMessage { run_id, command: Command::Resume }).await?;
    }
    tx.commit().await?;
    Ok(answered.len())
}
