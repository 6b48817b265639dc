//! The real local stack: servers in their own folder, clients that share them, and a killed keeper.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use mailrun_stack::{Pids, Release, Stack, Stopped};
use rustix::process::{Pid, Signal};
use sqlx::{Connection as _, PgConnection};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use url::Url;

async fn start(home: &Path) -> Stack {
    let begun = Instant::now();
    let keeper = Path::new(env!("CARGO_BIN_EXE_mailrun-dev"));
    let stack = Stack::start(home, keeper, Duration::from_secs(1), |line| eprintln!("{line}")).await.unwrap();
    eprintln!("ready after {:.1?}", begun.elapsed());
    stack
}

fn all(pids: Pids) -> Vec<u32> {
    [Some(pids.keeper), pids.postgres, pids.rabbitmq, pids.epmd].into_iter().flatten().collect()
}

/// Whether a process runs; zombies do not.
fn runs(pid: u32) -> bool {
    std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.is_empty())
}

async fn until(what: &str, holds: impl AsyncFn() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !holds().await {
        assert!(Instant::now() < end, "{what}: not within a minute");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn setting(stack: &Stack, name: &str) -> String {
    let mut connection = PgConnection::connect(&stack.database_url("mailrun")).await.unwrap();
    sqlx::query_scalar("SELECT current_setting($1)").bind(name).fetch_one(&mut connection).await.unwrap()
}

/// Whether a broker answers the AMQP 0-9-1 greeting with a method frame on channel 0.
async fn greets(stack: &Stack) -> bool {
    let url = Url::parse(&stack.amqp_url("mailrun")).unwrap();
    let address = (url.host_str().unwrap(), url.port().unwrap());
    let Ok(mut socket) = TcpStream::connect(address).await else { return false };
    let mut answer = [0; 3];
    socket.write_all(b"AMQP\x00\x00\x09\x01").await.is_ok()
        && socket.read_exact(&mut answer).await.is_ok()
        && answer == [1, 0, 0]
}

async fn console(stack: &Stack, path: &str, password: &str) -> u16 {
    let console = stack.console();
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let request = client.get(format!("{}api/{path}", console.url)).basic_auth(&console.user, Some(password));
    request.send().await.unwrap().status().as_u16()
}

async fn version(stack: &Stack) -> String {
    let console = stack.console();
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let request = client.get(format!("{}api/overview", console.url)).basic_auth(&console.user, Some(&console.password));
    let overview: serde_json::Value = request.send().await.unwrap().json().await.unwrap();
    overview["rabbitmq_version"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn clients_share_the_servers_and_the_last_one_stops_them() {
    let dir = tempfile::tempdir().unwrap();
    let home = dir.path().join("a home with spaces");
    let first = start(&home).await;
    for name in ["fsync", "synchronous_commit"] {
        assert_eq!(setting(&first, name).await, "on", "{name}");
    }
    assert!(greets(&first).await);
    let password = &first.console().password;
    let version = version(&first).await;
    assert!(Release::chosen().has(Some(&version)), "{:?} was requested, but {version} is running", Release::chosen());
    assert_eq!(console(&first, "overview", "another").await, 401);

    for _ in 0..2 {
        first.create_database("one more").await.unwrap();
        first.create_vhost("one/more").await.unwrap();
    }
    PgConnection::connect(&first.database_url("one more")).await.unwrap().close().await.unwrap();
    assert_eq!(console(&first, "vhosts/one%2Fmore", password).await, 200);
    for _ in 0..2 {
        first.drop_database("one more").await.unwrap();
        first.drop_vhost("one/more").await.unwrap();
    }
    assert!(PgConnection::connect(&first.database_url("one more")).await.is_err());
    assert_eq!(console(&first, "vhosts/one%2Fmore", password).await, 404);

    let second = start(&home).await;
    let pids = second.pids().unwrap();
    assert_eq!(pids, first.pids().unwrap());
    assert_eq!(all(pids).len(), 4);
    assert_eq!(first.stop().await.unwrap(), Stopped::StillUsed);
    assert_eq!(setting(&second, "fsync").await, "on");
    assert!(greets(&second).await);

    assert_eq!(second.stop().await.unwrap(), Stopped::Ended);
    for pid in all(pids) {
        assert!(!runs(pid), "process {pid} still runs");
    }
}

#[tokio::test]
async fn servers_stop_and_start_on_request_and_restart_after_a_crash() {
    let dir = tempfile::tempdir().unwrap();
    let stack = start(dir.path()).await;
    let before = stack.pids().unwrap();

    stack.stop_rabbitmq().await.unwrap();
    assert!(!greets(&stack).await);
    stack.start_rabbitmq().await.unwrap();
    assert!(greets(&stack).await);
    stack.stop_postgres().await.unwrap();
    assert!(PgConnection::connect(&stack.database_url("mailrun")).await.is_err());
    stack.start_postgres().await.unwrap();
    assert_eq!(setting(&stack, "fsync").await, "on");

    let restarted = stack.pids().unwrap();
    assert_ne!(restarted.rabbitmq, before.rabbitmq);
    for pid in [restarted.rabbitmq.unwrap(), restarted.postgres.unwrap()] {
        kill(pid);
    }
    until("both servers run again", async || {
        let now = stack.pids().unwrap();
        now.rabbitmq.is_some_and(|pid| Some(pid) != restarted.rabbitmq)
            && now.postgres.is_some_and(|pid| Some(pid) != restarted.postgres)
    })
    .await;
    assert!(greets(&stack).await);
    assert_eq!(setting(&stack, "fsync").await, "on");
    assert_eq!(stack.stop().await.unwrap(), Stopped::Ended);
}

#[tokio::test]
async fn a_killed_keeper_is_replaced_and_its_servers_are_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let first = start(dir.path()).await;
    first.create_database("kept").await.unwrap();
    let before = first.pids().unwrap();
    kill_keeper(dir.path(), before).await;

    let second = start(dir.path()).await;
    let after = second.pids().unwrap();
    assert_ne!(after.keeper, before.keeper);
    for pid in all(before) {
        assert!(!runs(pid), "process {pid} of the killed keeper still runs");
    }
    PgConnection::connect(&second.database_url("kept")).await.unwrap();

    // Without a keeper, the client itself stops the servers.
    drop(first);
    kill_keeper(dir.path(), after).await;
    assert_eq!(second.stop().await.unwrap(), Stopped::Ended);
    for pid in all(after) {
        assert!(!runs(pid), "process {pid} still runs");
    }
}

#[tokio::test]
async fn a_dropped_stack_ends_after_its_linger_time() {
    let dir = tempfile::tempdir().unwrap();
    let stack = start(dir.path()).await;
    let pids = stack.pids().unwrap();
    drop(stack);
    until("all processes ended", async || all(pids).into_iter().all(|pid| !runs(pid))).await;
}

fn kill(pid: u32) {
    rustix::process::kill_process(Pid::from_raw(pid.try_into().unwrap()).unwrap(), Signal::KILL).unwrap();
}

/// Kills the keeper and waits until it is dead: a dying one holds its lock and could be joined.
async fn kill_keeper(home: &Path, pids: Pids) {
    kill(pids.keeper);
    let lock = std::fs::File::open(home.join("keeper.lock")).unwrap();
    until("the keeper is dead", async || lock.try_lock_shared().is_ok()).await;
}
