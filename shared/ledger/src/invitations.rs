//! Invitations: the recipient of each item, and what is recorded about a person when an item is settled.

use std::collections::HashMap;

use sqlx::PgConnection;
use uuid::Uuid;

use crate::{
    held_suppressions::{Missing, suppress_missing},
    progress::{OnSettled, Settled},
    settings::SuppressionsConfig,
};
use mailrun_core::{claim::Withheld, item::ItemState};

/// The kind of these runs.
pub const KIND: &str = "invitations";
/// The code of attempts that are withheld because the address is suppressed.
pub const SUPPRESSED: u8 = 1;
/// The code of attempts that are withheld because the person has another invitation: an earlier run's that was cancelled and
/// turned out to be sent, or one to another spelling of the same mailbox.
pub const INVITED: u8 = 3;
/// The reasons shown for these codes.
pub const WITHHELD: &[(u8, &str)] = &[
    (SUPPRESSED, "the address is on the suppression list"),
    (INVITED, "already invited: another run has this person's invitation"),
];

/// The recipient of an invitation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recipient {
    /// The address as written in the list.
    pub email: String,
    /// The name in the list.
    pub name: Option<String>,
}

/// The recipients of these items, with the items' ids, or why their attempts are withheld.
pub async fn recipients(
    conn: &mut PgConnection,
    item_ids: &[i64],
) -> sqlx::Result<Vec<(i64, Result<Recipient, Withheld>)>> {
    let rows = sqlx::query!(
        r#"SELECT i.id AS "id!", coalesce(i.typed, u.email) AS email, nullif(coalesce(i.name, u.name), '') AS name,
                  u.erased_at IS NOT NULL AS "erased!", s.email IS NOT NULL AS "suppressed!",
                  (u.emailed_at IS NOT NULL OR i.overtaken) AS "invited!"
           FROM run_items i
           LEFT JOIN users u ON u.id = i.user_id
           LEFT JOIN suppressions s ON s.email = u.email
           WHERE i.id = ANY($1)"#,
        item_ids,
    )
    .fetch_all(conn)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| {
            let recipient = match row.email {
                Some(_) if row.suppressed && !row.erased => Err(Withheld::ByJob(SUPPRESSED)),
                Some(_) if row.invited && !row.erased => Err(Withheld::ByJob(INVITED)),
                Some(email) if !row.erased => Ok(Recipient { email, name: row.name }),
                _ => Err(Withheld::Deleted),
            };
            (row.id, recipient)
        })
        .collect())
}

/// Records who was emailed, and suppresses mailboxes that do not exist. Skips items about no person.
pub async fn settled(
    conn: &mut PgConnection,
    suppressions: &SuppressionsConfig,
    settled: &[Settled],
) -> sqlx::Result<()> {
    let sent = settled.iter().filter(|item| item.state == ItemState::Sent);
    let users: Vec<i64> = sent.filter_map(|item| item.user_id).collect();
    if !users.is_empty() {
        sqlx::query!("UPDATE users SET emailed_at = now() WHERE id = ANY($1) AND emailed_at IS NULL", &users)
            .execute(&mut *conn)
            .await?;
    }
    suppress(conn, suppressions, settled).await
}

async fn suppress(conn: &mut PgConnection, settings: &SuppressionsConfig, settled: &[Settled]) -> sqlx::Result<()> {
    let flagged = settled.iter().filter(|item| item.flagged);
    let bad: Vec<(Uuid, i64, Option<&str>)> =
        flagged.filter_map(|item| Some((item.run_id, item.user_id?, item.error.as_deref()))).collect();
    if bad.is_empty() {
        return Ok(());
    }
    let users: Vec<i64> = bad.iter().map(|(_, user_id, _)| *user_id).collect();
    let emails: HashMap<i64, String> = sqlx::query!("SELECT id, email FROM users WHERE id = ANY($1)", &users)
        .fetch_all(&mut *conn)
        .await?
        .into_iter()
        .map(|row| (row.id, row.email))
        .collect();
    let missing: Vec<Missing> = bad
        .into_iter()
        .filter_map(|(run_id, user_id, detail)| {
            let email = emails.get(&user_id)?.clone();
            Some(Missing { run_id, email, detail: detail.map(str::to_owned) })
        })
        .collect();
    suppress_missing(conn, settings, &missing).await?;
    Ok(())
}

/// For results that a person reports from outside the workers: about any person, of a job that follows the invitations' rules.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ByPeople;

impl OnSettled for ByPeople {
    async fn on_settled(&self, conn: &mut PgConnection, items: Vec<Settled>) -> sqlx::Result<()> {
        settled(conn, &SuppressionsConfig::default(), &items).await
    }
}
