//! The fan-out's state in a run: its lock, its passes and what they release.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use mailrun_core::{
    item::ItemState,
    message::Replay,
    run::{Flow, Wanted},
};
use mailrun_ledger::{
    passes::{self, Advance, Pass, PassKind},
    schema::now,
};
use sqlx::PgConnection;
use uuid::Uuid;

use crate::support::{
    add_later_value, apply, claim, execute, in_database, in_transaction, item, kill, release, run, run_of, set_wanted,
    until, until_one_waits, value, worker,
};

use ItemState::{Failed, Pending, Retrying, Sent, Unknown};

async fn lock(conn: &mut PgConnection, run_id: Uuid) -> Pass {
    passes::lock(conn, run_id).await.unwrap().unwrap()
}

fn replay_of(states: &[ItemState], error: Option<&str>) -> Replay {
    Replay { command_id: Uuid::new_v4(), states: states.to_vec(), error: error.map(str::to_owned) }
}

/// Begins a replay and returns its pass.
async fn replay(conn: &mut PgConnection, run_id: Uuid, states: &[ItemState], error: Option<&str>) -> Pass {
    let last = lock(conn, run_id).await;
    passes::begin_replay(conn, &last, &replay_of(states, error)).await.unwrap();
    lock(conn, run_id).await
}

async fn positions(conn: &mut PgConnection, pass: &Pass, limit: i32) -> Vec<i32> {
    let items = passes::next_items(conn, pass, pass.kind.unwrap(), limit).await.unwrap();
    items.into_iter().map(|item| item.position).collect()
}

fn step(pass: &Pass, cursor: i32, released: i32) -> Advance {
    Advance { cursor, released, next_due_at: pass.next_due_at, flow: pass.flow }
}

#[test]
fn the_first_lock_creates_the_first_pass() {
    in_transaction(async |conn| {
        let run = run_of(conn, &[Pending]).await;
        let pass = lock(conn, run.id).await;
        assert_eq!(
            (pass.number, pass.kind, pass.step, pass.cursor, pass.released),
            (1, Some(PassKind::First), 0, 0, 0)
        );
        lock(conn, run.id).await;
        assert_eq!(value::<i64>(conn, "SELECT count(*) FROM run_passes").await, 1);
        assert!(passes::lock(conn, Uuid::new_v4()).await.unwrap().is_none(), "there is no such run");
    });
}

#[test]
fn a_second_fan_out_waits_and_sees_the_new_pass() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let run = run_of(&mut conn, &[Failed]).await;
        lock(&mut conn, run.id).await;
        let mut tx = ledger.begin().await.unwrap();
        let first = lock(&mut tx, run.id).await;
        let (second, ()) = tokio::join!(lock(&mut conn, run.id), async {
            until_one_waits(ledger).await;
            passes::begin_replay(&mut tx, &first, &replay_of(&[Failed], None)).await.unwrap();
            tx.commit().await.unwrap();
        });
        assert_eq!((second.number, second.kind), (2, Some(PassKind::Replay)));
    });
}

#[test]
fn a_command_begins_one_pass() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let run = run_of(&mut conn, &[Failed]).await;
        let first = lock(&mut conn, run.id).await;
        let command = replay_of(&[Failed, Unknown], Some("550"));
        assert_eq!(passes::begun_by(&mut conn, command.command_id).await.unwrap(), None);
        assert_eq!(passes::begin_replay(&mut conn, &first, &command).await.unwrap(), 2);
        assert_eq!(passes::begun_by(&mut conn, command.command_id).await.unwrap(), Some(2));
        let pass = lock(&mut conn, run.id).await;
        assert_eq!((pass.states.as_slice(), pass.error.as_deref()), (&[Failed, Unknown][..], Some("550")));
        assert!(
            passes::begin_replay(&mut conn, &pass, &command).await.is_err(),
            "the constraint prevents a second pass"
        );
        let cancel = Uuid::new_v4();
        assert_eq!(passes::begin_cancel(&mut conn, &pass, cancel).await.unwrap(), 3);
        assert_eq!(lock(&mut conn, run.id).await.kind, Some(PassKind::Cancel));
    });
}

#[test]
fn a_step_advances_the_pass() {
    in_transaction(async |conn| {
        let run = run_of(conn, &[Pending; 9]).await;
        let pass = lock(conn, run.id).await;
        let flow = Flow { looked_at: pass.created_at, drained: 3, per_second: 1.5 };
        let due = pass.next_due_at + TimeDelta::seconds(4);
        let by = Advance { cursor: 5, released: 5, next_due_at: due, flow };
        passes::advance(conn, &pass, by).await.unwrap();
        passes::advance(conn, &pass, Advance { cursor: 7, released: 2, ..by }).await.unwrap();
        let pass = lock(conn, run.id).await;
        assert_eq!((pass.step, pass.cursor, pass.chunk_start, pass.released), (2, 7, 5, 7));
        assert_eq!((pass.next_due_at, pass.flow, pass.done_at), (due, flow, None));
        passes::finish(conn, &pass).await.unwrap();
        assert!(lock(conn, run.id).await.done_at.is_some());
    });
}

