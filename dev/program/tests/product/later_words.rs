//! Enum values of a later version in the ledger: no process of this version ends because of them, other work continues, the pages
//! answer, and what belongs to them waits for the upgrade.

use crate::support::{World, people, until};
use mailrun_broker::depth;
use mailrun_core::{
    item::ItemState::Sent,
    message::{ItemMessage, ResultsMessage, encode},
};
use serde_json::Value;
use sqlx::AssertSqlSafe;
use uuid::Uuid;

const TYPES: [&str; 5] = ["item_state", "wanted_state", "pass_kind", "suppression_reason", "relay_fault"];

fn id(run: &str) -> Uuid {
    run.rsplit('/').next().unwrap().parse().unwrap()
}

/// A list of distinct people.
fn list(name: &str) -> String {
    people(9).replace("@example.org", &format!("@{name}.example"))
}

async fn invite(world: &World, name: &str) -> String {
    world.invite(&list(name)).await
}

async fn execute(world: &World, statement: &str) {
    let done = sqlx::query(AssertSqlSafe(statement.to_owned())).execute(&world.pool).await;
    done.unwrap_or_else(|error| panic!("{statement}: {error}"));
}

async fn page(world: &World, path: &str) -> String {
    let answer = world.client.get(format!("{}{path}", world.web)).send().await.unwrap();
    assert!(answer.status().is_success(), "{path}: {}\n{}", answer.status(), world.log());
    answer.text().await.unwrap()
}

