//! Declaring a restore: items that are open in the backup may have been sent since.

use mailrun_core::{item::ItemState, run::Wanted};
use mailrun_ledger::{
    restore::{MAY_HAVE_BEEN_SENT, Stopped, connected_workers, settle_open, settle_sent, stop_all},
    runs, workers,
};

use crate::support::{
    counters_equal_counts, execute, in_database, in_transaction, item, pool_named, release, run, run_of, set_wanted,
    standings, value, worker,
};

use ItemState::{Cancelled, Failed, Pending, Retrying, Sent, Unknown};

#[test]
fn names_connected_workers() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        assert!(connected_workers(&mut conn).await.unwrap().is_empty());
        let pool = pool_named(ledger, "mailrun worker send").await;
        let held = [pool.acquire().await.unwrap(), pool.acquire().await.unwrap()];
        assert_eq!(connected_workers(&mut conn).await.unwrap(), ["mailrun worker send"]);
        drop(held);
        pool.close().await;
    });
}

#[test]
fn stops_everything_that_would_continue() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let (open, over) = (run_of(&mut conn, &[Pending]).await.id, run_of(&mut conn, &[Sent]).await.id);
        let cancelled = run_of(&mut conn, &[Pending]).await.id;
        set_wanted(&mut conn, cancelled, Wanted::Cancelled).await;
        release(&mut conn, open, 0).await;
        worker(&mut conn).await;
        for statement in [
            "INSERT INTO outbox (message, published_at) VALUES ('1', NULL), ('2', now())".into(),
            format!("INSERT INTO relay_stops (relay, reason, alike, runs) VALUES ('r', '', '{{}}', '{{{open}}}')"),
        ] {
            execute(&mut conn, statement).await;
        }
        let stopped = stop_all(&mut conn).await.unwrap();
        assert_eq!(stopped, Stopped { runs: 3, paused: 1, messages: 1 });
        let wanted = "SELECT string_agg(wanted::text, ',' ORDER BY wanted) FROM runs";
        assert_eq!(value::<String>(&mut conn, wanted).await, "running,paused,cancelled", "an ended run stays as it is");
        assert!(runs::progress(ledger, over).await.unwrap().unwrap().restored);
        assert!(workers::beats(&mut conn).await.unwrap().is_empty());
        assert!(value::<bool>(&mut conn, "SELECT bool_and(done_at IS NOT NULL) FROM run_passes").await);
        assert!(value::<bool>(&mut conn, "SELECT runs = '{}' FROM relay_stops").await, "an answer resumes nothing");
        let again = stop_all(&mut conn).await.unwrap();
        assert_eq!(again, Stopped { runs: 3, ..Stopped::default() }, "repeating it changes nothing");
    });
}

#[test]
fn open_items_become_unknown_released_or_not() {
    in_transaction(async |conn| {
        let items = [item(Pending), item(Retrying).attempt(3).counted(2, 1), item(Failed), item(Sent), item(Cancelled)];
        let run = run(conn, &items).await;
        let mut told = Vec::new();
        assert_eq!(settle_open(conn, |settled| told.push(settled)).await.unwrap(), 2);
        assert_eq!(told, [2]);
        let expected = [(1, Unknown), (4, Unknown), (1, Failed), (1, Sent), (1, Cancelled)];
        assert_eq!(standings(conn, run.id).await, expected, "the attempt that an item waited for");
        let error = "SELECT DISTINCT error FROM run_items WHERE state = 'unknown'";
        assert_eq!(value::<String>(conn, error).await, MAY_HAVE_BEEN_SENT);
        assert_eq!(settle_open(conn, |_| ()).await.unwrap(), 0, "repeating it changes nothing");
        counters_equal_counts(conn).await;
    });
}

#[test]
fn settles_more_than_one_batch_of_open_items() {
    in_transaction(async |conn| {
        let run = run_of(conn, &[Pending; 1_001]).await;
        let mut told = Vec::new();
        assert_eq!(settle_open(conn, |settled| told.push(settled)).await.unwrap(), 1_001);
        assert_eq!(told, [1_000, 1_001]);
        assert!(standings(conn, run.id).await.iter().all(|(_, state)| *state == Unknown));
        counters_equal_counts(conn).await;
    });
}

#[test]
fn settles_items_that_the_relays_log_shows_as_sent() {
    in_transaction(async |conn| {
        let items = [item(Pending), item(Retrying).attempt(2), item(Failed), item(Sent), item(Cancelled)];
        let run = run(conn, &items).await;
        let other = run_of(conn, &[Pending]).await;
        let mut sent: Vec<_> = run.items.iter().map(|item| (run.id, item.id)).collect();
        // The log names an item of another ledger whose id exists here.
        sent.push((run.id, other.items[0].id));
        assert_eq!(settle_sent(conn, &sent).await.unwrap(), 4);
        assert_eq!(standings(conn, run.id).await, [(1, Sent), (3, Sent), (1, Sent), (1, Sent), (1, Sent)]);
        assert_eq!(standings(conn, other.id).await, [(1, Pending)]);
        assert_eq!(settle_sent(conn, &sent).await.unwrap(), 0);
        counters_equal_counts(conn).await;
    });
}
