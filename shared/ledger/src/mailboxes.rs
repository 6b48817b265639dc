//! Normalizes the addresses of older ledgers to mailboxes. Those ledgers compared addresses as text, so a person may exist
//! twice, with an invitation each.

use std::collections::BTreeMap;

use sqlx::{Connection as _, PgConnection};

use super::may_pass;
use mailrun_core::address::mailbox;

/// Web and progress may be running. A transaction that PostgreSQL ends because of a deadlock is retried.
const TRIES: u32 = 5;

/// The number of changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unified {
    /// People whose address was not normalized.
    pub people: usize,
    /// People who were merged into another one with the same mailbox.
    pub merged: u64,
    /// Suppressions whose address was not normalized.
    pub suppressions: usize,
}

/// Normalizes every address, and merges people and suppressions with the same mailbox. Items keep their state, so no counter
/// changes. Of several items that count for one person, one still does; the others are no longer sent.
///
/// Safe to repeat at any time: processes of an older version add such addresses until they are replaced.
///
/// On an error nothing is changed.
pub async fn unify(conn: &mut PgConnection) -> sqlx::Result<Unified> {
    // Most ledgers need no change, and so no lock.
    if people(conn).await?.is_empty() && suppressions(conn).await?.is_empty() {
        return Ok(Unified::default());
    }
    let mut tries = 1;
    loop {
        match unify_once(conn).await {
            Err(error) if tries < TRIES && may_pass(&error) => tries += 1,
            result => return result,
        }
    }
}

async fn unify_once(conn: &mut PgConnection) -> sqlx::Result<Unified> {
    let mut tx = conn.begin().await?;
    // Items first, in the order in which progress writes.
    sqlx::query("LOCK TABLE run_items, users, suppressions IN SHARE ROW EXCLUSIVE MODE").execute(&mut *tx).await?;
    let people = people(&mut tx).await?;
    let merged = if people.is_empty() { 0 } else { merge_people(&mut tx, &people).await? };
    let suppressions = suppressions(&mut tx).await?;
    merge_suppressions(&mut tx, &suppressions).await?;
    tx.commit().await?;
    Ok(Unified { people: people.len(), merged, suppressions: suppressions.len() })
}

/// A person or suppression whose address is not normalized.
struct Spelled {
    id: i64,
    email: String,
    mailbox: String,
}

fn misspelled(rows: impl Iterator<Item = (i64, String)>) -> Vec<Spelled> {
    let spelled = |(id, email): (i64, String)| {
        let mailbox = mailbox(&email).ok().filter(|mailbox| *mailbox != email)?;
        Some(Spelled { id, email, mailbox })
    };
    rows.filter_map(spelled).collect()
}

