//! Submits a run: the run, its items and the message that starts it, in one transaction. Items of every kind enter the ledger
//! here. Their source is a [`Rows`].

mod list;

use std::{future::Future, time::Duration};

use serde::Serialize;
use sqlx::{AssertSqlSafe, PgConnection, PgPool, error::DatabaseError};
use uuid::Uuid;

use crate::{may_pass, outbox, stored::Stored};
use mailrun_core::{
    message::{Command, ItemMessage, Message as _, RunMessage, Step},
    run::Wanted,
};

pub use list::{InvalidEntry, Submission, Tally};

/// Submissions with the same people may deadlock. The one that PostgreSQL ends is retried.
const TRIES: u32 = 5;
/// Up to this many items of a hidden run, which are about no person, go to the outbox with the run, without the fan-out.
const RELEASED_AT_ONCE: i32 = 100;
/// The message type of these items.
const IMPERSONAL_ITEM: &str = ItemMessage::TYPES[1];
/// Rows inserted by one statement.
const ROWS: usize = 10_000;

/// A run to submit.
#[derive(Clone, Copy, Debug)]
pub struct NewRun<'a> {
    /// Its id. Submitting the same id again refers to the same run.
    pub id: Uuid,
    /// The job that processes its items: `Job::KIND`.
    pub kind: &'a str,
    /// In no list, count or metric, and deleted after a day.
    pub hidden: bool,
    /// Its title on pages. For invitations: the mail's subject.
    pub subject: &'a str,
    /// Other text shared by its items. For invitations: the mail's text.
    pub body: &'a str,
    /// The rate limit. `None`: as fast as possible.
    pub sends_per_second: Option<i32>,
}

impl<'a> NewRun<'a> {
    /// A visible run with a random id and no rate limit.
    #[must_use]
    pub fn new(kind: &'a str, subject: &'a str) -> Self {
        Self { id: Uuid::new_v4(), kind, hidden: false, subject, body: "", sends_per_second: None }
    }
}

/// The result of inserting a run's rows: the number of items, or why there is no run.
pub type Inserted = Result<i32, Refusal>;

/// The source of a run's items.
pub trait Rows: Sync {
    /// Whether there are no rows, as far as can be told without the ledger.
    fn are_none(&self) -> bool;

    /// Inserts the items of the run, with positions from 1 and no gaps. A refusal is rolled back.
    fn insert(
        &self,
        conn: &mut PgConnection,
        run_id: Uuid,
        insert: Insert,
    ) -> impl Future<Output = sqlx::Result<Inserted>> + Send;
}

/// Rows of data about no person in the ledger. Each becomes an item, as JSON.
#[derive(Clone, Copy, Debug)]
pub struct Data<'a, T>(pub &'a [T]);

impl<T: Serialize + Sync> Rows for Data<'_, T> {
    fn are_none(&self) -> bool {
        self.0.is_empty()
    }

    async fn insert(&self, conn: &mut PgConnection, run_id: Uuid, _: Insert) -> sqlx::Result<Inserted> {
        let mut inserted = 0;
        for rows in self.0.chunks(ROWS) {
            let rows = rows.iter().map(serde_json::to_value).collect::<Result<Vec<_>, _>>();
            let rows = rows.map_err(|error| sqlx::Error::Encode(error.into()))?;
            let added = sqlx::query!(
                "INSERT INTO run_items (run_id, position, data)
                 SELECT $1, $2 + place::integer, data FROM unnest($3::jsonb[]) WITH ORDINALITY AS rows (data, place)",
                run_id,
                inserted,
                &rows,
            )
            .execute(&mut *conn)
            .await?;
            inserted += to_count(added.rows_affected());
        }
        Ok(Ok(inserted))
    }
}

/// The result of a submission.
#[derive(Debug)]
pub enum Submitted {
    /// Committed: the run can no longer be lost.
    Accepted(Uuid),
    /// The same submission was accepted before, perhaps with another rate limit.
    Before(Earlier),
    /// No run was made.
    Refused(Refusal),
}

