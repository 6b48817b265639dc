//! Replies of mail servers: which items they fail, which addresses they suppress, and what they pause.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use crate::support::{World, people, until};
use mailrun_sink::{Action, Options, Rule, Session, Sink, Stage};

/// A world that sends to a sink with this rule, with its workers.
async fn world(rule: impl Fn(&str) -> Action + Send + Sync + 'static, settings: &[(&str, &str)]) -> (World, Sink) {
    let rule: Rule = Arc::new(move |stage: Stage<'_>, _: &Session| match stage {
        Stage::Rcpt(recipient) => rule(recipient),
        _ => Action::GoOn,
    });
    let sink = Sink::start(Options::default()).await.unwrap();
    sink.set_rule(rule);
    let relay = format!("smtp://{}?tls=none", sink.address());
    let mut all = vec![("MAILRUN_MAILER__KIND", "smtp"), ("MAILRUN_MAILER__SMTP__RELAYS", relay.as_str())];
    all.extend(settings);
    let mut world = World::new(&all).await;
    world.workers();
    (world, sink)
}

fn refuse(code: u16, text: &str) -> Action {
    Action::Reply(code, text.to_owned())
}

async fn number(world: &World, query: &'static str) -> i64 {
    sqlx::query_scalar(query).fetch_one(&world.pool).await.unwrap()
}

async fn suppressed(world: &World) -> i64 {
    number(world, "SELECT count(*) FROM suppressions").await
}

