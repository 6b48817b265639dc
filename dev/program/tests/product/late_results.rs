//! Late results, and results that the ledger refuses: a sent mail is recorded as sent regardless of later events, and a refused result
//! affects no others.

use crate::support::{World, people, until};
use lapin::options::BasicGetOptions;
use mailrun_broker::depth;
use mailrun_core::{
    item::ItemState::{self, Cancelled, Failed, Pending, Retrying, Sent, Skipped, Unknown},
    message::{ItemMessage, ItemResult, ResultsMessage, decode, encode},
};
use uuid::Uuid;

fn id(run: &str) -> Uuid {
    run.rsplit('/').next().unwrap().parse().unwrap()
}

/// A run's items, in the order of its list.
async fn items(world: &World, run: &str) -> Vec<i64> {
    let query = "SELECT id FROM run_items WHERE run_id = $1 ORDER BY position";
    sqlx::query_scalar(query).bind(id(run)).fetch_all(&world.pool).await.unwrap()
}

fn result(item_id: i64, attempt: i32, state: ItemState) -> ItemResult {
    ItemMessage { run_id: Uuid::nil(), item_id, attempt, tries: 1, replays: 0, impersonal: false }.result(state, None)
}

/// Reports results like a sender.
async fn report(world: &World, run: &str, results: &[ItemResult]) {
    let message = ResultsMessage { run_id: Some(id(run)), results: results.to_vec() };
    world.publish("mailrun.results", &encode(&message)).await;
}

async fn execute(world: &World, statement: &'static str) {
    sqlx::query(statement).execute(&world.pool).await.unwrap();
}

#[tokio::test]
async fn refused_results_are_buried_once_and_the_others_counted() {
    let mut world = World::new(&[]).await;
    let run = world.invite(&people(200)).await;
    execute(&world, "ALTER TABLE run_items ADD CONSTRAINT no_such_end CHECK (error <> 'impossible')").await;
    let mut results: Vec<ItemResult> =
        items(&world, &run).await.into_iter().map(|item| result(item, 1, Sent)).collect();
    results[70] = ItemResult { state: Failed, error: Some("impossible".into()), ..results[70].clone() };
    // Beyond PostgreSQL's range of dates.
    results[130] = ItemResult { state: Retrying, due_in_ms: Some(i64::MAX), ..results[130].clone() };
    report(&world, &run, &results).await;
    world.worker("progress");
    world.until_progress(&run, "the others are counted", |progress| progress["sent"] == 198).await;
    let channel = world.channel().await;
    until("both are buried", async || depth(&channel, "mailrun.dead").await.unwrap() == 2).await;

    // A sender repeats results that are not counted. Later results are counted after them.
    report(&world, &run, &results).await;
    report(&world, &run, &[results[130].clone(), results[70].clone()]).await;
    let later = world.invite("later@example.org").await;
    report(&world, &later, &[result(items(&world, &later).await[0], 1, Sent)]).await;
    world.until_over(&later).await;
    assert_eq!(depth(&channel, "mailrun.dead").await.unwrap(), 2, "{}", world.log());

    // Each is a separate dead letter, and can be moved back when the ledger accepts it.
    execute(&world, "ALTER TABLE run_items DROP CONSTRAINT no_such_end").await;
    while let Some(dead_letter) = channel.basic_get("mailrun.dead".into(), BasicGetOptions::default()).await.unwrap() {
        let message: ResultsMessage = decode(None, &dead_letter.data).unwrap();
        assert_eq!(message.results.len(), 1, "{message:?}");
        if message.results == results[70..71] {
            world.publish("mailrun.results", &dead_letter.data).await;
        }
    }
    let end = world.until_progress(&run, "one has failed", |progress| progress["failed"] == 1).await;
    assert_eq!((&end["sent"], &end["pending"]), (&198.into(), &1.into()));
    world.counters_equal_counts().await;
}

