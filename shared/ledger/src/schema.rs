//! Migrates the schema, and checks whether it is up to date.

use std::collections::HashMap;

use chrono::{DateTime, Utc};
use sqlx::{
    PgConnection, PgPool,
    migrate::{MigrateError, Migrator},
};
use tracing::info;

use super::mailboxes;

/// The migrations. A released migration is never edited.
static MIGRATIONS: Migrator = sqlx::migrate!("../../migrations");

/// Migrates the schema and normalizes the addresses in it (see [`mailboxes`]). Safe to run from several processes concurrently.
///
/// # Errors
/// If PostgreSQL can't be reached, or the database holds a different schema.
pub async fn migrate(pool: &PgPool) -> Result<(), MigrateError> {
    let mut connection = pool.acquire().await?;
    // A migration may take long on a large ledger.
    sqlx::query("SET statement_timeout = 0").execute(&mut *connection).await?;
    let done = bring_up_to_date(&mut connection).await;
    // This connection has other session settings than the pool's.
    connection.close().await?;
    done
}

async fn bring_up_to_date(conn: &mut PgConnection) -> Result<(), MigrateError> {
    MIGRATIONS.run(&mut *conn).await?;
    let unified = mailboxes::unify(conn).await?;
    if unified != Default::default() {
        let mailboxes::Unified { people, merged, suppressions } = unified;
        info!(people, merged, suppressions, "addresses normalized, people with the same mailbox merged");
    }
    Ok(())
}

/// The difference between the database's schema and this program's. Empty if there is none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Difference {
    /// Migrations that the database lacks.
    pub missing: Vec<i64>,
    /// Migrations that this program does not know: it is older than the schema.
    pub unknown: Vec<i64>,
    /// Migrations that have other contents in the database, or failed there.
    pub altered: Vec<i64>,
}

impl Difference {
    fn between(known: &[(i64, &[u8])], applied: &HashMap<i64, (Vec<u8>, bool)>) -> Self {
        let mut difference = Self::default();
        for (version, checksum) in known {
            match applied.get(version) {
                None => difference.missing.push(*version),
                Some((found, success)) if found != checksum || !success => difference.altered.push(*version),
                Some(_) => {}
            }
        }
        difference.unknown =
            applied.keys().filter(|version| known.iter().all(|(known, _)| known != *version)).copied().collect();
        difference.unknown.sort_unstable();
        difference
    }
}

/// Compares the database's schema with this program's.
pub async fn difference(conn: &mut PgConnection) -> sqlx::Result<Difference> {
    let exists = sqlx::query_scalar!(r#"SELECT to_regclass('_sqlx_migrations') IS NOT NULL AS "exists!""#)
        .fetch_one(&mut *conn)
        .await?;
    let rows = match exists {
        true => sqlx::query!("SELECT version, checksum, success FROM _sqlx_migrations").fetch_all(conn).await?,
        false => Vec::new(),
    };
    let applied = rows.into_iter().map(|row| (row.version, (row.checksum, row.success))).collect();
    let known: Vec<(i64, &[u8])> =
        MIGRATIONS.iter().map(|migration| (migration.version, migration.checksum.as_ref())).collect();
    Ok(Difference::between(&known, &applied))
}

/// The database's clock.
pub async fn now(conn: &mut PgConnection) -> sqlx::Result<DateTime<Utc>> {
    sqlx::query_scalar!(r#"SELECT clock_timestamp() AS "now!""#).fetch_one(conn).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_every_difference() {
        let known: [(i64, &[u8]); 4] = [(1, b"a"), (2, b"b"), (3, b"c"), (4, b"d")];
        let applied = |rows: &[(i64, &[u8], bool)]| {
            rows.iter().map(|(version, checksum, success)| (*version, (checksum.to_vec(), *success))).collect()
        };
        let same = applied(&[(1, b"a", true), (2, b"b", true), (3, b"c", true), (4, b"d", true)]);
        assert_eq!(Difference::between(&known, &same), Difference::default());
        let other = applied(&[(1, b"a", true), (2, b"x", true), (3, b"c", false), (9, b"z", true)]);
        assert_eq!(
            Difference::between(&known, &other),
            Difference { missing: vec![4], unknown: vec![9], altered: vec![2, 3] }
        );
    }
}
