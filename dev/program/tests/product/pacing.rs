//! Rate limits and pauses with the real servers: messages keep the limit on every path, and a paused run sends nothing.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use crate::support::{World, people, until};
use lapin::options::BasicGetOptions;
use mailrun_broker::depth;
use mailrun_sink::{Action, Options, RateMeter, Rule, Session, Sink, Stage};

/// The limit plus what `fan_out.rate_burst_ms` allows, and a tenth more to catch up after a delay.
fn allowed(per_second: usize) -> usize {
    per_second + per_second / 10 + per_second / 5 + 2
}

fn rule(rule: impl Fn(Stage<'_>) -> Action + Send + Sync + 'static) -> Rule {
    Arc::new(move |stage: Stage<'_>, _: &Session| rule(stage))
}

/// A mail server that records each `MAIL`, and answers with `reply` according to how often a recipient was named.
async fn server(
    reply: impl Fn(&str, u32) -> Option<(u16, &'static str)> + Send + Sync + 'static,
) -> (Sink, Arc<RateMeter>) {
    let sink = Sink::start(Options::default()).await.unwrap();
    let meter = RateMeter::start();
    let named: Mutex<HashMap<String, u32>> = Mutex::default();
    let noted = Arc::clone(&meter);
    sink.set_rule(rule(move |stage| {
        match stage {
            Stage::Mail => noted.note(),
            Stage::Rcpt(recipient) => {
                let mut named = named.lock().unwrap();
                let times = named.entry(recipient.to_owned()).or_default();
                *times += 1;
                if let Some((code, text)) = reply(recipient, *times) {
                    return Action::Reply(code, text.to_owned());
                }
            }
            _ => {}
        }
        Action::GoOn
    }));
    (sink, meter)
}

async fn world(sink: &Sink, settings: &[(&str, &str)]) -> World {
    let relay = format!("smtp://{}?tls=none", sink.address());
    let mut all = vec![
        ("MAILRUN_MAILER__KIND", "smtp"),
        ("MAILRUN_MAILER__SMTP__RELAYS", &relay),
        ("MAILRUN_MAILER__SMTP__FROM", "zoe@party.example"),
    ];
    all.extend(settings);
    World::new(&all).await
}

const GREYLISTED: Option<(u16, &str)> = Some((451, "4.7.1 Greylisted, please try again later"));
const FULL: Option<(u16, &str)> = Some((552, "5.2.2 mailbox full"));

#[tokio::test]
async fn a_deferred_recipient_does_not_stall_a_limited_run() {
    let (sink, meter) =
        server(|recipient, times| GREYLISTED.filter(|_| recipient.starts_with("guest-000007") && times < 3)).await;
    let mut world = world(&sink, &[("MAILRUN_FAN_OUT__SENDS_PER_SECOND", "10")]).await;
    world.workers();
    let run = world.invite(&people(30)).await;
    let end = world.until_over(&run).await;
    assert_eq!((&end["sent"], sink.received(), sink.received_twice()), (&30.into(), 30, 0));
    assert_eq!(meter.offered().len(), 32);
    assert_eq!(meter.check(allowed(10)).over, 0, "{:?}", meter.check(allowed(10)));
}

#[tokio::test]
async fn retries_and_moved_dead_letters_keep_the_limit() {
    // Everyone is deferred once, and a quarter is refused at the second try.
    let (sink, meter) = server(|recipient, times| match times {
        1 => GREYLISTED,
        2 if recipient.split('@').next().unwrap().ends_with(['1', '5']) => FULL,
        _ => None,
    })
    .await;
    let mut world = world(&sink, &[("MAILRUN_FAN_OUT__SENDS_PER_SECOND", "60")]).await;
    world.workers();
    let run = world.invite(&people(200)).await;
    let end = world.until_over(&run).await;
    assert_eq!((&end["sent"], &end["failed"]), (&160.into(), &40.into()));
    let kept = meter.check(allowed(60));
    assert!(kept.over == 0 && kept.windows > 0, "{kept:?}");

    // Like the console's "Move messages".
    let channel = world.channel().await;
    until("the dead letters are there", async || depth(&channel, "mailrun.dead").await.unwrap() == 40).await;
    meter.clear();
    let moved_at = Instant::now();
    for _ in 0..40 {
        let dead_letter = channel.basic_get("mailrun.dead".into(), BasicGetOptions::default()).await.unwrap().unwrap();
        let (body, properties) = (dead_letter.data.clone(), dead_letter.properties.clone());
        channel.basic_publish("".into(), "mailrun.items".into(), Default::default(), &body, properties).await.unwrap();
        dead_letter.ack(Default::default()).await.unwrap();
    }
    world.until_progress(&run, "all sent", |progress| progress["sent"] == 200).await;
    assert!(moved_at.elapsed() > Duration::from_millis(500), "40 at 60 a second");
    let kept = meter.check(allowed(60));
    assert!(kept.over == 0 && meter.offered().len() == 40, "{kept:?}");
}

// The test blocks while processes end, and the mail server must answer them meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn restarted_senders_send_no_burst() {
    let (sink, meter) = server(|_, _| None).await;
    let mut world = world(&sink, &[("MAILRUN_FAN_OUT__SENDS_PER_SECOND", "40")]).await;
    let senders = [world.worker("send"), world.worker("send")];
    world.worker("fan-out");
    world.worker("progress");
    let run = world.invite(&people(300)).await;
    world.until_progress(&run, "some are sent", |progress| progress["sent"].as_i64().unwrap() > 60).await;
    for sender in senders {
        world.terminate(sender);
    }
    let stopped = meter.offered().len();
    // They stay stopped until everything that fan-out may release is released.
    let channel = world.channel().await;
    until("items wait", async || depth(&channel, "mailrun.items").await.unwrap() >= 10).await;
    world.worker("send");
    world.worker("send");
    let end = world.until_over(&run).await;
    assert_eq!((&end["sent"], sink.received_twice()), (&300.into(), 0));
    let kept = meter.check(allowed(40));
    assert!(kept.over == 0 && meter.offered().len() > stopped, "{kept:?}");
}

#[tokio::test]
async fn senders_restarted_after_a_kill_send_no_burst() {
    let (sink, meter) = server(|_, _| None).await;
    let mut world = world(&sink, &[("MAILRUN_FAN_OUT__SENDS_PER_SECOND", "20")]).await;
    let senders = [world.worker("send"), world.worker("send")];
    world.worker("fan-out");
    world.worker("progress");
    let run = world.invite(&people(200)).await;
    world.until_progress(&run, "some are sent", |progress| progress["sent"].as_i64().unwrap() > 30).await;
    for sender in senders {
        world.kill(sender);
    }
    // Longer than a delay is caught up for. Their unacknowledged messages are back on the queue.
    let channel = world.channel().await;
    until("items wait", async || depth(&channel, "mailrun.items").await.unwrap() >= 5).await;
    let still = "SELECT extract(epoch FROM clock_timestamp() - updated_at)::float8 FROM run_progress";
    until("send times go by", async || sqlx::query_scalar::<_, f64>(still).fetch_one(&world.pool).await.unwrap() > 6.0)
        .await;
    meter.clear();
    world.worker("send");
    world.worker("send");
    let end = world.until_over(&run).await;
    // Attempts of the killed senders are unknown, and may have arrived.
    let (sent, unknown) = (end["sent"].as_i64().unwrap(), end["unknown"].as_i64().unwrap());
    assert_eq!((sent + unknown, sink.received_twice()), (200, 0));
    let kept = meter.check(allowed(20));
    assert!(kept.over == 0 && kept.windows > 0, "{kept:?}");
}

/// How many are offered after `since`, when a pause has had a second to take effect.
fn offered_after(meter: &RateMeter, since: Instant) -> usize {
    meter.offered().iter().filter(|at| **at > since + Duration::from_secs(1)).count()
}

#[tokio::test]
async fn a_paused_run_sends_nothing_from_any_queue() {
    // A hundred wait on a retry queue when the run is paused, and ten are refused permanently.
    let (sink, meter) = server(|recipient, times| match times {
        1 if recipient.starts_with("guest-00000") => FULL,
        1 => GREYLISTED,
        _ => None,
    })
    .await;
    let mut world = world(&sink, &[("MAILRUN_RETRY__RUNGS_MS", "3000")]).await;
    world.workers();
    let run = world.invite(&people(109)).await;
    world
        .until_progress(&run, "all are deferred or refused", |progress| {
            progress["retrying"] == 100 && progress["failed"] == 9
        })
        .await;
    world.client.post(format!("{run}/pause")).send().await.unwrap();
    let paused_at = Instant::now();
    // Including dead letters moved manually.
    let channel = world.channel().await;
    for _ in 0..4 {
        let dead_letter = channel.basic_get("mailrun.dead".into(), BasicGetOptions::default()).await.unwrap().unwrap();
        let (body, properties) = (dead_letter.data.clone(), dead_letter.properties.clone());
        channel.basic_publish("".into(), "mailrun.items".into(), Default::default(), &body, properties).await.unwrap();
        dead_letter.ack(Default::default()).await.unwrap();
    }
    // The waiting messages have come back and were dropped; moved ones count as pending.
    for queue in ["mailrun.retry.3s", "mailrun.items"] {
        until(&format!("{queue} is empty"), async || depth(&channel, queue).await.unwrap() == 0).await;
    }
    let progress = world.until_progress(&run, "what was moved waits", |progress| progress["pending"] == 4).await;
    assert_eq!((&progress["retrying"], &progress["phase"]), (&100.into(), &"paused".into()));
    assert_eq!((offered_after(&meter, paused_at), sink.received()), (0, 0));

    world.client.post(format!("{run}/resume")).send().await.unwrap();
    let end = world.until_over(&run).await;
    assert_eq!((&end["sent"], &end["failed"], sink.received_twice()), (&104.into(), &5.into(), 0));
    world.counters_equal_counts().await;
}

#[tokio::test]
async fn an_attempt_claimed_when_its_run_is_paused_is_withdrawn() {
    // One connection with a slow first mail: the others are claimed and wait for it, one of them with its envelope sent.
    let (sink, meter) = server(|_, _| None).await;
    let mut world = world(&sink, &[("MAILRUN_MAILER__SMTP__CONNECTIONS", "1"), ("MAILRUN_SEND__PERMITS", "20")]).await;
    let noted = Arc::clone(&meter);
    sink.set_rule(rule(move |stage| match stage {
        Stage::Message => {
            noted.note();
            Action::Wait(Duration::from_secs(3))
        }
        _ => Action::GoOn,
    }));
    world.workers();
    let run = world.invite(&people(5)).await;
    until("the first is in progress", async || !meter.offered().is_empty()).await;
    world.client.post(format!("{run}/pause")).send().await.unwrap();
    let paused_at = Instant::now();
    world
        .until_progress(&run, "the first is sent, and what was claimed is given back", |progress| {
            progress["sent"] == 1 && progress["phase"] == "paused"
        })
        .await;
    until("nothing is in flight", async || {
        let in_flight: Option<i64> =
            sqlx::query_scalar("SELECT sum(in_flight) FROM workers").fetch_one(&world.pool).await.unwrap();
        in_flight == Some(0)
    })
    .await;
    assert_eq!((offered_after(&meter, paused_at), sink.received()), (0, 1));
    let tries: i32 =
        sqlx::query_scalar("SELECT max(tries)::integer FROM run_items").fetch_one(&world.pool).await.unwrap();
    assert_eq!(tries, 1, "no try is charged");
    sink.set_rule(rule(|_| Action::GoOn));
    world.client.post(format!("{run}/resume")).send().await.unwrap();
    assert_eq!(world.until_over(&run).await["sent"], 5);
}

#[tokio::test]
async fn cancelling_settles_queued_retries_immediately() {
    let (sink, _) = server(|_, _| GREYLISTED).await;
    let mut world = world(&sink, &[("MAILRUN_RETRY__RUNGS_MS", "3600000")]).await;
    world.workers();
    let run = world.invite(&people(50)).await;
    world.until_progress(&run, "all wait for an hour", |progress| progress["retrying"] == 50).await;
    world.client.post(format!("{run}/cancel")).send().await.unwrap();
    assert_eq!(world.until_over(&run).await["cancelled"], 50);
    world.counters_equal_counts().await;
}
