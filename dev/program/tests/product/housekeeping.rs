//! Housekeeping: tidying replayed dead letters, pruning and sweeping. It neither delays runs nor loses work in progress.

use crate::support::{World, people, until};
use lapin::options::{BasicAckOptions, BasicGetOptions};
use mailrun_broker::depth;
use serde_json::Value;
use sqlx::AssertSqlSafe;

fn count(progress: &Value, state: &str) -> i64 {
    progress[state].as_i64().unwrap()
}

fn id(run: &str) -> &str {
    run.rsplit('/').next().unwrap()
}

async fn number(world: &World, query: &str) -> i64 {
    sqlx::query_scalar(AssertSqlSafe(query.to_owned())).fetch_one(&world.pool).await.unwrap()
}

async fn execute(world: &World, statement: &str) {
    sqlx::query(AssertSqlSafe(statement.to_owned())).execute(&world.pool).await.unwrap();
}

fn prune(world: &World) {
    assert!(world.run_to_end(&["prune", "--older-than-days", "0"]), "{}", world.log());
}

/// A list of a hundred people, one of whom fails until a replay.
fn list(run: usize) -> String {
    people(100).replace("@example.org", &format!("@run-{run}.example"))
}

#[tokio::test]
async fn tidying_dead_letters_delays_no_run_and_walks_the_queue_once_for_all_replays() {
    let mut world = World::new(&[]).await;
    world.workers();
    let mut runs = Vec::new();
    for run in 0..5 {
        runs.push(world.invite(&list(run)).await);
    }
    for run in &runs {
        world.until_over(run).await;
    }
    let channel = world.channel().await;
    until("there are five dead letters", async || depth(&channel, "mailrun.dead").await.unwrap() == 5).await;
    // More than one batch of a walk, so that the queue stays too long meanwhile.
    for _ in 0..600 {
        let publish =
            channel.basic_publish("".into(), "mailrun.dead".into(), Default::default(), b"{}", Default::default());
        publish.await.unwrap();
    }
    until("all are there", async || depth(&channel, "mailrun.dead").await.unwrap() == 605).await;
    // Now the queue is full, so no dead letter can be moved to its end.
    let full = r#"{"max-length":1}"#;
    let policy = ["set_policy", "-p", &world.name, "full", "^mailrun\\.dead$", full, "--apply-to", "queues"];
    world.stack.control_rabbitmq(&policy).await.unwrap();
    let confirming = world.channel().await;
    confirming.confirm_select(Default::default()).await.unwrap();
    until("it accepts nothing", async || {
        let (options, properties) = (Default::default(), Default::default());
        let publish = confirming.basic_publish("".into(), "mailrun.dead".into(), options, b"{}", properties);
        publish.await.unwrap().await.unwrap().is_nack()
    })
    .await;
    for run in &runs[..4] {
        world.retry(run, "failed").await;
    }
    for run in &runs[..4] {
        world.until_progress(run, "all sent", |progress| count(progress, "sent") == 100).await;
    }
    until("a walk has failed", async || world.log().contains("replayed dead letters stay on the queue")).await;
    let other = world.invite("a@other.example\nb@other.example").await;
    world.until_progress(&other, "sent", |progress| count(progress, "sent") == 2).await;
    world.stack.control_rabbitmq(&["clear_policy", "-p", &world.name, "full"]).await.unwrap();
    // Read earlier, the dead letters would not be on their queue.
    until("their dead letters are removed", async || world.log().contains("replayed dead letters are off the queue"))
        .await;
    let mut of = Vec::new();
    while let Some(dead_letter) = channel.basic_get("mailrun.dead".into(), BasicGetOptions::default()).await.unwrap() {
        let body: Value = serde_json::from_slice(&dead_letter.data).unwrap();
        of.extend(body["run_id"].as_str().map(str::to_owned));
    }
    assert!(
        !of.is_empty() && of.iter().all(|run| run == id(&runs[4])),
        "only the dead letter that was not replayed: {of:?}"
    );
    let walks = world.log().matches("replayed dead letters are off the queue").count();
    assert_eq!(walks, 1, "one walk for four replays");
}

#[tokio::test]
async fn a_recipient_of_a_moved_dead_letter_counts_as_emailed_although_the_run_is_pruned() {
    let mut world = World::new(&[]).await;
    world.worker("fan-out");
    world.worker("progress");
    let quick = world.worker("send");
    let run = world.invite(&list(1)).await;
    world.until_over(&run).await;
    assert!(world.terminate(quick));
    world.set("MAILRUN_MAILER__SIMULATED__LATENCY_MS", "8000".into());
    world.worker("send");
    let channel = world.channel().await;
    let dead_letter = channel.basic_get("mailrun.dead".into(), BasicGetOptions::default()).await.unwrap().unwrap();
    world.publish("mailrun.items", &dead_letter.data).await;
    dead_letter.ack(BasicAckOptions::default()).await.unwrap();
    let claimed = "SELECT count(*) FROM attempts a JOIN run_items i ON i.id = a.item_id
                   WHERE i.state = 'failed' AND a.number > i.attempt";
    until("the dead letter is being sent", async || number(&world, claimed).await == 1).await;
    prune(&world);
    assert_eq!(number(&world, "SELECT count(*) FROM runs").await, 0);
    assert_eq!(number(&world, "SELECT count(*) FROM run_items").await, 1, "what is being sent is still there");
    until("all count as emailed", async || {
        number(&world, "SELECT count(*) FROM users WHERE emailed_at IS NOT NULL").await == 100
    })
    .await;
    prune(&world);
    assert_eq!(number(&world, "SELECT count(*) FROM run_items").await, 0);
    assert_eq!(number(&world, "SELECT count(*) FROM attempts").await, 0);
    world.assert_no_duplicates();
}

