//! What PostgreSQL promises of a commit.

use sqlx::PgConnection;

/// The settings on which it depends whether a commit survives a crash or a failover.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Durability {
    /// `fsync`: whether anything is forced to disk.
    pub fsync: bool,
    /// `full_page_writes`: whether a page that was half written when the power failed can be restored.
    pub full_page_writes: bool,
    /// `synchronous_commit`, as our sessions have it.
    pub synchronous_commit: String,
    /// `synchronous_standby_names`: the standbys that a commit waits for; empty: none.
    pub synchronous_standbys: String,
    /// Standbys that are connected, of either kind.
    pub standbys: i64,
    /// Whether the server is itself a standby, and takes no writes.
    pub is_standby: bool,
}

/// Reads them.
///
/// # Errors
/// The database's.
pub async fn read(conn: &mut PgConnection) -> sqlx::Result<Durability> {
    sqlx::query_as!(
        Durability,
        r#"SELECT current_setting('fsync') = 'on' AS "fsync!",
                  current_setting('full_page_writes') = 'on' AS "full_page_writes!",
                  current_setting('synchronous_commit') AS "synchronous_commit!",
                  current_setting('synchronous_standby_names') AS "synchronous_standbys!",
                  (SELECT count(*) FROM pg_stat_replication) AS "standbys!",
                  pg_is_in_recovery() AS "is_standby!""#
    )
    .fetch_one(conn)
    .await
}
