//! The database writes of a measurement: WAL, commits and statements.

use std::ops::Sub;

use anyhow::Result;
use sqlx::PgConnection;

use super::statements::Statements;

/// The writes up to one moment; subtracting two gives those between them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Writes {
    /// Bytes of WAL of the whole server: nothing else writes while the bench runs.
    pub(super) wal_bytes: i64,
    /// Transactions of this database. Sessions report theirs with a delay of up to a second, or when they end.
    pub(super) commits: i64,
    /// Statements in this database, if `pg_stat_statements` is loaded.
    pub(super) statements: Option<i64>,
}

impl Writes {
    /// The writes so far.
    pub(super) async fn now(conn: &mut PgConnection) -> Result<Self> {
        let (wal_bytes, commits) = sqlx::query_as(
            "SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint, xact_commit
             FROM pg_stat_database WHERE datname = current_database()",
        )
        .fetch_one(&mut *conn)
        .await?;
        let statements = Statements::with(conn, "").await.map(|all| all.calls);
        Ok(Self { wal_bytes, commits, statements })
    }
}

impl Sub for Writes {
    type Output = Self;

    fn sub(self, earlier: Self) -> Self {
        Self {
            wal_bytes: self.wal_bytes - earlier.wal_bytes,
            commits: self.commits - earlier.commits,
            statements: self.statements.zip(earlier.statements).map(|(now, then)| now - then),
        }
    }
}
