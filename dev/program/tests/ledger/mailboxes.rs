//! Normalizing the addresses of older ledgers, and merging people with the same mailbox.

use mailrun_core::item::ItemState;
use mailrun_ledger::mailboxes::{Unified, unify};
use sqlx::PgConnection;
use uuid::Uuid;

use crate::support::{
    claim, counters_equal_counts, execute, in_database, item, run, states, suppress, until_one_waits, value, worker,
};

use ItemState::{Failed, Pending, Retrying, Sent, Unknown};

const WRITTEN: &str = "ann@bücher.example";
const MAILBOX: &str = "ann@xn--bcher-kva.example";

async fn active(conn: &mut PgConnection) -> Uuid {
    value(conn, "SELECT run_id FROM run_items WHERE active").await
}

#[test]
fn a_normalized_ledger_is_left_alone() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        run(&mut conn, &[item(Pending).to("ann@example.org"), item(Sent).to(MAILBOX)]).await;
        // It takes no lock either: another transaction holds one.
        let mut tx = ledger.begin().await.unwrap();
        execute(&mut tx, "LOCK TABLE run_items IN ROW EXCLUSIVE MODE").await;
        assert_eq!(unify(&mut conn).await.unwrap(), Unified::default());
    });
}

#[test]
fn an_address_is_normalized_and_its_mail_is_unchanged() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let run = run(&mut conn, &[item(Pending).to(WRITTEN)]).await;
        execute(&mut conn, "UPDATE users SET name = 'Ann'").await;
        execute(&mut conn, "UPDATE run_items SET name = NULL").await;
        suppress(&mut conn, "bob@bücher.example").await;
        assert_eq!(unify(&mut conn).await.unwrap(), Unified { people: 1, merged: 0, suppressions: 1 });
        let row = "SELECT email || ' ' || i.name || ' ' || typed FROM users u JOIN run_items i ON i.user_id = u.id";
        assert_eq!(value::<String>(&mut conn, row).await, format!("{MAILBOX} Ann {WRITTEN}"));
        assert_eq!(value::<String>(&mut conn, "SELECT email FROM suppressions").await, "bob@xn--bcher-kva.example");
        assert_eq!(unify(&mut conn).await.unwrap(), Unified::default(), "repeating it changes nothing");
        let worker = worker(&mut conn).await;
        assert_eq!(claim(&mut conn, worker, &run.keys()).await[0].recipient.as_ref().unwrap().email, WRITTEN);
    });
}

/// The item that is, or may be, in the recipient's mailbox already; otherwise the one closest to being sent.
#[test]
fn the_item_closest_to_being_sent_counts_for_a_mailbox() {
    let orders = [(Sent, Unknown), (Unknown, Retrying), (Retrying, Pending), (Pending, Failed)];
    for (further, other) in orders {
        for further_is_first in [true, false] {
            in_database(async |ledger| {
                let mut conn = ledger.acquire().await.unwrap();
                let emails = if further_is_first { [WRITTEN, MAILBOX] } else { [MAILBOX, WRITTEN] };
                let first = run(&mut conn, &[item(further).to(emails[0])]).await;
                let second = run(&mut conn, &[item(other).to(emails[1])]).await;
                let unified = unify(&mut conn).await.unwrap();
                assert_eq!((unified.people, unified.merged), (1, 1));
                assert_eq!(active(&mut conn).await, first.id, "{further:?} before {other:?}");
                assert_eq!(states(&mut conn, second.id).await, [other], "no counter changes");
                assert_eq!(value::<i64>(&mut conn, "SELECT count(*) FROM users").await, 1);
                let emailed: bool = value(&mut conn, "SELECT emailed_at IS NOT NULL FROM users").await;
                assert_eq!(emailed, further == Sent);
                counters_equal_counts(&mut conn).await;
            });
        }
    }
}

#[test]
fn a_claimed_item_counts_before_an_unclaimed_one() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        run(&mut conn, &[item(Retrying).to(WRITTEN)]).await;
        let claimed = run(&mut conn, &[item(Pending).to(MAILBOX)]).await;
        let worker = worker(&mut conn).await;
        claim(&mut conn, worker, &claimed.keys()).await;
        unify(&mut conn).await.unwrap();
        assert_eq!(active(&mut conn).await, claimed.id);
    });
}

#[test]
fn an_overtaken_item_is_no_longer_sent() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        run(&mut conn, &[item(Pending).to(WRITTEN)]).await;
        let second = run(&mut conn, &[item(Pending).to(MAILBOX)]).await;
        unify(&mut conn).await.unwrap();
        let worker = worker(&mut conn).await;
        let claimed = claim(&mut conn, worker, &second.keys()).await;
        assert_eq!(
            claimed[0].withheld,
            Some(mailrun_core::claim::Withheld::ByJob(mailrun_ledger::invitations::INVITED))
        );
    });
}

#[test]
fn the_first_reason_of_two_suppressions_is_kept() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        for (email, reason) in [(WRITTEN, "unsubscribed"), (MAILBOX, "bounced")] {
            execute(&mut conn, format!("INSERT INTO suppressions (email, reason) VALUES ('{email}', '{reason}')"))
                .await;
        }
        assert_eq!(unify(&mut conn).await.unwrap().suppressions, 1);
        let row = "SELECT email || ' ' || reason FROM suppressions";
        assert_eq!(value::<String>(&mut conn, row).await, format!("{MAILBOX} unsubscribed"));
    });
}

#[test]
fn waits_for_concurrent_writes() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        run(&mut conn, &[item(Pending).to(WRITTEN)]).await;
        // A list with the mailbox of a person who exists under another spelling is being submitted.
        let mut tx = ledger.begin().await.unwrap();
        run(&mut tx, &[item(Pending).to(MAILBOX)]).await;
        let (unified, ()) = tokio::join!(unify(&mut conn), async {
            until_one_waits(ledger).await;
            tx.commit().await.unwrap();
        });
        assert_eq!(unified.unwrap().merged, 1);
        counters_equal_counts(&mut conn).await;
    });
}
