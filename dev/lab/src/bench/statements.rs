//! Counts and durations of statements, from `pg_stat_statements`, if the server has loaded it.

use std::ops::Sub;

use sqlx::PgConnection;

/// The statistics of one database at one moment; subtracting two gives those between them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Statements {
    pub(super) calls: i64,
    milliseconds: f64,
}

impl Statements {
    /// The statements that contain `text`; none without these statistics.
    pub(super) async fn with(conn: &mut PgConnection, text: &str) -> Option<Self> {
        let (calls, milliseconds) = sqlx::query_as(
            "SELECT coalesce(sum(calls), 0)::bigint, coalesce(sum(total_exec_time), 0)::double precision
             FROM pg_stat_statements
             WHERE dbid = (SELECT oid FROM pg_database WHERE datname = current_database()) AND strpos(query, $1) > 0",
        )
        .bind(text)
        .fetch_one(conn)
        .await
        .ok()?;
        Some(Self { calls, milliseconds })
    }

    /// The mean per call, if there was one.
    pub(super) fn mean_milliseconds(&self) -> Option<f64> {
        (self.calls > 0).then(|| self.milliseconds / self.calls as f64)
    }
}

impl Sub for Statements {
    type Output = Self;

    fn sub(self, earlier: Self) -> Self {
        Self { calls: self.calls - earlier.calls, milliseconds: self.milliseconds - earlier.milliseconds }
    }
}
