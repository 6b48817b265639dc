//! Turns a list of addresses into people and items.
//!
//! The list passes through a temporary table, so that a million addresses need neither memory here nor a statement each.
//! Statements on that table can't be checked at compile time, because it does not exist then.

use serde::{Deserialize, Serialize};
use sqlx::{PgConnection, PgPool, types::Json};
use uuid::Uuid;

use super::{Insert, Inserted, NewRun, NotSubmitted, Refusal, Rows, Submitted, submit, to_count};
use crate::{invitations, people};
use mailrun_core::address::{self, Address};

/// How many invalid entries are stored for display. All of them are counted.
const SHOWN_INVALID: usize = 100;
/// The approximate size of the pieces in which the list is copied to the server.
const COPY_BYTES: usize = 256 * 1024;

/// What a person submits.
#[derive(Clone, Copy, Debug)]
pub struct Submission<'a> {
    /// The form's token: the same token, list, subject and text are the same submission.
    pub token: Uuid,
    /// The addresses as typed.
    pub text: &'a str,
    /// The invitation's subject.
    pub subject: &'a str,
    /// The invitation's text.
    pub body: &'a str,
    /// The run's rate limit. `None`: as fast as possible.
    pub sends_per_second: Option<i32>,
    /// The maximum number of addresses.
    pub max_addresses: usize,
}

impl Submission<'_> {
    /// The run's id, derived from the submission: the same submission is the same run. A changed list or text is another run,
    /// which is refused if no one is left to invite.
    #[must_use]
    pub fn run_id(&self) -> Uuid {
        let listed = Uuid::new_v5(&self.token, self.text.as_bytes());
        // A subject contains no control characters, so the separator is unambiguous.
        Uuid::new_v5(&listed, format!("{}\0{}", self.subject, self.body).as_bytes())
    }

    /// The run to submit.
    #[must_use]
    pub fn run(&self) -> NewRun<'_> {
        NewRun {
            id: self.run_id(),
            kind: invitations::KIND,
            hidden: false,
            subject: self.subject,
            body: self.body,
            sends_per_second: self.sends_per_second,
        }
    }

    /// Submits the list.
    ///
    /// # Errors
    /// The error, and whether it is certain that nothing was stored.
    pub async fn submit(self, pool: &PgPool) -> Result<Submitted, NotSubmitted> {
        submit(pool, self.run(), &self).await
    }
}

impl Rows for Submission<'_> {
    fn are_none(&self) -> bool {
        address::parse(self.text).next().is_none()
    }

    async fn insert(&self, conn: &mut PgConnection, run_id: Uuid, insert: Insert) -> sqlx::Result<Inserted> {
        let Some((listed, mut tally)) = copy_list(conn, *self).await? else {
            return Ok(Err(Refusal::TooMany { limit: self.max_addresses }));
        };
        let distinct = deduplicate(conn).await?;
        tally.repeated = listed - distinct;
        insert_users(conn, insert).await?;
        tally.accepted = insert_items(conn, run_id, insert).await?;
        if tally.accepted < distinct {
            count_others(conn, run_id, &mut tally).await?;
        }
        if tally.accepted == 0 {
            return Ok(Err(Refusal::NothingNew(tally)));
        }
        note(conn, run_id, &tally).await?;
        Ok(Ok(tally.accepted))
    }
}

/// The contents of a list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Accepted invitations.
    pub accepted: i32,
    /// People who were invited before, or are waiting in another run.
    pub already_invited: i32,
    /// People whose invitation in an earlier run failed or is unknown.
    pub already_failed: i32,
    /// Suppressed addresses.
    pub suppressed: i32,
    /// Repeated addresses.
    pub repeated: i32,
    /// Entries that are not an address.
    pub invalid: i32,
    /// The first invalid entries.
    pub invalid_entries: Vec<InvalidEntry>,
}

/// An entry that is not an address, and its position.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InvalidEntry {
    /// The line, from 1.
    pub line: u32,
    /// The entry, shortened.
    pub text: String,
    /// What is wrong with it.
    pub reason: String,
}

