//! Results: applied once, in any order, with the counters in the same transaction.

use mailrun_core::{item::ItemState, message::ItemResult, run::Wanted};
use mailrun_ledger::{
    audit,
    progress::{self, Report, is_buried, note_buried},
    settings::SuppressionsConfig,
};
use sqlx::PgConnection;
use uuid::Uuid;

use crate::support::{
    Invitations, Run, add_later_value, apply, counters_equal_counts, execute, idle_for, in_database, in_transaction,
    item, run, run_of, set_wanted, standings, states, until_one_waits, value,
};

use ItemState::{Cancelled, Failed, Pending, Retrying, Sent, Skipped, Unknown};

async fn emailed(conn: &mut PgConnection, user_id: i64) -> bool {
    value(conn, format!("SELECT emailed_at IS NOT NULL FROM users WHERE id = {user_id}")).await
}

async fn is_finished(conn: &mut PgConnection, run_id: Uuid) -> bool {
    value(conn, format!("SELECT finished_at IS NOT NULL FROM run_progress WHERE run_id = '{run_id}'")).await
}

#[test]
fn moves_items_and_counters_together() {
    in_transaction(async |conn| {
        let run = run_of(conn, &[Pending; 6]).await;
        let results = [Retrying, Cancelled, Skipped, Unknown, Failed, Sent];
        let results: Vec<ItemResult> = (0..6).map(|index| run.result(index, 1, results[index])).collect();
        let applied = apply(conn, run.id, &results).await;
        assert_eq!((applied.changed, applied.absorbed), (6, 0));
        assert!(applied.entered.values().all(|count| *count == 1) && applied.entered.len() == 6);
        assert_eq!(states(conn, run.id).await, [Retrying, Cancelled, Skipped, Unknown, Failed, Sent]);
        counters_equal_counts(conn).await;
        assert!(emailed(conn, run.items[5].user_id).await);
        assert!(!emailed(conn, run.items[3].user_id).await);
        assert!(!is_finished(conn, run.id).await, "one waits for its next try");
        let settled = format!("SELECT settled FROM run_samples WHERE run_id = '{}'", run.id);
        assert_eq!(value::<i32>(conn, settled).await, 5);
    });
}

#[test]
fn absorbs_a_duplicate() {
    in_transaction(async |conn| {
        let run = run_of(conn, &[Pending]).await;
        let failed = [run.result(0, 1, Failed)];
        assert_eq!(apply(conn, run.id, &failed).await.changed, 1);
        let finished = format!("SELECT finished_at::text FROM run_items WHERE run_id = '{}'", run.id);
        let before: String = value(conn, &*finished).await;
        let again = apply(conn, run.id, &failed).await;
        assert_eq!((again.changed, again.absorbed), (0, 1));
        assert_eq!(value::<String>(conn, &*finished).await, before);
        counters_equal_counts(conn).await;
    });
}

#[test]
fn absorbs_a_duplicate_within_a_batch() {
    in_transaction(async |conn| {
        let run = run_of(conn, &[Pending]).await;
        let applied = apply(conn, run.id, &[run.result(0, 1, Sent), run.result(0, 1, Sent)]).await;
        assert_eq!((applied.changed, applied.absorbed), (1, 1));
        assert_eq!(applied.entered.into_iter().collect::<Vec<_>>(), [((run.id, Sent), 1)], "the item is counted once");
        counters_equal_counts(conn).await;
    });
}

#[test]
fn the_newest_attempt_wins_in_any_order() {
    let orders = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];
    in_transaction(async |conn| {
        for order in orders {
            let run = run_of(conn, &[Pending]).await;
            let results = [run.result(0, 1, Retrying), run.result(0, 2, Retrying), run.result(0, 3, Failed)];
            for index in order {
                apply(conn, run.id, &results[index..=index]).await;
            }
            assert_eq!(standings(conn, run.id).await, [(3, Failed)], "{order:?}");
        }
        counters_equal_counts(conn).await;
    });
}

#[test]
fn sent_wins_over_later_results() {
    in_transaction(async |conn| {
        let run = run_of(conn, &[Pending]).await;
        apply(conn, run.id, &[run.result(0, 2, Failed)]).await;
        apply(conn, run.id, &[run.result(0, 1, Sent)]).await;
        apply(conn, run.id, &[run.result(0, 3, Unknown)]).await;
        assert_eq!(standings(conn, run.id).await, [(1, Sent)]);
        assert!(emailed(conn, run.items[0].user_id).await);
        counters_equal_counts(conn).await;
    });
}

