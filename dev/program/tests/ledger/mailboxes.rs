//! Spelling addresses of older ledgers as mailboxes, and merging people of one mailbox.

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
fn a_ledger_of_mailboxes_is_left_alone() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        run(&mut conn, &[item(Pending).to("ann@example.org"), item(Sent).to(MAILBOX)]).await;
        // It takes no lock either: somebody holds one.
        let mut tx = ledger.begin().await.unwrap();
        execute(&mut tx, "LOCK TABLE run_items IN ROW EXCLUSIVE MODE").await;
        assert_eq!(unify(&mut conn).await.unwrap(), Unified::default());
    });
}

#[test]
fn an_address_is_spelled_as_its_mailbox_and_its_mail_says_what_it_said() {
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
        assert_eq!(unify(&mut conn).await.unwrap(), Unified::default(), "it may be repeated");
        let worker = worker(&mut conn).await;
        assert_eq!(claim(&mut conn, worker, &run.keys()).await[0].recipient.as_ref().unwrap().email, WRITTEN);
    });
}

/// The one that is, or may be, in the recipient's mailbox already, then the furthest on its way there.
#[test]
fn of_two_items_for_one_mailbox_the_furthest_counts() {
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
fn an_item_that_is_claimed_counts_before_one_that_is_not() {
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
fn the_overtaken_item_is_not_sent_any_more() {
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
fn of_two_suppressions_the_first_reason_stays() {
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
fn waits_for_what_is_being_written() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        run(&mut conn, &[item(Pending).to(WRITTEN)]).await;
        // A list is being taken in, with the mailbox of somebody who is there under another spelling.
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
