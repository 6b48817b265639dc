//! The suppression list: addresses that receive no mail.

use crate::stored::InLedger;
use chrono::{DateTime, Utc};
use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

pub use super::held_suppressions::{Missing, Suppressed, suppress_missing};
use super::{people::Tombs, stored::Stored};

/// Why an address is suppressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, sqlx::Type)]
#[sqlx(type_name = "suppression_reason", rename_all = "snake_case")]
pub enum Reason {
    /// The recipient followed the unsubscribe link.
    Unsubscribed,
    /// The recipient reported a mail as spam.
    Complained,
    /// A mail server replied that the address does not exist.
    Bounced,
    /// An operator added it.
    Asked,
}

impl InLedger for Reason {
    type Sql = Self;
}

impl std::str::FromStr for Reason {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(match text {
            "unsubscribed" => Self::Unsubscribed,
            "complained" => Self::Complained,
            "bounced" => Self::Bounced,
            "asked" => Self::Asked,
            _ => return Err(format!("{text:?} is no reason; there are unsubscribed, complained, bounced and asked")),
        })
    }
}

impl Reason {
    /// A text that completes "This person …" or "This address …".
    #[must_use]
    pub fn words_of(reason: &Stored<Self>) -> &str {
        match reason {
            Stored::Known(reason) => reason.words(),
            Stored::Later(word) => word,
        }
    }

    fn words(self) -> &'static str {
        match self {
            Self::Unsubscribed => "unsubscribed",
            Self::Complained => "reported a mail as spam",
            Self::Bounced => "does not exist",
            Self::Asked => "was added by an operator",
        }
    }
}

/// A suppressed address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Suppression {
    /// Its number: higher is newer.
    pub number: i64,
    /// The address, in lower case.
    pub email: String,
    /// The first reason for which it was suppressed.
    pub reason: Stored<Reason>,
    /// The mail server's reply or the operator's note.
    pub detail: Option<String>,
    /// When it was added.
    pub created_at: DateTime<Utc>,
}

/// The recipient of an invitation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invited {
    /// The address.
    pub email: String,
    /// Why the address is suppressed, if it is.
    pub suppressed: Option<Stored<Reason>>,
}

/// Suppresses an address. `email` is in lower case. False: it was already suppressed, and keeps its first reason.
pub async fn suppress(
    conn: &mut PgConnection,
    email: &str,
    reason: Reason,
    detail: Option<&str>,
) -> sqlx::Result<bool> {
    let inserted = sqlx::query!(
        "INSERT INTO suppressions (email, reason, detail) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
        email,
        reason as _,
        detail,
    )
    .execute(conn)
    .await?;
    Ok(inserted.rows_affected() == 1)
}

/// Suppresses the recipient of an invitation, and returns the recipient as before. `None`: the invitation no longer exists.
pub async fn suppress_item(
    conn: &mut PgConnection,
    run_id: Option<Uuid>,
    item_id: i64,
    reason: Reason,
) -> sqlx::Result<Option<Invited>> {
    let Some(invited) = invited(&mut *conn, run_id, item_id).await? else { return Ok(None) };
    if invited.suppressed.is_none() {
        suppress(conn, &invited.email, reason, None).await?;
    }
    Ok(Some(invited))
}

/// The recipient of an invitation. `None`: it no longer exists, or belongs to another run than `run_id`.
pub async fn invited(conn: &mut PgConnection, run_id: Option<Uuid>, item_id: i64) -> sqlx::Result<Option<Invited>> {
    sqlx::query_as!(
        Invited,
        r#"SELECT u.email, s.reason AS "suppressed?: Stored<Reason>"
           FROM run_items i JOIN users u ON u.id = i.user_id LEFT JOIN suppressions s ON s.email = u.email
           WHERE i.id = $1 AND ($2::uuid IS NULL OR i.run_id = $2)"#,
        item_id,
        run_id
    )
    .fetch_optional(conn)
    .await
}

/// Why an address is suppressed. `None`: it is not.
pub async fn reason(conn: &mut PgConnection, email: &str) -> sqlx::Result<Option<Stored<Reason>>> {
    sqlx::query_scalar!(r#"SELECT reason AS "reason: Stored<Reason>" FROM suppressions WHERE email = $1"#, email)
        .fetch_optional(conn)
        .await
}

/// Removes an address from the list, or its tombstone if the person was erased. False: it was not on the list.
pub async fn remove(conn: &mut PgConnection, email: &str) -> sqlx::Result<bool> {
    let names = [email.to_owned(), Tombs::read(&mut *conn).await?.of(email)];
    let deleted = sqlx::query!("DELETE FROM suppressions WHERE email = ANY($1)", &names).execute(conn).await?;
    Ok(deleted.rows_affected() > 0)
}

/// Removes an entry by its number.
pub async fn remove_number(conn: &mut PgConnection, number: i64) -> sqlx::Result<bool> {
    let deleted = sqlx::query!("DELETE FROM suppressions WHERE number = $1", number).execute(conn).await?;
    Ok(deleted.rows_affected() == 1)
}

/// Removes entries that were added for `reason` at or after `since`. Returns how many.
pub async fn remove_since(conn: &mut PgConnection, reason: Reason, since: DateTime<Utc>) -> sqlx::Result<u64> {
    let deleted = sqlx::query!("DELETE FROM suppressions WHERE reason = $1 AND created_at >= $2", reason as _, since)
        .execute(conn)
        .await?;
    Ok(deleted.rows_affected())
}

/// How many entries [`remove_since`] would remove.
pub async fn count_since(conn: &mut PgConnection, reason: Reason, since: DateTime<Utc>) -> sqlx::Result<i64> {
    sqlx::query_scalar!(
        r#"SELECT count(*) AS "count!" FROM suppressions WHERE reason = $1 AND created_at >= $2"#,
        reason as _,
        since
    )
    .fetch_one(conn)
    .await
}

/// The newest entries, or the newest before the number `before`.
pub async fn list(pool: &PgPool, before: Option<i64>, limit: i64) -> sqlx::Result<Vec<Suppression>> {
    sqlx::query_as!(
        Suppression,
        r#"SELECT number, email, reason AS "reason: Stored<Reason>", detail, created_at FROM suppressions
           WHERE number < coalesce($1, 9223372036854775807)
           ORDER BY number DESC LIMIT $2"#,
        before,
        limit
    )
    .fetch_all(pool)
    .await
}

/// The number of entries.
pub async fn count(pool: &PgPool) -> sqlx::Result<i64> {
    sqlx::query_scalar!(r#"SELECT count(*) AS "count!" FROM suppressions"#).fetch_one(pool).await
}
