//! Receipts: what a mail server has accepted, stored by its sender in the transaction of the next claim.
//!
//! With a receipt on disk, an attempt can no longer become unknown, whatever happens to its worker or its result. So it needs
//! no permit from then on.

use std::collections::HashSet;

use sqlx::PgConnection;

/// A receipt.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Receipt {
    /// The worker's sequence number. A number that may have been written is never used again.
    pub number: i64,
    /// The items.
    pub item_ids: Vec<i64>,
    /// The attempt number of each item.
    pub attempts: Vec<i32>,
}

/// Writes a receipt without a claim, for a worker that claims nothing more.
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

/// Those attempts of dead workers that have a receipt, as item and attempt number.
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

/// Deletes a worker's receipts with numbers from `from` up to, but not including, `until`. The lower bound avoids scanning
/// recently deleted rows.
pub async fn delete(conn: &mut PgConnection, worker_id: i64, from: i64, until: i64) -> sqlx::Result<()> {
    sqlx::query!("DELETE FROM receipts WHERE worker_id = $1 AND number >= $2 AND number < $3", worker_id, from, until)
        .execute(conn)
        .await?;
    Ok(())
}
