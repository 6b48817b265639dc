//! The audit: counters against items, flags against invitations, and their repair.

use std::time::Duration;

use mailrun_core::{
    item::{ItemState, Standing},
    run::Wanted,
};
use mailrun_ledger::audit::{
    Flags, Troubled, Unfinished, correct_flags, drift, flags, recount, snapshot, subjects, troubled, unfinished,
    without_progress,
};
use sqlx::PgConnection;

use crate::support::{
    add_later_value, apply, counters_equal_counts, execute, idle_for, in_database, in_transaction, item, run, run_of,
    set_wanted, value, worker,
};

use ItemState::{Cancelled, Failed, Pending, Retrying, Sent, Skipped, Unknown};

#[test]
fn a_snapshot_is_consistent_and_read_only() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let first = run_of(&mut conn, &[Pending]).await;
        let mut tx = snapshot(ledger).await.unwrap();
        assert_eq!(unfinished(&mut tx).await.unwrap().len(), 1);
        run_of(&mut conn, &[Pending]).await;
        apply(&mut conn, first.id, &[first.result(0, 1, Sent)]).await;
        assert_eq!(unfinished(&mut tx).await.unwrap().len(), 1);
        assert!(drift(&mut tx).await.unwrap().is_empty());
        assert!(sqlx::query("DELETE FROM users").execute(&mut *tx).await.is_err());
    });
}

#[test]
fn finds_counters_that_differ_from_the_items() {
    in_transaction(async |conn| {
        run_of(conn, &ItemState::ALL).await;
        let (moved, ended, lost) =
            (run_of(conn, &[Pending]).await, run_of(conn, &[Sent]).await, run_of(conn, &[Sent, Sent]).await);
        let progress = |set: &str, run_id| format!("UPDATE run_progress SET {set} WHERE run_id = '{run_id}'");
        execute(conn, progress("pending = 0, sent = 1", moved.id)).await;
        execute(conn, progress("finished_at = NULL", ended.id)).await;
        execute(conn, format!("DELETE FROM run_items WHERE id = {}", lost.items[0].id)).await;
        let mut found = drift(conn).await.unwrap();
        found.sort_by_key(|drift| [moved.id, ended.id, lost.id].iter().position(|id| *id == drift.run_id));
        assert_eq!(found.len(), 3);
        assert_eq!(found[0].wrong(), [("pending", 0, 1), ("sent", 1, 0)]);
        assert!(!found[0].ended_wrongly() && found[0].missing() == 0);
        assert!(found[1].ended_wrongly() && found[1].wrong().is_empty());
        assert_eq!((found[2].missing(), found[2].wrong()), (1, vec![("total", 2, 1), ("sent", 2, 1)]));
    });
}

#[test]
fn a_recount_makes_the_counters_equal_to_the_items() {
    in_transaction(async |conn| {
        let run = run_of(conn, &ItemState::ALL).await;
        execute(conn, "UPDATE run_progress SET pending = 0, retrying = 0, sent = 3, finished_at = now()").await;
        recount(conn, run.id).await.unwrap();
        counters_equal_counts(conn).await;
        apply(conn, run.id, &[run.result(0, 1, Sent), run.result(1, 1, Failed)]).await;
        execute(conn, "UPDATE run_progress SET finished_at = NULL").await;
        recount(conn, run.id).await.unwrap();
        counters_equal_counts(conn).await;
    });
}

/// Only the numbers were wrong, so the page shows neither a restart nor progress.
#[test]
fn a_recount_of_a_run_that_was_wrongly_finished_does_not_restart_it() {
    in_transaction(async |conn| {
        let run = run_of(conn, &[Pending, Sent]).await;
        execute(
            conn,
            "UPDATE run_progress SET pending = 0, sent = 2, finished_at = now(), started_at = now() - interval '1 hour'",
        )
        .await;
        let samples = value::<i64>(conn, "SELECT count(*) FROM run_samples").await;
        recount(conn, run.id).await.unwrap();
        counters_equal_counts(conn).await;
        let kept = "SELECT finished_at IS NULL AND started_at = now() - interval '1 hour' FROM run_progress";
        assert!(value::<bool>(conn, kept).await);
        assert_eq!(value::<i64>(conn, "SELECT count(*) FROM run_samples").await, samples);
    });
}

/// The later version may have its own counter for them.
#[test]
fn a_run_with_items_in_a_later_versions_state_is_not_judged() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let run = run_of(&mut conn, &[Pending, Pending]).await;
        add_later_value(&mut conn, "item_state").await;
        execute(&mut conn, format!("UPDATE run_items SET state = 'later' WHERE id = {}", run.items[0].id)).await;
        assert!(drift(&mut conn).await.unwrap().is_empty());
        recount(&mut conn, run.id).await.unwrap();
        assert_eq!(value::<i32>(&mut conn, "SELECT pending FROM run_progress").await, 2);
        assert_eq!(subjects(&mut conn, &[run.items[0].id], Duration::ZERO).await.unwrap()[0].standing, None);
    });
}

async fn emailed(conn: &mut PgConnection, user_id: i64) -> bool {
    value(conn, format!("SELECT emailed_at IS NOT NULL FROM users WHERE id = {user_id}")).await
}

