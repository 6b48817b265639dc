//! The key that ids are signed with, and what says how far ids can be trusted.

use sqlx::PgConnection;

use crate::installation;
use mailrun_core::signed_id::SigningKey;

/// The key that `Message-ID`s and unsubscribe links are signed with. It never changes.
///
/// # Errors
/// The database's; `RowNotFound` where somebody has deleted it.
pub async fn key(conn: &mut PgConnection) -> sqlx::Result<SigningKey> {
    let installation = installation::read(&mut *conn).await?;
    let key = sqlx::query_scalar!("SELECT key FROM signing_key").fetch_one(conn).await?;
    Ok(SigningKey::new(key, installation.id))
}

/// Whether the ledger was ever restored from a backup. Numbers of items may have been given to other people since, so an id
/// counts only if it names the run as well.
///
/// # Errors
/// The database's.
pub async fn was_restored(conn: &mut PgConnection) -> sqlx::Result<bool> {
    Ok(installation::read(conn).await?.restored_at.is_some())
}
