//! The pipeline with the real servers and binaries: what people and operators rely on.

use std::time::Duration;

use crate::support::{World, people, until};
use futures::future::join_all;
use mailrun_core::queue;
use mailrun_lab::doubler::Doubler;
use mailrun_ledger::sweep::Repairs;
use serde_json::Value;
use sqlx::AssertSqlSafe;
use uuid::Uuid;

fn count(progress: &Value, state: &str) -> i64 {
    progress[state].as_i64().unwrap()
}

#[tokio::test]
async fn of_a_thousand_ten_fail_and_a_retry_sends_them() {
    let mut world = World::new(&[]).await;
    world.workers();
    let run = world.invite(&people(1000)).await;
    let first = world.until_over(&run).await;
    assert_eq!(first["text"], "990 successful, 10 failed of 1,000");
    world.retry(&run, "failed").await;
    let last = world.until_progress(&run, "all sent", |progress| count(progress, "sent") == 1000).await;
    assert_eq!((count(&last, "failed"), count(&last, "unknown")), (0, 0));
    world.counters_equal_counts().await;
    world.assert_no_duplicates();
    assert_eq!(world.handed_over().len(), 1000);
    let emailed: i64 = sqlx::query_scalar("SELECT count(*) FROM users WHERE emailed_at IS NOT NULL")
        .fetch_one(&world.pool)
        .await
        .unwrap();
    assert_eq!(emailed, 1000);
}

#[tokio::test]
async fn duplicated_messages_change_nothing() {
    let mut world = World::new(&[]).await;
    let queues = [queue::RUNS, queue::ITEMS, queue::RESULTS].map(str::to_owned);
    let _doubler = Doubler::start(&world.stack.amqp_url(&world.name), &queues).await.unwrap();
    world.worker("fan-out");
    for roles in ["send", "send", "send", "progress", "progress"] {
        world.worker(roles);
    }
    let run = world.invite(&people(5000)).await;
    let end = world.until_over(&run).await;
    assert_eq!(end["text"], "4,950 successful, 50 failed of 5,000");
    world.counters_equal_counts().await;
    world.assert_no_duplicates();
}

#[tokio::test]
async fn a_killed_worker_loses_nothing_and_sends_nothing_twice() {
    let mut world =
        World::new(&[("MAILRUN_MAILER__SIMULATED__LATENCY_MS", "20"), ("MAILRUN_SEND__PERMITS", "20")]).await;
    world.workers();
    let victim = world.worker("send");
    let run = world.invite(&people(2000)).await;
    world.until_progress(&run, "half way", |progress| count(progress, "sent") > 700).await;
    world.kill(victim);
    let end = world.until_over(&run).await;
    assert_eq!(count(&end, "sent") + count(&end, "failed") + count(&end, "unknown"), 2000);
    assert!(count(&end, "unknown") <= 20, "more unknown than permits: {end}");
    world.counters_equal_counts().await;
    world.assert_no_duplicates();
    // Items neither sent nor unknown were certainly not sent.
    let handed_over = i64::try_from(world.handed_over().len()).unwrap();
    assert!(handed_over >= count(&end, "sent") && handed_over <= count(&end, "sent") + count(&end, "unknown"));
}

#[tokio::test]
async fn sends_before_a_workers_last_claim_are_known_although_the_results_are_purged() {
    let mut world =
        World::new(&[("MAILRUN_MAILER__SIMULATED__LATENCY_MS", "20"), ("MAILRUN_SEND__PERMITS", "20")]).await;
    world.worker("fan-out");
    let victim = world.worker("send");
    // Without a progress worker, only the first window is sent.
    let run = world.invite(&people(300)).await;
    let receipts = "SELECT coalesce(sum(cardinality(item_ids)), 0)::bigint FROM receipts";
    until("most have a receipt", async || {
        sqlx::query_scalar::<_, i64>(receipts).fetch_one(&world.pool).await.unwrap() > 60
    })
    .await;
    world.kill(victim);
    world.channel().await.queue_purge("mailrun.results".into(), Default::default()).await.unwrap();
    let unproved: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM attempts a
         WHERE NOT EXISTS (SELECT FROM receipts r WHERE r.worker_id = a.worker_id AND a.item_id = ANY(r.item_ids))",
    )
    .fetch_one(&world.pool)
    .await
    .unwrap();
    world.workers();
    let end = world.until_over(&run).await;
    let unknown = count(&end, "unknown") as i64;
    assert!(unknown <= unproved, "{unknown} are unknown, {unproved} have no receipt: {end}");
    assert!(world.repairs(&run).await.told_again > 0, "the dead worker's receipts prove what it sent");
    world.counters_equal_counts().await;
    world.assert_no_duplicates();
}

