//! The ceiling: the rate that the servers allow when the same durable writes are done in bulk and without decisions.

use anyhow::Result;
use sqlx::{Connection as _, PgConnection};
use uuid::Uuid;

use super::{
    bare_pipeline::Sizes,
    people,
    place::Place,
    raw::{Raw, insert_run, process},
};

/// Batches of the size of Mailrun's defaults. Two senders for each of its sending processes: one waits for the servers while the other
/// works.
const SIZES: Sizes = Sizes { burst: 512, batch: 200, publishers: 2, senders: 4, window: 5_000 };

/// Submits `items` people with one COPY, and processes them.
pub(super) async fn measure(place: &Place<'_>, items: usize) -> Result<Raw> {
    process(place, items, SIZES, submit).await
}

/// A run with all its rows in one transaction: no parsing, no check for duplicates, only new people.
async fn submit(conn: &mut PgConnection, run_id: Uuid, items: usize) -> Result<()> {
    let rows = people("guest", items);
    let mut tx = conn.begin().await?;
    insert_run(&mut tx, run_id, items).await?;
    sqlx::query(r#"CREATE TEMP TABLE listed (email text COLLATE "C") ON COMMIT DROP"#).execute(&mut *tx).await?;
    let mut copy = tx.copy_in_raw("COPY listed (email) FROM STDIN").await?;
    for part in rows.as_bytes().chunks(64 * 1024) {
        copy.send(part).await?;
    }
    copy.finish().await?;
    sqlx::query(
        "WITH invited AS (INSERT INTO users (email) SELECT email FROM listed RETURNING id)
         INSERT INTO run_items (run_id, user_id, position) SELECT $1, id, row_number() OVER () FROM invited",
    )
    .bind(run_id)
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(())
}