#[test]
fn stores_the_details_of_a_result() {
    in_transaction(async |conn| {
        let run = run_of(conn, &[Pending]).await;
        let result = ItemResult {
            tries: 3,
            replays: 2,
            error: Some("451 try later".into()),
            due_in_ms: Some(90_000),
            ..run.result(0, 4, Retrying)
        };
        apply(conn, run.id, &[result]).await;
        let row = "SELECT attempt || ' ' || tries || ' ' || replays || ' ' || error || ' '
                          || extract(epoch FROM due_at - now())::int || ' ' || (finished_at IS NULL) FROM run_items";
        assert_eq!(value::<String>(conn, row).await, "4 3 2 451 try later 90 true");
        assert_eq!(value::<i32>(conn, "SELECT repeats FROM run_progress").await, 1);
        apply(conn, run.id, &[run.result(0, 5, Sent)]).await;
        let row = "SELECT error IS NULL AND due_at IS NULL AND finished_at IS NOT NULL FROM run_items";
        assert!(value::<bool>(conn, row).await, "the next result replaces it");
    });
}

#[test]
fn a_run_finishes_with_its_last_item_and_restarts_with_a_replay() {
    in_transaction(async |conn| {
        let run = run_of(conn, &[Pending, Sent]).await;
        execute(conn, "UPDATE run_progress SET started_at = now() - interval '1 day'").await;
        apply(conn, run.id, &[run.result(0, 1, Failed)]).await;
        assert!(is_finished(conn, run.id).await);
        let finished: String = value(conn, "SELECT finished_at::text FROM run_progress").await;
        let restarted = "SELECT started_at > now() - interval '1 hour' FROM run_progress";
        assert!(!value::<bool>(conn, restarted).await);
        apply(conn, run.id, &[run.result(0, 1, Sent)]).await;
        assert_eq!(
            value::<String>(conn, "SELECT finished_at::text FROM run_progress").await,
            finished,
            "the first end"
        );

        let run = run_of(conn, &[Failed]).await;
        let restarted = format!("SELECT started_at > '{finished}' FROM run_progress WHERE run_id = '{}'", run.id);
        apply(conn, run.id, &[run.result(0, 2, Pending)]).await;
        assert!(!is_finished(conn, run.id).await);
        assert!(value::<bool>(conn, restarted).await);
        counters_equal_counts(conn).await;
    });
}

#[test]
fn a_batch_may_cover_several_runs() {
    in_transaction(async |conn| {
        let (first, second) = (run_of(conn, &[Pending]).await, run_of(conn, &[Pending, Pending]).await);
        let results = [second.result(1, 1, Sent), first.result(0, 1, Failed), second.result(0, 1, Sent)];
        let reports: Vec<Report<'_>> = results.iter().map(|result| Report { run_id: None, result }).collect();
        let applied = progress::apply(conn, &Invitations::default(), &reports).await.unwrap();
        assert_eq!(applied.changed, 3, "messages of the first version name no run");
        counters_equal_counts(conn).await;
        assert!(is_finished(conn, first.id).await && is_finished(conn, second.id).await);
    });
}

#[test]
fn results_of_another_ledger_change_nothing() {
    in_transaction(async |conn| {
        let (run, other) = (run_of(conn, &[Pending, Pending]).await, run_of(conn, &[Pending]).await);
        let unknown = ItemResult { item_id: i64::MAX, ..run.result(0, 1, Sent) };
        let results = [run.result(0, 1, Sent), other.result(0, 1, Sent), unknown];
        let applied = apply(conn, run.id, &results).await;
        assert_eq!((applied.changed, applied.strange), (1, vec![1, 2]));
        assert_eq!(states(conn, other.id).await, [Pending]);
        assert!(!emailed(conn, other.items[0].user_id).await);
    });
}

#[test]
fn a_result_for_an_item_in_a_later_versions_state_waits() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let run = run_of(&mut conn, &[Pending, Pending]).await;
        add_later_value(&mut conn, "item_state").await;
        execute(&mut conn, format!("UPDATE run_items SET state = 'later' WHERE id = {}", run.items[0].id)).await;
        let applied = apply(&mut conn, run.id, &[run.result(0, 1, Sent), run.result(1, 1, Sent)]).await;
        assert_eq!((applied.changed, applied.later), (1, vec![0]), "the others are applied");
        let kept = format!("SELECT state::text FROM run_items WHERE id = {}", run.items[0].id);
        assert_eq!(value::<String>(&mut conn, kept).await, "later");
    });
}

#[test]
fn the_flag_keeps_the_time_of_the_first_email() {
    in_transaction(async |conn| {
        let run = run_of(conn, &[Pending]).await;
        let user_id = run.items[0].user_id;
        execute(conn, format!("UPDATE users SET emailed_at = '2020-01-01' WHERE id = {user_id}")).await;
        apply(conn, run.id, &[run.result(0, 1, Sent)]).await;
        let year = format!("SELECT extract(year FROM emailed_at)::int FROM users WHERE id = {user_id}");
        assert_eq!(value::<i32>(conn, year).await, 2020);
    });
}

