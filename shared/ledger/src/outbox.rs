//! The outbox: messages committed with the transaction that makes them true, waiting to be published.

use std::time::Duration;

use sqlx::{PgConnection, types::Json};

use mailrun_core::message::Message;

/// An unpublished message.
#[derive(Debug)]
pub struct Waiting {
    /// Its id, for [`mark_published`].
    pub id: i64,
    /// Its [`Message::TYPE`], unless a newer program wrote it.
    pub kind: String,
    /// Its body.
    pub message: serde_json::Value,
}

/// Adds a message, to be published after the caller's transaction has committed.
pub async fn put<M: Message + Sync>(conn: &mut PgConnection, message: &M) -> sqlx::Result<()> {
    sqlx::query!("INSERT INTO outbox (kind, message) VALUES ($1, $2)", message.kind(), Json(message) as _)
        .execute(conn)
        .await?;
    Ok(())
}

/// The oldest due messages, locked until the caller's transaction ends, so that several outbox publishers do not publish the
/// same ones.
pub async fn take(conn: &mut PgConnection, limit: i64) -> sqlx::Result<Vec<Waiting>> {
    sqlx::query_as!(
        Waiting,
        r#"SELECT id, kind, message FROM outbox
           WHERE published_at IS NULL AND (publish_at <= now() OR publish_at > now() + interval '2 minutes')
           ORDER BY publish_at, id LIMIT $1
           FOR UPDATE SKIP LOCKED"#,
        limit
    )
    .fetch_all(conn)
    .await
}

/// Marks messages as published, after the publisher confirm.
pub async fn mark_published(conn: &mut PgConnection, ids: &[i64]) -> sqlx::Result<()> {
    sqlx::query!("UPDATE outbox SET published_at = now() WHERE id = ANY($1)", ids).execute(conn).await?;
    Ok(())
}

/// Postpones messages by `time`.
pub async fn postpone(conn: &mut PgConnection, ids: &[i64], time: Duration) -> sqlx::Result<()> {
    if !ids.is_empty() {
        sqlx::query!(
            "UPDATE outbox SET publish_at = now() + make_interval(secs => $2) WHERE id = ANY($1)",
            ids,
            time.as_secs_f64(),
        )
        .execute(conn)
        .await?;
    }
    Ok(())
}

/// The oldest messages that were added more than `after` ago and are still not published.
pub async fn overdue(conn: &mut PgConnection, after: Duration, limit: i64) -> sqlx::Result<Vec<Waiting>> {
    sqlx::query_as!(
        Waiting,
        "SELECT id, kind, message FROM outbox
         WHERE published_at IS NULL AND created_at < clock_timestamp() - make_interval(secs => $1)
         ORDER BY id LIMIT $2",
        after.as_secs_f64(),
        limit
    )
    .fetch_all(conn)
    .await
}

/// Locks messages as [`take`] does. Returns those that were neither published nor locked in the meantime.
pub async fn lock(conn: &mut PgConnection, ids: &[i64]) -> sqlx::Result<Vec<i64>> {
    sqlx::query_scalar!("SELECT id FROM outbox WHERE id = ANY($1) AND published_at IS NULL FOR UPDATE SKIP LOCKED", ids)
        .fetch_all(conn)
        .await
}
