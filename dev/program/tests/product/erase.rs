//! Erasing people, people and runs deleted manually, and settling unknown items.

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

/// The tables that still contain a text in any column.
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
async fn dead_letters(world: &World) -> Vec<String> {
    let channel = world.channel().await;
    let mut dead_letters = Vec::new();
    while let Some(dead_letter) = channel.basic_get("mailrun.dead".into(), BasicGetOptions::default()).await.unwrap() {
        let body = String::from_utf8_lossy(&dead_letter.data).into_owned();
        dead_letters.push(format!("{} {body}", header_text(&dead_letter, ERROR_HEADER).unwrap_or_default()));
    }
    channel.close(200, "done".into()).await.unwrap();
    dead_letters
}

#[tokio::test]
async fn an_erased_person_leaves_only_a_tombstone_that_prevents_a_second_mail() {
    let mut world = World::new(&[("MAILRUN_MAILER__SIMULATED__DOWN_EVERY", "0")]).await;
    world.workers();
    let list = "Ann Smith <ann@erase.example>\nbob@other.example\nnot <an> ann@erase.example address\n";
    let first = world.invite(list).await;
    world.until_over(&first).await;
    assert_eq!(number(&world, "SELECT count(*) FROM users WHERE emailed_at IS NOT NULL").await, 2);
    // Where an address may be in other rows.
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
        r#"WITH test AS (INSERT INTO runs (id, kind, hidden, subject, body, total)
                         VALUES (gen_random_uuid(), 'test_mail', true, 'a', 'b', 1) RETURNING id)
           INSERT INTO run_items (run_id, position, data) SELECT id, 1, '{"email": "ann@erase.example"}' FROM test"#,
    )
    .await;
    let said = run(&world, &["people", "erase", "Ann@Erase.example"]);
    assert!(said.contains("Person erased"), "{said}");
    assert_eq!(tables_with(&world, "ann@erase.example").await, [""; 0]);
    assert_eq!(tables_with(&world, "Ann Smith").await, [""; 0]);
    assert_eq!(number(&world, "SELECT count(*) FROM users WHERE email ~ '^erased:[0-9a-f]{64}$'").await, 1);
    world.counters_equal_counts().await;
    // Nobody is invited twice, and others are not affected.
    let (status, page) = world.submit(&world.token().await, "ann@erase.example\nbob@other.example").await.unwrap_err();
    assert_eq!(status, 422, "{page}");
    let second = world.invite("Ann <ann@erase.example>\nnew@other.example").await;
    assert_eq!(count(&world.until_over(&second).await, "sent"), 1);
    assert_eq!(tables_with(&world, "ann@erase.example").await, [""; 0]);
    assert_eq!(world.handed_over().len(), 3);
}

#[tokio::test]
async fn a_person_erased_before_sending_fails_with_a_reason_and_can_be_invited_again() {
    let mut world = World::new(&[("MAILRUN_MAILER__SIMULATED__DOWN_EVERY", "0")]).await;
    let first = world.invite("ann@erase.example\nbob@other.example\ncia@erase.example").await;
    run(&world, &["people", "erase", "ann@erase.example"]);
    // Manually.
    execute(&world, "DELETE FROM users WHERE email = 'cia@erase.example'").await;
    world.workers();
    let end = world.until_over(&first).await;
    assert_eq!((count(&end, "sent"), count(&end, "failed")), (1, 2), "{end}");
    let reasons = "SELECT count(*) FROM run_items WHERE state = 'failed'
                   AND error = 'the person, the run or the data of this item was deleted'";
    assert_eq!(number(&world, reasons).await, 2);
    let second = world.invite("ann@erase.example").await;
    assert_eq!(count(&world.until_over(&second).await, "sent"), 1);
    run(&world, &["people", "erase", "ann@erase.example"]);
    assert_eq!(tables_with(&world, "ann@erase").await, [""; 0]);
    assert_eq!(world.submit(&world.token().await, "ann@erase.example").await.unwrap_err().0, 422);
}