#[tokio::test]
async fn a_terminated_worker_finishes_its_sends() {
    let mut world = World::new(&[("MAILRUN_MAILER__SIMULATED__LATENCY_MS", "20")]).await;
    world.worker("fan-out");
    world.worker("progress");
    let first = world.worker("send");
    let run = world.invite(&people(3000)).await;
    world.until_progress(&run, "in progress", |progress| count(progress, "sent") > 300).await;
    assert!(world.terminate(first), "the exit code of a clean stop is 0");
    assert!(world.progress(&run).await["over"] == false, "the run must still be in progress");
    world.worker("send");
    let end = world.until_over(&run).await;
    assert_eq!((count(&end, "sent"), count(&end, "failed"), count(&end, "unknown")), (2970, 30, 0));
    world.assert_no_duplicates();
}

#[tokio::test]
async fn a_run_submitted_without_the_broker_starts_when_it_is_back() {
    // Its own stack: other tests need theirs.
    let home = tempfile::tempdir().unwrap();
    let mut world = World::on(home.path(), &[]).await;
    world.workers();
    world.stack.stop_rabbitmq().await.unwrap();
    let run = world.invite(&people(300)).await;
    assert_eq!(count(&world.progress(&run).await, "pending"), 300);
    world.stack.start_rabbitmq().await.unwrap();
    let end = world.until_over(&run).await;
    assert_eq!((count(&end, "sent"), count(&end, "failed")), (297, 3));
    world.assert_no_duplicates();
}

#[tokio::test]
async fn concurrent_forms_with_the_same_people_invite_them_once() {
    let mut world = World::new(&[("MAILRUN_MAILER__SIMULATED__DOWN_EVERY", "0")]).await;
    world.workers();
    // Each list shares a third with the previous one and a third with the next one.
    let list =
        |first: usize| -> String { (first..first + 1500).map(|number| format!("guest-{number}@x.org\n")).collect() };
    let mut forms = Vec::new();
    for number in 0..4 {
        forms.push((world.token().await, list(number * 1000)));
    }
    let runs = join_all(forms.iter().map(|(token, list)| world.submit(token, list))).await;
    for run in &runs {
        world.until_over(run.as_ref().unwrap()).await;
    }
    assert_eq!(world.handed_over().len(), 4500);
    world.assert_no_duplicates();
    world.counters_equal_counts().await;
    let left_out = "SELECT total, already_invited FROM runs";
    let told: Vec<(i32, i32)> = sqlx::query_as(left_out).fetch_all(&world.pool).await.unwrap();
    assert!(told.iter().all(|(total, already_invited)| total + already_invited == 1500), "{told:?}");
    assert_eq!(told.iter().map(|(total, _)| total).sum::<i32>(), 4500);
}

#[tokio::test]
async fn excluded_people_are_counted_by_reason() {
    let mut world = World::new(&[]).await;
    world.workers();
    // 1 to 99 are sent, 100 fails.
    world.until_over(&world.invite(&people(100)).await).await;
    // One who was emailed, and one who was not.
    assert!(world.run_to_end(&["suppressions", "add", "guest-000001@example.org", "guest-000102@example.org"]));
    let list = people(103) + "guest-000103@example.org\nnobody\n";
    let run = world.invite(&list).await;
    let told: (i32, i32, i32, i32, i32, i32) = sqlx::query_as(
        "SELECT total, already_invited, already_failed, suppressed, repeated, invalid FROM runs WHERE id = $1",
    )
    .bind(run.rsplit('/').next().unwrap().parse::<Uuid>().unwrap())
    .fetch_one(&world.pool)
    .await
    .unwrap();
    assert_eq!(told, (2, 98, 1, 2, 1, 1));
    assert_eq!(count(&world.until_over(&run).await, "sent"), 2);
}

