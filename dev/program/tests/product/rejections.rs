//! Messages returned or rejected by RabbitMQ: they delay only their own recipients, and are reported.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use crate::support::{World, field, people, until};
use lapin::options::QueueDeleteOptions;
use mailrun_broker::depth;
use mailrun_sink::{Action, Options, Rule, Sink, Stage};
use serde_json::Value;
use uuid::Uuid;

const NOT_DECLARED: (&str, &str) = ("MAILRUN_AMQP__DECLARE_TOPOLOGY", "false");

fn count(progress: &Value, state: &str) -> i64 {
    progress[state].as_i64().unwrap()
}

async fn delete(world: &World, queues: &[&str]) {
    let channel = world.channel().await;
    for queue in queues {
        channel.queue_delete((*queue).into(), QueueDeleteOptions::default()).await.unwrap();
    }
}

fn doctor(world: &World) -> String {
    world.output(&["doctor", "--json"], &[]).1
}

async fn readiness(world: &World) -> (u16, String) {
    let answer = world.client.get(format!("{}/readyz", world.web)).send().await.unwrap();
    (answer.status().as_u16(), answer.text().await.unwrap())
}

#[tokio::test]
async fn a_missing_retry_queue_is_reported_and_everyone_is_sent() {
    let settings =
        [NOT_DECLARED, ("MAILRUN_MAILER__SIMULATED__FLAKY_EVERY", "3"), ("MAILRUN_MAILER__SIMULATED__DOWN_EVERY", "0")];
    let mut world = World::new(&settings).await;
    delete(&world, &["mailrun.retry.100ms"]).await;
    world.workers();
    let run = world.invite(&people(300)).await;
    world.until_progress(&run, "the others sent", |progress| count(progress, "sent") >= 200).await;
    until("the doctor reports it", async || {
        let report = doctor(&world);
        report.contains("mailrun.retry.100ms is missing") && report.contains("RabbitMQ rejects messages of worker")
    })
    .await;
    // Another run is not delayed.
    let second = world.invite("a@later.example\nb@later.example").await;
    world.until_progress(&second, "sent", |progress| count(progress, "sent") == 2).await;
    let end = world.until_over(&run).await;
    assert_eq!(count(&end, "sent"), 300, "{end}");
    world.counters_equal_counts().await;
    world.assert_no_duplicates();
    let log = world.log();
    let reported = log.lines().filter(|line| line.contains("RabbitMQ rejects messages")).count();
    assert!((1..=4).contains(&reported), "once a minute at most: {reported}\n{log}");
    assert!(!log.contains("Server returned us a message"), "the bodies of returned messages are not logged");
}

#[tokio::test]
async fn survives_a_relay_outage_without_retry_queues() {
    let down = Arc::new(AtomicBool::new(true));
    let sink = Sink::start(Options::default()).await.unwrap();
    let is_down = Arc::clone(&down);
    let rule: Rule = Arc::new(move |stage, _| match stage {
        Stage::Mail if is_down.load(Ordering::Relaxed) => Action::Reply(421, "4.3.2 Down for maintenance".into()),
        _ => Action::GoOn,
    });
    sink.set_rule(rule);
    let relay = format!("smtp://{}?tls=none", sink.address());
    let mut world = World::new(&[NOT_DECLARED]).await;
    // Only the senders know the mail server, as if the other processes had incomplete settings.
    world.set("MAILRUN_MAILER__KIND", "smtp".into());
    world.set("MAILRUN_MAILER__SMTP__RELAYS", relay);
    world.workers();
    delete(&world, &["mailrun.retry.100ms", "mailrun.retry.200ms"]).await;
    let run = world.invite(&people(100)).await;
    let rejecting = "SELECT count(*) FROM workers WHERE rejected IS NOT NULL";
    until("the retries are rejected", async || {
        sqlx::query_scalar::<_, i64>(rejecting).fetch_one(&world.pool).await.unwrap() > 0
    })
    .await;
    down.store(false, Ordering::Relaxed);
    let end = world.until_over(&run).await;
    assert_eq!(count(&end, "sent"), 100, "{end}");
    assert_eq!((sink.received(), sink.received_twice()), (100, 0));
}