#[tokio::test]
async fn manually_changed_counters_bury_no_result() {
    let mut world = World::new(&[]).await;
    let run = world.invite(&people(200)).await;
    execute(&world, "UPDATE run_progress SET pending = pending - 150, sent = sent + 150").await;
    let results: Vec<ItemResult> = items(&world, &run).await.into_iter().map(|item| result(item, 1, Sent)).collect();
    report(&world, &run, &results).await;
    world.worker("progress");
    assert_eq!(world.until_over(&run).await["text"], "200 successful of 200");
    assert_eq!(depth(&world.channel().await, "mailrun.dead").await.unwrap(), 0);
    world.counters_equal_counts().await;
}

#[tokio::test]
async fn a_late_sent_result_of_an_earlier_attempt_wins() {
    let mut world = World::new(&[]).await;
    world.worker("progress");
    let run = world.invite(&people(6)).await;
    let items = items(&world, &run).await;
    let since = [(3, Failed), (1, Cancelled), (2, Skipped), (2, Unknown), (3, Retrying), (4, Pending)];
    let happened: Vec<ItemResult> =
        items.iter().zip(since).map(|(item, (attempt, state))| result(*item, attempt, state)).collect();
    report(&world, &run, &happened).await;
    world
        .until_progress(&run, "all of it is shown", |progress| {
            ["failed", "cancelled", "skipped", "unknown", "retrying"].iter().all(|state| progress[*state] == 1)
        })
        .await;
    let late: Vec<ItemResult> = items.iter().map(|item| result(*item, 1, Sent)).collect();
    report(&world, &run, &late).await;
    assert_eq!(world.until_over(&run).await["text"], "6 successful of 6");
    let emailed = "SELECT count(*) FROM users WHERE emailed_at IS NOT NULL";
    assert_eq!(sqlx::query_scalar::<_, i64>(emailed).fetch_one(&world.pool).await.unwrap(), 6);
    let page = world.client.get(&run).send().await.unwrap().text().await.unwrap();
    assert!(page.contains("6 successful"), "{page}");

    // Pending attempts are not made.
    for item_id in items {
        let next = ItemMessage { run_id: id(&run), item_id, attempt: 5, tries: 1, replays: 1, impersonal: false };
        world.publish("mailrun.items", &encode(&next)).await;
    }
    world.worker("fan-out");
    world.worker("send");
    let later = world.invite("later@example.org").await;
    world.until_over(&later).await;
    assert_eq!((world.handed_over().len(), &world.progress(&run).await["sent"]), (1, &6.into()));
    world.counters_equal_counts().await;
}

#[tokio::test]
async fn a_late_sent_result_prevents_sends_of_a_replay_and_another_run() {
    // Every send fails until a person requests a replay.
    let mut world = World::new(&[("MAILRUN_MAILER__SIMULATED__DOWN_EVERY", "1")]).await;
    world.worker("fan-out");
    world.worker("progress");
    let sender = world.worker("send");
    let replayed = world.invite("ann@example.org").await;
    assert_eq!(world.until_over(&replayed).await["failed"], 1);
    assert!(world.terminate(sender), "{}", world.log());
    world.retry(&replayed, "failed").await;
    world.until_progress(&replayed, "waiting for the next try", |progress| progress["pending"] == 1).await;

    let cancelled = world.invite("bob@example.org").await;
    world.client.post(format!("{cancelled}/cancel")).send().await.unwrap();
    assert_eq!(world.until_over(&cancelled).await["cancelled"], 1);
    let again = world.invite("bob@example.org").await;
    assert_eq!(world.progress(&again).await["pending"], 1);

    for run in [&replayed, &cancelled] {
        report(&world, run, &[result(items(&world, run).await[0], 1, Sent)]).await;
        let end = world.until_progress(run, "shown as sent", |progress| progress["sent"] == 1).await;
        assert_eq!(end["text"], "1 successful of 1");
    }
    world.worker("send");
    assert_eq!(world.until_over(&again).await["skipped"], 1);
    let later = world.invite("later@example.org").await;
    assert_eq!(world.until_over(&later).await["failed"], 1);
    assert_eq!(world.handed_over(), [""; 0], "nothing is sent");
    assert_eq!(world.progress(&replayed).await["sent"], 1);
    world.counters_equal_counts().await;
}
