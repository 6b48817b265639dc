//! Real mail: the pipeline with a mail server that accepts, refuses, hangs, drops connections and dies.

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use crate::support::{World, people, until};
use mail_parser::{HeaderValue, MessageParser, MimeHeaders as _};
use mailrun_sink::{Action, Options, RateMeter, Rule, Session, Sink, Stage};
use serde_json::Value;

fn count(progress: &Value, state: &str) -> i64 {
    progress[state].as_i64().unwrap()
}

/// A world that sends to the sink, with its workers.
async fn world(sink: &Sink, settings: &[(&str, &str)]) -> World {
    let relay = format!("smtp://{}?tls=none", sink.address());
    let mut all = vec![
        ("MAILRUN_MAILER__KIND", "smtp"),
        ("MAILRUN_MAILER__SMTP__RELAYS", &relay),
        ("MAILRUN_MAILER__SMTP__FROM", "Zoë’s Party <zoe@party.example>"),
        ("MAILRUN_MAILER__SMTP__REPLY_TO", "host@party.example"),
    ];
    all.extend(settings);
    let mut world = World::new(&all).await;
    world.workers();
    world
}

fn rule(rule: impl Fn(Stage<'_>, &Session) -> Action + Send + Sync + 'static) -> Rule {
    Arc::new(rule)
}

/// The number of one of [`people`].
fn number(recipient: &str) -> usize {
    recipient.strip_prefix("guest-").and_then(|rest| rest.split('@').next()).unwrap().parse().unwrap()
}

async fn largest(world: &World, column: &str) -> i32 {
    let query = format!("SELECT max({column})::integer FROM run_items");
    sqlx::query_scalar(sqlx::AssertSqlSafe(query)).fetch_one(&world.pool).await.unwrap()
}

#[tokio::test]
async fn two_thousand_people_get_one_correct_mail_each() {
    let sink = Sink::start(Options::default()).await.unwrap();
    let subject = ("MAILRUN_WEB__SUBJECT", "Überraschung für {{ name or 'dich' }} 🎉");
    let body = ("MAILRUN_WEB__BODY", "Hello {{ name or 'there' }},\n\nthere is **cake**.\n.\nA line with a dot alone.");
    let world = world(&sink, &[subject, body]).await;
    let run = world.invite(&format!("Łukasz & Co \"Q\" <guest-000001@example.org>\n{}", people(2000))).await;
    let end = world.until_over(&run).await;
    assert_eq!(end["text"], "2,000 successful of 2,000");
    world.counters_equal_counts().await;
    assert_eq!((sink.received(), sink.received_twice()), (2000, 0));

    let (mut recipients, mut ids) = (HashSet::new(), HashSet::new());
    for message in sink.mailbox().newest(None, 2000) {
        let parsed = MessageParser::default().parse(&message.raw).unwrap();
        let to = parsed.to().and_then(|to| to.first()).unwrap();
        assert_eq!(to.address().unwrap(), message.to[0]);
        let from = parsed.from().and_then(|from| from.first()).unwrap();
        assert_eq!((from.name(), from.address()), (Some("Zoë’s Party"), Some("zoe@party.example")));
        let reply_to = parsed.reply_to().and_then(|to| to.first()).unwrap();
        assert_eq!(reply_to.address(), Some("host@party.example"));
        assert!(parsed.date().is_some_and(mail_parser::DateTime::is_valid));
        assert!(matches!(parsed.header("Auto-Submitted"), Some(HeaderValue::Text(text)) if text == "auto-generated"));
        assert!(parsed.is_content_type("multipart", "alternative"));
        let named = to.address() == Some("guest-000001@example.org");
        let (whose, whom) = if named { ("Łukasz & Co \"Q\"", "Łukasz & Co \"Q\"") } else { ("dich", "there") };
        assert_eq!(parsed.subject(), Some(format!("Überraschung für {whose} 🎉").as_str()));
        let (text, html) = (parsed.body_text(0).unwrap(), parsed.body_html(0).unwrap());
        assert!(text.starts_with(&format!("Hello {whom},")), "{text}");
        assert!(text.lines().any(|line| line == "."), "{text}");
        assert!(html.contains("<strong>cake</strong>") && !html.contains("<b>"), "{html}");
        recipients.insert(message.to[0].clone());
        ids.insert(parsed.message_id().unwrap().to_owned());
    }
    assert_eq!((recipients.len(), ids.len()), (2000, 2000));
}

#[tokio::test]
async fn a_relay_outage_loses_no_invitation() {
    let latency = Duration::from_millis(20);
    let sink = Sink::start(Options { latency, ..Options::default() }).await.unwrap();
    let world = world(&sink, &[]).await;
    let run = world.invite(&people(1500)).await;
    world.until_progress(&run, "in progress", |progress| count(progress, "sent") > 300).await;
    sink.set_down(true).await.unwrap();
    let is_told = |progress: &Value| progress["note"].as_str().unwrap().contains("the relay is not accepting mail");
    let held_up = world.until_progress(&run, "the reason is shown", is_told).await;
    assert!(held_up["over"] == false, "{held_up}");
    sink.set_down(false).await.unwrap();
    let end = world.until_over(&run).await;
    world.counters_equal_counts().await;
    // Mails handed over when the server died may have arrived: they are unknown, and not sent again.
    let (sent, unknown) = (count(&end, "sent"), count(&end, "unknown"));
    assert_eq!((sent + unknown, count(&end, "failed")), (1500, 0), "{end}");
    assert!(unknown <= 20, "more unknown than connections: {end}");
    let received = i64::try_from(sink.received()).unwrap();
    assert!((sent..=sent + unknown).contains(&received) && sink.received_twice() == 0);
}

#[tokio::test]
async fn temporary_refusals_of_all_mail_charge_no_tries() {
    let sink = Sink::start(Options::default()).await.unwrap();
    let busy = Arc::new(AtomicBool::new(true));
    sink.set_rule(rule({
        let busy = Arc::clone(&busy);
        move |stage, _| match stage {
            Stage::Mail if busy.load(Ordering::Relaxed) => Action::Reply(421, "4.3.2 Busy, try again later".into()),
            _ => Action::GoOn,
        }
    }));
    let world = world(&sink, &[]).await;
    let run = world.invite(&people(500)).await;
    let is_told = |progress: &Value| progress["note"].as_str().unwrap().contains("Busy, try again later");
    world.until_progress(&run, "the server's reply is shown", is_told).await;
    busy.store(false, Ordering::Relaxed);
    let end = world.until_over(&run).await;
    assert_eq!(end["text"], "500 successful of 500");
    assert_eq!(largest(&world, "tries").await, 1);
    assert_eq!((sink.received(), sink.received_twice()), (500, 0));
    world.counters_equal_counts().await;
}

#[tokio::test]
async fn each_reply_has_its_outcome() {
    let sink = Sink::start(Options::default()).await.unwrap();
    let first = Arc::new(std::sync::Mutex::new(HashSet::new()));
    sink.set_rule(rule(move |stage, session| match stage {
        // No such mailbox; a policy; temporary, once; and a lost reply.
        Stage::Rcpt(to) if number(to) % 10 == 1 => Action::Reply(550, "5.1.1 No such user here".into()),
        Stage::Rcpt(to) if number(to) % 10 == 2 => Action::Reply(550, "5.7.1 We do not like you".into()),
        Stage::Rcpt(to) if number(to) % 10 == 3 && first.lock().unwrap().insert(to.to_owned()) => {
            Action::Reply(451, "4.3.0 Disk full".into())
        }
        Stage::Message if number(&session.recipients[0]) % 10 == 4 => Action::AcceptThenDrop,
        _ => Action::GoOn,
    }));
    // Consecutive broken connections look like a failing relay, so few are used here.
    let world = world(&sink, &[("MAILRUN_MAILER__SMTP__CONNECTIONS", "4")]).await;
    let run = world.invite(&people(100)).await;
    let end = world.until_over(&run).await;
    assert_eq!(end["text"], "70 successful, 20 failed, 10 unknown of 100");
    world.counters_equal_counts().await;
    assert_eq!((sink.received(), sink.received_twice()), (80, 0));
    let errors: Vec<(String, i64)> =
        sqlx::query_as("SELECT error, count(*) FROM run_items WHERE state = 'failed' GROUP BY error ORDER BY error")
            .fetch_all(&world.pool)
            .await
            .unwrap();
    let error = |place: usize, text: &str| errors[place].0.contains(text) && errors[place].1 == 10;
    assert!(error(0, "5.1.1 No such user here") && error(1, "5.7.1 We do not like you"), "{errors:?}");
    // A nonexistent address is not mailed again by any run.
    let suppressed: Vec<String> =
        sqlx::query_scalar("SELECT email FROM suppressions ORDER BY email").fetch_all(&world.pool).await.unwrap();
    assert_eq!(suppressed.len(), 10);
    assert!(suppressed.iter().all(|email| number(email) % 10 == 1), "{suppressed:?}");
    world.retry(&run, "failed").await;
    let skipped = world.until_progress(&run, "retried", |now| now["over"] == true && count(now, "skipped") == 10).await;
    assert_eq!(skipped["text"], "70 successful, 10 failed, 10 unknown, 10 skipped of 100");
    world.counters_equal_counts().await;
}

/// How many seconds without a stall are needed to check a rate.
const ENOUGH_SECONDS: usize = 10;

#[tokio::test]
async fn the_server_observes_the_configured_rate() {
    let sink = Sink::start(Options::default()).await.unwrap();
    let meter = RateMeter::start();
    let noted = Arc::clone(&meter);
    sink.set_rule(rule(move |stage, _| {
        if stage == Stage::Mail {
            noted.note();
        }
        Action::GoOn
    }));
    let mut world = world(&sink, &[("MAILRUN_FAN_OUT__SENDS_PER_SECOND", "150")]).await;
    // With several fan-out workers and senders, and across runs.
    world.worker("fan-out");
    world.worker("send");
    let mut seconds = Vec::new();
    for round in 1.. {
        // Not those between two rounds.
        meter.clear();
        let list = |domain: &str| people(1100).replace("example.org", &format!("{domain}-{round}.example"));
        let runs = [world.invite(&list("first")).await, world.invite(&list("second")).await];
        for run in &runs {
            world.until_over(run).await;
        }
        assert_eq!((sink.received(), sink.received_twice()), (2200 * round, 0));
        // A tenth more to catch up after a delay, and what may be late at once.
        let kept = meter.check(150 + 15 + 30 + 2);
        assert_eq!(kept.over, 0, "{kept:?}");
        seconds.extend(meter.seconds());
        if seconds.len() >= ENOUGH_SECONDS {
            break;
        }
    }
    // On a busy machine, single seconds are lost.
    seconds.sort_unstable();
    let median = seconds[seconds.len() / 2];
    assert!((142..=165).contains(&median), "{median} a second, and not 150: {seconds:?}");
}

#[tokio::test]
async fn an_unresponsive_relay_is_replaced_by_another_one() {
    let (hanging, sink) =
        (Sink::start(Options::default()).await.unwrap(), Sink::start(Options::default()).await.unwrap());
    hanging.set_rule(rule(|_, _| Action::Hang));
    let relays = format!("smtp://{}?tls=none&weight=9,smtp://{}?tls=none", hanging.address(), sink.address());
    let settings =
        [("MAILRUN_MAILER__SMTP__RELAYS", relays.as_str()), ("MAILRUN_MAILER__SMTP__COMMAND_TIMEOUT_MS", "300")];
    let world = world(&sink, &settings).await;
    let run = world.invite(&people(200)).await;
    let end = world.until_over(&run).await;
    assert_eq!(end["text"], "200 successful of 200");
    assert_eq!((sink.received(), sink.received_twice(), hanging.received()), (200, 0, 0));
    until("the workers have noticed", async || world.log().contains("probing it later")).await;
}