/// The item was cancelled, its person was invited again, and then a late result says that the item had been sent.
#[test]
fn a_late_sent_is_overtaken_by_the_persons_newer_item() {
    in_transaction(async |conn| {
        for given_up in [Cancelled, Skipped] {
            let first = run_of(conn, &[given_up, given_up]).await;
            let [twice, once] = [first.items[0].user_id, first.items[1].user_id];
            let second = run(conn, &[item(Pending).of(twice)]).await;
            apply(conn, first.id, &[first.result(0, 1, Sent), first.result(1, 1, Sent)]).await;
            assert_eq!(states(conn, first.id).await, [Sent, Sent]);
            let active = "SELECT run_id FROM run_items WHERE active AND user_id =";
            assert_eq!(value::<Uuid>(conn, format!("{active} {twice}")).await, second.id);
            assert_eq!(value::<Uuid>(conn, format!("{active} {once}")).await, first.id);
            assert!(emailed(conn, twice).await, "so the newer item is withheld");
        }
        counters_equal_counts(conn).await;
    });
}

fn bounced(run: &Run, index: usize) -> ItemResult {
    let failed = run.result(index, 1, Failed);
    ItemResult { error: Some("550 no such user".into()), flagged: true, ..failed }
}

#[test]
fn suppresses_an_address_that_does_not_exist() {
    in_transaction(async |conn| {
        let run = run_of(conn, &[Pending, Pending]).await;
        apply(conn, run.id, &[bounced(&run, 0), run.result(1, 1, Failed)]).await;
        let listed = "SELECT email || ' ' || reason || ' ' || detail FROM suppressions";
        assert_eq!(value::<String>(conn, listed).await, format!("{} bounced 550 no such user", run.items[0].email));
        // An outdated result has no effect.
        let run = run_of(conn, &[Pending]).await;
        apply(conn, run.id, &[run.result(0, 2, Retrying)]).await;
        apply(conn, run.id, &[bounced(&run, 0)]).await;
        assert_eq!(value::<i64>(conn, "SELECT count(*) FROM suppressions").await, 1);
    });
}

#[test]
fn holds_an_unusual_share_of_suppressions() {
    in_transaction(async |conn| {
        let run = run_of(conn, &[Pending; 4]).await;
        let results: Vec<ItemResult> = (0..3).map(|index| bounced(&run, index)).collect();
        let reports: Vec<Report<'_>> = results.iter().map(|result| Report { run_id: Some(run.id), result }).collect();
        let settings = SuppressionsConfig { hold_percent: 50, hold_at_least: 3 };
        progress::apply(conn, &Invitations(settings), &reports).await.unwrap();
        assert_eq!(value::<i64>(conn, "SELECT count(*) FROM suppressions").await, 0);
        assert_eq!(value::<i64>(conn, "SELECT count(*) FROM held_suppressions").await, 3);
    });
}

#[test]
fn stores_no_reply_about_an_erased_person() {
    in_transaction(async |conn| {
        let run = run_of(conn, &[Pending, Pending]).await;
        let user_id = run.items[0].user_id;
        execute(conn, format!("UPDATE users SET email = 'erased:00', erased_at = now() WHERE id = {user_id}")).await;
        let deleted = ItemResult { error: Some(mailrun_core::outcome::DELETED.into()), ..run.result(1, 1, Cancelled) };
        let erased = run.items[1].user_id;
        execute(conn, format!("UPDATE users SET erased_at = now() WHERE id = {erased}")).await;
        apply(conn, run.id, &[bounced(&run, 0), deleted]).await;
        let error = |index: usize| format!("SELECT error FROM run_items WHERE id = {}", run.items[index].id);
        assert_eq!(value::<String>(conn, error(0)).await, mailrun_ledger::people::REPLY_ERASED);
        assert_eq!(value::<String>(conn, error(1)).await, mailrun_core::outcome::DELETED, "our own words stay");
        let listed = "SELECT email || ' ' || detail FROM suppressions";
        assert_eq!(value::<String>(conn, listed).await, format!("erased:00 {}", mailrun_ledger::people::REPLY_ERASED));
    });
}

#[test]
fn recounts_if_manually_changed_counters_do_not_allow_a_result() {
    in_transaction(async |conn| {
        let run = run_of(conn, &[Pending, Pending]).await;
        execute(conn, "UPDATE run_progress SET pending = 0, failed = 2").await;
        let applied = apply(conn, run.id, &[run.result(0, 1, Sent)]).await;
        assert_eq!(applied.changed, 1);
        counters_equal_counts(conn).await;
    });
}

