//! Test mails: a person checks an invitation before sending it. Each is a hidden run of one item about no person.

use serde::{Deserialize, Serialize};
use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

use crate::{
    people::Tombs,
    stored::Stored,
    submit::{Data, NewRun, NotSubmitted, submit},
    suppressions::{self, Reason},
};
use mailrun_core::item::ItemState;

/// The kind of these runs.
pub const KIND: &str = "test_mail";

/// The data of the item.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TestMail {
    /// The normalized recipient address.
    pub email: String,
}

/// A test mail to submit.
#[derive(Clone, Copy, Debug)]
pub struct NewTest<'a> {
    /// The normalized recipient address.
    pub email: &'a str,
    /// The invitation's subject.
    pub subject: &'a str,
    /// The invitation's text.
    pub body: &'a str,
}

/// The result of a submission.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Submitted {
    /// It is committed and will be sent at most once. After a second click: the same test is in progress already.
    Accepted(Uuid),
    /// The address is suppressed.
    Suppressed(Stored<Reason>),
}

/// Submits a test mail.
///
/// # Errors
/// The database's, and whether it is certain that nothing is kept.
pub async fn submit_test(pool: &PgPool, test: NewTest<'_>) -> Result<Submitted, NotSubmitted> {
    let mut conn = pool.acquire().await.map_err(NotSubmitted::before_commit)?;
    if let Some(known) = suppressed_or_in_progress(&mut conn, test).await.map_err(NotSubmitted::before_commit)? {
        return Ok(known);
    }
    drop(conn);
    let run = NewRun { hidden: true, body: test.body, ..NewRun::new(KIND, test.subject) };
    submit(pool, run, &Data(&[TestMail { email: test.email.to_owned() }])).await?;
    Ok(Submitted::Accepted(run.id))
}

async fn suppressed_or_in_progress(conn: &mut PgConnection, test: NewTest<'_>) -> sqlx::Result<Option<Submitted>> {
    // The suppression of an erased person is stored under the tombstone.
    let tombstone = Tombs::read(&mut *conn).await?.of(test.email);
    for email in [test.email, tombstone.as_str()] {
        if let Some(reason) = suppressions::reason(&mut *conn, email).await? {
            return Ok(Some(Submitted::Suppressed(reason)));
        }
    }
    Ok(in_progress(conn, test).await?.map(Submitted::Accepted))
}

/// The same test, if it is pending. A test that has ended may be repeated, because its cause may have been repaired.
async fn in_progress(conn: &mut PgConnection, test: NewTest<'_>) -> sqlx::Result<Option<Uuid>> {
    sqlx::query_scalar!(
        "SELECT r.id FROM runs r JOIN run_items i ON i.run_id = r.id
         WHERE r.hidden AND r.kind = $1 AND r.subject = $3 AND r.body = $4
           AND i.data->>'email' = $2 AND i.state IN ('pending', 'retrying')
         ORDER BY r.created_at DESC LIMIT 1",
        KIND,
        test.email,
        test.subject,
        test.body,
    )
    .fetch_optional(conn)
    .await
}

/// A test mail, for its page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Test {
    /// The recipient. `None`: erased.
    pub email: Option<String>,
    /// The invitation's subject.
    pub subject: String,
    /// The invitation's text.
    pub body: String,
    /// The state of the item.
    pub state: Stored<ItemState>,
    /// The relay's reply, if it was not sent.
    pub reason: Option<String>,
}

impl Test {
    /// Whether its result is known.
    #[must_use]
    pub fn is_over(&self) -> bool {
        !matches!(&self.state, Stored::Known(state) if state.is_open())
    }
}

/// A test mail. `None`: there is none with this id, or it was deleted.
pub async fn read(pool: &PgPool, test_id: Uuid) -> sqlx::Result<Option<Test>> {
    sqlx::query_as!(
        Test,
        r#"SELECT i.data->>'email' AS email, r.subject, r.body, i.state AS "state: Stored<ItemState>", i.error AS reason
           FROM runs r JOIN run_items i ON i.run_id = r.id
           WHERE r.id = $1 AND r.hidden AND r.kind = $2"#,
        test_id,
        KIND,
    )
    .fetch_optional(pool)
    .await
}
