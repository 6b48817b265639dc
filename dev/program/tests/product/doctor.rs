//! `mailrun doctor` on the real servers: it finds nothing in a busy installation without faults, and finds and repairs faults.

use crate::support::{World, people, until};
use mailrun_app::config::DatabaseConfig;
use mailrun_broker::depth;
use serde_json::{Value, json};

/// Whether the exit code was 0, and the report.
fn doctor(world: &World, args: &[&str], settings: &[(&str, &str)]) -> (bool, Value) {
    let (good, stdout) = world.output(&[&["doctor", "--json"], args].concat(), settings);
    let report: Value = serde_json::from_str(stdout.lines().last().unwrap()).unwrap();
    assert_eq!(report["well"], good, "the exit code agrees: {report}");
    (good, report)
}

fn assert_well(world: &World) -> Value {
    let (good, report) = doctor(world, &[], &[]);
    assert!(good, "{report}\n{}", world.log());
    report
}

/// Whether a check has a finding with these words in its subject or explanation.
fn found(report: &Value, check: &str, words: &str) -> bool {
    report["findings"].as_array().unwrap().iter().any(|finding| {
        let said = |key: &str| finding[key].as_str().unwrap().contains(words);
        finding["check"] == check && (said("subject") || said("what"))
    })
}

async fn execute(world: &World, statement: &'static str) {
    assert!(sqlx::query(statement).execute(&world.pool).await.unwrap().rows_affected() > 0, "{statement}");
}

async fn number(world: &World, query: &'static str) -> i64 {
    sqlx::query_scalar(query).fetch_one(&world.pool).await.unwrap()
}

async fn waiting(world: &World, queue: &str) -> u32 {
    depth(&world.channel().await, queue).await.unwrap()
}

async fn purge(world: &World, queue: &str) {
    let purged = world.channel().await.queue_purge(queue.into(), Default::default()).await.unwrap();
    assert!(purged > 0, "nothing was on {queue}");
}

#[tokio::test]
async fn finds_and_repairs_faults() {
    let mut world = World::new(&[
        ("MAILRUN_MAILER__SIMULATED__LATENCY_MS", "20"),
        ("MAILRUN_SEND__PERMITS", "20"),
        // Only the doctor repairs anything here.
        ("MAILRUN_SWEEP__STALLED_AFTER_MS", "600000"),
    ])
    .await;
    world.workers();
    let run = world.invite(&people(2000)).await;
    world.until_progress(&run, "in progress", |progress| progress["sent"].as_i64() > Some(100)).await;
    assert_well(&world);
    assert!(world.progress(&run).await["over"] == false, "the run must still be in progress");
    world.until_over(&run).await;
    let later = world.invite("late@example.org").await;
    world.until_over(&later).await;
    assert_well(&world);

    execute(
        &world,
        "UPDATE run_progress SET sent = sent - 3, failed = failed + 3, finished_at = NULL WHERE total = 2000",
    )
    .await;
    execute(&world, "UPDATE users SET emailed_at = NULL WHERE email = 'guest-000001@example.org'").await;
    execute(&world, "UPDATE users SET emailed_at = now() WHERE email = 'guest-000100@example.org'").await;
    execute(
        &world,
        "INSERT INTO outbox (kind, message, created_at) VALUES ('mailrun.run.v9', '{}', now() - interval '1 hour')",
    )
    .await;
    // A dead letter of an item that was sent an hour ago.
    execute(
        &world,
        "UPDATE run_progress SET finished_at = finished_at - interval '1 hour', updated_at = updated_at - interval '1 hour'
         WHERE total = 1",
    )
    .await;
    let late = number(
        &world,
        "SELECT i.id FROM run_items i JOIN users u ON u.id = i.user_id WHERE u.email = 'late@example.org'",
    );
    let dead_letter = json!({ "run_id": later.rsplit('/').next(), "item_id": late.await, "attempt": 2 });
    world.publish("mailrun.dead", dead_letter.to_string().as_bytes()).await;
    world.channel().await.queue_delete("mailrun.retry.200ms".into(), Default::default()).await.unwrap();

    let (good, report) = doctor(&world, &[], &[]);
    assert!(!good);
    let id = run.rsplit('/').next().unwrap();
    for (check, words) in [
        ("counters", id),
        ("counters", "sent is 1,977, but there are 1,980; the run does not count as finished"),
        ("people", "2 people are wrongly marked"),
        ("queues", "mailrun.retry.200ms is missing"),
        ("outbox", "its type is not known"),
        ("dead letters", "1 dead letter is outdated"),
    ] {
        assert!(found(&report, check, words), "{check}, {words}: {report}");
    }
    assert_eq!(report["findings"].as_array().unwrap().len(), 5, "no other findings: {report}");
    assert!(report["findings"].as_array().unwrap().iter().all(|finding| finding["repaired"] == false), "{report}");

    let (good, report) = doctor(&world, &["--fix"], &[]);
    // A worker that connects meanwhile declares the missing queue as well.
    let others = report["findings"].as_array().unwrap().iter().filter(|finding| finding["check"] != "queues").count();
    assert!(good && others == 4, "{report}");
    let remarks = assert_well(&world)["remarks"].to_string();
    assert!(remarks.contains("1 message is poison"), "the outbox's row is a dead letter now: {remarks}");
    world.counters_equal_counts().await;
    let wrong = "SELECT count(*) FROM users u JOIN run_items i ON i.user_id = u.id
                 WHERE (u.emailed_at IS NOT NULL) <> (i.state = 'sent')";
    assert_eq!(number(&world, wrong).await, 0);
    assert_eq!(number(&world, "SELECT count(*) FROM run_progress WHERE finished_at IS NULL").await, 0);
    assert_eq!(number(&world, "SELECT count(*) FROM outbox WHERE published_at IS NULL").await, 0);
    assert_eq!(waiting(&world, "mailrun.retry.200ms").await, 0);
    assert_eq!(
        waiting(&world, "mailrun.dead").await,
        21,
        "the failed ones' are still there, and the one from the outbox"
    );

    let (good, text) = world.output(&["doctor"], &[]);
    assert!(good && text.ends_with("No faults found.\n"), "{text}");

    // If one server is unavailable, it is reported, and the other one is checked anyway.
    execute(&world, "UPDATE users SET emailed_at = NULL WHERE email = 'guest-000001@example.org'").await;
    let (_, report) = doctor(&world, &[], &[("AMQP_URL", "amqp://127.0.0.1:1/none")]);
    assert!(found(&report, "RabbitMQ", "is unavailable") && found(&report, "people", "1 person"), "{report}");
    // A process that connects meanwhile would declare it again.
    world.terminate_all();
    world.channel().await.queue_delete("mailrun.retry.200ms".into(), Default::default()).await.unwrap();
    let (_, report) = doctor(&world, &[], &[("DATABASE_URL", "postgres://127.0.0.1:1/none")]);
    assert!(found(&report, "PostgreSQL", "is unavailable") && found(&report, "queues", "200ms"), "{report}");
}

