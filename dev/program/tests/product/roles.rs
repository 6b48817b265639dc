//! Each process with its own PostgreSQL role: it can do its work, and nothing else.

use crate::support::{World, people, until};
use mailrun_core::{signed_id::Named, unsubscribe::Signer};
use mailrun_ledger::{grants, signing};
use url::Url;

const WRITERS: [&str; 6] = ["web", "fan_out", "send", "progress", "worker", "operator"];
/// PostgreSQL's error code for a missing privilege.
const INSUFFICIENT_PRIVILEGE: &str = "42501";

/// A world with a role for each process.
struct Roles {
    world: World,
    prefix: String,
}

impl Roles {
    async fn new(settings: &[(&str, &str)]) -> Self {
        let mut world = World::new(settings).await;
        world.kill(0);
        // Roles belong to the whole server.
        let prefix = world.name.replace('-', "_");
        world.set("MAILRUN_DATABASE__ROLES__PREFIX", prefix.clone());
        for writer in WRITERS {
            let key = format!("MAILRUN_DATABASE__ROLES__{}_PASSWORD", writer.to_uppercase());
            world.set(&key, format!("password-of-{writer}"));
        }
        for time in ["first", "second"] {
            assert!(world.run_to_end(&["setup"]), "the {time} setup failed: {}", world.log());
        }
        Self { world, prefix }
    }

    fn url(&self, writer: &str) -> String {
        let mut url = Url::parse(&self.world.stack.database_url(&self.world.name)).unwrap();
        url.set_username(&format!("{}_{writer}", self.prefix)).unwrap();
        url.set_password(Some(&format!("password-of-{writer}"))).unwrap();
        url.into()
    }

    /// Starts a process with a role.
    fn start(&mut self, writer: &str, args: &[&str]) -> usize {
        let url = self.url(writer);
        self.world.set("DATABASE_URL", url);
        self.world.start(args)
    }

    /// Runs an operator's command.
    fn operate(&mut self, args: &[&str]) {
        let url = self.url("operator");
        self.world.set("DATABASE_URL", url);
        assert!(self.world.run_to_end(args), "{args:?}: {}", self.world.log());
    }

    /// Roles outlive a database, so they are dropped.
    async fn drop_roles(&self) {
        for writer in WRITERS {
            let role = format!("\"{}_{writer}\"", self.prefix);
            let statement = format!("DROP OWNED BY {role}; DROP ROLE {role}");
            sqlx::raw_sql(sqlx::AssertSqlSafe(statement)).execute(&self.world.pool).await.unwrap();
        }
    }
}

#[tokio::test]
async fn every_column_has_a_writer() {
    let world = World::new(&[]).await;
    let schema: Vec<(String, String)> = sqlx::query_as(
        "SELECT c.table_name::text, c.column_name::text FROM information_schema.columns c
         JOIN information_schema.tables t USING (table_schema, table_name)
         WHERE c.table_schema = current_schema() AND t.table_type = 'BASE TABLE' ORDER BY 1, 2",
    )
    .fetch_all(&world.pool)
    .await
    .unwrap();
    assert!(schema.len() > 100, "{schema:?}");
    let differences = grants::differences(&schema);
    assert!(differences.is_empty(), "\n{}", differences.join("\n"));
}

