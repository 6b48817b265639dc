//! The outbox: due messages are taken by one publisher at a time, oldest first.

use std::time::Duration;

use mailrun_core::message::{Command, ItemMessage, RunMessage};
use mailrun_ledger::outbox::{lock, mark_published, overdue, postpone, put, take};
use sqlx::PgConnection;
use uuid::Uuid;

use crate::support::{execute, in_database, in_transaction, until, value};

/// Adds `count` messages and returns their ids.
async fn messages(conn: &mut PgConnection, count: usize) -> Vec<i64> {
    for _ in 0..count {
        put(conn, &RunMessage { run_id: Uuid::new_v4(), command: Command::Resume }).await.unwrap();
    }
    value(conn, "SELECT array_agg(id ORDER BY id) FROM outbox").await
}

async fn taken(conn: &mut PgConnection) -> Vec<i64> {
    take(conn, 10).await.unwrap().iter().map(|waiting| waiting.id).collect()
}

#[test]
fn a_message_keeps_its_kind_and_body() {
    in_transaction(async |conn| {
        let run = RunMessage { run_id: Uuid::new_v4(), command: Command::default() };
        let item = ItemMessage { run_id: run.run_id, item_id: 1, attempt: 1, tries: 1, replays: 0, impersonal: true };
        put(conn, &run).await.unwrap();
        put(conn, &RunMessage { command: Command::Resume, ..run.clone() }).await.unwrap();
        put(conn, &item).await.unwrap();
        let waiting = take(conn, 10).await.unwrap();
        let kinds: Vec<&str> = waiting.iter().map(|waiting| waiting.kind.as_str()).collect();
        assert_eq!(kinds, ["mailrun.run.v1", "mailrun.run.v2", "mailrun.item.v2"]);
        assert_eq!(waiting[0].message, serde_json::to_value(&run).unwrap());
        assert_eq!(waiting[2].message, serde_json::to_value(item).unwrap());
    });
}

#[test]
fn two_publishers_take_different_messages() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let ids = messages(&mut conn, 3).await;
        let (mut first, mut second) = (ledger.begin().await.unwrap(), ledger.begin().await.unwrap());
        assert_eq!(take(&mut first, 2).await.unwrap().len(), 2);
        assert_eq!(taken(&mut second).await, [ids[2]], "it does not wait for the first publisher");
        assert_eq!(lock(&mut second, &ids).await.unwrap(), [ids[2]]);
        mark_published(&mut first, &ids[..2]).await.unwrap();
        first.commit().await.unwrap();
        second.rollback().await.unwrap();
        assert_eq!(taken(&mut conn).await, [ids[2]], "an unpublished message is taken again");
        assert_eq!(lock(&mut conn, &ids).await.unwrap(), [ids[2]]);
    });
}

#[test]
fn a_message_survives_a_publisher_that_dies_before_marking_it() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let ids = messages(&mut conn, 1).await;
        let mut tx = ledger.begin().await.unwrap();
        assert_eq!(taken(&mut tx).await, ids);
        drop(tx);
        until("the transaction is rolled back", async || taken(&mut conn).await == ids).await;
    });
}

#[test]
fn a_postponed_message_does_not_block_others() {
    in_transaction(async |conn| {
        let ids = messages(conn, 3).await;
        postpone(conn, &ids[..1], Duration::from_secs(60)).await.unwrap();
        postpone(conn, &[], Duration::from_secs(60)).await.unwrap();
        assert_eq!(taken(conn).await, ids[1..]);
        execute(conn, format!("UPDATE outbox SET publish_at = now() - interval '1 minute' WHERE id = {}", ids[0]))
            .await;
        assert_eq!(taken(conn).await, ids, "the longest due comes first");
    });
}

/// It was postponed before the clock was set back.
#[test]
fn a_message_postponed_beyond_the_maximum_is_due() {
    in_transaction(async |conn| {
        let ids = messages(conn, 1).await;
        execute(conn, "UPDATE outbox SET publish_at = now() + interval '3 hours'").await;
        assert_eq!(taken(conn).await, ids);
    });
}

#[test]
fn finds_overdue_messages() {
    in_transaction(async |conn| {
        let ids = messages(conn, 3).await;
        execute(conn, format!("UPDATE outbox SET created_at = now() - interval '1 minute' WHERE id <> {}", ids[2]))
            .await;
        mark_published(conn, &ids[..1]).await.unwrap();
        // Including locked ones: the caller has to check that.
        let found = overdue(conn, Duration::from_secs(30), 10).await.unwrap();
        assert_eq!(found.iter().map(|waiting| waiting.id).collect::<Vec<_>>(), [ids[1]]);
        assert_eq!(overdue(conn, Duration::ZERO, 1).await.unwrap()[0].id, ids[1]);
    });
}
