//! Suppressions of missing addresses: if a run suppresses an unusual share of its recipients, they are held for a person.

use mailrun_core::item::ItemState::Pending;
use mailrun_ledger::{
    held_suppressions::{Missing, Suppressed, decide, open_reviews, suppress_missing},
    settings::SuppressionsConfig,
};
use sqlx::PgConnection;

use crate::support::{Run, execute, in_database, in_transaction, run_of, until_one_waits, value};

/// More than half of a run, and at least three.
const HOLDS: SuppressionsConfig = SuppressionsConfig { hold_percent: 50, hold_at_least: 3 };

fn missing(run: &Run, indices: std::ops::Range<usize>) -> Vec<Missing> {
    let of = |index: usize| {
        let detail = Some("550 no such user".to_owned());
        Missing { run_id: run.id, email: run.items[index].email.clone(), detail }
    };
    indices.map(of).collect()
}

async fn report(conn: &mut PgConnection, run: &Run, indices: std::ops::Range<usize>) -> Suppressed {
    suppress_missing(conn, &HOLDS, &missing(run, indices)).await.unwrap()
}

async fn listed(conn: &mut PgConnection) -> (i64, i64) {
    let suppressed = value(conn, "SELECT count(*) FROM suppressions").await;
    (suppressed, value(conn, "SELECT count(*) FROM held_suppressions").await)
}

#[test]
fn a_usual_share_is_suppressed_at_once() {
    in_transaction(async |conn| {
        let run = run_of(conn, &[Pending; 8]).await;
        assert_eq!(report(conn, &run, 0..2).await, Suppressed { new: 2, held: 0 });
        assert_eq!(report(conn, &run, 1..3).await, Suppressed { new: 1, held: 0 }, "the known one is not new");
        assert_eq!(listed(conn).await, (3, 0));
        let of_run = format!("SELECT count(*) FROM suppressions WHERE run_id = '{}'", run.id);
        assert_eq!(value::<i64>(conn, of_run).await, 3);
        assert!(open_reviews(conn).await.unwrap().is_empty());
    });
}

#[test]
fn an_unusual_share_is_undone_and_held_with_the_rest() {
    in_transaction(async |conn| {
        let (run, other) = (run_of(conn, &[Pending; 6]).await, run_of(conn, &[Pending; 6]).await);
        report(conn, &other, 0..1).await;
        assert_eq!(report(conn, &run, 0..2).await, Suppressed { new: 2, held: 0 });
        assert_eq!(report(conn, &run, 2..4).await, Suppressed { new: 0, held: 4 });
        assert_eq!(listed(conn).await, (1, 4), "other runs' stay");
        assert_eq!(report(conn, &run, 3..6).await, Suppressed { new: 0, held: 2 });
        let reviews = open_reviews(conn).await.unwrap();
        assert_eq!((reviews[0].run_id, reviews[0].addresses), (run.id, 6));
        assert_eq!(reviews[0].detail.as_deref(), Some("550 no such user"));
    });
}

#[test]
fn suppressions_by_people_are_not_undone() {
    in_transaction(async |conn| {
        let run = run_of(conn, &[Pending; 4]).await;
        let email = &run.items[0].email;
        execute(conn, format!("INSERT INTO suppressions (email, reason) VALUES ('{email}', 'unsubscribed')")).await;
        report(conn, &run, 0..4).await;
        assert_eq!(listed(conn).await, (1, 3));
    });
}

#[test]
fn accepting_a_review_suppresses_and_lets_later_ones_through() {
    in_transaction(async |conn| {
        let run = run_of(conn, &[Pending; 6]).await;
        report(conn, &run, 0..4).await;
        assert_eq!(decide(conn, run.id, true).await.unwrap(), Some(4));
        assert_eq!(listed(conn).await, (4, 0));
        assert_eq!(report(conn, &run, 4..5).await, Suppressed { new: 1, held: 0 });
        assert_eq!(decide(conn, run.id, false).await.unwrap(), None, "already decided");
        assert!(open_reviews(conn).await.unwrap().is_empty());
    });
}

#[test]
fn rejecting_a_review_drops_it_and_later_ones() {
    in_transaction(async |conn| {
        let run = run_of(conn, &[Pending; 6]).await;
        report(conn, &run, 0..4).await;
        assert_eq!(decide(conn, run.id, false).await.unwrap(), Some(4));
        assert_eq!(report(conn, &run, 4..5).await, Suppressed::default());
        assert_eq!(listed(conn).await, (0, 0));
        let without = run_of(conn, &[Pending]).await;
        assert_eq!(decide(conn, without.id, true).await.unwrap(), None, "there is no review");
    });
}

/// Each transaction alone would see a usual share.
#[test]
fn concurrent_reports_are_counted_together() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let run = run_of(&mut conn, &[Pending; 4]).await;
        let mut tx = ledger.begin().await.unwrap();
        report(&mut tx, &run, 0..2).await;
        let (second, ()) = tokio::join!(report(&mut conn, &run, 2..4), async {
            until_one_waits(ledger).await;
            tx.commit().await.unwrap();
        });
        assert_eq!(second, Suppressed { new: 0, held: 4 });
        assert_eq!(listed(&mut conn).await, (0, 4));
    });
}