/// The run of an earlier identical submission.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Earlier {
    /// The run.
    pub run_id: Uuid,
    /// Its current wanted state.
    pub wanted: Wanted,
    /// Its rate limit, which is not changed.
    pub sends_per_second: Option<i32>,
}

/// A submission that failed or whose result is unknown.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct NotSubmitted {
    /// The database error.
    #[source]
    pub error: sqlx::Error,
    /// Whether it is certain that nothing was stored. Otherwise the connection was lost during the commit; repeating the same
    /// submission shows the result.
    pub nothing_kept: bool,
}

/// An error from elsewhere, such as a timeout, says nothing about the commit.
impl From<sqlx::Error> for NotSubmitted {
    fn from(error: sqlx::Error) -> Self {
        Self { error, nothing_kept: false }
    }
}

impl NotSubmitted {
    /// The error occurred before the commit was requested.
    #[must_use]
    pub fn before_commit(error: sqlx::Error) -> Self {
        Self { error, nothing_kept: true }
    }

    /// The commit was requested. It is certainly undone only if the database names a reason: a transaction conflict (class 40),
    /// or the data (22, 23, 25).
    fn at_commit(error: sqlx::Error) -> Self {
        let refused = error
            .as_database_error()
            .and_then(DatabaseError::code)
            .is_some_and(|code| ["22", "23", "25", "40"].iter().any(|class| code.starts_with(class)));
        Self { error, nothing_kept: refused }
    }
}

/// Why no run was created.
#[derive(Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The list is empty.
    Empty,
    /// The list has too many addresses.
    TooMany {
        /// The limit.
        limit: usize,
    },
    /// No one in the list can be invited.
    NothingNew(Tally),
}

/// The time limit of a submission.
pub const SUBMISSION: Duration = Duration::from_secs(300);

/// Submits a run.
///
/// # Errors
/// The error, and whether it is certain that nothing was stored.
pub async fn submit(pool: &PgPool, run: NewRun<'_>, rows: &impl Rows) -> Result<Submitted, NotSubmitted> {
    if rows.are_none() {
        return Ok(Submitted::Refused(Refusal::Empty));
    }
    let mut tries = 1;
    let mut insert = Insert::Plain;
    // The commit of an earlier try may have succeeded, unless a later try finds nothing of it.
    let mut in_doubt = false;
    loop {
        match submit_once(pool, run, rows, insert, &mut in_doubt).await {
            Err(failed) if insert == Insert::Plain && is_unique_violation(&failed.error) => insert = Insert::Checked,
            Err(failed) if tries < TRIES && may_pass(&failed.error) => {
                in_doubt |= !failed.nothing_kept;
                tries += 1;
            }
            Err(failed) => return Err(NotSubmitted { nothing_kept: failed.nothing_kept && !in_doubt, ..failed }),
            Ok(submitted) => return Ok(submitted),
        }
    }
}

/// How to insert rows that another submission may be inserting as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Insert {
    /// Fails as a whole if one row conflicts. Without the check of each row, this takes three quarters of the time.
    Plain,
    /// Skips conflicting rows.
    Checked,
}

impl Insert {
    fn rows(self, statement: &str, unique: &str) -> AssertSqlSafe<String> {
        AssertSqlSafe(match self {
            Self::Plain => statement.to_owned(),
            Self::Checked => format!("{statement} ON CONFLICT {unique} DO NOTHING"),
        })
    }
}

fn is_unique_violation(error: &sqlx::Error) -> bool {
    error.as_database_error().is_some_and(DatabaseError::is_unique_violation)
}

async fn submit_once(
    pool: &PgPool,
    run: NewRun<'_>,
    rows: &impl Rows,
    insert: Insert,
    in_doubt: &mut bool,
) -> Result<Submitted, NotSubmitted> {
    let mut tx = pool.begin().await.map_err(NotSubmitted::before_commit)?;
    let submitted = take_in(&mut tx, run, rows, insert, in_doubt).await.map_err(NotSubmitted::before_commit)?;
    if matches!(submitted, Submitted::Accepted(_)) {
        tx.commit().await.map_err(NotSubmitted::at_commit)?;
    }
    Ok(submitted)
}

