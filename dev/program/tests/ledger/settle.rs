//! Settling unknown items, after a person has found out.

use mailrun_core::item::ItemState::{Failed, Pending, Sent, Unknown};
use mailrun_ledger::settle::{Found, Selection, settle};

use crate::support::{apply, counters_equal_counts, in_transaction, item, run, run_of, standings, states, value};

#[test]
fn settles_only_unknown_items() {
    in_transaction(async |conn| {
        let run = run(conn, &[item(Unknown).attempt(3), item(Failed), item(Pending)]).await;
        assert_eq!(settle(conn, &Selection::default(), Found::Arrived, "ann").await.unwrap(), 1);
        assert_eq!(standings(conn, run.id).await, [(3, Sent), (1, Failed), (1, Pending)]);
        let emailed = format!("SELECT emailed_at IS NOT NULL FROM users WHERE id = {}", run.items[0].user_id);
        assert!(value::<bool>(conn, emailed).await);
        assert_eq!(settle(conn, &Selection::default(), Found::Arrived, "ann").await.unwrap(), 0, "nothing is left");
        counters_equal_counts(conn).await;
    });
}

#[test]
fn settles_the_selected_items() {
    in_transaction(async |conn| {
        let (first, second) = (run_of(conn, &[Unknown, Unknown]).await, run_of(conn, &[Unknown]).await);
        let of_first = Selection { run_id: Some(first.id), emails: Some(vec![first.items[0].email.clone()]) };
        assert_eq!(settle(conn, &of_first, Found::NotSent, "ann").await.unwrap(), 1);
        assert_eq!(states(conn, first.id).await, [Failed, Unknown]);
        let error = format!("SELECT error FROM run_items WHERE id = {}", first.items[0].id);
        assert_eq!(value::<String>(conn, error).await, "settled by ann: it was not sent");
        let everyone = Selection { run_id: Some(first.id), emails: None };
        assert_eq!(settle(conn, &everyone, Found::Arrived, "ann").await.unwrap(), 1);
        assert_eq!(states(conn, second.id).await, [Unknown]);
        counters_equal_counts(conn).await;
    });
}

#[test]
fn settles_more_than_one_batch() {
    in_transaction(async |conn| {
        let run = run_of(conn, &[Unknown; 501]).await;
        assert_eq!(settle(conn, &Selection::default(), Found::Arrived, "ann").await.unwrap(), 501);
        assert!(states(conn, run.id).await.iter().all(|state| *state == Sent));
        counters_equal_counts(conn).await;
    });
}

#[test]
fn a_result_that_arrives_late_still_wins() {
    in_transaction(async |conn| {
        let run = run_of(conn, &[Unknown]).await;
        settle(conn, &Selection::default(), Found::NotSent, "ann").await.unwrap();
        assert_eq!(apply(conn, run.id, &[run.result(0, 1, Sent)]).await.changed, 1);
        assert_eq!(states(conn, run.id).await, [Sent]);
    });
}
