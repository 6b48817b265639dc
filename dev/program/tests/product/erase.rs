//! Erasing a person, people and runs that were deleted by hand, and settling what is unknown.

use std::sync::Arc;

use crate::support::{World, people, until};
use lapin::options::BasicGetOptions;
use mailrun_broker::ERROR_HEADER;
use mailrun_broker::dead_letters::header_text;
use mailrun_sink::{Action, Options, Rule, Sink, Stage};
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
    let done = sqlx::query(AssertSqlSafe(statement.to_owned())).execute(&world.pool).await.unwrap();
    assert!(done.rows_affected() > 0, "{statement}");
}

fn run(world: &World, args: &[&str]) -> String {
    let (good, said) = world.output(args, &[]);
    assert!(good, "{args:?}: {said}\n{}", world.log());
    said
}

/// The tables in which a text still stands, in whatever column.
async fn tables_with(world: &World, text: &str) -> Vec<String> {
    let tables: Vec<String> = sqlx::query_scalar("SELECT tablename::text FROM pg_tables WHERE schemaname = 'public'")
        .fetch_all(&world.pool)
        .await
        .unwrap();
    assert!(tables.len() > 10);
    let mut found = Vec::new();
    for table in tables {
        let query = format!("SELECT count(*) FROM {table} t WHERE t::text ILIKE '%{text}%'");
        if number(world, &query).await > 0 {
            found.push(table);
        }
    }
    found
}

/// The dead letters: their errors and bodies.
async fn letters(world: &World) -> Vec<String> {
    let channel = world.channel().await;
    let mut letters = Vec::new();
    while let Some(letter) = channel.basic_get("mailrun.dead".into(), BasicGetOptions::default()).await.unwrap() {
        let body = String::from_utf8_lossy(&letter.data).into_owned();
        letters.push(format!("{} {body}", header_text(&letter, ERROR_HEADER).unwrap_or_default()));
    }
    channel.close(200, "looked".into()).await.unwrap();
    letters
}

#[tokio::test]
async fn nothing_is_left_of_an_erased_person_but_a_tombstone_that_keeps_her_from_getting_two() {
    let mut world = World::new(&[("MAILRUN_MAILER__SIMULATED__DOWN_EVERY", "0")]).await;
    world.workers();
    let list = "Ann Smith <ann@erase.example>\nbob@other.example\nnot <an> ann@erase.example address\n";
    let first = world.invite(list).await;
    world.until_over(&first).await;
    assert_eq!(number(&world, "SELECT count(*) FROM users WHERE emailed_at IS NOT NULL").await, 2);
    // Where an address may stand in others' rows.
    execute(&world, "UPDATE run_items SET error = '550 5.1.1 <Ann@Erase.example>: user unknown' WHERE position = 2")
        .await;
    execute(
        &world,
        "UPDATE runs SET invalid_entries = '[{\"line\": 3, \"text\": \"ann@erase.example@\", \"reason\": \"x\"}]'",
    )
    .await;
    execute(
        &world,
        "INSERT INTO buried_results (run_id, item_id, attempt, state, reason)
         VALUES (gen_random_uuid(), 1, 1, 'sent', 'about ann@erase.example')",
    )
    .await;
    execute(
        &world,
        "INSERT INTO suppressions (email, reason, detail) VALUES ('x@x.example', 'asked', 'ask ann@erase.example')",
    )
    .await;
    execute(
        &world,
        "INSERT INTO test_sends (id, email, subject, body) VALUES (gen_random_uuid(), 'ann@erase.example', 'a', 'b')",
    )
    .await;
    let said = run(&world, &["people", "erase", "Ann@Erase.example"]);
    assert!(said.contains("Person erased"), "{said}");
    assert_eq!(tables_with(&world, "ann@erase.example").await, [""; 0]);
    assert_eq!(tables_with(&world, "Ann Smith").await, [""; 0]);
    assert_eq!(number(&world, "SELECT count(*) FROM users WHERE email ~ '^erased:[0-9a-f]{64}$'").await, 1);
    world.counters_equal_counts().await;
    // Nobody twice, and the others as before.
    let (status, page) = world.submit(&world.token().await, "ann@erase.example\nbob@other.example").await.unwrap_err();
    assert_eq!(status, 422, "{page}");
    let second = world.invite("Ann <ann@erase.example>\nnew@other.example").await;
    assert_eq!(count(&world.until_over(&second).await, "sent"), 1);
    assert_eq!(tables_with(&world, "ann@erase.example").await, [""; 0]);
    assert_eq!(world.handed_over().len(), 3);
}

#[tokio::test]
async fn who_was_erased_before_anything_was_sent_fails_with_a_reason_and_can_be_invited_anew() {
    let mut world = World::new(&[("MAILRUN_MAILER__SIMULATED__DOWN_EVERY", "0")]).await;
    let first = world.invite("ann@erase.example\nbob@other.example\ncia@erase.example").await;
    run(&world, &["people", "erase", "ann@erase.example"]);
    // By hand.
    execute(&world, "DELETE FROM users WHERE email = 'cia@erase.example'").await;
    world.workers();
    let end = world.until_over(&first).await;
    assert_eq!((count(&end, "sent"), count(&end, "failed")), (1, 2), "{end}");
    let reasons = "SELECT count(*) FROM run_items WHERE state = 'failed'
                   AND error = 'the person or the run was deleted from the database'";
    assert_eq!(number(&world, reasons).await, 2);
    let second = world.invite("ann@erase.example").await;
    assert_eq!(count(&world.until_over(&second).await, "sent"), 1);
    run(&world, &["people", "erase", "ann@erase.example"]);
    assert_eq!(tables_with(&world, "ann@erase").await, [""; 0]);
    assert_eq!(world.submit(&world.token().await, "ann@erase.example").await.unwrap_err().0, 422);
}