#[tokio::test]
async fn values_of_a_later_version_wait_for_the_upgrade_and_block_nothing_else() {
    // A high rate limit, so that claims and steps check limits as well.
    let mut world = World::new(&[("MAILRUN_FAN_OUT__SENDS_PER_SECOND", "1000")]).await;
    for name in TYPES {
        execute(&world, &format!("ALTER TYPE {name} ADD VALUE 'later'")).await;
    }
    // A finished run whose replay names states of the later version.
    let mut workers = vec![world.worker("fan-out"), world.worker("send"), world.worker("progress")];
    let old = invite(&world, "old").await;
    world.until_over(&old).await;
    for worker in workers.drain(..) {
        assert!(world.terminate(worker));
    }
    let replay = "INSERT INTO run_passes (run_id, number, kind, states, done_at)";
    execute(&world, &format!("{replay} VALUES ('{}', 2, 'replay', '{{failed,later}}', now())", id(&old))).await;

    let [item, pass] = [invite(&world, "item").await, invite(&world, "pass").await];
    let token = world.token().await;
    let wanted = world.submit(&token, &list("wanted")).await.unwrap();
    let later_item: i64 = sqlx::query_scalar("SELECT min(id) FROM run_items WHERE run_id = $1")
        .bind(id(&item))
        .fetch_one(&world.pool)
        .await
        .unwrap();
    let test_id = Uuid::new_v4();
    for statement in [
        format!("UPDATE run_items SET state = 'later' WHERE id = {later_item}"),
        format!("UPDATE runs SET wanted = 'later' WHERE id = '{}'", id(&wanted)),
        format!("INSERT INTO run_passes (run_id, number, kind, done_at) VALUES ('{}', 1, 'first', now())", id(&pass)),
        format!("INSERT INTO run_passes (run_id, number, kind) VALUES ('{}', 2, 'later')", id(&pass)),
        "INSERT INTO suppressions (email, reason) VALUES ('suppressed@example.org', 'later')".to_owned(),
        format!(
            "INSERT INTO runs (id, kind, hidden, subject, body, total) VALUES ('{test_id}', 'test_mail', true, '', '', 1)"
        ),
        format!(
            r#"INSERT INTO run_items (run_id, position, state, data) VALUES ('{test_id}', 1, 'later', '{{"email": "a@example.org"}}')"#
        ),
        "INSERT INTO relay_stops (relay, reason, alike, runs, answered_at, fault)
         VALUES ('relay:25', 'refused', '{}', '{}', now(), 'later')"
            .to_owned(),
    ] {
        execute(&world, &statement).await;
    }
    // A result of the item, and a message for another attempt.
    let asked =
        ItemMessage { run_id: id(&item), item_id: later_item, attempt: 1, tries: 1, replays: 0, impersonal: false };
    let results = ResultsMessage { run_id: Some(id(&item)), results: vec![asked.result(Sent, None)] };
    world.publish("mailrun.results", &encode(&results)).await;
    let next = ItemMessage { attempt: 2, ..asked };
    world.publish("mailrun.items", &encode(&next)).await;

    // Another run's messages are lost: it only ends if it is swept.
    let other = invite(&world, "other").await;
    workers.push(world.worker("fan-out"));
    let channel = world.channel().await;
    until("all that can be released is", async || depth(&channel, "mailrun.items").await.unwrap() == 18).await;
    let cursors = "SELECT count(*) FROM run_passes WHERE cursor = 9 AND run_id = ANY($1)";
    until("the steps are committed", async || {
        let runs = [id(&item), id(&other)];
        sqlx::query_scalar::<_, i64>(cursors).bind(runs).fetch_one(&world.pool).await.unwrap() == 2
    })
    .await;
    channel.queue_purge("mailrun.items".into(), Default::default()).await.unwrap();
    world.publish("mailrun.items", &encode(&next)).await;
    workers.extend([world.worker("send"), world.worker("progress")]);
    assert_eq!(world.until_over(&other).await["sent"], 9);
    assert_eq!(world.repairs(&other).await.put_back, 9);
    world.until_progress(&item, "all others are sent", |progress| progress["sent"] == 8).await;
    for queue in ["mailrun.items.wait", "mailrun.results.wait"] {
        until(queue, async || depth(&channel, queue).await.unwrap() == 1).await;
    }

    let runs = page(&world, "/runs").await;
    assert!(runs.contains(">later</span>"), "the value is shown: {runs}");
    assert!(page(&world, &format!("/runs/{}", id(&wanted))).await.contains("newer version"));
    assert_eq!(world.progress(&wanted).await["state"], "later");
    let again = world.submit(&token, &list("wanted")).await.unwrap();
    assert!(again.starts_with(&wanted), "the same form creates no other run: {again}");
    for run in [&item, &pass, &old] {
        page(&world, &format!("/runs/{}", id(run))).await;
    }
    assert!(page(&world, "/suppressions").await.contains("later"));
    assert!(page(&world, &format!("/tests/{test_id}")).await.contains("later"));
    page(&world, "/relay").await;
    // A suppressed address stays suppressed for any reason.
    let skipped = world.invite("suppressed@example.org\nfine@example.org").await;
    assert_eq!(world.until_over(&skipped).await["total"], 1);
    for command in [&["suppressions", "list"][..], &["relay", "show"], &["dead-letters"]] {
        assert!(world.run_to_end(command), "{command:?}\n{}", world.log());
    }
    let (_, report) = world.output(&["doctor", "--fix", "--json"], &[]);
    let report: Value = serde_json::from_str(report.lines().last().unwrap_or_default()).unwrap();
    assert!(report["findings"].is_array(), "{report}\n{}", world.log());
    for worker in &workers {
        assert!(world.is_running(*worker), "{}", world.log());
    }
    assert_eq!(depth(&channel, "mailrun.dead").await.unwrap(), 0, "nothing of it is poison");

    // A later version handles these values.
    execute(&world, &format!("UPDATE run_items SET state = 'pending' WHERE id = {later_item}")).await;
    execute(&world, "UPDATE runs SET wanted = 'running' WHERE wanted = 'later'").await;
    execute(&world, "DELETE FROM run_passes WHERE kind = 'later'").await;
    execute(&world, "UPDATE run_passes SET done_at = NULL WHERE cursor = 0").await;
    for run in [&item, &wanted, &pass] {
        assert_eq!(world.until_over(run).await["sent"], 9, "{}", world.log());
    }
    world.assert_no_duplicates();
    world.counters_equal_counts().await;
}
