//! Test mails: hidden runs of one item, in no list, each sent at most once.

use mailrun_core::item::ItemState;
use mailrun_ledger::{
    invitations,
    people::REPLY_ERASED,
    runs,
    stored::Stored,
    suppressions::Reason,
    test_mails::{KIND, NewTest, Submitted, read, submit_test},
};
use sqlx::PgPool;
use uuid::Uuid;

use crate::support::{apply, execute, in_database, suppress, value};

use ItemState::{Failed, Pending, Sent};

const TEST: NewTest<'_> = NewTest { email: "ann@example.org", subject: "Hello", body: "Come!" };

async fn submitted(ledger: &PgPool) -> Uuid {
    match submit_test(ledger, TEST).await.unwrap() {
        Submitted::Accepted(test_id) => test_id,
        Submitted::Suppressed(reason) => panic!("{reason:?}"),
    }
}

async fn result(ledger: &PgPool, test_id: Uuid, state: ItemState, error: Option<&str>) {
    let mut conn = ledger.acquire().await.unwrap();
    let item_id = value(&mut conn, format!("SELECT id FROM run_items WHERE run_id = '{test_id}'")).await;
    let item = mailrun_core::message::ItemMessage {
        run_id: test_id,
        item_id,
        attempt: 1,
        tries: 1,
        replays: 0,
        impersonal: true,
    };
    apply(&mut conn, test_id, &[item.result(state, error.map(str::to_owned))]).await;
}

#[test]
fn a_test_is_released_with_its_submission() {
    in_database(async |ledger| {
        let test_id = submitted(ledger).await;
        let mut conn = ledger.acquire().await.unwrap();
        let message = "SELECT concat_ws(' ', kind, message->>'run_id', message->>'attempt') FROM outbox";
        assert_eq!(value::<String>(&mut conn, message).await, format!("mailrun.item.v2 {test_id} 1"));
        assert!(value::<bool>(&mut conn, "SELECT done_at IS NOT NULL FROM run_passes").await, "no fan-out is needed");
        let test = read(ledger, test_id).await.unwrap().unwrap();
        assert_eq!(
            (test.email.as_deref(), test.subject.as_str(), test.body.as_str()),
            (Some(TEST.email), "Hello", "Come!")
        );
        assert_eq!((test.state.known(), test.reason), (Some(Pending), None));
        assert_eq!(read(ledger, Uuid::new_v4()).await.unwrap(), None);
    });
}

#[test]
fn a_test_is_in_no_list_or_count_and_invites_no_one() {
    in_database(async |ledger| {
        let test_id = submitted(ledger).await;
        result(ledger, test_id, Failed, Some("550 no such user")).await;
        let mut conn = ledger.acquire().await.unwrap();
        assert!(runs::list(ledger, None, 10).await.unwrap().is_empty());
        assert!(runs::progress(ledger, test_id).await.unwrap().is_none());
        assert!(runs::dead_by_error(ledger).await.unwrap().is_empty());
        let gauges = mailrun_ledger::gauges::read(&mut conn).await.unwrap();
        assert_eq!(gauges.items.iter().map(|(_, items)| items).sum::<i64>(), 0);
        assert_eq!(mailrun_ledger::audit::troubled(&mut conn).await.unwrap(), Default::default());
        assert_eq!(value::<i64>(&mut conn, "SELECT count(*) FROM users").await, 0);
        assert_ne!(KIND, invitations::KIND);
    });
}

#[test]
fn a_second_click_is_the_same_test() {
    in_database(async |ledger| {
        let first = submitted(ledger).await;
        assert_eq!(submitted(ledger).await, first);
        let other = submit_test(ledger, NewTest { body: "Stay!", ..TEST }).await.unwrap();
        assert_ne!(other, Submitted::Accepted(first));
        let mut conn = ledger.acquire().await.unwrap();
        assert_eq!(value::<i64>(&mut conn, "SELECT count(*) FROM outbox").await, 2);
        result(ledger, first, Failed, Some("550")).await;
        assert_ne!(submitted(ledger).await, first, "something may have been repaired");
    });
}

#[test]
fn a_suppressed_address_gets_no_test() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        suppress(&mut conn, TEST.email).await;
        let suppressed = Submitted::Suppressed(Stored::Known(Reason::Asked));
        assert_eq!(submit_test(ledger, TEST).await.unwrap(), suppressed);
        // The suppression of an erased person is stored under the tombstone.
        mailrun_ledger::people::erase(&mut conn, TEST.email).await.unwrap();
        assert_eq!(submit_test(ledger, TEST).await.unwrap(), suppressed);
        assert_eq!(value::<i64>(&mut conn, "SELECT count(*) FROM outbox").await, 0);
    });
}

#[test]
fn the_result_of_a_test_is_that_of_its_item() {
    in_database(async |ledger| {
        let test_id = submitted(ledger).await;
        result(ledger, test_id, Sent, None).await;
        let test = read(ledger, test_id).await.unwrap().unwrap();
        assert!(test.is_over());
        assert_eq!(test.state.known(), Some(Sent));
    });
}

#[test]
fn erasing_the_recipient_leaves_neither_address_nor_a_later_reply() {
    in_database(async |ledger| {
        let (over, open) = (submitted(ledger).await, ());
        result(ledger, over, Failed, Some("550 ann@example.org: no such user")).await;
        let open = match submit_test(ledger, NewTest { body: "Stay!", ..TEST }).await.unwrap() {
            Submitted::Accepted(test_id) => test_id,
            Submitted::Suppressed(reason) => panic!("{reason:?} {open:?}"),
        };
        let mut conn = ledger.acquire().await.unwrap();
        assert_eq!(mailrun_ledger::people::erase(&mut conn, TEST.email).await.unwrap().tests, 2);
        result(ledger, open, Failed, Some("550 ann@example.org: no such user")).await;
        for test_id in [over, open] {
            let test = read(ledger, test_id).await.unwrap().unwrap();
            assert_eq!((test.email, test.reason.as_deref()), (None, Some(REPLY_ERASED)));
        }
        execute(&mut conn, "SELECT 1").await;
    });
}