/// Alternating between two domains.
fn guests(count: usize) -> String {
    (1..=count).map(|number| format!("guest-{number:06}@{}.example\n", ["one", "two"][number % 2])).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_refuses_the_sender_fails_and_suppresses_nobody() {
    for (code, words) in
        [(550, "relay not permitted"), (550, "5.1.1 too many recipients this hour"), (454, "4.7.1 Relay access denied")]
    {
        let refusing = Arc::new(AtomicBool::new(true));
        let flag = Arc::clone(&refusing);
        let rule = move |_: &str| if flag.load(Ordering::Relaxed) { refuse(code, words) } else { Action::GoOn };
        let (world, sink) = world(rule, &[("MAILRUN_RETRY__RUNGS_MS", "100,200,400,800,1600")]).await;
        let run = world.invite(&guests(40)).await;
        let paused = world.until_progress(&run, "held up", |progress| progress.to_string().contains(words)).await;
        assert_eq!((paused["failed"].as_i64(), paused["sent"].as_i64()), (Some(0), Some(0)));
        refusing.store(false, Ordering::Relaxed);
        let end = world.until_over(&run).await;
        assert_eq!(end["sent"], 40, "{end}");
        assert_eq!((sink.received(), suppressed(&world).await), (40, 0));
        if code == 550 {
            assert_eq!(number(&world, "SELECT max(tries)::bigint FROM run_items").await, 1, "a try was charged");
        }
        world.counters_equal_counts().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_recipient_that_is_always_deferred_fails() {
    for (code, words) in [(454, "4.7.0 not for this one"), (452, "too many messages for this recipient")] {
        let rule = move |recipient: &str| {
            if recipient.starts_with("guest-000007@") { refuse(code, words) } else { Action::GoOn }
        };
        let (world, sink) = world(rule, &[]).await;
        let run = world.invite(&people(300)).await;
        let end = world.until_over(&run).await;
        assert_eq!((end["sent"].as_i64(), end["failed"].as_i64()), (Some(299), Some(1)), "{end}");
        assert_eq!((sink.received(), suppressed(&world).await), (299, 0));
        assert!(!world.log().contains("takes no mail"), "it paused the relay");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn unexplained_refusals_stop_the_run_and_relay_until_an_operator_answers() {
    for fault in ["it-was-us", "it-was-them"] {
        let refusing = Arc::new(AtomicBool::new(true));
        let offers = Arc::new(AtomicUsize::new(0));
        let (flag, count) = (Arc::clone(&refusing), Arc::clone(&offers));
        let rule = move |_: &str| {
            count.fetch_add(1, Ordering::Relaxed);
            if flag.load(Ordering::Relaxed) { refuse(550, "Computer says no") } else { Action::GoOn }
        };
        let (world, sink) = world(rule, &[]).await;
        let run = world.invite(&people(60)).await;
        until("the relay is stopped", async || number(&world, "SELECT count(*) FROM relay_stops").await == 1).await;
        let paused = world.until_progress(&run, "paused", |progress| progress["phase"] == "paused").await;
        assert_eq!(paused["failed"], 0, "{paused}");
        assert!(offers.load(Ordering::Relaxed) < 60, "the relay was not stopped");
        let (_, shown) = world.output(&["relay"], &[]);
        assert!(shown.contains("20 recipients in a row") && shown.contains("Computer says no"), "{shown}");
        let page = world.client.get(format!("{}/relay", world.web)).send().await.unwrap().text().await.unwrap();
        assert!(page.contains("Computer says no") && page.contains("It was us"), "{page}");
        if fault == "it-was-us" {
            refusing.store(false, Ordering::Relaxed);
        }
        assert!(world.run_to_end(&["relay", fault]), "{}", world.log());
        let end = world.until_over(&run).await;
        let (sent, failed) = if fault == "it-was-us" { (60, 0) } else { (0, 60) };
        assert_eq!((end["sent"].as_i64(), end["failed"].as_i64()), (Some(sent), Some(failed)), "{end}");
        assert_eq!((sink.received(), suppressed(&world).await), (sent as u64, 0));
        assert_eq!(number(&world, "SELECT max(tries)::bigint FROM run_items").await, 1, "a try was charged");
        world.counters_equal_counts().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unusual_share_of_suppressions_is_held_for_review() {
    for decision in ["--accept", "--reject"] {
        let rule = |recipient: &str| {
            let number: usize = recipient[6..12].parse().unwrap();
            if number.is_multiple_of(2) { refuse(550, "5.1.1 User unknown") } else { Action::GoOn }
        };
        let (world, _sink) = world(rule, &[]).await;
        let run = world.invite(&people(60)).await;
        let end = world.until_over(&run).await;
        assert_eq!((end["sent"].as_i64(), end["failed"].as_i64()), (Some(30), Some(30)), "{end}");
        let held = "SELECT count(*) FROM held_suppressions";
        assert_eq!((suppressed(&world).await, number(&world, held).await), (0, 30));
        let id = run.rsplit('/').next().unwrap();
        let (_, shown) = world.output(&["suppressions", "held"], &[]);
        assert!(shown.contains(id) && shown.contains("30 addresses") && shown.contains("User unknown"), "{shown}");
        let page = world.client.get(format!("{}/suppressions", world.web)).send().await.unwrap().text().await.unwrap();
        assert!(page.contains("held for review"), "{page}");
        assert!(world.run_to_end(&["suppressions", "review", id, decision]));
        let suppressed_now = if decision == "--accept" { 30 } else { 0 };
        assert_eq!((suppressed(&world).await, number(&world, held).await), (suppressed_now, 0));
        assert!(!world.run_to_end(&["suppressions", "review", id, decision]), "it is decided already");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn suppressions_are_removed_by_reason_and_time() {
    let rule = |recipient: &str| {
        if recipient < "guest-000011" { refuse(550, "no such user") } else { Action::GoOn }
    };
    let (world, _sink) = world(rule, &[]).await;
    let run = world.invite(&people(40)).await;
    world.until_over(&run).await;
    assert_eq!(suppressed(&world).await, 10);
    assert!(world.run_to_end(&["suppressions", "add", "zoe@example.org"]));
    assert!(!world.run_to_end(&["suppressions", "remove", "--reason", "bounced"]), "since when?");
    assert!(!world.run_to_end(&["suppressions", "remove", "--reason", "bounced", "--since", "soon"]));
    let old = "UPDATE suppressions SET created_at = now() - interval '2 hours' WHERE email LIKE 'guest-000001%'";
    sqlx::query(old).execute(&world.pool).await.unwrap();
    assert!(world.run_to_end(&["suppressions", "remove", "--reason", "bounced", "--since", "1h"]));
    assert_eq!(suppressed(&world).await, 2, "the old one, and the one that an operator added");
    let form = [("reason", "bounced"), ("since", "3h")];
    let answer = world.client.post(format!("{}/suppressions/remove", world.web)).form(&form).send().await.unwrap();
    assert_eq!(answer.status().as_u16(), 303);
    assert_eq!(suppressed(&world).await, 1);
}
