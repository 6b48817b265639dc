//! Suppressions based only on a mail server's reply. They are applied at once, or held for a person if a run would suppress an
//! unusual share of its recipients.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use sqlx::{Connection as _, PgConnection};
use uuid::Uuid;

use crate::settings::SuppressionsConfig;

/// An address that does not exist, according to a mail server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// The run of the recipient.
    pub run_id: Uuid,
    /// The address, in lower case.
    pub email: String,
    /// The mail server's reply.
    pub detail: Option<String>,
}

/// The number of suppressions applied and held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Suppressed {
    /// Newly suppressed addresses.
    pub new: usize,
    /// Addresses held for review.
    pub held: usize,
}

/// Suppresses addresses that do not exist. If a run suppresses a larger share of its recipients than `settings` allow, it gets
/// a review: what it has suppressed is undone and held with the rest. Call this last in a transaction, because it locks the
/// counters of the runs.
pub async fn suppress_missing(
    conn: &mut PgConnection,
    settings: &SuppressionsConfig,
    missing: &[Missing],
) -> sqlx::Result<Suppressed> {
    let mut tx = conn.begin().await?;
    let mut runs: BTreeMap<Uuid, BTreeMap<&str, Option<&str>>> = BTreeMap::new();
    for Missing { run_id, email, detail } in missing {
        runs.entry(*run_id).or_default().entry(email).or_insert(detail.as_deref());
    }
    let mut all = Suppressed::default();
    for (run_id, addresses) in runs {
        let emails: Vec<String> = addresses.keys().map(|email| (*email).to_owned()).collect();
        let details: Vec<Option<&str>> = addresses.into_values().collect();
        // One transaction at a time, so that concurrent ones do not both see too low a count.
        let total = sqlx::query_scalar!("SELECT total FROM run_progress WHERE run_id = $1 FOR UPDATE", run_id)
            .fetch_optional(&mut *tx)
            .await?
            .unwrap_or_default();
        let review = sqlx::query_scalar!("SELECT accepted FROM suppression_reviews WHERE run_id = $1", run_id)
            .fetch_optional(&mut *tx)
            .await?;
        match review {
            None | Some(Some(true)) => {
                let new = sqlx::query!(
                    "INSERT INTO suppressions (email, reason, detail, run_id)
                     SELECT email, 'bounced', detail, $3 FROM unnest($1::text[], $2::text[]) AS new (email, detail)
                     ORDER BY email ON CONFLICT DO NOTHING",
                    &emails,
                    &details as _,
                    run_id,
                )
                .execute(&mut *tx)
                .await?;
                all.new += usize::try_from(new.rows_affected()).unwrap_or(usize::MAX);
                if review.is_none() && is_unusual(&mut tx, settings, run_id, i64::from(total)).await? {
                    let held = hold(&mut tx, run_id).await?;
                    all.held += held;
                    all.new = all.new.saturating_sub(held);
                }
            }
            Some(Some(false)) => {}
            Some(None) => {
                let held = sqlx::query!(
                    "INSERT INTO held_suppressions (run_id, email, detail)
                     SELECT $3, email, detail FROM unnest($1::text[], $2::text[]) AS new (email, detail)
                     ORDER BY email ON CONFLICT DO NOTHING",
                    &emails,
                    &details as _,
                    run_id,
                )
                .execute(&mut *tx)
                .await?;
                all.held += usize::try_from(held.rows_affected()).unwrap_or(usize::MAX);
            }
        }
    }
    tx.commit().await?;
    Ok(all)
}

async fn is_unusual(
    conn: &mut PgConnection,
    settings: &SuppressionsConfig,
    run_id: Uuid,
    total: i64,
) -> sqlx::Result<bool> {
    let count = sqlx::query_scalar!(
        r#"SELECT count(*) AS "count!" FROM suppressions WHERE run_id = $1 AND reason = 'bounced'"#,
        run_id
    )
    .fetch_one(conn)
    .await?;
    Ok(settings.holds(count, total))
}

/// Undoes and holds the suppressions of a run. Returns the number of addresses.
async fn hold(conn: &mut PgConnection, run_id: Uuid) -> sqlx::Result<usize> {
    sqlx::query!("INSERT INTO suppression_reviews (run_id) VALUES ($1)", run_id).execute(&mut *conn).await?;
    let held = sqlx::query!(
        "WITH taken AS (
             DELETE FROM suppressions WHERE run_id = $1 AND reason = 'bounced' RETURNING email, detail, created_at
         )
         INSERT INTO held_suppressions (run_id, email, detail, created_at)
         SELECT $1, email, detail, created_at FROM taken ORDER BY email",
        run_id
    )
    .execute(conn)
    .await?;
    Ok(usize::try_from(held.rows_affected()).unwrap_or(usize::MAX))
}

/// A run whose suppressions are held.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Review {
    /// The run.
    pub run_id: Uuid,
    /// When the review began.
    pub held_at: DateTime<Utc>,
    /// The number of addresses.
    pub addresses: i64,
    /// The most frequent reply.
    pub detail: Option<String>,
}

/// The undecided reviews, newest first.
pub async fn open_reviews(conn: &mut PgConnection) -> sqlx::Result<Vec<Review>> {
    sqlx::query_as!(
        Review,
        r#"SELECT r.run_id, r.held_at, count(h.email) AS "addresses!",
                  mode() WITHIN GROUP (ORDER BY h.detail) AS detail
           FROM suppression_reviews r LEFT JOIN held_suppressions h ON h.run_id = r.run_id
           WHERE r.decided_at IS NULL GROUP BY r.run_id ORDER BY r.held_at DESC LIMIT 100"#
    )
    .fetch_all(conn)
    .await
}

/// Decides a review: `accepted` suppresses the addresses, otherwise they are dropped. Returns the number of addresses. `None`:
/// there is no undecided review.
pub async fn decide(conn: &mut PgConnection, run_id: Uuid, accepted: bool) -> sqlx::Result<Option<usize>> {
    let mut tx = conn.begin().await?;
    let decided = sqlx::query!(
        "UPDATE suppression_reviews SET decided_at = now(), accepted = $2 WHERE run_id = $1 AND decided_at IS NULL",
        run_id,
        accepted,
    )
    .execute(&mut *tx)
    .await?;
    if decided.rows_affected() == 0 {
        return Ok(None);
    }
    if accepted {
        sqlx::query!(
            "INSERT INTO suppressions (email, reason, detail, run_id)
             SELECT email, 'bounced', detail, run_id FROM held_suppressions WHERE run_id = $1
             ORDER BY email ON CONFLICT DO NOTHING",
            run_id
        )
        .execute(&mut *tx)
        .await?;
    }
    let held = sqlx::query!("DELETE FROM held_suppressions WHERE run_id = $1", run_id)
        .execute(&mut *tx)
        .await?
        .rows_affected();
    tx.commit().await?;
    Ok(Some(usize::try_from(held).unwrap_or(usize::MAX)))
}