#[tokio::test]
async fn erased_and_deleted_people_do_not_block_a_cancelled_run() {
    let mut world = World::new(&[]).await;
    let run = world.invite("ann@erase.example\nbob@other.example\ncia@erase.example").await;
    let erase = [("email", "ann@erase.example")];
    let answer = world.client.post(format!("{}/people/erase", world.web)).form(&erase).send().await.unwrap();
    assert_eq!(answer.status(), 303);
    execute(&world, "DELETE FROM users WHERE email = 'cia@erase.example'").await;
    world.client.post(format!("{run}/cancel")).send().await.unwrap();
    world.workers();
    let end = world.until_over(&run).await;
    // A cancelled run has cancelled them all, whatever became of the people.
    assert_eq!((count(&end, "cancelled"), count(&end, "failed")), (3, 0), "{end}");
    until("nothing is left to do", async || {
        number(&world, "SELECT count(*) FROM users WHERE erased_at IS NOT NULL AND scrubbed_at IS NULL").await == 0
    })
    .await;
    world.counters_equal_counts().await;
}

#[tokio::test]
async fn erases_mail_server_replies_from_the_ledger_and_dead_letters() {
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
    until("the dead letter is there", async || {
        dead_letters(&world).await.iter().any(|dead_letter| dead_letter.contains("user unknown"))
    })
    .await;
    run(&world, &["people", "erase", "ann@erase.example"]);
    assert_eq!(tables_with(&world, "ann@erase.example").await, [""; 0]);
    let left = dead_letters(&world).await;
    assert!(left.iter().all(|dead_letter| !dead_letter.contains("ann@erase.example")), "{left:?}");
    // Suppressions stay in effect.
    let suppressed = number(&world, "SELECT count(*) FROM suppressions WHERE email LIKE 'erased:%'").await;
    if suppressed == 1 {
        assert_eq!(world.submit(&world.token().await, "ann@erase.example").await.unwrap_err().0, 422);
    }
}

#[tokio::test]
async fn settled_unknown_items_allow_pruning_their_run() {
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
    assert_eq!(number(&world, "SELECT count(*) FROM runs").await, 1, "a person must decide first");

    let said = run(
        &world,
        &["unknown", "settle", "--arrived", "--by", "Zoë", "guest-000001@example.org", "guest-000002@example.org"],
    );
    assert!(said.contains("2 unknown invitations were settled as sent"), "{said}");
    let (good, _) = world.output(&["unknown", "settle", "--not-sent"], &[]);
    assert!(!good, "a selection is required");
    let run_id = id(&invitation).to_owned();
    let said = run(&world, &["unknown", "settle", "--not-sent", "--by", "Zoë", "--run", &run_id]);
    assert!(said.contains("3 unknown invitations were settled as failed"), "{said}");
    let end = world.until_progress(&invitation, "settled", |progress| count(progress, "unknown") == 0).await;
    assert_eq!((count(&end, "sent"), count(&end, "failed"), count(&end, "unknown")), (2, 3, 0), "{end}");
    let reasons = "SELECT count(*) FROM run_items WHERE error LIKE 'settled by Zoë: it %'";
    assert_eq!(number(&world, reasons).await, 5);
    assert_eq!(number(&world, "SELECT count(*) FROM users WHERE emailed_at IS NOT NULL").await, 2);
    world.counters_equal_counts().await;
    // A settled item stays settled.
    assert!(run(&world, &["unknown", "settle", "--arrived", "--all"]).contains("No invitations match"));
    run(&world, &["prune", "--older-than-days", "0"]);
    assert_eq!(number(&world, "SELECT count(*) FROM runs").await, 0);
    assert_eq!(number(&world, "SELECT count(*) FROM users WHERE emailed_at IS NOT NULL").await, 2);
}
