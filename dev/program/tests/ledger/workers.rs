//! Workers: each writes only its own row, and is declared dead when its heartbeat stops changing.

use std::time::Duration;

use mailrun_core::agreement::Agreement;
use mailrun_ledger::workers::{Registration, all, beats, declare_dead, heartbeat, register, stop};

use crate::support::{execute, in_database, in_transaction, kill, settings, until_one_waits, value, worker};

#[test]
fn a_worker_registers_sends_heartbeats_and_stops() {
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
fn refuses_a_worker_whose_settings_differ_from_a_live_one() {
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
fn a_worker_without_recorded_settings_agrees_with_all_others() {
    in_transaction(async |conn| {
        worker(conn).await;
        execute(conn, "UPDATE workers SET settings = NULL").await;
        let settings = Agreement { item_queues: 2, ..settings() };
        let other = Registration { roles: "send", host: "other", pid: 2, permits: 1, settings: &settings };
        register(conn, &other).await.unwrap().unwrap();
    });
}

#[test]
fn a_gate_that_was_due_to_open_is_not_closed() {
    in_transaction(async |conn| {
        let id = worker(conn).await;
        heartbeat(conn, id, 0, 0, Some(("busy".into(), Duration::from_secs(60))), None).await.unwrap();
        execute(conn, "UPDATE workers SET lane_until = clock_timestamp() - interval '1 second'").await;
        assert_eq!(all(conn).await.unwrap()[0].closed, None);
    });
}

#[test]
fn declares_a_worker_with_an_unchanged_heartbeat_dead() {
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
fn refuses_the_heartbeat_of_a_worker_declared_dead() {
    in_transaction(async |conn| {
        let id = worker(conn).await;
        let seen = beats(conn).await.unwrap();
        declare_dead(conn, &seen).await.unwrap();
        assert!(!heartbeat(conn, id, 0, 0, None, None).await.unwrap());
        assert!(!heartbeat(conn, id + 1, 0, 0, None, None).await.unwrap(), "nor of one without a row");
    });
}

#[test]
fn does_not_declare_a_stopped_worker_dead() {
    in_transaction(async |conn| {
        let id = worker(conn).await;
        let seen = beats(conn).await.unwrap();
        execute(conn, format!("UPDATE workers SET stopped_at = now() WHERE id = {id}")).await;
        assert!(declare_dead(conn, &seen).await.unwrap().is_empty());
    });
}

/// Whichever commits first wins: the worker ends, or it lives.
#[test]
fn a_concurrent_heartbeat_and_declaration_agree() {
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
