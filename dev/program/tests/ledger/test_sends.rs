//! Test sends: each goes out at most once.

use std::time::Duration;

use mailrun_ledger::{
    stored::Stored,
    suppressions::Reason,
    test_sends::{Asked, NewTest, TestState, ask, claim, finish, read},
};
use sqlx::PgPool;
use uuid::Uuid;

use crate::support::{add_later_value, execute, in_database, kill, suppress, value, worker};

const TEST: NewTest<'_> = NewTest { email: "ann@example.org", subject: "Hello", body: "Come!" };
const DEAD_AFTER: Duration = Duration::from_secs(60);

async fn asked(ledger: &PgPool) -> Uuid {
    match ask(ledger, TEST).await.unwrap() {
        Asked::Accepted(test_id) => test_id,
        Asked::Suppressed(reason) => panic!("{reason:?}"),
    }
}

#[test]
fn a_test_and_its_message_are_committed_together() {
    in_database(async |ledger| {
        let test_id = asked(ledger).await;
        let mut conn = ledger.acquire().await.unwrap();
        let message = "SELECT message->>'test_id' || ' ' || kind FROM outbox";
        assert_eq!(value::<String>(&mut conn, message).await, format!("{test_id} mailrun.test.v1"));
        let test = read(ledger, test_id, DEAD_AFTER).await.unwrap().unwrap();
        assert_eq!(
            (test.email.as_str(), test.subject.as_str(), test.body.as_str()),
            (TEST.email, TEST.subject, TEST.body)
        );
        assert_eq!((test.state, test.orphaned), (None, false));
        assert_eq!(read(ledger, Uuid::new_v4(), DEAD_AFTER).await.unwrap(), None);
    });
}

#[test]
fn a_second_click_asks_for_the_same_test() {
    in_database(async |ledger| {
        let first = asked(ledger).await;
        assert_eq!(asked(ledger).await, first);
        let other = ask(ledger, NewTest { body: "Stay!", ..TEST }).await.unwrap();
        assert_ne!(other, Asked::Accepted(first));
        let mut conn = ledger.acquire().await.unwrap();
        assert_eq!(value::<i64>(&mut conn, "SELECT count(*) FROM outbox").await, 2);
        claim(&mut conn, first, 1).await.unwrap();
        assert_eq!(asked(ledger).await, first, "it was just taken");
        finish(&mut conn, first, 1, TestState::Failed, Some("550")).await.unwrap();
        assert_ne!(asked(ledger).await, first, "something may have been mended");
    });
}

#[test]
fn a_suppressed_address_gets_no_test() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        suppress(&mut conn, TEST.email).await;
        assert_eq!(ask(ledger, TEST).await.unwrap(), Asked::Suppressed(Stored::Known(Reason::Asked)));
        // The suppression of a person who was erased stands under the tombstone.
        mailrun_ledger::people::erase(&mut conn, TEST.email).await.unwrap();
        assert_eq!(ask(ledger, TEST).await.unwrap(), Asked::Suppressed(Stored::Known(Reason::Asked)));
        assert_eq!(value::<i64>(&mut conn, "SELECT count(*) FROM outbox").await, 0);
    });
}

#[test]
fn one_worker_claims_a_test() {
    in_database(async |ledger| {
        let test_id = asked(ledger).await;
        let mut conn = ledger.acquire().await.unwrap();
        let claimed = claim(&mut conn, test_id, 1).await.unwrap().unwrap();
        assert_eq!(claimed.email, TEST.email);
        assert_eq!(claim(&mut conn, test_id, 2).await.unwrap(), None);
        assert_eq!(claim(&mut conn, test_id, 1).await.unwrap(), None, "not even the same one twice");
        assert_eq!(claim(&mut conn, Uuid::new_v4(), 1).await.unwrap(), None);
    });
}

#[test]
fn the_first_end_of_a_test_stays() {
    in_database(async |ledger| {
        let test_id = asked(ledger).await;
        let mut conn = ledger.acquire().await.unwrap();
        claim(&mut conn, test_id, 1).await.unwrap();
        finish(&mut conn, test_id, 2, TestState::Sent, None).await.unwrap();
        assert_eq!(read(ledger, test_id, DEAD_AFTER).await.unwrap().unwrap().state, None, "another worker's word");
        finish(&mut conn, test_id, 1, TestState::Failed, Some("550")).await.unwrap();
        finish(&mut conn, test_id, 1, TestState::Sent, None).await.unwrap();
        let test = read(ledger, test_id, DEAD_AFTER).await.unwrap().unwrap();
        assert_eq!((test.state, test.reason.as_deref()), (Some(Stored::Known(TestState::Failed)), Some("550")));
    });
}

#[test]
fn a_test_is_orphaned_when_its_worker_has_died() {
    in_database(async |ledger| {
        let test_id = asked(ledger).await;
        let mut conn = ledger.acquire().await.unwrap();
        let worker = worker(&mut conn).await;
        claim(&mut conn, test_id, worker).await.unwrap();
        let orphaned = async || read(ledger, test_id, DEAD_AFTER).await.unwrap().unwrap().orphaned;
        assert!(!orphaned().await);
        execute(&mut conn, "UPDATE workers SET heartbeat_at = now() - interval '2 minutes'").await;
        assert!(orphaned().await, "silent for too long");
        execute(&mut conn, "UPDATE workers SET heartbeat_at = now()").await;
        kill(&mut conn, worker).await;
        assert!(orphaned().await);
    });
}

#[test]
fn a_later_versions_state_is_shown_as_its_word() {
    in_database(async |ledger| {
        let test_id = asked(ledger).await;
        let mut conn = ledger.acquire().await.unwrap();
        add_later_value(&mut conn, "test_state").await;
        execute(
            &mut conn,
            "UPDATE test_sends SET state = 'later', finished_at = now(), claimed_at = now(), worker_id = 1",
        )
        .await;
        let test = read(ledger, test_id, DEAD_AFTER).await.unwrap().unwrap();
        assert_eq!(test.state, Some(Stored::Later("later".into())));
    });
}