#[tokio::test]
async fn who_was_erased_or_deleted_does_not_hold_up_a_cancelled_run() {
    let mut world = World::new(&[]).await;
    let run = world.invite("ann@erase.example\nbob@other.example\ncia@erase.example").await;
    let erase = [("email", "ann@erase.example")];
    let answer = world.client.post(format!("{}/people/erase", world.web)).form(&erase).send().await.unwrap();
    assert_eq!(answer.status(), 303);
    execute(&world, "DELETE FROM users WHERE email = 'cia@erase.example'").await;
    world.client.post(format!("{run}/cancel")).send().await.unwrap();
    world.workers();
    let end = world.until_over(&run).await;
    assert_eq!((count(&end, "cancelled"), count(&end, "failed")), (1, 2), "{end}");
    until("nothing is left to do", async || {
        number(&world, "SELECT count(*) FROM users WHERE erased_at IS NOT NULL AND scrubbed_at IS NULL").await == 0
    })
    .await;
    world.counters_equal_counts().await;
}

#[tokio::test]
async fn replies_of_mail_servers_are_erased_from_the_ledger_and_from_dead_letters() {
    let sink = Sink::start(Options::default()).await.unwrap();
    let rule: Rule = Arc::new(|stage, _| match stage {
        Stage::Rcpt(to) if to.starts_with("ann@") => Action::Reply(550, format!("5.1.1 <{to}>: user unknown")),
        Stage::Rcpt(to) if to.starts_with("bob@") => Action::Reply(550, "5.7.1 not you, only ann@erase.example".into()),
        _ => Action::GoOn,
    });
    sink.set_rule(rule);
    let relay = format!("smtp://{}?tls=none", sink.address());
    let mut world =
        World::new(&[("MAILRUN_MAILER__KIND", "smtp"), ("MAILRUN_MAILER__SMTP__RELAYS", relay.as_str())]).await;
    world.workers();
    let first = world.invite("ann@erase.example\nbob@other.example\ncia@other.example").await;
    let end = world.until_over(&first).await;
    assert_eq!(count(&end, "sent"), 1, "{end}");
    until("the letter is there", async || letters(&world).await.iter().any(|letter| letter.contains("user unknown")))
        .await;
    run(&world, &["people", "erase", "ann@erase.example"]);
    assert_eq!(tables_with(&world, "ann@erase.example").await, [""; 0]);
    let left = letters(&world).await;
    assert!(left.iter().all(|letter| !letter.contains("ann@erase.example")), "{left:?}");
    // What was suppressed stays so.
    let suppressed = number(&world, "SELECT count(*) FROM suppressions WHERE email LIKE 'erased:%'").await;
    if suppressed == 1 {
        assert_eq!(world.submit(&world.token().await, "ann@erase.example").await.unwrap_err().0, 422);
    }
}

#[tokio::test]
async fn what_is_unknown_can_be_settled_and_then_its_run_can_be_pruned() {
    let settings = [("MAILRUN_MAILER__SIMULATED__LATENCY_MS", "600000"), ("MAILRUN_SEND__PERMITS", "5")];
    let mut world = World::new(&settings).await;
    world.worker("fan-out");
    world.worker("progress");
    let victim = world.worker("send");
    let list = people(5);
    let invitation = world.invite(&list).await;
    until("all are being sent", async || number(&world, "SELECT count(*) FROM attempts").await == 5).await;
    world.kill(victim);
    world.set("MAILRUN_MAILER__SIMULATED__LATENCY_MS", "0".into());
    world.worker("send");
    let end = world.until_progress(&invitation, "unknown", |progress| count(progress, "unknown") == 5).await;
    assert_eq!(count(&end, "sent"), 0);
    run(&world, &["prune", "--older-than-days", "0"]);
    assert_eq!(number(&world, "SELECT count(*) FROM runs").await, 1, "somebody has to decide first");

    let said = run(
        &world,
        &["unknown", "settle", "--arrived", "--by", "Zoë", "guest-000001@example.org", "guest-000002@example.org"],
    );
    assert!(said.contains("2 unknown invitations were settled as sent"), "{said}");
    let (good, _) = world.output(&["unknown", "settle", "--not-sent"], &[]);
    assert!(!good, "it has to be said which");
    let run_id = id(&invitation).to_owned();
    let said = run(&world, &["unknown", "settle", "--not-sent", "--by", "Zoë", "--run", &run_id]);
    assert!(said.contains("3 unknown invitations were settled as failed"), "{said}");
    let end = world.until_progress(&invitation, "settled", |progress| count(progress, "unknown") == 0).await;
    assert_eq!((count(&end, "sent"), count(&end, "failed"), count(&end, "unknown")), (2, 3, 0), "{end}");
    let reasons = "SELECT count(*) FROM run_items WHERE error LIKE 'settled by Zoë: it %'";
    assert_eq!(number(&world, reasons).await, 5);
    assert_eq!(number(&world, "SELECT count(*) FROM users WHERE emailed_at IS NOT NULL").await, 2);
    world.counters_equal_counts().await;
    // Settled once, it stays so.
    assert!(run(&world, &["unknown", "settle", "--arrived", "--all"]).contains("No invitations match"));
    run(&world, &["prune", "--older-than-days", "0"]);
    assert_eq!(number(&world, "SELECT count(*) FROM runs").await, 0);
    assert_eq!(number(&world, "SELECT count(*) FROM users WHERE emailed_at IS NOT NULL").await, 2);
}