/// The condition skips lower-case ASCII addresses, which need no change, without reading them twice.
async fn people(conn: &mut PgConnection) -> sqlx::Result<Vec<Spelled>> {
    let rows = sqlx::query!(
        r#"SELECT id, email FROM users
           WHERE octet_length(email) <> char_length(email) OR strpos(email, 'xn--') > 0 OR strpos(email, '"') > 0
                 OR starts_with(email, '''')
           ORDER BY id"#
    )
    .fetch_all(conn)
    .await?;
    Ok(misspelled(rows.into_iter().map(|row| (row.id, row.email))))
}

async fn suppressions(conn: &mut PgConnection) -> sqlx::Result<Vec<Spelled>> {
    let rows = sqlx::query!(
        r#"SELECT number, email FROM suppressions
           WHERE octet_length(email) <> char_length(email) OR strpos(email, 'xn--') > 0 OR strpos(email, '"') > 0
                 OR starts_with(email, '''')
           ORDER BY number"#
    )
    .fetch_all(conn)
    .await?;
    Ok(misspelled(rows.into_iter().map(|row| (row.number, row.email))))
}

/// Returns how many people were deleted. These statements can't be checked at compile time, because the temporary table does
/// not exist then.
async fn merge_people(conn: &mut PgConnection, people: &[Spelled]) -> sqlx::Result<u64> {
    sqlx::query(
        r#"CREATE TEMP TABLE spelled (user_id bigint PRIMARY KEY, email text COLLATE "C", mailbox text COLLATE "C", keep bigint)
           ON COMMIT DROP"#,
    )
    .execute(&mut *conn)
    .await?;
    let column = |of: fn(&Spelled) -> &str| people.iter().map(|spelled| of(spelled).to_owned()).collect::<Vec<_>>();
    sqlx::query(
        "INSERT INTO spelled (user_id, email, mailbox) SELECT * FROM unnest($1::bigint[], $2::text[], $3::text[])",
    )
    .bind(people.iter().map(|spelled| spelled.id).collect::<Vec<_>>())
    .bind(column(|spelled| &spelled.email))
    .bind(column(|spelled| &spelled.mailbox))
    .execute(&mut *conn)
    .await?;
    let mut gone = 0;
    for (step, statement) in MERGE.into_iter().enumerate() {
        let done = sqlx::query(statement).execute(&mut *conn).await?;
        if step == DELETION {
            gone = done.rows_affected();
        }
    }
    Ok(gone)
}

/// The index in [`MERGE`] of the statement that deletes people.
const DELETION: usize = 6;
const MERGE: [&str; 8] = [
    // People who already have the normalized address.
    "INSERT INTO spelled (user_id, email, mailbox)
     SELECT u.id, u.email, u.email FROM users u WHERE u.email IN (SELECT mailbox FROM spelled) ON CONFLICT DO NOTHING",
    "UPDATE spelled s SET keep = first.user_id
     FROM (SELECT mailbox, min(user_id) AS user_id FROM spelled GROUP BY mailbox) first WHERE first.mailbox = s.mailbox",
    // Every mail keeps the name and spelling of its list.
    "UPDATE run_items i SET name = coalesce(i.name, u.name, ''), typed = coalesce(i.typed, nullif(s.email, s.mailbox))
     FROM spelled s JOIN users u ON u.id = s.user_id WHERE i.user_id = s.user_id",
    // The item that counts is the one that is, or may be, in the recipient's mailbox already. Otherwise it is the one closest
    // to being sent, or the first.
    "UPDATE run_items i SET overtaken = true
     FROM (SELECT i.id, row_number() OVER (PARTITION BY s.keep ORDER BY
               CASE i.state WHEN 'sent' THEN 0 WHEN 'unknown' THEN 1 WHEN 'failed' THEN 5 ELSE
                   CASE WHEN EXISTS (SELECT FROM attempts a WHERE a.item_id = i.id
                                     AND a.number = i.attempt + CASE WHEN i.state = 'retrying' THEN 1 ELSE 0 END)
                        THEN 2 WHEN i.state = 'retrying' THEN 3 ELSE 4 END
               END, i.id) AS place
           FROM run_items i JOIN spelled s ON s.user_id = i.user_id WHERE i.active) ranked
     WHERE ranked.id = i.id AND ranked.place > 1",
    "UPDATE run_items i SET user_id = s.keep FROM spelled s WHERE i.user_id = s.user_id AND s.user_id <> s.keep",
    "UPDATE users u SET emailed_at = all_of.emailed_at, created_at = all_of.created_at
     FROM (SELECT s.keep, min(u.emailed_at) AS emailed_at, min(u.created_at) AS created_at
           FROM spelled s JOIN users u ON u.id = s.user_id GROUP BY s.keep) all_of
     WHERE u.id = all_of.keep",
    "DELETE FROM users u USING spelled s WHERE u.id = s.user_id AND s.user_id <> s.keep",
    "UPDATE users u SET email = s.mailbox FROM spelled s WHERE u.id = s.user_id AND u.email <> s.mailbox",
];

/// The first reason is kept.
async fn merge_suppressions(conn: &mut PgConnection, spelled: &[Spelled]) -> sqlx::Result<()> {
    let mut by_mailbox: BTreeMap<&str, Vec<i64>> = BTreeMap::new();
    for Spelled { id, mailbox, .. } in spelled {
        by_mailbox.entry(mailbox).or_default().push(*id);
    }
    for (mailbox, mut numbers) in by_mailbox {
        let known = sqlx::query_scalar!("SELECT number FROM suppressions WHERE email = $1", mailbox)
            .fetch_optional(&mut *conn)
            .await?;
        numbers.extend(known);
        numbers.sort_unstable();
        let (first, others) = numbers.split_at(1);
        sqlx::query!("DELETE FROM suppressions WHERE number = ANY($1)", others).execute(&mut *conn).await?;
        sqlx::query!("UPDATE suppressions SET email = $2 WHERE number = ANY($1)", first, mailbox)
            .execute(&mut *conn)
            .await?;
    }
    Ok(())
}