#[tokio::test]
async fn a_run_with_a_requested_replay_is_not_pruned_before_it() {
    let mut world = World::new(&[]).await;
    world.worker("send");
    world.worker("progress");
    let releasing = world.worker("fan-out");
    let run = world.invite(&list(1)).await;
    world.until_over(&run).await;
    assert!(world.terminate(releasing));
    world.retry(&run, "failed").await;
    until("it is on the queue", async || {
        number(&world, "SELECT count(*) FROM outbox WHERE published_at IS NULL").await == 0
    })
    .await;
    prune(&world);
    world.worker("fan-out");
    world.until_progress(&run, "all sent", |progress| count(progress, "sent") == 100).await;
    world.counters_equal_counts().await;
    assert!(!world.log().contains("there is no such run"));
}

#[tokio::test]
async fn pruning_deletes_a_runs_rows_and_keeps_needed_receipts() {
    // The run that is opened again by hand is not swept, which would end it.
    let mut world = World::new(&[("MAILRUN_SWEEP__STALLED_AFTER_MS", "600000")]).await;
    world.workers();
    let [old, open] = [world.invite(&list(1)).await, world.invite("a@open.example").await];
    world.until_over(&old).await;
    world.until_over(&open).await;
    execute(&world, "UPDATE run_progress SET finished_at = NULL WHERE total = 1").await;
    execute(
        &world,
        &format!("INSERT INTO pacing (run_id, next_at) VALUES ('{}', now()), ('{}', now())", id(&old), id(&open)),
    )
    .await;
    execute(
        &world,
        &format!(
            "INSERT INTO buried_results (run_id, item_id, attempt, state, reason, buried_at) VALUES
                 ('{old}', 1, 7, 'sent', 'of the run', now()),
                 ('{other}', 1, 7, 'sent', 'old', now() - interval '40 days'),
                 ('{other}', 2, 7, 'sent', 'new', now())",
            old = id(&old),
            other = uuid::Uuid::nil(),
        ),
    )
    .await;
    // A receipt of a pruned worker, for an item that is not settled as sent yet.
    execute(
        &world,
        "UPDATE run_items SET state = 'pending' WHERE run_id IN (SELECT run_id FROM run_progress WHERE total = 1)",
    )
    .await;
    execute(
        &world,
        "INSERT INTO receipts (worker_id, number, item_ids, attempts)
         SELECT 2000000, 1, ARRAY[i.id], ARRAY[1] FROM run_items i JOIN run_progress p USING (run_id) WHERE total = 1",
    )
    .await;
    prune(&world);
    assert_eq!(number(&world, "SELECT count(*) FROM pacing").await, 1, "that of the run that is there");
    assert_eq!(number(&world, "SELECT count(*) FROM buried_results").await, 1, "the new one");
    assert_eq!(number(&world, "SELECT count(*) FROM receipts WHERE worker_id = 2000000").await, 1, "its item needs it");
    execute(&world, "UPDATE run_items SET state = 'sent'").await;
    prune(&world);
    assert_eq!(number(&world, "SELECT count(*) FROM receipts WHERE worker_id = 2000000").await, 0);
}

#[tokio::test]
async fn a_run_that_cannot_be_swept_does_not_stop_the_sweep() {
    let mut world = World::new(&[]).await;
    let releasing = world.worker("fan-out");
    let mut runs = Vec::new();
    for run in 0..3 {
        runs.push(world.invite(&format!("a@run-{run}.example\nb@run-{run}.example")).await);
    }
    let channel = world.channel().await;
    until("all are released", async || depth(&channel, "mailrun.items").await.unwrap() == 6).await;
    // A step is committed after its messages are published, and repeated if it was not.
    let released = "SELECT count(*) FROM run_passes WHERE cursor = 2";
    until("the steps are committed", async || number(&world, released).await == 3).await;
    world.kill(releasing);
    // The first and the last of them cannot be swept, in any order.
    execute(
        &world,
        "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'not this one'; END $$",
    )
    .await;
    let failing = format!(
        "CREATE TRIGGER fail BEFORE INSERT ON sweeps FOR EACH ROW
         WHEN (NEW.run_id IN ('{}', '{}')) EXECUTE FUNCTION fail()",
        id(&runs[0]),
        id(&runs[2])
    );
    execute(&world, &failing).await;
    channel.queue_purge("mailrun.items".into(), Default::default()).await.unwrap();
    // All in one sweep: republished messages wait for a sender and are no longer missing.
    execute(&world, "UPDATE run_progress SET updated_at = now() - interval '1 minute'").await;
    world.worker("fan-out");
    until("the other one is swept", async || world.repairs(&runs[1]).await.put_back == 2).await;
    until("that is logged", async || world.log().contains("a run can't be swept")).await;
    execute(&world, "DROP TRIGGER fail ON sweeps").await;
    world.worker("send");
    world.worker("progress");
    for run in &runs {
        let end = world.until_over(run).await;
        assert_eq!(count(&end, "sent"), 2);
    }
    world.assert_no_duplicates();
}
