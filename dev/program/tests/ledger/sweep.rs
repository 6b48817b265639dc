//! The sweeper's queries: stalled runs, and items whose message may be lost.

use std::time::Duration;

use mailrun_core::{
    claim::{Fate, Owner, Withheld},
    item::ItemState,
    run::Wanted,
};
use mailrun_ledger::sweep::{
    Repairs, all_lanes_closed, is_standstill, open_items, record, repairs, stalled_runs, try_lock,
};
use sqlx::PgConnection;
use uuid::Uuid;

use crate::support::{
    claim, execute, idle_for, in_database, in_transaction, item, kill, receipt, release, run, run_of, set_wanted,
    suppress, worker,
};

use ItemState::{Pending, Retrying, Sent};

const STALLED: Duration = Duration::from_secs(60);

/// A run that has not moved for two minutes.
async fn stalled_run(conn: &mut PgConnection, state: ItemState) -> Uuid {
    let run_id = run_of(conn, &[state]).await.id;
    idle_for(conn, run_id, 120).await;
    run_id
}

#[test]
fn only_one_sweeper_holds_the_lock() {
    in_database(async |ledger| {
        let (mut first, mut second) = (ledger.begin().await.unwrap(), ledger.begin().await.unwrap());
        assert!(try_lock(&mut first).await.unwrap());
        assert!(!try_lock(&mut second).await.unwrap());
        first.rollback().await.unwrap();
        assert!(try_lock(&mut second).await.unwrap());
    });
}

#[test]
fn a_run_is_stalled_if_its_counters_have_not_moved_and_items_are_open() {
    in_transaction(async |conn| {
        let stalled = stalled_run(conn, Retrying).await;
        stalled_run(conn, Sent).await;
        run_of(conn, &[Pending]).await;
        let found = stalled_runs(conn, STALLED).await.unwrap();
        assert_eq!(found.iter().map(|run| run.run_id).collect::<Vec<_>>(), [stalled]);
        assert_eq!((found[0].wanted, found[0].driven, found[0].cancel_begun), (Wanted::Running, false, false));
    });
}

/// The counters moved before the clock was set back.
#[test]
fn counters_that_moved_in_the_future_do_not_hide_a_stalled_run() {
    in_transaction(async |conn| {
        let run_id = run_of(conn, &[Pending]).await.id;
        execute(conn, "UPDATE run_progress SET updated_at = clock_timestamp() + interval '3 hours'").await;
        assert_eq!(stalled_runs(conn, STALLED).await.unwrap()[0].run_id, run_id);
    });
}

#[test]
fn a_run_is_driven_if_its_message_was_seen_or_none_is_needed() {
    in_transaction(async |conn| {
        let run_id = stalled_run(conn, Pending).await;
        let driven = async |conn: &mut PgConnection| stalled_runs(conn, STALLED).await.unwrap()[0].driven;
        release(conn, run_id, 0).await;
        assert!(driven(conn).await, "seen just now");
        execute(conn, "UPDATE run_passes SET seen_at = now() - interval '2 minutes'").await;
        assert!(!driven(conn).await);
        execute(conn, "UPDATE run_passes SET done_at = now()").await;
        assert!(driven(conn).await, "it has released everything");
        let cancel = "INSERT INTO run_passes (run_id, number, kind, seen_at) VALUES";
        execute(conn, format!("{cancel} ('{run_id}', 2, 'cancel', now() - interval '2 minutes')")).await;
        set_wanted(conn, run_id, Wanted::Cancelled).await;
        let stalled = stalled_runs(conn, STALLED).await.unwrap().remove(0);
        assert_eq!((stalled.wanted, stalled.driven, stalled.cancel_begun), (Wanted::Cancelled, false, true));
    });
}

#[test]
fn a_paused_run_is_not_a_standstill() {
    in_transaction(async |conn| {
        let run_id = stalled_run(conn, Pending).await;
        for (wanted, expected) in [(Wanted::Running, true), (Wanted::Paused, false), (Wanted::Cancelled, true)] {
            set_wanted(conn, run_id, wanted).await;
            assert_eq!(is_standstill(conn, STALLED).await.unwrap(), expected);
        }
        assert!(!is_standstill(conn, Duration::from_secs(300)).await.unwrap());
    });
}

