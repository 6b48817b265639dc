//! The schema: brings it up to date, and tells whether it is.

use std::collections::HashMap;

use chrono::{DateTime, Utc};
use sqlx::{
    PgConnection, PgPool,
    migrate::{MigrateError, Migrator},
};
use tracing::info;

use super::mailboxes;

/// The steps that make it. One that has landed is never edited.
static MIGRATIONS: Migrator = sqlx::migrate!("../../migrations");

/// Brings the schema up to date, and the addresses in it (see [`mailboxes`]). Safe from several processes at once.
///
/// # Errors
/// When PostgreSQL can't be reached, or holds another schema.
pub async fn migrate(pool: &PgPool) -> Result<(), MigrateError> {
    let mut connection = pool.acquire().await?;
    // A step may take its time on a large ledger.
    sqlx::query("SET statement_timeout = 0").execute(&mut *connection).await?;
    let done = bring_up_to_date(&mut connection).await;
    // It is not as the others any more.
    connection.close().await?;
    done
}

async fn bring_up_to_date(conn: &mut PgConnection) -> Result<(), MigrateError> {
    MIGRATIONS.run(&mut *conn).await?;
    let unified = mailboxes::unify(conn).await?;
    if unified != Default::default() {
        let mailboxes::Unified { people, merged, suppressions } = unified;
        info!(
            people,
            merged, suppressions, "addresses are spelled as their mailboxes, and people of one mailbox merged"
        );
    }
    Ok(())
}

/// What is between the schema of the database and that of this program. All empty: nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Difference {
    /// Migrations that the database has not had.
    pub missing: Vec<i64>,
    /// Migrations that it has had and this program does not know: it is the older one.
    pub unknown: Vec<i64>,
    /// Migrations that were other ones there, or were broken off.
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

/// Compares the schema of the database with that of this program.
///
/// # Errors
/// The database's.
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
///
/// # Errors
/// The database's.
pub async fn now(conn: &mut PgConnection) -> sqlx::Result<DateTime<Utc>> {
    sqlx::query_scalar!(r#"SELECT clock_timestamp() AS "now!""#).fetch_one(conn).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_difference_is_told() {
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
