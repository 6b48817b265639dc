//! Pruning: deletes old data, and nothing that is still needed.

use std::time::Duration;

use mailrun_core::{item::ItemState, run::Wanted};
use mailrun_ledger::{
    prune::{Step, cancel_hidden, delete_runs, housekeeping, is_held_up, step},
    runs::{ReplayWish, replay},
};
use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

use crate::support::{
    Run, claim, execute, in_database, item, kill, receipt, release, run, run_of, set_wanted, until_one_waits, value,
    worker,
};

use ItemState::{Failed, Pending, Retrying, Sent, Unknown};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// A run that ended two days ago.
async fn old_run(conn: &mut PgConnection, states: &[ItemState]) -> Run {
    let run = run_of(conn, states).await;
    release(conn, run.id, i32::try_from(states.len()).unwrap()).await;
    execute(conn, format!("UPDATE run_passes SET done_at = now() WHERE run_id = '{}'", run.id)).await;
    age(conn, run.id).await;
    run
}

async fn age(conn: &mut PgConnection, run_id: Uuid) {
    let update = "UPDATE run_progress SET finished_at = finished_at - interval '2 days' WHERE run_id =";
    execute(conn, format!("{update} '{run_id}'")).await;
}

async fn deleted(ledger: &PgPool) -> usize {
    delete_runs(ledger, Some(DAY), 10).await.unwrap()
}

async fn stepped(ledger: &PgPool, limit: i64) -> Option<Step> {
    step(ledger, limit).await.unwrap()
}

async fn count(conn: &mut PgConnection, table: &str) -> i64 {
    value(conn, format!("SELECT count(*) FROM {table}")).await
}

#[test]
fn an_old_run_is_deleted_at_once_and_its_items_in_steps() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let old = old_run(&mut conn, &[Sent, Sent, Failed]).await;
        let new = run_of(&mut conn, &[Sent]).await;
        let worker = worker(&mut conn).await;
        execute(&mut conn, format!("UPDATE run_items SET state = 'pending' WHERE id = {}", old.items[0].id)).await;
        claim(&mut conn, worker, &[old.key(0, 1)]).await;
        execute(&mut conn, format!("UPDATE run_items SET state = 'sent' WHERE id = {}", old.items[0].id)).await;
        let (id, nil) = (old.id, Uuid::nil());
        for statement in [
            format!("INSERT INTO pacing (run_id, next_at) VALUES ('{id}', now()), ('{nil}', now())"),
            format!("INSERT INTO run_samples (run_id, at, settled) VALUES ('{id}', now(), 1)"),
            format!("INSERT INTO sweeps (run_id, driven, put_back, buried, told_again) VALUES ('{id}', 1, 0, 0, 0)"),
        ] {
            execute(&mut conn, statement).await;
        }
        assert_eq!(deleted(ledger).await, 1);
        assert_eq!(value::<Uuid>(&mut conn, "SELECT id FROM runs").await, new.id);
        for (table, left) in [("run_passes", 0), ("run_samples", 0), ("sweeps", 0), ("pacing", 1), ("run_progress", 1)]
        {
            assert_eq!(count(&mut conn, table).await, left, "{table}");
        }
        let mut items = Vec::new();
        while let Some(step) = stepped(ledger, 2).await {
            assert_eq!((step.run_id, step.waits), (old.id, false));
            items.push(step.items);
        }
        assert_eq!(items, [2, 1, 0]);
        assert_eq!((count(&mut conn, "run_items").await, count(&mut conn, "attempts").await), (1, 0));
        assert_eq!(count(&mut conn, "users").await, 4, "people stay");
        assert_eq!(count(&mut conn, "pruned_runs").await, 0);
    });
}

#[test]
fn a_run_that_is_still_needed_stays() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        old_run(&mut conn, &[Unknown]).await;
        let open = old_run(&mut conn, &[Retrying]).await;
        assert!(
            value::<bool>(
                &mut conn,
                format!("SELECT finished_at IS NULL FROM run_progress WHERE run_id = '{}'", open.id)
            )
            .await
        );
        let reviewed = old_run(&mut conn, &[Sent]).await;
        execute(&mut conn, format!("INSERT INTO suppression_reviews (run_id) VALUES ('{}')", reviewed.id)).await;
        let replaying = old_run(&mut conn, &[Failed]).await;
        let pass = "INSERT INTO run_passes (run_id, number, kind, states) VALUES";
        execute(&mut conn, format!("{pass} ('{}', 2, 'replay', '{{failed}}')", replaying.id)).await;
        run_of(&mut conn, &[Sent]).await;
        assert_eq!(deleted(ledger).await, 0);
        execute(&mut conn, "UPDATE suppression_reviews SET decided_at = now(), accepted = true").await;
        assert_eq!(deleted(ledger).await, 1, "decided");
        // Passes of a cancelled run are never finished.
        set_wanted(&mut conn, replaying.id, Wanted::Cancelled).await;
        assert_eq!(deleted(ledger).await, 1);
    });
}