#[test]
fn the_first_pass_releases_every_item_once() {
    in_transaction(async |conn| {
        let run = run_of(conn, &[Pending, Sent, Pending, Pending]).await;
        let mut pass = lock(conn, run.id).await;
        assert_eq!(positions(conn, &pass, 2).await, [1, 2]);
        pass.cursor = 2;
        assert_eq!(positions(conn, &pass, 9).await, [3, 4]);
        pass.cursor = 4;
        assert!(positions(conn, &pass, 9).await.is_empty());
    });
}

#[test]
fn a_replay_releases_items_with_the_requested_states_and_error() {
    in_transaction(async |conn| {
        let items =
            [item(Failed).error("550 a"), item(Failed).error("550 b"), item(Unknown), item(Pending), item(Sent)];
        let run = run(conn, &items).await;
        let pass = replay(conn, run.id, &[Failed], None).await;
        assert_eq!(positions(conn, &pass, 9).await, [1, 2]);
        let pass = replay(conn, run.id, &[Failed, Unknown], None).await;
        assert_eq!(positions(conn, &pass, 9).await, [1, 2, 3]);
        let pass = replay(conn, run.id, &[Failed], Some("550 b")).await;
        assert_eq!(positions(conn, &pass, 9).await, [2]);
    });
}

#[test]
fn a_cancel_pass_takes_open_items() {
    in_transaction(async |conn| {
        let run = run_of(conn, &[Pending, Retrying, Sent, Failed, Pending]).await;
        let last = lock(conn, run.id).await;
        passes::begin_cancel(conn, &last, Uuid::new_v4()).await.unwrap();
        let pass = lock(conn, run.id).await;
        assert_eq!(positions(conn, &pass, 9).await, [1, 2, 5]);
    });
}

#[test]
fn a_replays_chunk_is_unapplied_until_its_results_are_counted() {
    in_transaction(async |conn| {
        let run = run_of(conn, &[Failed, Failed]).await;
        execute(conn, "UPDATE run_items SET finished_at = now() - interval '1 hour'").await;
        let pass = replay(conn, run.id, &[Failed], None).await;
        passes::advance(conn, &pass, step(&pass, 1, 1)).await.unwrap();
        let pass = lock(conn, run.id).await;
        assert!(passes::is_unapplied(conn, &pass).await.unwrap());
        apply(conn, run.id, &[run.result(0, 2, Pending)]).await;
        assert!(!passes::is_unapplied(conn, &pass).await.unwrap(), "the second item is not of this chunk");
        apply(conn, run.id, &[run.result(0, 2, Failed)]).await;
        assert!(!passes::is_unapplied(conn, &pass).await.unwrap(), "it failed again, since the pass began");
    });
}

#[test]
fn a_pass_of_a_later_version_is_left_alone() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let run = run_of(&mut conn, &[Failed]).await;
        lock(&mut conn, run.id).await;
        add_later_value(&mut conn, "pass_kind").await;
        add_later_value(&mut conn, "item_state").await;
        let insert = format!("INSERT INTO run_passes (run_id, number, kind, states, done_at) VALUES ('{}'", run.id);
        execute(&mut conn, format!("{insert}, 2, 'later', '{{}}', now())")).await;
        assert_eq!(lock(&mut conn, run.id).await.kind, None);
        execute(&mut conn, format!("{insert}, 3, 'replay', '{{failed,later}}', now())")).await;
        assert_eq!(lock(&mut conn, run.id).await.kind, None);
        assert!(passes::to_tidy(&mut conn).await.unwrap().is_empty());
    });
}

#[test]
fn the_situation_counts_the_permits_of_live_workers() {
    in_transaction(async |conn| {
        let run = run_of(conn, &[Pending, Sent]).await;
        assert!(
            passes::situation(conn, run.id).await.unwrap().is_none(),
            "without a first pass there is nothing to do"
        );
        release(conn, run.id, 2).await;
        set_wanted(conn, run.id, Wanted::Paused).await;
        execute(conn, "UPDATE runs SET sends_per_second = 7").await;
        let (alive, dead) = (worker(conn).await, worker(conn).await);
        execute(conn, format!("UPDATE workers SET in_flight = 3 WHERE id = {alive}")).await;
        kill(conn, dead).await;
        let situation = passes::situation(conn, run.id).await.unwrap().unwrap();
        assert_eq!((situation.wanted, situation.sends_per_second), (Wanted::Paused, Some(7)));
        assert_eq!((situation.permits, situation.in_flight, situation.first_released), (10, 3, 2));
        assert_eq!((situation.counters.total, situation.counters.of(Pending), situation.counters.of(Sent)), (2, 1, 1));
    });
}