/// Copies the valid addresses into the temporary table `listed`. `None`: there are too many.
async fn copy_list(conn: &mut PgConnection, submission: Submission<'_>) -> sqlx::Result<Option<(i32, Tally)>> {
    sqlx::query(
        r#"CREATE TEMP TABLE listed (place integer, email text COLLATE "C", typed text, name text) ON COMMIT DROP"#,
    )
    .execute(&mut *conn)
    .await?;
    let blocked = people::blocked(&mut *conn).await?;
    let mut tally = Tally::default();
    let mut place: i32 = 0;
    let mut rows = String::with_capacity(COPY_BYTES + 1024);
    let mut copy = conn.copy_in_raw("COPY listed (place, email, typed, name) FROM STDIN").await?;
    for entry in address::parse(submission.text) {
        match entry.parsed {
            Ok(address) => {
                place += 1;
                if usize::try_from(place).is_ok_and(|place| place > submission.max_addresses) {
                    copy.abort("too many addresses").await?;
                    return Ok(None);
                }
                // Erased people are in the ledger under another name, which keeps them out of this list.
                match blocked.as_ref().and_then(|blocked| blocked.name(&address.email)) {
                    Some(tombstone) => {
                        push_row(&mut rows, place, &Address { email: tombstone.to_owned(), typed: None, name: None });
                    }
                    None => push_row(&mut rows, place, &address),
                }
                if rows.len() >= COPY_BYTES {
                    copy.send(rows.as_bytes()).await?;
                    rows.clear();
                }
            }
            Err(invalid) => {
                tally.invalid += 1;
                if tally.invalid_entries.len() < SHOWN_INVALID {
                    let reason = invalid.reason.to_owned();
                    tally.invalid_entries.push(InvalidEntry { line: entry.line, text: invalid.text, reason });
                }
            }
        }
    }
    copy.send(rows.as_bytes()).await?;
    copy.finish().await?;
    Ok(Some((place, tally)))
}

/// A row in COPY's text format.
fn push_row(rows: &mut String, place: i32, address: &Address) {
    rows.push_str(&place.to_string());
    rows.push('\t');
    push_escaped(rows, &address.email);
    for field in [&address.typed, &address.name] {
        rows.push('\t');
        match field {
            Some(text) => push_escaped(rows, text),
            None => rows.push_str("\\N"),
        }
    }
    rows.push('\n');
}

/// Addresses and names contain no control characters, but may contain backslashes.
fn push_escaped(rows: &mut String, text: &str) {
    for character in text.chars() {
        if character == '\\' {
            rows.push('\\');
        }
        rows.push(character);
    }
}

/// Stores each distinct address once, at its first position, in the temporary table `invited`, with the id of its person: a
/// known one, or one to be inserted.
///
/// Here and below, a person is looked up by a scalar subquery, which is always an index lookup. A join might be planned as a
/// scan over everyone ever invited, and would get slower with every run.
async fn deduplicate(conn: &mut PgConnection) -> sqlx::Result<i32> {
    // `OFFSET 0` prevents the subquery from being evaluated twice, once for each reference.
    let distinct = sqlx::query(
        "CREATE TEMP TABLE invited ON COMMIT DROP AS
         SELECT place, email, typed, name, known, coalesce(known, nextval('users_id_seq')) AS user_id
         FROM (SELECT place, email, typed, name, (SELECT u.id FROM users u WHERE u.email = first.email) AS known
               FROM (SELECT DISTINCT ON (email) place, email, typed, name FROM listed ORDER BY email, place) first
               OFFSET 0) first",
    )
    .execute(&mut *conn)
    .await?;
    // Without statistics, the statements below may be planned for a handful of rows.
    sqlx::query("ANALYZE invited").execute(conn).await?;
    Ok(to_count(distinct.rows_affected()))
}

/// Inserts in one fixed order, so that concurrent submissions of the same new people wait for each other instead of deadlocking.
async fn insert_users(conn: &mut PgConnection, insert: Insert) -> sqlx::Result<()> {
    let statement = "INSERT INTO users (id, email) OVERRIDING SYSTEM VALUE
         SELECT user_id, email FROM invited WHERE known IS NULL ORDER BY email";
    sqlx::query(insert.rows(statement, "(email)")).execute(&mut *conn).await?;
    if insert == Insert::Checked {
        // Another submission has inserted some of them in the meantime, under other ids.
        let statement =
            "UPDATE invited SET (known, user_id) = (SELECT u.id, u.id FROM users u WHERE u.email = invited.email)
             WHERE known IS NULL";
        sqlx::query(statement).execute(conn).await?;
    }
    Ok(())
}

