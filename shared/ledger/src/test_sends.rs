//! Single mails that somebody sends to look at an invitation. Nobody counts as invited by one.

use std::time::Duration;

use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

use crate::{
    outbox,
    people::Tombs,
    stored::{InLedger, Stored},
    suppressions::{self, Reason},
};
use mailrun_core::message::TestMessage;

/// What a person wants to look at.
#[derive(Clone, Copy, Debug)]
pub struct NewTest<'a> {
    /// Where it goes, in lower case.
    pub email: &'a str,
    /// The invitation's subject.
    pub subject: &'a str,
    /// The invitation's text.
    pub body: &'a str,
}

/// What became of the wish.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked {
    /// It is committed, and will be sent once. The same is under way already, after a second click.
    Accepted(Uuid),
    /// Nobody writes to that address any more.
    Suppressed(Stored<Reason>),
}

/// Takes a test in: its row, and the message that has it sent, in one transaction.
///
/// # Errors
/// The database's. Nothing is written then.
pub async fn ask(pool: &PgPool, test: NewTest<'_>) -> sqlx::Result<Asked> {
    let mut tx = pool.begin().await?;
    // The suppression of an erased person stands under the tombstone.
    let tombstone = Tombs::read(&mut tx).await?.of(test.email);
    for email in [test.email, tombstone.as_str()] {
        if let Some(reason) = suppressions::reason(&mut tx, email).await? {
            return Ok(Asked::Suppressed(reason));
        }
    }
    if let Some(same) = under_way(&mut tx, test).await? {
        return Ok(Asked::Accepted(same));
    }
    let test_id = Uuid::new_v4();
    sqlx::query!(
        "INSERT INTO test_sends (id, email, subject, body) VALUES ($1, $2, $3, $4)",
        test_id,
        test.email,
        test.subject,
        test.body,
    )
    .execute(&mut *tx)
    .await?;
    outbox::put(&mut tx, &TestMessage { test_id }).await?;
    tx.commit().await?;
    Ok(Asked::Accepted(test_id))
}

/// The same test, if it waits or has just been taken. One that is over may be asked for again: something may have been mended.
async fn under_way(conn: &mut PgConnection, test: NewTest<'_>) -> sqlx::Result<Option<Uuid>> {
    sqlx::query_scalar!(
        "SELECT id FROM test_sends
         WHERE finished_at IS NULL AND (claimed_at IS NULL OR claimed_at > now() - interval '1 minute')
           AND email = $1 AND subject = $2 AND body = $3
         ORDER BY created_at DESC LIMIT 1",
        test.email,
        test.subject,
        test.body,
    )
    .fetch_optional(conn)
    .await
}

/// A test to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claimed {
    /// Where it goes.
    pub email: String,
    /// The invitation's subject.
    pub subject: String,
    /// The invitation's text.
    pub body: String,
}

/// Claims a test for a worker. None: somebody has it, or had it; or it is pruned.
///
/// # Errors
/// The database's.
pub async fn claim(conn: &mut PgConnection, test_id: Uuid, worker_id: i64) -> sqlx::Result<Option<Claimed>> {
    sqlx::query_as!(
        Claimed,
        "UPDATE test_sends SET claimed_at = now(), worker_id = $2 WHERE id = $1 AND claimed_at IS NULL
         RETURNING email, subject, body",
        test_id,
        worker_id
    )
    .fetch_optional(conn)
    .await
}

/// What became of a test.
#[derive(Clone, Copy, Debug, PartialEq, Eq, sqlx::Type)]
#[sqlx(type_name = "test_state", rename_all = "snake_case")]
pub enum TestState {
    /// Accepted by the mail server.
    Sent,
    /// Not sent.
    Failed,
    /// Handed to the mail server, and the answer was lost.
    Unknown,
}

impl InLedger for TestState {
    type Sql = Self;
}

/// Writes down what became of a test that the worker had claimed.
///
/// # Errors
/// The database's.
pub async fn finish(
    conn: &mut PgConnection,
    test_id: Uuid,
    worker_id: i64,
    state: TestState,
    reason: Option<&str>,
) -> sqlx::Result<()> {
    sqlx::query!(
        "UPDATE test_sends SET state = $3, reason = $4, finished_at = now()
         WHERE id = $1 AND worker_id = $2 AND finished_at IS NULL",
        test_id,
        worker_id,
        state as _,
        reason,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// A test, as its page shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TestSend {
    /// Where it goes.
    pub email: String,
    /// The invitation's subject.
    pub subject: String,
    /// The invitation's text.
    pub body: String,
    /// What became of it; none: it is under way.
    pub state: Option<Stored<TestState>>,
    /// Why it was not sent, in the mail server's words.
    pub reason: Option<String>,
    /// The worker that had it has died, so nothing more will be heard of it.
    pub orphaned: bool,
}

/// A test; none: there is none with this id, or not any more. A worker that was silent for `dead_after` is dead.
///
/// # Errors
/// The database's.
pub async fn read(pool: &PgPool, test_id: Uuid, dead_after: Duration) -> sqlx::Result<Option<TestSend>> {
    sqlx::query_as!(
        TestSend,
        r#"SELECT t.email, t.subject, t.body, t.state AS "state: Stored<TestState>", t.reason,
                  (t.claimed_at IS NOT NULL AND t.finished_at IS NULL AND NOT EXISTS (
                       SELECT FROM live_workers w WHERE w.id = t.worker_id AND w.heartbeat_at > now() - make_interval(secs => $2))) AS "orphaned!"
           FROM test_sends t WHERE t.id = $1"#,
        test_id,
        dead_after.as_secs_f64()
    )
    .fetch_optional(pool)
    .await
}
