//! Other ledgers: one restored from a backup, and another installation's on the same virtual host.

use std::process::Command;

use crate::support::{World, field, people, until};
use mailrun_ledger::installation;
use sqlx::PgPool;

/// Slow enough to be backed up during the run.
const SLOW: [(&str, &str); 1] = [("MAILRUN_FAN_OUT__SENDS_PER_SECOND", "60")];

fn postgres_program(name: &str) -> String {
    let mut found: Vec<_> = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .filter_map(|folder| Some(folder.ok()?.path().join("bin").join(name)))
        .filter(|program| program.is_file())
        .collect();
    found.sort();
    found.pop().map_or_else(|| name.to_owned(), |program| program.display().to_string())
}

/// Replaces the ledger by a backup. All processes have ended.
async fn restore(world: &mut World, backup: &str) {
    let name = format!("{}-restored", world.name);
    world.stack.create_database(&name).await.unwrap();
    let url = world.stack.database_url(&name);
    let restored = Command::new(postgres_program("pg_restore"))
        .args(["--no-owner", "--exit-on-error", "--dbname", &url, backup])
        .status()
        .unwrap();
    assert!(restored.success());
    world.pool = PgPool::connect_lazy(&url).unwrap();
    world.set("DATABASE_URL", url);
}

async fn start_pages(world: &mut World) {
    world.start(&["web"]);
    let health = format!("{}/healthz", world.web);
    until("the pages answer", async || world.client.get(&health).send().await.is_ok()).await;
}

async fn post(world: &World, address: &str, fields: &[(&str, &str)]) -> String {
    let answer = world.client.post(address).form(fields).send().await.unwrap();
    assert_eq!(answer.status(), 303);
    answer.headers()["location"].to_str().unwrap().to_owned()
}

/// Sends 300 invitations and takes a backup when a third is sent; returns the run's path and the number sent in the backup.
async fn back_up_at_a_third(world: &mut World, backup: &str) -> (String, i64) {
    world.workers();
    let run = world.invite(&people(300)).await;
    world.until_progress(&run, "a third", |progress| progress["sent"].as_i64() >= Some(100)).await;
    let (good, said) = world.output(&["backup", backup], &[]);
    assert!(good, "{said}");
    let end = world.until_over(&run).await;
    assert_eq!((end["sent"].as_i64(), end["failed"].as_i64()), (Some(297), Some(3)));
    world.terminate_all();
    restore(world, backup).await;
    let sent = sqlx::query_scalar("SELECT sent::bigint FROM run_progress").fetch_one(&world.pool).await.unwrap();
    assert!((100..297).contains(&sent), "{sent}");
    (run, sent)
}

#[tokio::test]
async fn a_restored_backup_mails_nobody_twice() {
    let mut world = World::new(&SLOW).await;
    let backup = world.folder.path().join("backup").display().to_string();
    let (run, sent) = back_up_at_a_third(&mut world, &backup).await;

    let (good, said) = world.output(&["restored"], &[]);
    assert!(good && said.contains("1 run is paused") && said.contains("unsubscribes"), "{said}");
    start_pages(&mut world).await;
    world.workers();
    let path = run.strip_prefix(&world.web).unwrap();
    assert_eq!(post(&world, &format!("{run}/resume"), &[]).await, path);
    let now = world.until_progress(&run, "settled", |progress| progress["over"] == true).await;
    let failed = now["failed"].as_i64().unwrap();
    assert_eq!(now["sent"].as_i64(), Some(sent));
    assert_eq!(now["unknown"].as_i64(), Some(300 - sent - failed));
    world.counters_equal_counts().await;

    // A new list is sent normally, with ids that were not used before the restore.
    let new = world.invite("late@example.org").await;
    assert_eq!(world.until_over(&new).await["sent"], 1);
    world.assert_no_duplicates();
    assert_eq!(world.handed_over().len(), 298);

    if failed > 0 {
        let page = world.client.get(&run).send().await.unwrap().text().await.unwrap();
        assert!(page.contains("Retry…"), "{page}");
        let token = field(&page, "token");
        let asked = post(&world, &format!("{run}/retry"), &[("states", "failed"), ("token", &token)]).await;
        assert_eq!(asked, format!("{path}?confirm=retry#confirm"));
        let page = world.client.get(format!("{run}?confirm=retry")).send().await.unwrap().text().await.unwrap();
        assert!(page.contains("This run was restored from a backup"), "{page}");
    }

    // The relay's log shows what was sent since.
    world.terminate_all();
    let journal = world.folder.path().join("journal").display().to_string();
    let (good, said) = world.output(&["restored", "--sent-log", &journal], &[]);
    assert!(good, "{said}");
    let sent: i64 =
        sqlx::query_scalar("SELECT sum(sent)::bigint FROM run_progress").fetch_one(&world.pool).await.unwrap();
    assert_eq!(sent, 298, "{said}");
    world.counters_equal_counts().await;
}

#[tokio::test]
async fn a_ledger_older_than_the_messages_sends_nothing_until_the_restore_is_declared() {
    let mut world = World::new(&SLOW).await;
    let backup = world.folder.path().join("backup").display().to_string();
    let (run, _) = back_up_at_a_third(&mut world, &backup).await;

    start_pages(&mut world).await;
    let workers = world.worker("fan-out,send,progress");
    until("the worker finds out, and doctor says what to do", async || {
        let (good, said) = world.output(&["doctor"], &[]);
        !good && said.contains("mailrun restored")
    })
    .await;
    let (good, _) = world.output(&["restored"], &[]);
    assert!(!good, "a worker is connected");
    let new = world.invite("late@example.org").await;
    assert_eq!(world.progress(&new).await["sent"], 0);
    assert_eq!(world.handed_over().len(), 297);
    assert!(world.terminate(workers));

    assert!(world.run_to_end(&["restored"]), "{}", world.log());
    world.worker("fan-out,send,progress");
    post(&world, &format!("{run}/resume"), &[]).await;
    world.until_over(&run).await;
    world.assert_no_duplicates();
}

#[tokio::test]
async fn a_virtual_host_belongs_to_one_installation() {
    let mut world = World::new(&[]).await;
    let other = format!("{}-other", world.name);
    world.stack.create_database(&other).await.unwrap();
    let url = world.stack.database_url(&other);
    let settings = [("DATABASE_URL", url.as_str())];

    let (good, _) = world.output(&["setup"], &settings);
    assert!(!good, "it belongs to the first one");
    let (good, _) = world.output(&["worker"], &settings);
    assert!(!good, "it sends nothing");
    let (good, said) = world.output(&["doctor"], &settings);
    assert!(!good && said.contains("another Mailrun installation"), "{said}");
    // The first one is not affected.
    world.workers();
    let run = world.invite(&people(20)).await;
    assert_eq!(world.until_over(&run).await["sent"], 20);

    let (good, said) = world.output(&["setup", "--take-over"], &settings);
    assert!(good, "{said}");
    let id = installation::read(&mut PgPool::connect_lazy(&url).unwrap().acquire().await.unwrap()).await.unwrap().id;
    assert!(
        !world.run_to_end(&["worker"]) && world.log().contains(&id.to_string()),
        "the first one is refused now: {}",
        world.log()
    );
    world.terminate_all();
}
