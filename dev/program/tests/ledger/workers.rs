//! Workers: each writes its own row, and others declare it dead by a heartbeat that does not change.

use std::time::Duration;

use mailrun_core::agreement::Agreement;
use mailrun_ledger::workers::{Registration, all, beats, declare_dead, heartbeat, register, stop};

use crate::support::{execute, in_database, in_transaction, kill, settings, until_one_waits, value, worker};

#[test]
fn a_worker_registers_beats_and_stops() {
    in_transaction(async |conn| {
        let registration =
            Registration { roles: "send,progress", host: "host", pid: 42, permits: 7, settings: &settings() };
        let id = register(conn, &registration).await.unwrap().unwrap();
        assert_eq!(beats(conn).await.unwrap()[0].worker_id, id);
        let closed = Some(("421 try later".to_owned(), Duration::from_secs(60)));
        assert!(heartbeat(conn, id, 3, 1, closed, Some("mailrun.items: full".into())).await.unwrap());
        let worker = all(conn).await.unwrap().remove(0);
        assert_eq!(
            (worker.id, worker.roles.as_str(), worker.host.as_str(), worker.pid),
            (id, "send,progress", "host", 42)
        );
        assert_eq!((worker.stopped, worker.dead), (false, false));
        assert_eq!(worker.closed.as_deref(), Some("421 try later"));
        assert_eq!(worker.rejected.as_deref(), Some("mailrun.items: full"));
        assert_eq!(value::<i32>(conn, "SELECT in_flight + rebuilds + permits FROM workers").await, 11);

        stop(conn, id, 2).await.unwrap();
        let worker = all(conn).await.unwrap().remove(0);
        assert_eq!((worker.stopped, worker.dead, worker.closed, worker.rejected), (true, false, None, None));
        assert!(beats(conn).await.unwrap().is_empty());
    });
}

#[test]
fn a_worker_with_other_settings_than_a_live_one_is_not_registered() {
    in_transaction(async |conn| {
        let live = worker(conn).await;
        let settings = Agreement { item_queues: 2, ..settings() };
        let other = Registration { roles: "send", host: "other", pid: 2, permits: 1, settings: &settings };
        let disagreeing = register(conn, &other).await.unwrap().unwrap_err();
        assert_eq!((disagreeing[0].beat.worker_id, disagreeing[0].dead_after), (live, Duration::from_secs(8)));
        assert_eq!(disagreeing[0].differences[0].key, "amqp.item_queues");
        assert_eq!(all(conn).await.unwrap().len(), 1);
        kill(conn, live).await;
        register(conn, &other).await.unwrap().unwrap();
    });
}

#[test]
fn a_worker_of_a_version_without_settings_agrees_with_every_other() {
    in_transaction(async |conn| {
        worker(conn).await;
        execute(conn, "UPDATE workers SET settings = NULL").await;
        let settings = Agreement { item_queues: 2, ..settings() };
        let other = Registration { roles: "send", host: "other", pid: 2, permits: 1, settings: &settings };
        register(conn, &other).await.unwrap().unwrap();
    });
}

#[test]
fn a_lane_that_was_to_open_by_now_is_not_closed() {
    in_transaction(async |conn| {
        let id = worker(conn).await;
        heartbeat(conn, id, 0, 0, Some(("busy".into(), Duration::from_secs(60))), None).await.unwrap();
        execute(conn, "UPDATE workers SET lane_until = clock_timestamp() - interval '1 second'").await;
        assert_eq!(all(conn).await.unwrap()[0].closed, None);
    });
}

#[test]
fn declares_a_worker_dead_whose_heartbeat_has_not_changed() {
    in_transaction(async |conn| {
        let (silent, beating) = (worker(conn).await, worker(conn).await);
        let seen = beats(conn).await.unwrap();
        execute(conn, format!("UPDATE workers SET heartbeat_at = heartbeat_at + interval '1 ms' WHERE id = {beating}"))
            .await;
        assert_eq!(declare_dead(conn, &seen).await.unwrap(), [silent]);
        assert!(declare_dead(conn, &seen).await.unwrap().is_empty(), "once");
        assert_eq!(beats(conn).await.unwrap().len(), 1);
    });
}

#[test]
fn a_worker_that_was_declared_dead_beats_no_more() {
    in_transaction(async |conn| {
        let id = worker(conn).await;
        let seen = beats(conn).await.unwrap();
        declare_dead(conn, &seen).await.unwrap();
        assert!(!heartbeat(conn, id, 0, 0, None, None).await.unwrap());
        assert!(!heartbeat(conn, id + 1, 0, 0, None, None).await.unwrap(), "nor one without a row");
    });
}

#[test]
fn a_worker_that_stopped_is_not_declared_dead() {
    in_transaction(async |conn| {
        let id = worker(conn).await;
        let seen = beats(conn).await.unwrap();
        execute(conn, format!("UPDATE workers SET stopped_at = now() WHERE id = {id}")).await;
        assert!(declare_dead(conn, &seen).await.unwrap().is_empty());
    });
}

/// Whoever comes first decides: the worker ends, or it lives.
#[test]
fn a_heartbeat_and_a_declaration_at_the_same_moment_agree() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let id = worker(&mut conn).await;
        let seen = beats(&mut conn).await.unwrap();
        let mut tx = ledger.begin().await.unwrap();
        assert!(heartbeat(&mut tx, id, 0, 0, None, None).await.unwrap());
        let (dead, ()) = tokio::join!(declare_dead(&mut conn, &seen), async {
            until_one_waits(ledger).await;
            tx.commit().await.unwrap();
        });
        assert!(dead.unwrap().is_empty(), "the heartbeat came first");

        let seen = beats(&mut conn).await.unwrap();
        let mut tx = ledger.begin().await.unwrap();
        assert_eq!(declare_dead(&mut tx, &seen).await.unwrap(), [id]);
        let (alive, ()) = tokio::join!(heartbeat(&mut conn, id, 0, 0, None, None), async {
            until_one_waits(ledger).await;
            tx.commit().await.unwrap();
        });
        assert!(!alive.unwrap(), "the declaration came first");
    });
}