#[test]
fn corrects_flags_that_contradict_the_invitation() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let run = run_of(&mut conn, &[Sent, Pending, Failed, Cancelled, Skipped, Sent]).await;
        assert_eq!(flags(&mut conn).await.unwrap(), Flags::default());
        let [sent, pending, failed, cancelled, ..] = [0, 1, 2, 3, 4, 5].map(|index: usize| run.items[index].user_id);
        execute(&mut conn, format!("UPDATE users SET emailed_at = NULL WHERE id = {sent}")).await;
        execute(
            &mut conn,
            format!("UPDATE users SET emailed_at = now() WHERE id IN ({pending}, {failed}, {cancelled})"),
        )
        .await;
        assert_eq!(
            flags(&mut conn).await.unwrap(),
            Flags { missing: 1, wrong: 2 },
            "an item that does not count says nothing"
        );
        correct_flags(ledger).await.unwrap();
        assert_eq!(flags(&mut conn).await.unwrap(), Flags::default());
        assert!(emailed(&mut conn, sent).await && !emailed(&mut conn, pending).await);
        assert!(emailed(&mut conn, cancelled).await);
    });
}

#[test]
fn a_person_with_an_overtaken_item_may_have_been_emailed_by_it() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let first = run_of(&mut conn, &[Cancelled]).await;
        let user_id = first.items[0].user_id;
        run(&mut conn, &[item(Pending).of(user_id)]).await;
        apply(&mut conn, first.id, &[first.result(0, 1, Sent)]).await;
        assert_eq!(flags(&mut conn).await.unwrap(), Flags::default());
        correct_flags(ledger).await.unwrap();
        assert!(emailed(&mut conn, user_id).await);
    });
}

#[test]
fn lists_unfinished_runs_oldest_first() {
    in_transaction(async |conn| {
        run_of(conn, &[Sent]).await;
        let (first, second) = (run_of(conn, &[Pending]).await.id, run_of(conn, &[Retrying]).await.id);
        execute(conn, format!("UPDATE runs SET created_at = now() - interval '1 day' WHERE id = '{first}'")).await;
        set_wanted(conn, second, Wanted::Paused).await;
        let expected = [
            Unfinished { run_id: first, kind: "invitations".into(), wanted: Wanted::Running },
            Unfinished { run_id: second, kind: "invitations".into(), wanted: Wanted::Paused },
        ];
        assert_eq!(unfinished(conn).await.unwrap(), expected);
    });
}

#[test]
fn a_run_without_progress_has_due_items_and_is_not_held() {
    in_transaction(async |conn| {
        const AFTER: Duration = Duration::from_secs(60);
        let stuck = run_of(conn, &[Pending]).await.id;
        let waiting = run(conn, &[item(Retrying).due_in(600.0)]).await.id;
        let (paused, moving) = (run_of(conn, &[Pending]).await.id, run_of(conn, &[Pending]).await.id);
        set_wanted(conn, paused, Wanted::Paused).await;
        for run_id in [stuck, waiting, paused] {
            idle_for(conn, run_id, 120).await;
        }
        let found = without_progress(conn, AFTER, None).await.unwrap();
        assert_eq!(found.iter().map(|run| run.run_id).collect::<Vec<_>>(), [stuck]);
        assert!(found[0].for_s >= 120.0 && found[0].for_s < 130.0);
        assert_eq!(without_progress(conn, AFTER, Some(1_000)).await.unwrap().len(), 1);
        idle_for(conn, moving, 8).await;
        let shared = without_progress(conn, Duration::from_secs(5), Some(1)).await.unwrap();
        assert_eq!(shared.iter().map(|run| run.run_id).collect::<Vec<_>>(), [stuck], "three runs share 1 a second");
        execute(conn, "UPDATE run_items SET due_at = now() - interval '90 seconds' WHERE due_at IS NOT NULL").await;
        assert_eq!(without_progress(conn, AFTER, None).await.unwrap().len(), 2, "its retry is overdue");
        worker(conn).await;
        execute(conn, "UPDATE workers SET lane_until = now() + interval '1 minute'").await;
        assert!(without_progress(conn, AFTER, None).await.unwrap().is_empty(), "the relay holds them");
    });
}

#[test]
fn counts_items_that_need_attention() {
    in_transaction(async |conn| {
        run_of(conn, &[Failed, Unknown, Failed, Sent, Cancelled]).await;
        assert_eq!(troubled(conn).await.unwrap(), Troubled { failed: 2, unknown: 1 });
    });
}

#[test]
fn reads_the_standing_of_a_dead_letters_item() {
    in_transaction(async |conn| {
        const QUIET: Duration = Duration::from_secs(60);
        let (over, open) = (run(conn, &[item(Failed).attempt(4)]).await, run_of(conn, &[Pending]).await);
        let subject = async |conn: &mut PgConnection, item_id| subjects(conn, &[item_id, -1], QUIET).await.unwrap();
        let found = subject(conn, over.items[0].id).await;
        assert_eq!((found.len(), found[0].standing), (1, Some(Standing { attempt: 4, state: Failed })));
        assert!(!found[0].quiet, "it has only just ended");
        execute(conn, "UPDATE run_progress SET finished_at = finished_at - interval '1 hour'").await;
        assert!(!subject(conn, over.items[0].id).await[0].quiet, "its counters have just moved");
        idle_for(conn, over.id, 3_600).await;
        idle_for(conn, open.id, 3_600).await;
        assert!(subject(conn, over.items[0].id).await[0].quiet);
        assert!(!subject(conn, open.items[0].id).await[0].quiet, "it has not ended");
        execute(conn, format!("DELETE FROM run_progress WHERE run_id = '{}'", open.id)).await;
        assert!(subject(conn, open.items[0].id).await[0].quiet, "its run was pruned");
    });
}