#[test]
fn a_batch_is_merged_again_if_an_item_changes_concurrently() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let run = run_of(&mut conn, &[Pending, Pending]).await;
        // Another progress worker is about to commit the newer attempt of the first item.
        let mut tx = ledger.begin().await.unwrap();
        apply(&mut tx, run.id, &[run.result(0, 2, Retrying)]).await;
        let results = [run.result(0, 1, Failed), run.result(1, 1, Sent)];
        let (applied, ()) = tokio::join!(apply(&mut conn, run.id, &results), async {
            until_one_waits(ledger).await;
            tx.commit().await.unwrap();
        });
        assert_eq!((applied.changed, applied.absorbed), (1, 1), "what was read first is not written");
        assert_eq!(standings(&mut conn, run.id).await, [(2, Retrying), (1, Sent)]);
        counters_equal_counts(&mut conn).await;
    });
}

/// The unique index makes the second commit fail. It then merges again and finds the newer item.
#[test]
fn a_concurrent_late_sent_and_new_invitation_leave_one_active_item() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let first = run_of(&mut conn, &[Cancelled]).await;
        let user_id = first.items[0].user_id;
        let mut tx = ledger.begin().await.unwrap();
        let second = run(&mut tx, &[item(Pending).of(user_id)]).await;
        let sent = [first.result(0, 1, Sent)];
        let (applied, ()) = tokio::join!(apply(&mut conn, first.id, &sent), async {
            until_one_waits(ledger).await;
            tx.commit().await.unwrap();
        });
        assert_eq!(applied.changed, 1);
        let active = "SELECT run_id FROM run_items WHERE active";
        assert_eq!(value::<Uuid>(&mut conn, active).await, second.id);
        counters_equal_counts(&mut conn).await;
    });
}

#[test]
fn concurrent_batches_lose_nothing() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let run = run_of(&mut conn, &[Pending; 30]).await;
        // Both report every item, in opposite orders, one attempt apart.
        let worker = async |attempt: i32, backwards: bool| {
            let mut conn = ledger.acquire().await.unwrap();
            let mut results: Vec<ItemResult> = (0..30).map(|index| run.result(index, attempt, Retrying)).collect();
            if backwards {
                results.reverse();
            }
            for batch in results.chunks(10) {
                apply(&mut conn, run.id, batch).await;
            }
        };
        tokio::join!(worker(1, false), worker(2, true), worker(3, false));
        assert_eq!(standings(&mut conn, run.id).await, [(3, Retrying); 30]);
        counters_equal_counts(&mut conn).await;
    });
}

#[test]
fn recounts_while_results_are_applied() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let run = run_of(&mut conn, &[Pending; 2]).await;
        let mut tx = ledger.begin().await.unwrap();
        apply(&mut tx, run.id, &[run.result(0, 1, Sent)]).await;
        // The recount waits for the counters that the batch has moved, and sees its items.
        let (recounted, ()) = tokio::join!(audit::recount(&mut conn, run.id), async {
            until_one_waits(ledger).await;
            tx.commit().await.unwrap();
        });
        recounted.unwrap();
        counters_equal_counts(&mut conn).await;
    });
}

#[test]
fn results_are_applied_in_every_wanted_state() {
    in_transaction(async |conn| {
        for wanted in [Wanted::Paused, Wanted::Cancelled] {
            let run = run_of(conn, &[Pending]).await;
            set_wanted(conn, run.id, wanted).await;
            idle_for(conn, run.id, 60).await;
            assert_eq!(apply(conn, run.id, &[run.result(0, 1, Sent)]).await.changed, 1);
            let moved =
                format!("SELECT mailrun_is_recent(updated_at, 10) FROM run_progress WHERE run_id = '{}'", run.id);
            assert!(value::<bool>(conn, moved).await);
        }
    });
}

#[test]
fn a_result_is_buried_once() {
    in_transaction(async |conn| {
        let run = run_of(conn, &[Pending]).await;
        let (sent, failed) = (run.result(0, 1, Sent), run.result(0, 1, Failed));
        let report = Report { run_id: Some(run.id), result: &sent };
        assert!(!is_buried(conn, report).await.unwrap());
        note_buried(conn, report, "refused").await.unwrap();
        note_buried(conn, report, "refused once more").await.unwrap();
        assert!(is_buried(conn, report).await.unwrap());
        assert_eq!(value::<String>(conn, "SELECT reason FROM buried_results").await, "refused");
        assert!(!is_buried(conn, Report { result: &failed, ..report }).await.unwrap());
        assert!(!is_buried(conn, Report { run_id: None, ..report }).await.unwrap());
    });
}
