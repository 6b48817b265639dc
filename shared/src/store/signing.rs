//! The key that ids are signed with, and what says how far ids can be trusted.

use sqlx::PgConnection;
use uuid::Uuid;

use crate::signed_id::SigningKey;

/// The key that `Message-ID`s and unsubscribe links are signed with. It never changes.
///
/// # Errors
/// The database's; `RowNotFound` where somebody has deleted it.
pub async fn key(conn: &mut PgConnection) -> sqlx::Result<SigningKey> {
    let installation = installation(&mut *conn).await?;
    let key = sqlx::query_scalar!("SELECT key FROM signing_key").fetch_one(conn).await?;
    Ok(SigningKey::new(key, installation.id))
}

/// Whether the ledger was ever restored from a backup. Numbers of items may have been given to other people since, so an id
/// counts only if it names the run as well.
///
/// # Errors
/// The database's.
pub async fn was_restored(conn: &mut PgConnection) -> sqlx::Result<bool> {
    Ok(installation(conn).await?.restored)
}

/// Which installation this ledger is.
#[derive(Clone, Copy, Debug)]
struct Installation {
    id: Uuid,
    restored: bool,
}

/// The ledger does not record it yet: every installation is the same one, and none was restored.
#[expect(clippy::unused_async, reason = "its callers are ready for a row of the ledger")]
async fn installation(_conn: &mut PgConnection) -> sqlx::Result<Installation> {
    Ok(Installation { id: Uuid::nil(), restored: false })
}
