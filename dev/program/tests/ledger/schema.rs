//! The schema: concurrent migrations, and the comparison with the program's schema.

use mailrun_core::item::ItemState::Pending;
use mailrun_ledger::{
    migrate,
    schema::{Difference, difference, now},
};

use crate::support::{execute, in_bare_database, in_transaction, item, run, value};

#[test]
fn several_processes_may_migrate_concurrently() {
    in_bare_database(async |bare| {
        let mut conn = bare.acquire().await.unwrap();
        let before = difference(&mut conn).await.unwrap();
        assert!(before.missing.contains(&1) && before.unknown.is_empty() && before.altered.is_empty());
        let (first, second, third) = tokio::join!(migrate(bare), migrate(bare), migrate(bare));
        [first, second, third].into_iter().for_each(|done| done.unwrap());
        assert_eq!(difference(&mut conn).await.unwrap(), Difference::default());
        // Migrating also normalizes addresses.
        run(&mut conn, &[item(Pending).to("ann@bücher.example")]).await;
        migrate(bare).await.unwrap();
        assert_eq!(value::<String>(&mut conn, "SELECT email FROM users").await, "ann@xn--bcher-kva.example");
    });
}

#[test]
fn reports_schema_differences() {
    in_transaction(async |conn| {
        assert_eq!(difference(conn).await.unwrap(), Difference::default());
        for statement in [
            "DELETE FROM _sqlx_migrations WHERE version = 1",
            "UPDATE _sqlx_migrations SET checksum = '\\x00' WHERE version = 2",
            "UPDATE _sqlx_migrations SET success = false WHERE version = 3",
            "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time)
             VALUES (9999, 'later', true, '\\x00', 0)",
        ] {
            execute(conn, statement).await;
        }
        let found = difference(conn).await.unwrap();
        assert_eq!(found, Difference { missing: vec![1], unknown: vec![9999], altered: vec![2, 3] });
    });
}

#[test]
fn the_clock_advances_within_a_transaction() {
    in_transaction(async |conn| {
        let first = now(conn).await.unwrap();
        assert!(now(conn).await.unwrap() > first);
    });
}

/// Otherwise, waiting for a moment in the future would take hours after the clock was set back.
#[test]
fn a_moment_in_the_future_is_not_recent() {
    in_transaction(async |conn| {
        for (at, recent) in [("-1", true), ("-11", false), ("1", true), ("60", false)] {
            let query = format!("SELECT mailrun_is_recent(clock_timestamp() + make_interval(secs => {at}), 10)");
            assert_eq!(value::<bool>(conn, query).await, recent, "{at} s");
        }
    });
}