/// Rows of the large tables read by sequential scans. Sessions report them with some delay, at the latest when they end.
async fn rows_scanned(world: &World) -> i64 {
    let read =
        "SELECT sum(seq_tup_read)::bigint FROM pg_stat_user_tables WHERE relname IN ('users', 'run_items', 'attempts')";
    sqlx::query_scalar(read).fetch_one(&world.pool).await.unwrap()
}

/// Whether only the test itself still has sessions.
async fn is_alone(world: &World) -> bool {
    let others = "SELECT count(*) FROM pg_stat_activity
                  WHERE datname = current_database() AND application_name <> current_setting('application_name')";
    sqlx::query_scalar::<_, i64>(others).fetch_one(&world.pool).await.unwrap() == 0
}

#[tokio::test]
async fn nothing_scans_all_people_ever_invited() {
    const BEFORE: i64 = 50_000;
    let mut world = World::new(&[]).await;
    let old_run = "
        INSERT INTO runs (id, subject, body, total) VALUES (gen_random_uuid(), 'Hello', 'Come!', $1);
        INSERT INTO run_progress (run_id, total, pending, sent, finished_at) SELECT id, total, 0, total, now() FROM runs;
        INSERT INTO users (email, emailed_at) SELECT 'known-' || n || '@example.org', now() FROM generate_series(1, $1) n;
        INSERT INTO run_items (run_id, user_id, position, state, finished_at)
            SELECT runs.id, users.id, users.id, 'sent', now() FROM users, runs;
        INSERT INTO attempts (item_id, number, worker_id) SELECT id, 1, 1 FROM run_items;
        ANALYZE;
        SELECT pg_stat_force_next_flush()";
    sqlx::raw_sql(AssertSqlSafe(old_run.replace("$1", &BEFORE.to_string()))).execute(&world.pool).await.unwrap();
    let before = rows_scanned(&world).await;
    world.workers();
    let known: String = (1..=100).map(|number| format!("known-{number}@example.org\n")).collect();
    let run = world.invite(&(people(1000) + &known)).await;
    world.until_over(&run).await;
    world.retry(&run, "failed").await;
    world.until_progress(&run, "all sent", |progress| progress["sent"] == 1000).await;
    for page in [run, format!("{}/runs", world.web)] {
        world.client.get(page).send().await.unwrap().error_for_status().unwrap();
    }
    world.terminate_all();
    until("the other sessions end", async || is_alone(&world).await).await;
    let read = rows_scanned(&world).await - before;
    assert!(read < BEFORE, "{read} rows were scanned");
}

#[tokio::test]
async fn a_repeated_form_is_one_run_and_invalid_input_is_explained() {
    let mut world = World::new(&[]).await;
    let token = world.token().await;
    let emails = "Ann <ANN@example.org>, bob@example.org;\n\nann@example.org\nnobody\n";
    let (one, two) = tokio::join!(world.submit(&token, emails), world.submit(&token, emails));
    let run = one.unwrap();
    assert_eq!(run, two.unwrap());
    assert_eq!(world.submit(&token, emails).await.unwrap(), run);
    let page = world.client.get(&run).send().await.unwrap().text().await.unwrap();
    assert!(page.contains("nobody") && page.contains("has no @ sign"), "{page}");

    let (status, page) = world.submit(&world.token().await, " \n ").await.unwrap_err();
    assert_eq!(status, 422);
    assert!(page.contains("role=\"alert\""));
    let (status, page) = world.submit(&world.token().await, "bob@example.org").await.unwrap_err();
    assert_eq!(status, 422);
    assert!(page.contains("bob@example.org"), "the input is kept");

    world.workers();
    assert_eq!(count(&world.until_over(&run).await, "sent"), 2);
}