#[tokio::test]
async fn a_whole_run_works_with_a_role_for_each_process() {
    let mut roles = Roles::new(&[
        ("MAILRUN_MAILER__SIMULATED__LATENCY_MS", "20"),
        ("MAILRUN_SEND__PERMITS", "5"),
        ("MAILRUN_RETENTION__KEEP_DAYS", "1"),
    ])
    .await;
    roles.start("web", &["web"]);
    let health = format!("{}/healthz", roles.world.web);
    until("the pages answer", async || {
        roles.world.client.get(&health).send().await.is_ok_and(|answer| answer.status() == 200)
    })
    .await;
    roles.start("fan_out", &["worker", "--roles", "fan-out"]);
    let killed = roles.start("send", &["worker", "--roles", "send"]);
    roles.start("progress", &["worker", "--roles", "progress"]);

    // With retries, a pause, an unsubscribe, a rate limit, and a sender that dies.
    let world = &roles.world;
    let run = world.invite(&people(300)).await;
    world.until_progress(&run, "in progress", |progress| progress["sent"].as_i64() > Some(20)).await;
    world.client.post(format!("{run}/pause")).send().await.unwrap().error_for_status().unwrap();
    let key = signing::key(&mut world.pool.acquire().await.unwrap()).await.unwrap();
    let last = "SELECT id, run_id FROM run_items WHERE state = 'pending' ORDER BY id DESC LIMIT 1";
    let (item_id, run_id) = sqlx::query_as(last).fetch_one(&world.pool).await.unwrap();
    let link = format!("{}/u/{}", world.web, Signer::new(&key).token(Named { run_id, item_id }));
    world.client.post(link).send().await.unwrap().error_for_status().unwrap();
    world.client.post(format!("{run}/resume")).send().await.unwrap().error_for_status().unwrap();
    let sent = world.progress(&run).await["sent"].as_i64();
    world.until_progress(&run, "resumed", |progress| progress["sent"].as_i64() > sent).await;
    roles.world.kill(killed);
    // A worker with all roles has the privileges of each.
    roles.start("worker", &["worker"]);
    let over = roles.world.until_over(&run).await;
    assert_eq!(over["skipped"], 1, "{over}");
    let failed = over["failed"].as_i64().unwrap();
    assert!(failed > 0, "{over}");
    // What the killed sender had in hand may have gone out, and is sent once more by this.
    let unknown = usize::try_from(over["unknown"].as_i64().unwrap()).unwrap();
    roles.world.retry(&run, "failed,unknown").await;
    roles.world.until_progress(&run, "replayed", |progress| progress["sent"] == 299).await;

    // A cancelled run, a test, and operator commands.
    let world = &roles.world;
    let form = [("token", world.token().await), ("emails", people(600)), ("sends_per_second", "5".to_owned())];
    let answer = world.client.post(format!("{}/invites", world.web)).form(&form).send().await.unwrap();
    let location = answer.headers()["location"].to_str().unwrap().to_owned();
    let limited = format!("{}{location}", world.web);
    world.until_progress(&limited, "in progress", |progress| progress["sent"].as_i64() > Some(2)).await;
    world.client.post(format!("{limited}/cancel")).send().await.unwrap().error_for_status().unwrap();
    world.until_over(&limited).await;
    let test = [("test_email", "me@example.org"), ("subject", "Hello"), ("body", "Come!")];
    let answer = world.client.post(format!("{}/tests", world.web)).form(&test).send().await.unwrap();
    let test = format!("{}{}", world.web, answer.headers()["location"].to_str().unwrap());
    until("the test is sent", async || {
        world.client.get(&test).send().await.unwrap().text().await.unwrap().contains("Test sent")
    })
    .await;
    roles.operate(&["suppressions", "add", "bob@example.org"]);
    roles.operate(&["suppressions", "remove", "bob@example.org"]);
    roles.operate(&["dead-letters"]);
    let (_, report) = roles.world.output(&["doctor", "--fix"], &[("DATABASE_URL", &roles.url("operator"))]);
    assert!(!report.contains("permission denied"), "{report}");

    // The first run finished long ago, so retention deletes it. Fan-out workers do that on schedule, with the same function.
    roles.world.counters_equal_counts().await;
    let run_id: uuid::Uuid = run.rsplit('/').next().unwrap().parse().unwrap();
    let statement = "UPDATE run_progress SET finished_at = now() - interval '2 days' WHERE run_id = $1";
    sqlx::query(statement).bind(run_id).execute(&roles.world.pool).await.unwrap();
    for writer in ["fan_out", "operator"] {
        let (deleted, report) = roles.world.output(&["prune"], &[("DATABASE_URL", &roles.url(writer))]);
        assert!(deleted, "{writer}: {report}");
    }
    let left = "SELECT (SELECT count(*) FROM runs WHERE id = $1) + (SELECT count(*) FROM run_items WHERE run_id = $1)";
    let left: i64 = sqlx::query_scalar(left).bind(run_id).fetch_one(&roles.world.pool).await.unwrap();
    assert_eq!(left, 0, "rows of a deleted run");
    assert!(roles.world.duplicates() <= unknown, "{} mails twice, {unknown} were unknown", roles.world.duplicates());
    let log = roles.world.log();
    assert!(!log.contains("permission denied"), "{log}");
    roles.world.terminate_rest();
    roles.drop_roles().await;
}

#[tokio::test]
async fn a_process_can_only_write_its_own_columns() {
    let roles = Roles::new(&[]).await;
    for (writer, statement) in [
        ("web", "UPDATE run_items SET state = 'sent'"),
        ("web", "UPDATE run_progress SET sent = 7"),
        ("web", "UPDATE users SET emailed_at = now()"),
        ("web", "INSERT INTO attempts (item_id, number, worker_id) VALUES (1, 1, 1)"),
        ("web", "DELETE FROM runs"),
        ("fan_out", "UPDATE runs SET body = ''"),
        ("fan_out", "UPDATE run_items SET state = 'sent'"),
        ("fan_out", "DELETE FROM suppressions"),
        ("send", "UPDATE run_items SET state = 'sent'"),
        ("send", "INSERT INTO suppressions (email, reason) VALUES ('a@x.org', 'asked')"),
        ("send", "UPDATE runs SET body = 'Buy!'"),
        ("progress", "SELECT key FROM signing_key"),
        ("progress", "UPDATE suppressions SET detail = ''"),
        ("progress", "INSERT INTO outbox (kind, message) VALUES ('x', '{}')"),
        ("worker", "UPDATE runs SET body = 'Buy!'"),
        ("operator", "UPDATE signing_key SET key = ''"),
        ("operator", "DROP TABLE users"),
        ("web", "CREATE TABLE here (id integer)"),
    ] {
        let pool = sqlx::PgPool::connect(&roles.url(writer)).await.unwrap();
        let refused = sqlx::query(statement).execute(&pool).await.expect_err(statement);
        let code = refused.as_database_error().and_then(|error| error.code().map(std::borrow::Cow::into_owned));
        assert_eq!(code.as_deref(), Some(INSUFFICIENT_PRIVILEGE), "{writer}: {statement}: {refused}");
        pool.close().await;
    }
    let log = roles.world.log();
    assert!(!log.contains("password-of"), "{log}");
    roles.drop_roles().await;
}
