//! The naive pipeline: the same work one item at a time, with a transaction per person, a confirm per message, an ack per delivery, and
//! a result message and a counter update per item.

use anyhow::Result;
use sqlx::{Connection as _, PgConnection};
use uuid::Uuid;

use super::{
    bare_pipeline::Sizes,
    people,
    place::Place,
    raw::{Raw, insert_run, process},
};

/// As many processes as Mailrun has.
const SIZES: Sizes = Sizes { burst: 1, batch: 1, publishers: 1, senders: 2, window: 5_000 };

/// Submits `items` people one by one, and processes them one by one.
pub(super) async fn measure(place: &Place<'_>, items: usize) -> Result<Raw> {
    process(place, items, SIZES, submit).await
}

/// A run with all its rows: one transaction for each person and their item.
async fn submit(conn: &mut PgConnection, run_id: Uuid, items: usize) -> Result<()> {
    insert_run(conn, run_id, items).await?;
    for (position, email) in (1..=i32::try_from(items)?).zip(people("guest", items).lines()) {
        let mut tx = conn.begin().await?;
        let user_id: i64 = sqlx::query_scalar("INSERT INTO users (email) VALUES ($1) RETURNING id")
            .bind(email)
            .fetch_one(&mut *tx)
            .await?;
        sqlx::query("INSERT INTO run_items (run_id, user_id, position) VALUES ($1, $2, $3)")
            .bind(run_id)
            .bind(user_id)
            .bind(position)
            .execute(&mut *tx)
            .await?;
        tx.commit().await?;
    }
    Ok(())
}