#[tokio::test]
async fn declares_the_retry_queues_of_all_mailers() {
    let world = World::new(&[NOT_DECLARED]).await;
    let channel = world.channel().await;
    for queue in ["250ms", "1s", "5s", "30s", "300s", "1800s", "7200s", "28800s", "100ms", "200ms"] {
        depth(&channel, &format!("mailrun.retry.{queue}")).await.unwrap();
    }
}

#[tokio::test]
async fn runs_end_with_any_queues_missing() {
    let settings = [
        NOT_DECLARED,
        ("MAILRUN_AMQP__ITEM_QUEUES", "3"),
        ("MAILRUN_MAILER__SIMULATED__DOWN_EVERY", "50"),
        ("MAILRUN_MAILER__SIMULATED__FLAKY_EVERY", "40"),
        ("MAILRUN_FAN_OUT__WINDOW_ITEMS", "20"),
        // One retry queue: a rejected message is published again for ten seconds before it is given up.
        ("MAILRUN_RETRY__RUNGS_MS", "100"),
    ];
    let mut world = World::new(&settings).await;
    let missing =
        ["mailrun.runs.wait", "mailrun.runs.paused", "mailrun.dead", "mailrun.items.2", "mailrun.retry.100ms"];
    delete(&world, &missing).await;
    // A rejected outbox message does not block those behind it.
    let page = world.client.get(&world.web).send().await.unwrap().text().await.unwrap();
    let test = [("token", field(&page, "token")), ("test_email", "me@example.org".into())];
    world.client.post(format!("{}/tests", world.web)).form(&test).send().await.unwrap();
    world.workers();
    let runs = [world.invite(&people(200)).await, world.invite("a@other.example\nb@other.example").await];
    for run in &runs {
        world.until_over(run).await;
    }
    let end = world.progress(&runs[0]).await;
    assert_eq!((count(&end, "sent"), count(&end, "failed")), (196, 4), "{end}");
    until("the pages are not ready", async || readiness(&world).await.0 == 503).await;
    assert!(readiness(&world).await.1.contains("mailrun.items.2"));
    // When the queues are back, everything else is, too.
    assert!(world.run_to_end(&["setup"]));
    until("the pages are ready", async || {
        // A process that publishes seldom finds out with its next messages.
        let subject = Uuid::new_v4().to_string();
        let test = [("token", field(&page, "token")), ("subject", subject), ("test_email", "me@example.org".into())];
        world.client.post(format!("{}/tests", world.web)).form(&test).send().await.unwrap();
        readiness(&world).await.0 == 200
    })
    .await;
    world.retry(&runs[0], "failed").await;
    world.until_progress(&runs[0], "all sent", |progress| count(progress, "sent") == 200).await;
    world.counters_equal_counts().await;
    world.assert_no_duplicates();
}

#[tokio::test]
async fn a_process_declares_a_queue_that_it_misses() {
    let mut world =
        World::new(&[("MAILRUN_MAILER__SIMULATED__LATENCY_MS", "20"), ("MAILRUN_SEND__PERMITS", "10")]).await;
    world.workers();
    let run = world.invite(&people(600)).await;
    world.until_progress(&run, "in progress", |progress| count(progress, "sent") > 50).await;
    delete(&world, &["mailrun.results", "mailrun.retry.100ms", "mailrun.dead", "mailrun.runs.wait"]).await;
    let end = world.until_over(&run).await;
    assert_eq!((count(&end, "sent"), count(&end, "failed"), count(&end, "unknown")), (594, 6, 0), "{end}");
    world.counters_equal_counts().await;
    world.assert_no_duplicates();
}
