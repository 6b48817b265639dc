//! Workers that are cut off, declared dead, or stopped while no progress worker runs: their attempts are settled once, and nobody gets
//! two mails.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::support::{World, people, until};
use mailrun_broker::depth;
use mailrun_lab::proxy::Proxy;
use mailrun_sink::{Action, Options, Rule, Sink, Stage};
use reqwest::Url;
use rustix::process::Signal;
use serde_json::Value;

async fn number(world: &World, query: &'static str) -> i64 {
    sqlx::query_scalar(query).fetch_one(&world.pool).await.unwrap()
}

fn count(progress: &Value, state: &str) -> i64 {
    progress[state].as_i64().unwrap()
}

/// Waits until the queue has this many consumers.
async fn until_read(world: &World, queue: &str, consumers: u32) {
    let channel = world.channel().await;
    until(&format!("{queue} is read"), async || {
        let options = lapin::options::QueueDeclareOptions { passive: true, ..Default::default() };
        channel.queue_declare(queue.into(), options, Default::default()).await.unwrap().consumer_count() == consumers
    })
    .await;
}

#[tokio::test]
async fn a_worker_without_a_row_fails_and_the_next_one_continues() {
    let mut world = World::new(&[]).await;
    let workers = ["fan-out", "send", "progress"].map(|role| world.worker(role));
    until("all have registered", async || number(&world, "SELECT count(*) FROM workers").await == 3).await;
    sqlx::query("DELETE FROM workers").execute(&world.pool).await.unwrap();
    for worker in workers {
        assert!(!world.until_ended(worker).await, "the exit code reports an error");
    }
    let run = world.invite(&people(50)).await;
    world.workers();
    assert_eq!(count(&world.until_over(&run).await, "sent"), 50);
    world.assert_no_duplicates();
}

#[tokio::test]
async fn the_doctor_finds_an_idle_worker_without_a_row() {
    // It does not notice by itself for a long time.
    let settings = [("MAILRUN_HEARTBEAT__INTERVAL_MS", "600000"), ("MAILRUN_HEARTBEAT__DEAD_AFTER_MS", "3600000")];
    let mut world = World::new(&settings).await;
    world.worker("send");
    until_read(&world, "mailrun.items", 1).await;
    let (well, report) = world.output(&["doctor", "--json"], &[]);
    assert!(well, "{report}");
    sqlx::query("DELETE FROM workers").execute(&world.pool).await.unwrap();
    let (well, report) = world.output(&["doctor", "--json"], &[]);
    assert!(!well && report.contains("mailrun.items has a consumer that is not a live worker"), "{report}");
    // A working one does not hide it.
    world.worker("send");
    until_read(&world, "mailrun.items", 2).await;
    let (well, report) = world.output(&["doctor", "--json"], &[]);
    assert!(!well && report.contains("mailrun.items has a consumer that is not a live worker"), "{report}");
}

/// The maximum of released items that are not counted.
const WINDOW: &str = "100";

/// A run during which all senders have ended cleanly, without a progress worker.
async fn senders_ended_without_a_progress_worker(on_unknown: &str) -> (World, String) {
    let mut world = World::new(&[
        ("MAILRUN_SEND__ON_UNKNOWN", on_unknown),
        ("MAILRUN_MAILER__SIMULATED__LATENCY_MS", "20"),
        ("MAILRUN_SEND__PERMITS", "20"),
        ("MAILRUN_FAN_OUT__WINDOW_ITEMS", WINDOW),
    ])
    .await;
    world.worker("fan-out");
    let senders = [world.worker("send"), world.worker("send")];
    let run = world.invite(&people(300)).await;
    until("many are sent", async || world.handed_over().len() > 60).await;
    for sender in senders {
        assert!(world.terminate(sender), "{}", world.log());
    }
    (world, run)
}

/// Waits until the run is swept, which is visible by the republished run message after it was purged.
async fn until_swept(world: &World, run: &str) {
    let channel = world.channel().await;
    until("the run is swept", async || {
        for queue in ["mailrun.runs", "mailrun.runs.wait"] {
            channel.queue_purge(queue.into(), Default::default()).await.unwrap();
        }
        world.repairs(run).await.driven > 0
    })
    .await;
}

#[tokio::test]
async fn senders_restarted_without_a_progress_worker_send_nothing_twice() {
    let (mut world, run) = senders_ended_without_a_progress_worker("resend").await;
    world.worker("send");
    world.worker("send");
    until_swept(&world, &run).await;
    world.worker("progress");
    let end = world.until_over(&run).await;
    assert_eq!((count(&end, "sent"), count(&end, "failed"), count(&end, "unknown")), (297, 3, 0));
    world.counters_equal_counts().await;
    world.assert_no_duplicates();
}

