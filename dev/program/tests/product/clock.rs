//! Changing PostgreSQL's clock by hours: a private server has its own clock, with libfaketime. The machine's clock is not changed.

use std::{
    fs,
    net::TcpListener,
    os::unix::fs::chown,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use crate::support::{World, people, say, until};
use mailrun_stack::{FAKETIME, POSTGRESQL, ensure_packages, faketime_library};
use rustix::process::{Pid, Signal, geteuid, kill_process};
use serde_json::Value;
use sqlx::PgPool;

/// A PostgreSQL with its own clock.
struct Server {
    process: Child,
    folder: tempfile::TempDir,
    url: String,
}

impl Server {
    async fn start() -> Self {
        ensure_packages(&[POSTGRESQL, FAKETIME], say).await.unwrap();
        let folder = tempfile::tempdir().unwrap();
        let account = account();
        give_away(folder.path(), account);
        let (data, password, offset) =
            (folder.path().join("data"), folder.path().join("password"), folder.path().join("offset"));
        fs::write(&password, "of-this-test").unwrap();
        give_away(&password, account);
        let created = program("initdb", account, &[])
            .args(["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--username=mailrun", "--pgdata"])
            .arg(&data)
            .arg("--pwfile")
            .arg(&password)
            .stdout(Stdio::null())
            .status()
            .unwrap();
        assert!(created.success());
        set(&offset, 0);
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let log = fs::File::create(folder.path().join("log")).unwrap();
        let clock = [
            format!("LD_PRELOAD={}", faketime_library().unwrap().display()),
            format!("FAKETIME_TIMESTAMP_FILE={}", offset.display()),
            "FAKETIME_NO_CACHE=1".to_owned(),
            // Timeouts use the real time.
            "FAKETIME_DONT_FAKE_MONOTONIC=1".to_owned(),
        ];
        let process = program("postgres", account, &clock)
            .arg("-D")
            .arg(&data)
            .args(["-c", &format!("port={port}"), "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="])
            // Its data need not survive.
            .args(["-c", "fsync=off", "-c", "logging_collector=off"])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let url = format!("postgres://mailrun:of-this-test@127.0.0.1:{port}/postgres");
        let server = Self { process, folder, url };
        until("PostgreSQL answers", async || PgPool::connect(&server.url).await.is_ok()).await;
        server
    }

    /// Sets its clock to this many hours before or after the machine's.
    async fn set_clock(&self, pool: &PgPool, hours: i32) {
        set(&self.folder.path().join("offset"), hours);
        let query = "SELECT (extract(epoch FROM clock_timestamp())::float8 - $1)::float8";
        let machine = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
        let ahead: f64 = sqlx::query_scalar(query).bind(machine).fetch_one(pool).await.unwrap();
        // The test itself takes some time.
        assert!((ahead - f64::from(hours) * 3_600.0).abs() < 600.0, "{ahead} s ahead, and not {hours} h");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Its children end with it after a clean stop.
        let _ = kill_process(Pid::from_child(&self.process), Signal::QUIT);
        let _ = self.process.wait();
    }
}

/// Atomically: the file is always complete.
fn set(offset: &Path, hours: i32) {
    let new = offset.with_extension("new");
    fs::write(&new, format!("{:+}", hours * 3_600)).unwrap();
    fs::rename(&new, offset).unwrap();
}

/// PostgreSQL refuses to run as root.
fn account() -> Option<(u32, u32)> {
    if !geteuid().is_root() {
        return None;
    }
    let accounts = fs::read_to_string("/etc/passwd").unwrap();
    let line = ["postgres", "nobody"].iter().find_map(|name| {
        let prefix = format!("{name}:");
        accounts.lines().find(|line| line.starts_with(&prefix))
    });
    let mut ids = line.unwrap().split(':').skip(2).map(|id| id.parse().unwrap());
    Some((ids.next().unwrap(), ids.next().unwrap()))
}

fn give_away(path: &Path, account: Option<(u32, u32)>) {
    if let Some((uid, gid)) = account {
        chown(path, Some(uid), Some(gid)).unwrap();
    }
}

/// One of PostgreSQL's programs. The environment does not apply to the program that changes the account, which must not use the
/// fake clock.
fn program(name: &str, account: Option<(u32, u32)>, environment: &[String]) -> Command {
    let mut found: Vec<PathBuf> = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .map(|folder| folder.unwrap().path().join("bin").join(name))
        .filter(|program| program.is_file())
        .collect();
    found.sort();
    let mut command = match account {
        None => Command::new("env"),
        Some((uid, gid)) => {
            let mut command = Command::new("setpriv");
            command.args([format!("--reuid={uid}"), format!("--regid={gid}"), "--clear-groups".into(), "env".into()]);
            command
        }
    };
    command.arg("LC_ALL=C").args(environment).arg(found.pop().unwrap_or_else(|| name.into())).current_dir("/");
    command
}

/// A world with this server's ledger.
async fn world(server: &Server, settings: &[(&str, &str)]) -> World {
    let mut world = World::new(&[&[("DATABASE_URL", server.url.as_str())], settings].concat()).await;
    world.pool = PgPool::connect_lazy(&server.url).unwrap();
    world
}

fn count(progress: &Value, state: &str) -> i64 {
    progress[state].as_i64().unwrap()
}

async fn number(world: &World, query: &'static str) -> i64 {
    sqlx::query_scalar(query).fetch_one(&world.pool).await.unwrap()
}

const DEAD: &str = "SELECT count(*) FROM workers WHERE died_at IS NOT NULL";

#[tokio::test]
async fn setting_the_clock_back_neither_stalls_runs_nor_hides_a_dead_worker() {
    let server = Server::start().await;
    let mut world = world(&server, &[("MAILRUN_FAN_OUT__SENDS_PER_SECOND", "30")]).await;
    world.worker("fan-out");
    world.worker("progress");
    // One that starts five attempts, and dies.
    world.set("MAILRUN_SEND__PERMITS", "5".into());
    world.set("MAILRUN_MAILER__SIMULATED__LATENCY_MS", "600000".into());
    let victim = world.worker("send");
    let run = world.invite(&people(95)).await;
    until("five are claimed", async || number(&world, "SELECT count(*) FROM attempts").await == 5).await;
    world.kill(victim);
    server.set_clock(&world.pool, -5).await;
    // And one that sends the rest.
    world.set("MAILRUN_SEND__PERMITS", "20".into());
    world.set("MAILRUN_MAILER__SIMULATED__LATENCY_MS", "0".into());
    world.worker("send");
    world.until_progress(&run, "in progress", |progress| count(progress, "sent") >= 10).await;
    server.set_clock(&world.pool, -9).await;
    let end = world.until_over(&run).await;
    assert_eq!((count(&end, "sent"), count(&end, "unknown")), (90, 5), "{}", world.log());
    let victims = "SELECT count(*) FROM workers WHERE died_at IS NOT NULL AND permits = 5";
    assert_eq!((number(&world, DEAD).await, number(&world, victims).await), (1, 1), "{}", world.log());

    // The next run is not delayed either.
    let next = world.invite("a@later.example\nb@later.example").await;
    assert_eq!(count(&world.until_over(&next).await, "sent"), 2);
    assert_eq!(number(&world, DEAD).await, 1, "{}", world.log());
    world.counters_equal_counts().await;
    world.assert_no_duplicates();
}

#[tokio::test]
async fn setting_the_clock_forward_declares_no_live_worker_dead() {
    let server = Server::start().await;
    // Heartbeats are rare: observers read them many times before the next one is written.
    let settings = [
        ("MAILRUN_HEARTBEAT__INTERVAL_MS", "3000"),
        ("MAILRUN_HEARTBEAT__DEAD_AFTER_MS", "30000"),
        ("MAILRUN_MAILER__SIMULATED__LATENCY_MS", "5000"),
    ];
    let mut world = world(&server, &settings).await;
    let workers = ["fan-out", "progress", "send", "send"].map(|role| world.worker(role));
    let run = world.invite(&people(50)).await;
    until("all are being sent", async || number(&world, "SELECT count(*) FROM attempts").await == 50).await;
    server.set_clock(&world.pool, 5).await;
    let end = world.until_over(&run).await;
    assert_eq!((count(&end, "sent"), count(&end, "unknown")), (50, 0), "{}", world.log());
    // Once more, during the next run.
    let next = world.invite(&people(50).replace("example.org", "later.example")).await;
    until("all are being sent", async || number(&world, "SELECT count(*) FROM attempts").await >= 100).await;
    server.set_clock(&world.pool, 11).await;
    let end = world.until_over(&next).await;
    assert_eq!((count(&end, "sent"), count(&end, "unknown")), (50, 0), "{}", world.log());
    assert_eq!(number(&world, DEAD).await, 0, "{}", world.log());
    for worker in workers {
        assert!(world.is_running(worker), "{}", world.log());
    }
    world.counters_equal_counts().await;
    world.assert_no_duplicates();
}