/// Inserts an item for everyone who was not emailed and has no item that counts. The filter only keeps the positions without
/// gaps; the unique index is what keeps concurrent submissions apart.
///
/// Name and spelling are this list's, whatever earlier lists said.
async fn insert_items(conn: &mut PgConnection, run_id: Uuid, insert: Insert) -> sqlx::Result<i32> {
    let statement = "INSERT INTO run_items (run_id, user_id, position, name, typed)
         SELECT $1, user_id, row_number() OVER (ORDER BY place), coalesce(name, ''), typed FROM invited
         WHERE (known IS NULL OR (SELECT u.emailed_at IS NULL FROM users u WHERE u.id = known)
                                 AND (SELECT i.id FROM run_items i WHERE i.user_id = known AND i.active) IS NULL)
           AND (SELECT s.email FROM suppressions s WHERE s.email = invited.email) IS NULL
         ORDER BY place";
    let inserted = sqlx::query(insert.rows(statement, "(user_id) WHERE active")).bind(run_id).execute(conn).await?;
    Ok(to_count(inserted.rows_affected()))
}

/// Counts the people who were left out: because of an item in another run, possibly a pruned one, or because they are suppressed.
async fn count_others(conn: &mut PgConnection, run_id: Uuid, tally: &mut Tally) -> sqlx::Result<()> {
    let (suppressed, others, failed): (i64, i64, i64) = sqlx::query_as(
        "SELECT count(*) FILTER (WHERE suppressed),
                count(*) FILTER (WHERE NOT suppressed AND (emailed OR troubled IS NOT NULL)),
                count(*) FILTER (WHERE NOT suppressed AND troubled)
         FROM (SELECT (SELECT s.email FROM suppressions s WHERE s.email = invited.email) IS NOT NULL AS suppressed,
                      (SELECT u.emailed_at IS NOT NULL FROM users u WHERE u.id = known) AS emailed,
                      (SELECT i.troubled FROM run_items i
                       WHERE i.user_id = known AND i.active AND i.run_id <> $1) AS troubled
               FROM invited OFFSET 0) people",
    )
    .bind(run_id)
    .fetch_one(conn)
    .await?;
    tally.suppressed = i32::try_from(suppressed).unwrap_or(i32::MAX);
    tally.already_failed = i32::try_from(failed).unwrap_or(i32::MAX);
    tally.already_invited = i32::try_from(others - failed).unwrap_or(i32::MAX);
    Ok(())
}

async fn note(conn: &mut PgConnection, run_id: Uuid, tally: &Tally) -> sqlx::Result<()> {
    sqlx::query!(
        "UPDATE runs SET already_invited = $2, already_failed = $3, suppressed = $4, repeated = $5, invalid = $6,
                invalid_entries = $7
         WHERE id = $1",
        run_id,
        tally.already_invited,
        tally.already_failed,
        tally.suppressed,
        tally.repeated,
        tally.invalid,
        Json(&tally.invalid_entries) as _,
    )
    .execute(conn)
    .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_click_is_the_same_run_but_another_text_is_not() {
        let first = Submission {
            token: Uuid::from_u128(7),
            text: "ann@x.org",
            subject: "Hello",
            body: "Come!",
            sends_per_second: None,
            max_addresses: 10,
        };
        assert_eq!(first.run_id(), Submission { sends_per_second: Some(1), ..first }.run_id());
        for other in [
            Submission { token: Uuid::from_u128(8), ..first },
            Submission { text: "bob@x.org", ..first },
            Submission { subject: "Hi", ..first },
            Submission { body: "Stay!", ..first },
        ] {
            assert_ne!(first.run_id(), other.run_id());
        }
    }

    #[test]
    fn a_row_survives_backslashes() {
        let mut rows = String::new();
        push_row(&mut rows, 3, &Address { email: r#""a\\b"@x.org"#.into(), typed: None, name: Some(r"C:\N".into()) });
        assert_eq!(rows, "3\t\"a\\\\\\\\b\"@x.org\t\\N\tC:\\\\N\n");
    }
}