#[test]
fn a_run_with_a_requested_replay_stays_until_the_replay_has_begun() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let old = old_run(&mut conn, &[Failed]).await;
        let wish =
            ReplayWish { run_id: None, states: vec![Failed], error: None, token: Uuid::new_v4(), restored: false };
        assert_eq!(replay(ledger, &wish).await.unwrap().runs, 1);
        assert_eq!(deleted(ledger).await, 0, "the command waits in the outbox");
        execute(&mut conn, "UPDATE outbox SET published_at = now()").await;
        assert_eq!(deleted(ledger).await, 0, "the command is being delivered");
        let command = "(SELECT (message->'command'->'replay'->>'command_id')::uuid FROM outbox)";
        let pass = "INSERT INTO run_passes (run_id, number, kind, command_id, done_at) VALUES";
        execute(&mut conn, format!("{pass} ('{}', 2, 'replay', {command}, now())", old.id)).await;
        assert_eq!(deleted(ledger).await, 1, "the replay has begun and finished");
    });
}

/// The replay locks the run's counters: either pruning sees it, or it finds the run deleted.
#[test]
fn a_concurrent_replay_keeps_the_run() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        old_run(&mut conn, &[Failed]).await;
        let mut tx = ledger.begin().await.unwrap();
        execute(&mut tx, "SELECT FROM run_progress FOR KEY SHARE").await;
        assert_eq!(deleted(ledger).await, 0, "nor does pruning wait for it");
        tx.rollback().await.unwrap();
        assert_eq!(deleted(ledger).await, 1);
        let wish =
            ReplayWish { run_id: None, states: vec![Failed], error: None, token: Uuid::new_v4(), restored: false };
        assert_eq!(replay(ledger, &wish).await.unwrap().runs, 0);
    });
}

#[test]
fn waits_for_a_claim_in_progress() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let old = old_run(&mut conn, &[Failed]).await;
        let worker = worker(&mut conn).await;
        let mut tx = ledger.begin().await.unwrap();
        assert_eq!(claim(&mut tx, worker, &[old.key(0, 2)]).await.len(), 1);
        let (gone, ()) = tokio::join!(deleted(ledger), async {
            until_one_waits(ledger).await;
            tx.commit().await.unwrap();
        });
        assert_eq!(gone, 1);
        // The step sees the claim: the item stays until its outcome is known.
        let step = stepped(ledger, 10).await.unwrap();
        assert_eq!((step.items, step.waits), (0, true));
        let withheld = claim(&mut conn, worker, &[old.key(0, 3)]).await;
        assert!(withheld[0].withheld.is_some(), "no further attempt is made");
        kill(&mut conn, worker).await;
        assert_eq!(stepped(ledger, 10).await.unwrap().items, 1);
        let emailed = format!("SELECT emailed_at IS NOT NULL FROM users WHERE id = {}", old.items[0].user_id);
        assert!(value::<bool>(&mut conn, emailed).await, "the person may have received it");
    });
}

#[test]
fn a_long_claim_ends_the_try() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        old_run(&mut conn, &[Sent]).await;
        let mut tx = ledger.begin().await.unwrap();
        execute(&mut tx, "LOCK TABLE attempts IN ROW EXCLUSIVE MODE").await;
        let error = delete_runs(ledger, Some(DAY), 10).await.unwrap_err();
        assert!(is_held_up(&error), "{error}");
        assert_eq!(count(&mut conn, "runs").await, 1);
        assert!(!is_held_up(&sqlx::Error::RowNotFound));
    });
}

#[test]
fn items_of_a_pruned_worker_are_deleted_and_their_people_count_as_emailed() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let old = old_run(&mut conn, &[Failed]).await;
        let dead = worker(&mut conn).await;
        claim(&mut conn, dead, &[old.key(0, 2)]).await;
        execute(&mut conn, "DELETE FROM workers").await;
        deleted(ledger).await;
        assert_eq!(stepped(ledger, 10).await.unwrap().items, 1);
        assert!(value::<bool>(&mut conn, "SELECT emailed_at IS NOT NULL FROM users").await);
    });
}

#[test]
fn a_run_with_attempts_in_progress_is_tried_after_the_others() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let worker = worker(&mut conn).await;
        let first = old_run(&mut conn, &[Failed]).await;
        claim(&mut conn, worker, &[first.key(0, 2)]).await;
        deleted(ledger).await;
        let second = old_run(&mut conn, &[Failed]).await;
        deleted(ledger).await;
        assert!(stepped(ledger, 10).await.unwrap().waits);
        let step = stepped(ledger, 10).await.unwrap();
        assert_eq!((step.run_id, step.items, step.beside_others), (second.id, 1, false));
    });
}

