//! PostgreSQL itself: its durability settings, our sessions, its roles, and the gauges.

use std::time::Duration;

use mailrun_core::item::ItemState;
use mailrun_ledger::{
    Session, durability, gauges,
    grants::{self, Granted},
    may_pass,
    settings::{RolesConfig, Writer},
};
use sqlx::PgConnection;
use uuid::Uuid;

use crate::support::{execute, in_database, in_transaction, run_of, suppress, value};

use ItemState::{Pending, Retrying, Sent};

#[test]
fn reads_the_durability_settings() {
    in_transaction(async |conn| {
        execute(conn, "SET LOCAL synchronous_commit = on").await;
        let durable = durability::read(conn).await.unwrap();
        assert_eq!((durable.synchronous_commit.as_str(), durable.standbys, durable.is_standby), ("on", 0, false));
        assert_eq!(durable.fsync, value::<String>(conn, "SHOW fsync").await == "on");
        execute(conn, "SET LOCAL synchronous_commit = off").await;
        assert_eq!(durability::read(conn).await.unwrap().synchronous_commit, "off");
    });
}

#[test]
fn gauges_sum_up_the_runs() {
    in_transaction(async |conn| {
        let empty = gauges::read(conn).await.unwrap();
        assert_eq!((empty.open_runs, empty.outbox_messages, empty.outbox_oldest), (0, 0, Duration::ZERO));
        run_of(conn, &[Pending, Retrying, Sent]).await;
        run_of(conn, &[Sent]).await;
        suppress(conn, "sam@example.org").await;
        for statement in [
            "INSERT INTO outbox (message, created_at) VALUES ('1', now() - interval '1 minute'), ('2', now())",
            "INSERT INTO outbox (message, created_at, published_at) VALUES ('3', now() - interval '1 hour', now())",
            "INSERT INTO relay_stops (relay, reason, alike, runs) VALUES ('r', '', '{}', '{}')",
        ] {
            execute(conn, statement).await;
        }
        let read = gauges::read(conn).await.unwrap();
        let count = |state| read.items.iter().find(|(of, _)| *of == state).map(|(_, count)| *count);
        assert_eq!((count(Pending), count(Retrying), count(Sent)), (Some(1), Some(1), Some(2)));
        assert_eq!((read.open_runs, read.outbox_messages, read.suppressions, read.relays_stopped), (1, 2, 1, 1));
        assert!(read.outbox_oldest >= Duration::from_secs(60) && read.outbox_oldest < Duration::from_secs(70));
    });
}

/// After the clock was set back, the age would be negative.
#[test]
fn a_message_from_the_future_has_age_zero() {
    in_transaction(async |conn| {
        execute(conn, "INSERT INTO outbox (message, created_at) VALUES ('1', now() + interval '1 hour')").await;
        assert_eq!(gauges::read(conn).await.unwrap().outbox_oldest, Duration::ZERO);
    });
}

#[test]
fn a_session_keeps_its_connection_until_an_error() {
    in_database(async |ledger| {
        const LIMIT: Duration = Duration::from_secs(30);
        let mut session = Session::new(ledger);
        let pid = async |conn: &mut PgConnection| {
            sqlx::query_scalar::<_, i32>("SELECT pg_backend_pid()").fetch_one(conn).await
        };
        let first = session.run(LIMIT, pid).await.unwrap();
        assert_eq!(session.run(LIMIT, pid).await.unwrap(), first);
        execute(&mut ledger.acquire().await.unwrap(), format!("SELECT pg_terminate_backend({first})")).await;
        let error = session.run(LIMIT, pid).await.unwrap_err();
        assert!(may_pass(&error), "{error}");
        assert_ne!(session.run(LIMIT, pid).await.unwrap(), first, "the next operation gets another one");
    });
}

#[test]
fn a_role_may_write_only_its_columns() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let config = RolesConfig { prefix: format!("ledger_{}", Uuid::new_v4().simple()), ..RolesConfig::default() };
        assert_eq!(grants::grant(ledger, &config).await.unwrap(), Granted::Yes);
        assert_eq!(grants::grant(ledger, &config).await.unwrap(), Granted::Yes, "repeating it changes nothing");
        let may = async |conn: &mut PgConnection, writer, right: &str| {
            let role = config.name(writer);
            value::<bool>(conn, format!("SELECT has_column_privilege('{role}', {right})")).await
        };
        assert!(may(&mut conn, Writer::Progress, "'run_items', 'state', 'UPDATE'").await);
        assert!(!may(&mut conn, Writer::Send, "'run_items', 'state', 'UPDATE'").await);
        assert!(may(&mut conn, Writer::Send, "'attempts', 'worker_id', 'INSERT'").await);
        assert!(may(&mut conn, Writer::Worker, "'attempts', 'worker_id', 'INSERT'").await, "it has the rights of each");
        assert!(!may(&mut conn, Writer::Progress, "'signing_key', 'key', 'SELECT'").await);
        for writer in Writer::ALL {
            let role = config.name(writer);
            execute(&mut conn, format!("DROP OWNED BY {role}")).await;
            execute(&mut conn, format!("DROP ROLE {role}")).await;
        }
    });
}