#[tokio::test]
async fn our_sessions_commit_synchronously_despite_database_settings() {
    let world = World::new(&[]).await;
    let name = &world.name;
    for statement in [
        format!("ALTER DATABASE \"{name}\" SET synchronous_commit = off"),
        format!("ALTER ROLE CURRENT_USER IN DATABASE \"{name}\" SET synchronous_commit = off"),
    ] {
        sqlx::query(sqlx::AssertSqlSafe(statement)).execute(&world.pool).await.unwrap();
    }
    let setting = async |pool: &sqlx::PgPool| -> String {
        sqlx::query_scalar("SHOW synchronous_commit").fetch_one(pool).await.unwrap()
    };
    let url = world.stack.database_url(name);
    assert_eq!(setting(&sqlx::PgPool::connect(&url).await.unwrap()).await, "off", "the database says so");
    let config = DatabaseConfig { url: url.into(), ..DatabaseConfig::default() };
    assert_eq!(setting(&mailrun_ledger::open(&config, "test").unwrap()).await, "on");
    let (_, text) = world.output(&["doctor"], &[]);
    assert!(text.contains("fsync, full_page_writes and synchronous_commit are on; there is no standby"), "{text}");
}

#[tokio::test]
async fn settles_the_claims_of_a_killed_worker() {
    let settings = [("MAILRUN_MAILER__SIMULATED__LATENCY_MS", "600000"), ("MAILRUN_SEND__PERMITS", "5")];
    let mut world = World::new(&settings).await;
    world.worker("fan-out");
    world.worker("progress");
    let victim = world.worker("send");
    let run = world.invite(&people(20)).await;
    until("all permits are used", async || number(&world, "SELECT count(*) FROM attempts").await == 5).await;
    assert_well(&world);
    world.kill(victim);
    until("the doctor reports the worker as dead", async || {
        let (_, report) = doctor(&world, &[], &[]);
        found(&report, "claims", "5 invitations are claimed by a dead worker")
            && found(&report, "workers", "no live worker for send")
    })
    .await;
    let (good, report) = doctor(&world, &["--fix"], &[]);
    assert!(!good, "the doctor starts no worker: {report}");
    let claims = report["findings"].as_array().unwrap().iter().find(|finding| finding["check"] == "claims").unwrap();
    assert_eq!(claims["repaired"], true, "{report}");
    until("the results are counted", async || world.progress(&run).await["unknown"] == 5).await;
    assert_eq!(waiting(&world, "mailrun.dead").await, 5);
    world.worker("send");
    until("all is well", async || doctor(&world, &[], &[]).0).await;
    world.counters_equal_counts().await;
}

#[tokio::test]
async fn republishes_purged_messages() {
    let mut world = World::new(&[]).await;
    let run = world.invite(&people(50)).await;
    until("the outbox publisher has published it", async || waiting(&world, "mailrun.runs").await == 1).await;
    purge(&world, "mailrun.runs").await;
    until("the doctor misses it", async || found(&doctor(&world, &[], &[]).1, "runs", "Its command is on no queue"))
        .await;
    doctor(&world, &["--fix"], &[]);
    let fan_out = world.worker("fan-out");
    until("all is released", async || waiting(&world, "mailrun.items").await == 50).await;
    // The step is committed after its messages are published.
    let released = "SELECT coalesce(max(cursor), 0)::bigint FROM run_passes";
    until("the step is committed", async || number(&world, released).await == 50).await;
    world.kill(fan_out);
    purge(&world, "mailrun.items").await;
    until("the doctor misses them", async || found(&doctor(&world, &[], &[]).1, "runs", "50 invitations are stuck"))
        .await;
    doctor(&world, &["--fix"], &[]);
    assert_eq!(waiting(&world, "mailrun.items").await, 50);
    world.workers();
    let end = world.until_over(&run).await;
    assert_eq!(end["sent"], 50);
    world.assert_no_duplicates();
    assert_well(&world);
}