#[tokio::test]
async fn manually_moved_dead_letters_and_manual_run_messages_work() {
    let mut world = World::new(&[]).await;
    world.workers();
    let run = world.invite(&people(200)).await;
    assert_eq!(count(&world.until_over(&run).await, "failed"), 2);
    // Like the console's "Move messages": takes one and publishes it through the default exchange, keeping its headers.
    let channel = world.channel().await;
    let dead_letter = channel.basic_get("mailrun.dead".into(), Default::default()).await.unwrap().unwrap();
    channel
        .basic_publish(
            "".into(),
            "mailrun.items".into(),
            Default::default(),
            &dead_letter.data,
            dead_letter.properties.clone(),
        )
        .await
        .unwrap();
    dead_letter.ack(Default::default()).await.unwrap();
    let moved = world.until_progress(&run, "sent by hand", |progress| count(progress, "sent") == 199).await;
    assert_eq!(count(&moved, "failed"), 1);
    world.assert_no_duplicates();

    // Purge a run's message, and publish it manually.
    let id = run.rsplit('/').next().unwrap().to_owned();
    world.publish("mailrun.runs", format!(r#"{{"run_id":"{id}"}}"#).as_bytes()).await;
    let next: String = (0..20).map(|number| format!("later-{number}@example.org\n")).collect();
    assert_eq!(count(&world.until_over(&world.invite(&next).await).await, "sent"), 20);
    world.counters_equal_counts().await;
}

#[tokio::test]
async fn a_small_run_overtakes_a_large_one_and_a_pause_stops_a_run_until_it_is_resumed() {
    // 50 sends per second, as with a slow relay.
    let mut world =
        World::new(&[("MAILRUN_MAILER__SIMULATED__LATENCY_MS", "200"), ("MAILRUN_SEND__PERMITS", "10")]).await;
    world.workers();
    let big = world.invite(&people(3000)).await;
    world.until_progress(&big, "in progress", |progress| count(progress, "sent") > 20).await;
    let few: String = (0..20).map(|number| format!("later-{number}@example.org\n")).collect();
    let small = world.invite(&few).await;
    assert_eq!(count(&world.until_over(&small).await, "sent"), 20);
    let (released, all): (i64, i64) = sqlx::query_as(
        "SELECT p.cursor::bigint, r.total::bigint FROM run_passes p JOIN runs r ON r.id = p.run_id WHERE r.id = $1",
    )
    .bind(big.rsplit('/').next().unwrap().parse::<Uuid>().unwrap())
    .fetch_one(&world.pool)
    .await
    .unwrap();
    assert!(released < all, "the small run waited until all {all} of the big one were released");

    world.client.post(format!("{big}/pause")).send().await.unwrap();
    let channel = world.channel().await;
    until("no messages are in progress", async || {
        mailrun_broker::depth(&channel, "mailrun.items").await.unwrap() == 0
            && sqlx::query_scalar::<_, i64>("SELECT sum(in_flight) FROM workers").fetch_one(&world.pool).await.unwrap()
                == 0
    })
    .await;
    let rest = world.progress(&big).await;
    assert!(count(&rest, "pending") > 0 && rest["phase"] == "paused", "{rest}");
    until("it waits on the queue of paused runs", async || {
        mailrun_broker::depth(&channel, "mailrun.runs.paused").await.unwrap() == 1
    })
    .await;

    world.client.post(format!("{big}/resume")).send().await.unwrap();
    let further = count(&rest, "sent") + 20;
    world.until_progress(&big, "going on", |progress| count(progress, "sent") > further).await;

    world.client.post(format!("{big}/cancel")).send().await.unwrap();
    world.until_over(&big).await;
    world.counters_equal_counts().await;
    world.assert_no_duplicates();
}

#[tokio::test]
async fn pruning_deletes_a_run_and_keeps_who_was_emailed() {
    let mut world = World::new(&[]).await;
    world.workers();
    let old = world.invite(&people(2500)).await;
    world.until_over(&old).await;
    let unclear = world.invite("bob@example.org").await;
    world.until_over(&unclear).await;
    sqlx::query("UPDATE run_progress SET sent = 0, unknown = 1 WHERE total = 1").execute(&world.pool).await.unwrap();
    sqlx::query("UPDATE run_progress SET finished_at = now() - interval '31 days'").execute(&world.pool).await.unwrap();
    let young = world.invite("ann@example.org").await;
    world.until_over(&young).await;
    assert!(world.run_to_end(&["prune", "--older-than-days", "30"]));

    assert_eq!(world.client.get(&old).send().await.unwrap().status(), 404);
    assert_eq!(world.client.get(&young).send().await.unwrap().status(), 200);
    assert_eq!(world.client.get(&unclear).send().await.unwrap().status(), 200, "a person must decide first");
    for (table, left) in [("run_items", 2), ("attempts", 2), ("run_passes", 2), ("pruned_runs", 0), ("users", 2502)] {
        let count: i64 = sqlx::query_scalar(AssertSqlSafe(format!("SELECT count(*) FROM {table}")))
            .fetch_one(&world.pool)
            .await
            .unwrap();
        assert_eq!(count, left, "{table}");
    }
    // The 25 that failed may be invited again; the others were emailed.
    let again = world.invite(&people(2500)).await;
    assert_eq!(count(&world.progress(&again).await, "total"), 25);
}

#[tokio::test]
async fn items_are_spread_evenly_over_several_queues() {
    let mut world = World::new(&[("MAILRUN_AMQP__ITEM_QUEUES", "3")]).await;
    world.worker("fan-out");
    let run = world.invite(&people(1500)).await;
    let channel = world.channel().await;
    for queue in ["mailrun.items", "mailrun.items.2", "mailrun.items.3"] {
        until("a third of the window waits on each queue", async || {
            mailrun_broker::depth(&channel, queue).await.unwrap() >= 30
        })
        .await;
    }
    channel.queue_purge("mailrun.items.3".into(), Default::default()).await.unwrap();
    for roles in ["send", "send", "progress"] {
        world.worker(roles);
    }
    let end = world.until_over(&run).await;
    assert_eq!((count(&end, "sent"), count(&end, "failed"), count(&end, "unknown")), (1485, 15, 0));
    world.retry(&run, "failed").await;
    world.until_progress(&run, "all sent", |progress| count(progress, "sent") == 1500).await;
    world.counters_equal_counts().await;
    world.assert_no_duplicates();
}

#[tokio::test]
async fn purged_queues_only_delay_a_run_and_cancelling_settles_it() {
    let mut world = World::new(&[("MAILRUN_MAILER__SIMULATED__LATENCY_MS", "20")]).await;
    world.workers();
    let run = world.invite(&people(1500)).await;
    world.until_progress(&run, "in progress", |progress| count(progress, "sent") > 100).await;
    let channel = world.channel().await;
    for queue in ["mailrun.items", "mailrun.results", "mailrun.retry.100ms"] {
        channel.queue_purge(queue.into(), Default::default()).await.unwrap();
    }
    let end = world.until_over(&run).await;
    assert_eq!((count(&end, "sent"), count(&end, "failed"), count(&end, "unknown")), (1485, 15, 0));
    world.assert_no_duplicates();

    let next: String = (0..3000).map(|number| format!("later-{number}@example.org\n")).collect();
    let run = world.invite(&next).await;
    world.until_progress(&run, "in progress", |progress| count(progress, "sent") > 50).await;
    world.client.post(format!("{run}/cancel")).send().await.unwrap();
    let end = tokio::time::timeout(Duration::from_secs(100), world.until_over(&run)).await.unwrap();
    assert!(count(&end, "cancelled") > 0, "{end}");
    world.counters_equal_counts().await;
    world.assert_no_duplicates();
}

#[tokio::test]
async fn republishes_exactly_what_was_purged() {
    /// Less than the window of a run without a sender, so that all are released before they are sent.
    const PEOPLE: usize = 90;
    let mut world = World::new(&[
        // Few unacknowledged and many on the queue, as with a slow relay.
        ("MAILRUN_SEND__PREFETCH", "10"),
        ("MAILRUN_SEND__PERMITS", "5"),
        ("MAILRUN_MAILER__SIMULATED__LATENCY_MS", "100"),
        ("MAILRUN_MAILER__SIMULATED__DOWN_EVERY", "30"),
        // Even on a busy machine, a healthy run does not stall this long.
        ("MAILRUN_SWEEP__STALLED_AFTER_MS", "600000"),
    ])
    .await;
    world.worker("fan-out");
    world.worker("progress");
    let sender = world.worker("send");
    let sound = world.invite(&people(PEOPLE)).await;
    assert_eq!(count(&world.until_over(&sound).await, "sent"), 87);
    assert_eq!(world.repairs(&sound).await, Repairs::default());

    assert!(world.terminate(sender), "{}", world.log());
    let next = people(PEOPLE).replace("guest", "later");
    let run = world.invite(&next).await;
    let released = "SELECT count(*) FROM run_passes WHERE cursor = 90";
    until("all are released", async || {
        sqlx::query_scalar::<_, i64>(released).fetch_one(&world.pool).await.unwrap() == 2
    })
    .await;
    world.worker("send");
    world.until_progress(&run, "in progress", |progress| count(progress, "sent") > 20).await;
    let channel = world.channel().await;
    let purged = channel.queue_purge("mailrun.items".into(), Default::default()).await.unwrap();
    assert!(purged > 0, "nothing was on the queue");
    world
        .until_progress(&run, "settled but for what was purged", |progress| {
            count(progress, "pending") + count(progress, "retrying") == i64::from(purged)
        })
        .await;
    // Much later, it is swept.
    let later = "UPDATE run_progress SET updated_at = now() - interval '1 hour' WHERE finished_at IS NULL";
    sqlx::query(later).execute(&world.pool).await.unwrap();
    // What was purged of a retry was due long ago, too.
    let due = "UPDATE run_items SET due_at = due_at - interval '1 hour' WHERE state = 'retrying'";
    sqlx::query(due).execute(&world.pool).await.unwrap();
    let end = world.until_over(&run).await;
    assert_eq!((count(&end, "sent"), count(&end, "failed"), count(&end, "unknown")), (87, 3, 0));
    assert_eq!(world.repairs(&run).await, Repairs { put_back: purged.into(), ..Repairs::default() });
    let page = world.client.get(&run).send().await.unwrap().text().await.unwrap();
    assert!(page.contains("The sweeper republished"), "{page}");
    world.assert_no_duplicates();
}

#[tokio::test]
async fn survives_deleted_queues_and_replays_without_dead_letters() {
    let mut world = World::new(&[("MAILRUN_MAILER__SIMULATED__LATENCY_MS", "20")]).await;
    world.workers();
    let run = world.invite(&people(2000)).await;
    let channel = world.channel().await;
    let queues = [
        "mailrun.runs",
        "mailrun.runs.wait",
        "mailrun.runs.paused",
        "mailrun.items",
        "mailrun.results",
        "mailrun.retry.100ms",
        "mailrun.retry.200ms",
        "mailrun.dead",
    ];
    for (number, queue) in (1..).zip(queues) {
        world.until_progress(&run, "a little further", |progress| count(progress, "sent") >= number * 100).await;
        channel.queue_delete(queue.into(), Default::default()).await.unwrap();
    }
    let end = world.until_over(&run).await;
    assert_eq!((count(&end, "sent"), count(&end, "failed"), count(&end, "unknown")), (1980, 20, 0));
    channel.queue_purge("mailrun.dead".into(), Default::default()).await.unwrap();
    world.retry(&run, "failed").await;
    world.until_progress(&run, "all sent", |progress| count(progress, "sent") == 2000).await;
    world.counters_equal_counts().await;
    world.assert_no_duplicates();
}
