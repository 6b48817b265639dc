//! PostgreSQL's durability settings.

use sqlx::PgConnection;

/// The settings that decide whether a commit survives a crash or a failover.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Durability {
    /// `fsync`: whether writes are forced to disk.
    pub fsync: bool,
    /// `full_page_writes`: whether a page torn by a power failure can be restored.
    pub full_page_writes: bool,
    /// `synchronous_commit` in our sessions.
    pub synchronous_commit: String,
    /// `synchronous_standby_names`: the standbys that a commit waits for; empty for none.
    pub synchronous_standbys: String,
    /// Connected standbys, synchronous or not.
    pub standbys: i64,
    /// Whether the server itself is a standby and read-only.
    pub is_standby: bool,
}

/// Reads the settings.
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