#[test]
fn repairs_add_up() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let run_id = Uuid::new_v4();
        assert_eq!(repairs(ledger, run_id).await.unwrap(), Repairs::default());
        record(&mut conn, run_id, Repairs { driven: 1, put_back: 2, ..Repairs::default() }).await.unwrap();
        record(&mut conn, run_id, Repairs::default()).await.unwrap();
        record(&mut conn, run_id, Repairs { put_back: 3, buried: 4, told_again: 5, ..Repairs::default() })
            .await
            .unwrap();
        record(&mut conn, Uuid::new_v4(), Repairs { driven: 9, ..Repairs::default() }).await.unwrap();
        let sum = Repairs { driven: 1, put_back: 5, buried: 4, told_again: 5 };
        assert_eq!(repairs(ledger, run_id).await.unwrap(), sum);
    });
}

#[test]
fn all_gates_are_closed_when_no_live_sender_may_send() {
    in_transaction(async |conn| {
        assert!(!all_lanes_closed(conn).await.unwrap(), "there is no sender");
        let (first, second) = (worker(conn).await, worker(conn).await);
        execute(conn, "INSERT INTO workers (roles, host, pid) VALUES ('progress', 'host', 1)").await;
        let close =
            |id| format!("UPDATE workers SET lane_until = clock_timestamp() + interval '1 minute' WHERE id = {id}");
        execute(conn, close(first)).await;
        assert!(!all_lanes_closed(conn).await.unwrap());
        execute(conn, close(second)).await;
        assert!(all_lanes_closed(conn).await.unwrap());
        let open = worker(conn).await;
        assert!(!all_lanes_closed(conn).await.unwrap());
        kill(conn, open).await;
        assert!(all_lanes_closed(conn).await.unwrap());
    });
}

#[test]
fn finds_overdue_released_items_and_their_owners() {
    in_transaction(async |conn| {
        let items = [
            item(Pending),                          // 1: nobody's
            item(Pending),                          // 2: of a worker that lives
            item(Pending),                          // 3: of one that died
            item(Pending),                          // 4: of one that died after the mail server accepted it
            item(Pending),                          // 5: withheld
            item(Sent),                             // 6
            item(Retrying).due_in(-120.0),          // 7: overdue
            item(Retrying).due_in(-30.0),           // 8: due, but not for long
            item(Pending).attempt(2).counted(1, 1), // 9: replayed, behind the cursor
            item(Pending),                          // 10: claimed, behind the cursor
            item(Pending),                          // 11: not released
        ];
        let run = run(conn, &items).await;
        release(conn, run.id, 8).await;
        let (alive, dead) = (worker(conn).await, worker(conn).await);
        claim(conn, alive, &[run.key(1, 1), run.key(9, 1)]).await;
        claim(conn, dead, &[run.key(2, 1), run.key(3, 1)]).await;
        mailrun_ledger::receipts::write(conn, dead, &receipt(1, &[run.key(3, 1)])).await.unwrap();
        suppress(conn, &run.items[4].email).await;
        claim(conn, alive, &[run.key(4, 1)]).await;
        kill(conn, dead).await;
        let of = |id, fate| Some(Owner::Worker { id, fate });
        let expected = [
            (1, 1, None),
            (2, 1, of(alive, Fate::Alive)),
            (3, 1, of(dead, Fate::Dead)),
            (4, 1, of(dead, Fate::Accepted)),
            (5, 1, Some(Owner::Nobody(Withheld::ByJob(mailrun_ledger::invitations::SUPPRESSED)))),
            (7, 2, None),
            (9, 2, None),
            (10, 1, of(alive, Fate::Alive)),
        ];
        let open = open_items(conn, run.id, STALLED, 0, 99).await.unwrap();
        let found: Vec<_> = open.iter().map(|item| (item.position, item.next.attempt, item.owner)).collect();
        assert_eq!(found, expected);
        let page = open_items(conn, run.id, STALLED, 4, 2).await.unwrap();
        assert_eq!(page.iter().map(|item| item.position).collect::<Vec<_>>(), [5, 7]);
    });
}

/// The rows of dead workers are pruned after a day. A run that was paused for longer still has their claims.
#[test]
fn a_claim_of_a_pruned_worker_counts_as_a_dead_workers() {
    in_transaction(async |conn| {
        let run = run_of(conn, &[Pending]).await;
        release(conn, run.id, 1).await;
        let dead = worker(conn).await;
        claim(conn, dead, &run.keys()).await;
        execute(conn, format!("DELETE FROM workers WHERE id = {dead}")).await;
        let open = open_items(conn, run.id, STALLED, 0, 1).await.unwrap();
        assert_eq!(open[0].owner, Some(Owner::Worker { id: dead, fate: Fate::Dead }));
    });
}