#[tokio::test]
async fn senders_restarted_without_a_progress_worker_leave_no_stale_dead_letters() {
    let (mut world, run) = senders_ended_without_a_progress_worker("hold").await;
    world.worker("send");
    world.worker("send");
    until_swept(&world, &run).await;
    world.worker("progress");
    let end = world.until_over(&run).await;
    assert_eq!((count(&end, "sent"), count(&end, "failed"), count(&end, "unknown")), (297, 3, 0));
    assert_eq!(depth(&world.channel().await, "mailrun.dead").await.unwrap(), 3, "only those of failed items");
    world.counters_equal_counts().await;
    world.assert_no_duplicates();
}

#[tokio::test]
async fn sends_before_a_clean_stop_are_known_although_the_results_are_purged() {
    let (mut world, run) = senders_ended_without_a_progress_worker("resend").await;
    let purged = world.channel().await.queue_purge("mailrun.results".into(), Default::default()).await.unwrap();
    assert!(purged > 0, "no result was on its queue");
    world.worker("send");
    world.worker("progress");
    let end = world.until_over(&run).await;
    assert_eq!((count(&end, "sent"), count(&end, "failed"), count(&end, "unknown")), (297, 3, 0));
    assert!(world.repairs(&run).await.told_again > 0, "the last receipts prove what was sent");
    world.counters_equal_counts().await;
    world.assert_no_duplicates();
}

/// A mail server behind a proxy, which holds everything from the first RCPT on: its reply does not arrive.
async fn mail_server() -> (Sink, Arc<Proxy>) {
    let sink = Sink::start(Options::default()).await.unwrap();
    let proxy = Arc::new(Proxy::start(sink.address()).await.unwrap());
    let (to_mail, was_held) = (Arc::clone(&proxy), AtomicBool::new(false));
    let rule: Rule = Arc::new(move |stage, _| {
        if matches!(stage, Stage::Rcpt(_)) && !was_held.swap(true, Ordering::Relaxed) {
            to_mail.hold();
        }
        Action::GoOn
    });
    sink.set_rule(rule);
    (sink, proxy)
}

/// A world without senders, with send.on_unknown = "resend".
async fn world_that_sends_through(proxy: &Proxy) -> World {
    let relay = format!("smtp://{}?tls=none", proxy.address());
    let mut world = World::new(&[
        ("MAILRUN_MAILER__KIND", "smtp"),
        ("MAILRUN_MAILER__SMTP__RELAYS", &relay),
        ("MAILRUN_MAILER__SMTP__FROM", "zoe@party.example"),
        ("MAILRUN_MAILER__SMTP__CONNECTIONS", "5"),
        ("MAILRUN_SEND__ON_UNKNOWN", "resend"),
        // RabbitMQ soon requeues the deliveries of a stopped process.
        ("MAILRUN_AMQP__HEARTBEAT_S", "2"),
    ])
    .await;
    world.worker("fan-out");
    world.worker("progress");
    world
}

/// Waits until the sender is declared dead and its claims are settled.
async fn until_given_up(world: &World, run: &str) {
    until("its claims are settled", async || world.repairs(run).await.buried > 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sender_without_a_ledger_sends_nothing_more() {
    let (sink, mail) = mail_server().await;
    let mut world = world_that_sends_through(&mail).await;
    let sound = world.stack.database_url(&world.name);
    let mut url: Url = sound.parse().unwrap();
    let ledger = Proxy::start(SocketAddr::from(([127, 0, 0, 1], url.port().unwrap()))).await.unwrap();
    url.set_port(Some(ledger.address().port())).unwrap();
    world.set("DATABASE_URL", url.to_string());
    let cut_off = world.worker("send");
    world.set("DATABASE_URL", sound);
    let run = world.invite(&people(20)).await;
    until("mails are in progress", async || mail.is_held()).await;
    ledger.hold();
    until_given_up(&world, &run).await;
    // Now the relay's reply arrives.
    mail.release();
    ledger.release();
    assert!(!world.until_ended(cut_off).await, "it notices that it was declared dead");
    assert_eq!(sink.received(), 0, "{}", world.log());
    world.worker("send");
    let end = world.until_over(&run).await;
    assert_eq!((count(&end, "sent"), sink.received(), sink.received_twice()), (20, 20, 0));
    world.counters_equal_counts().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sender_stopped_for_too_long_sends_nothing_more() {
    let (sink, mail) = mail_server().await;
    let mut world = world_that_sends_through(&mail).await;
    let frozen = world.worker("send");
    let run = world.invite(&people(20)).await;
    until("mails are in progress", async || mail.is_held()).await;
    world.signal(frozen, Signal::STOP);
    until_given_up(&world, &run).await;
    mail.release();
    // Another one sends everything, including the first one's attempts.
    world.worker("send");
    let end = world.until_over(&run).await;
    assert_eq!((count(&end, "sent"), sink.received()), (20, 20));
    world.signal(frozen, Signal::CONT);
    assert!(!world.until_ended(frozen).await, "it notices that it was declared dead");
    assert_eq!((sink.received(), sink.received_twice()), (20, 0), "{}", world.log());
    world.counters_equal_counts().await;
}