/// Everything except the commit. Unless the submission is accepted, it is rolled back.
async fn take_in(
    conn: &mut PgConnection,
    run: NewRun<'_>,
    rows: &impl Rows,
    insert: Insert,
    in_doubt: &mut bool,
) -> sqlx::Result<Submitted> {
    // A statement for a million people may exceed the usual timeout.
    let timeout = format!("SET LOCAL statement_timeout = {}", SUBMISSION.as_millis());
    sqlx::query(AssertSqlSafe(timeout)).execute(&mut *conn).await?;
    // This comes first, so that the second of two simultaneous clicks waits here for the end of the first one.
    if !insert_run(conn, run).await? {
        return earlier(conn, run.id).await.map(Submitted::Before);
    }
    // Inserting also waited for the end of an earlier try, so that one has left nothing behind.
    *in_doubt = false;
    let items = match rows.insert(conn, run.id, insert).await? {
        Ok(items) => items,
        Err(refusal) => return Ok(Submitted::Refused(refusal)),
    };
    complete_run(conn, run.id, items).await?;
    if run.hidden && items <= RELEASED_AT_ONCE {
        release_all(conn, run.id, items).await?;
    } else {
        let start = Command::Release(Step { pass: Some(1), step: Some(0) });
        outbox::put(conn, &RunMessage { run_id: run.id, command: start }).await?;
    }
    Ok(Submitted::Accepted(run.id))
}

async fn earlier(conn: &mut PgConnection, run_id: Uuid) -> sqlx::Result<Earlier> {
    let (wanted, sends_per_second): (Stored<Wanted>, Option<i32>) =
        sqlx::query_as("SELECT wanted, sends_per_second FROM runs WHERE id = $1").bind(run_id).fetch_one(conn).await?;
    Ok(Earlier { run_id, wanted: wanted.acted_on(), sends_per_second })
}

async fn insert_run(conn: &mut PgConnection, run: NewRun<'_>) -> sqlx::Result<bool> {
    let inserted = sqlx::query!(
        "INSERT INTO runs (id, kind, hidden, subject, body, sends_per_second, total) VALUES ($1, $2, $3, $4, $5, $6, 0)
         ON CONFLICT DO NOTHING",
        run.id,
        run.kind,
        run.hidden,
        run.subject,
        run.body,
        run.sends_per_second,
    )
    .execute(conn)
    .await?;
    Ok(inserted.rows_affected() == 1)
}

async fn complete_run(conn: &mut PgConnection, run_id: Uuid, items: i32) -> sqlx::Result<()> {
    sqlx::query!("UPDATE runs SET total = $2 WHERE id = $1", run_id, items).execute(&mut *conn).await?;
    sqlx::query!("INSERT INTO run_progress (run_id, total, pending) VALUES ($1, $2, $2)", run_id, items)
        .execute(conn)
        .await?;
    Ok(())
}

/// Adds the items' messages to the outbox, and records that the first pass has released them.
async fn release_all(conn: &mut PgConnection, run_id: Uuid, items: i32) -> sqlx::Result<()> {
    sqlx::query!(
        "INSERT INTO run_passes (run_id, number, kind, cursor, released, done_at) VALUES ($1, 1, 'first', $2, $2, now())",
        run_id,
        items,
    )
    .execute(&mut *conn)
    .await?;
    sqlx::query!(
        "INSERT INTO outbox (kind, message)
         SELECT $2, jsonb_build_object('run_id', run_id, 'item_id', id, 'attempt', 1, 'impersonal', true)
         FROM run_items WHERE run_id = $1 ORDER BY position",
        run_id,
        IMPERSONAL_ITEM,
    )
    .execute(conn)
    .await?;
    Ok(())
}

fn to_count(rows: u64) -> i32 {
    i32::try_from(rows).unwrap_or(i32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_refused_or_unrequested_commit_certainly_stored_nothing() {
        let lost = || sqlx::Error::Io(std::io::ErrorKind::ConnectionReset.into());
        assert!(NotSubmitted::before_commit(lost()).nothing_kept);
        assert!(!NotSubmitted::at_commit(lost()).nothing_kept);
        assert!(!NotSubmitted::from(sqlx::Error::PoolTimedOut).nothing_kept);
    }
}