#[test]
fn paused_and_finished_runs_do_not_share_the_installations_limit() {
    in_transaction(async |conn| {
        for (state, wanted) in [(Pending, Wanted::Running), (Pending, Wanted::Paused), (Sent, Wanted::Running)] {
            let run = run_of(conn, &[state]).await;
            set_wanted(conn, run.id, wanted).await;
        }
        assert_eq!(passes::count_running(conn).await.unwrap(), 1);
    });
}

#[test]
fn the_installations_budget_is_spent_by_one_step_at_a_time() {
    in_database(async |ledger| {
        let mut tx = ledger.begin().await.unwrap();
        let mut conn = ledger.acquire().await.unwrap();
        let due = passes::lock_budget(&mut tx).await.unwrap();
        let later = due + TimeDelta::seconds(9);
        let (seen, ()) = tokio::join!(passes::lock_budget(&mut conn), async {
            until_one_waits(ledger).await;
            passes::spend_budget(&mut tx, later).await.unwrap();
            tx.commit().await.unwrap();
        });
        assert_eq!(seen.unwrap(), later);
    });
}

#[test]
fn a_finished_replay_is_tidied_exactly_once() {
    in_transaction(async |conn| {
        let run = run_of(conn, &[Failed]).await;
        let pass = replay(conn, run.id, &[Failed], Some("550")).await;
        assert!(passes::to_tidy(conn).await.unwrap().is_empty(), "it is not finished");
        passes::finish(conn, &pass).await.unwrap();
        let replayed = passes::to_tidy(conn).await.unwrap();
        assert_eq!((replayed[0].run_id, replayed[0].number), (run.id, 2));
        assert_eq!((replayed[0].states.as_slice(), replayed[0].error.as_deref()), (&[Failed][..], Some("550")));
        passes::mark_tidied(conn, &replayed).await.unwrap();
        assert!(passes::to_tidy(conn).await.unwrap().is_empty());
    });
}

#[test]
fn only_one_connection_tidies() {
    in_database(async |ledger| {
        let (mut first, mut second) = (ledger.acquire().await.unwrap(), ledger.acquire().await.unwrap());
        assert!(passes::lock_tidying(&mut first).await.unwrap());
        assert!(!passes::lock_tidying(&mut second).await.unwrap());
        first.close().await.unwrap();
        until("the server notices", async || passes::lock_tidying(&mut second).await.unwrap()).await;
        second.close().await.unwrap();
    });
}

#[test]
fn records_a_waiting_message_at_most_once_a_second() {
    in_transaction(async |conn| {
        let run = run_of(conn, &[Pending]).await;
        let pass = lock(conn, run.id).await;
        execute(conn, "UPDATE run_passes SET seen_at = clock_timestamp() - interval '2 seconds'").await;
        let seen = "SELECT seen_at FROM run_passes";
        let before: DateTime<Utc> = value(conn, seen).await;
        passes::touch(conn, &pass).await.unwrap();
        let touched: DateTime<Utc> = value(conn, seen).await;
        assert!(touched > before);
        passes::touch(conn, &pass).await.unwrap();
        assert_eq!(value::<DateTime<Utc>>(conn, seen).await, touched);
        // A time in the future was written before the clock was set back. It must not block updates for hours.
        execute(conn, "UPDATE run_passes SET seen_at = clock_timestamp() + interval '1 hour'").await;
        passes::touch(conn, &pass).await.unwrap();
        assert!(value::<DateTime<Utc>>(conn, seen).await <= now(conn).await.unwrap());
    });
}

#[test]
fn finds_items_dropped_while_the_run_was_paused() {
    in_transaction(async |conn| {
        let items = [
            item(Pending),                          // 1: released
            item(Pending),                          // 2: claimed
            item(Sent),                             // 3
            item(Retrying).due_in(-1.0),            // 4: due
            item(Retrying).due_in(1.0),             // 5: due soon
            item(Retrying).due_in(60.0),            // 6: on its retry queue
            item(Pending).attempt(2).counted(1, 1), // 7: replayed, behind the first pass's cursor
            item(Pending),                          // 8: not released
        ];
        let run = run(conn, &items).await;
        release(conn, run.id, 6).await;
        let worker = worker(conn).await;
        claim(conn, worker, &[run.key(1, 1)]).await;
        let dropped = passes::dropped_items(conn, run.id, Duration::from_secs(5), 0, 9).await.unwrap();
        let found: Vec<(i32, i32)> = dropped.iter().map(|item| (item.position, item.next.attempt)).collect();
        assert_eq!(found, [(1, 1), (4, 2), (5, 2), (7, 2)], "each with its next attempt");
        let rest = passes::dropped_items(conn, run.id, Duration::from_secs(5), 4, 1).await.unwrap();
        assert_eq!(rest[0].position, 5);
        claim(conn, worker, &[run.key(3, 2)]).await;
        let dropped = passes::dropped_items(conn, run.id, Duration::ZERO, 1, 1).await.unwrap();
        assert_eq!(dropped[0].position, 7);
    });
}