#[test]
fn concurrent_prunes_take_different_runs_and_notice_runs_in_progress() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        old_run(&mut conn, &[Sent]).await;
        let mut tx = ledger.begin().await.unwrap();
        execute(&mut tx, "SELECT FROM run_progress FOR UPDATE").await;
        assert_eq!(deleted(ledger).await, 0);
        tx.rollback().await.unwrap();
        assert_eq!(deleted(ledger).await, 1);
        let mut tx = ledger.begin().await.unwrap();
        execute(&mut tx, "SELECT FROM pruned_runs FOR UPDATE").await;
        assert_eq!(stepped(ledger, 10).await, None);
        tx.rollback().await.unwrap();
        run(&mut conn, &[item(Pending)]).await;
        assert!(stepped(ledger, 10).await.unwrap().beside_others);
    });
}

#[test]
fn prunes_at_most_the_limit_oldest_first() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let newer = old_run(&mut conn, &[Sent]).await;
        let older = old_run(&mut conn, &[Sent]).await;
        age(&mut conn, older.id).await;
        assert_eq!(delete_runs(ledger, Some(DAY), 1).await.unwrap(), 1);
        assert_eq!(value::<Uuid>(&mut conn, "SELECT id FROM runs").await, newer.id);
    });
}

#[test]
fn housekeeping_deletes_rows_that_are_not_needed_after_a_day() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let run = run_of(&mut conn, &[Sent, Pending]).await;
        let (gone, alive) = (worker(&mut conn).await, worker(&mut conn).await);
        let write = async |conn: &mut PgConnection, worker, number, keys: &[_]| {
            mailrun_ledger::receipts::write(conn, worker, &receipt(number, keys)).await.unwrap();
        };
        write(&mut conn, gone, 1, &[run.key(0, 1)]).await;
        write(&mut conn, gone, 2, &run.keys()).await;
        write(&mut conn, alive, 1, &[run.key(0, 1)]).await;
        let (id, nil) = (run.id, Uuid::nil());
        for statement in [
            "INSERT INTO outbox (message, published_at) VALUES ('1', now() - interval '2 days'), ('2', now()), ('3', NULL)".into(),
            "UPDATE outbox SET created_at = now() - interval '9 days'".into(),
            "UPDATE workers SET heartbeat_at = now() - interval '2 days'".into(),
            format!("UPDATE workers SET died_at = now() WHERE id = {gone}"),
            format!("INSERT INTO buried_results VALUES ('{id}', 1, 1, 'sent', '', now() - interval '31 days'), ('{id}', 1, 2, 'sent', '', now())"),
            format!("INSERT INTO pacing (run_id, next_at) VALUES (gen_random_uuid(), now()), ('{id}', now()), ('{nil}', now())"),
        ] {
            execute(&mut conn, statement).await;
        }
        assert_eq!(housekeeping(ledger, 100).await.unwrap(), 5);
        for (table, left) in [("outbox", 2), ("workers", 1), ("receipts", 2), ("buried_results", 1), ("pacing", 2)] {
            assert_eq!(count(&mut conn, table).await, left, "{table}");
        }
        let needed = format!("SELECT number FROM receipts WHERE worker_id = {gone}");
        assert_eq!(value::<i64>(&mut conn, needed).await, 2, "an item of it is not shown as sent");
        assert_eq!(housekeeping(ledger, 100).await.unwrap(), 0);
    });
}

#[test]
fn a_hidden_run_is_deleted_after_a_day_or_cancelled_if_open() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let (over, unknown) = (run_of(&mut conn, &[Failed]).await, run_of(&mut conn, &[Unknown]).await);
        let (open, new) = (run_of(&mut conn, &[Pending]).await, run_of(&mut conn, &[Sent]).await);
        execute(&mut conn, "UPDATE runs SET hidden = true").await;
        execute(
            &mut conn,
            format!("UPDATE runs SET created_at = now() - interval '25 hours' WHERE id <> '{}'", new.id),
        )
        .await;
        assert_eq!(cancel_hidden(ledger).await.unwrap(), 1);
        assert_eq!(cancel_hidden(ledger).await.unwrap(), 0);
        assert_eq!(delete_runs(ledger, None, 10).await.unwrap(), 2, "{} {}", over.id, unknown.id);
        let left = "SELECT string_agg(wanted::text, ',' ORDER BY created_at) FROM runs";
        assert_eq!(value::<String>(&mut conn, left).await, "cancelled,running", "{} {}", open.id, new.id);
        execute(&mut conn, "UPDATE run_progress SET pending = 0, cancelled = total, sent = 0, finished_at = now()")
            .await;
        assert_eq!(delete_runs(ledger, None, 10).await.unwrap(), 1, "once it is settled");
    });
}
