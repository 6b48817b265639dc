//! The key that signs ids, and how far ids can be trusted.

use sqlx::PgConnection;

use crate::installation;
use mailrun_core::signed_id::SigningKey;

/// The key that signs `Message-ID`s and unsubscribe links. It never changes.
///
/// # Errors
/// `RowNotFound` if the key was deleted.
pub async fn key(conn: &mut PgConnection) -> sqlx::Result<SigningKey> {
    let installation = installation::read(&mut *conn).await?;
    let key = sqlx::query_scalar!("SELECT key FROM signing_key").fetch_one(conn).await?;
    Ok(SigningKey::new(key, installation.id))
}

/// Whether the ledger was ever restored from a backup. Item ids may have been reused for other people since, so a signed id
/// counts only if it also names the run.
pub async fn was_restored(conn: &mut PgConnection) -> sqlx::Result<bool> {
    Ok(installation::read(conn).await?.restored_at.is_some())
}
