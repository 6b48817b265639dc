//! Receipts: what a mail server has accepted, written down by its sender in the transaction of its next claim.
//!
//! With a receipt on disk an attempt can't become unknown any more, whatever happens to its worker and to its result. So it
//! needs no permit from then on.

use std::collections::HashSet;

use sqlx::PgConnection;

/// What is written with a claim.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Receipt {
    /// Counts the worker's receipts. One that may have been written, or not, is never written again.
    pub number: i64,
    /// The items.
    pub item_ids: Vec<i64>,
    /// The number of each one's attempt.
    pub attempts: Vec<i32>,
}

/// Writes a receipt by itself, for a worker that claims nothing more.
///
/// # Errors
/// The database's.
pub async fn write(conn: &mut PgConnection, worker_id: i64, receipt: &Receipt) -> sqlx::Result<()> {
    if !receipt.item_ids.is_empty() {
        sqlx::query!(
            "INSERT INTO receipts (worker_id, number, item_ids, attempts) VALUES ($1, $2, $3, $4)",
            worker_id,
            receipt.number,
            &receipt.item_ids,
            &receipt.attempts,
        )
        .execute(conn)
        .await?;
    }
    Ok(())
}

/// Of attempts that dead workers had claimed, those for which there is a receipt, as item and number.
///
/// # Errors
/// The database's.
pub(super) async fn of_workers(
    conn: &mut PgConnection,
    worker_ids: &[i64],
    item_ids: &[i64],
) -> sqlx::Result<HashSet<(i64, i32)>> {
    if worker_ids.is_empty() {
        return Ok(HashSet::new());
    }
    let rows = sqlx::query!(
        r#"SELECT accepted.item_id AS "item_id!", accepted.attempt AS "attempt!"
           FROM receipts r CROSS JOIN unnest(r.item_ids, r.attempts) AS accepted (item_id, attempt)
           WHERE r.worker_id = ANY($1) AND accepted.item_id = ANY($2)"#,
        worker_ids,
        item_ids,
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|row| (row.item_id, row.attempt)).collect())
}

/// Deletes a worker's receipts from number `from` on, and before number `until`. The lower end is there for speed: looking
/// for them would otherwise pass by all those that were deleted lately.
///
/// # Errors
/// The database's.
pub async fn delete(conn: &mut PgConnection, worker_id: i64, from: i64, until: i64) -> sqlx::Result<()> {
    sqlx::query!("DELETE FROM receipts WHERE worker_id = $1 AND number >= $2 AND number < $3", worker_id, from, until)
        .execute(conn)
        .await?;
    Ok(())
}
