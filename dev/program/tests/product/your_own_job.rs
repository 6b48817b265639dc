//! The job of `docs/your-own-job.md`, as the program of that page: a call for each row, on a server of the test's own.

use std::{
    collections::HashMap,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex},
};

use axum::{Router, extract::State, http::StatusCode, routing::post};
use mailrun_ledger::submit::{Data, NewRun, Submitted, submit};
use serde::Serialize;
use serde_json::Value;
use tokio::{net::TcpListener, sync::Notify};

use crate::support::{MAILRUN, World, until};

const EXAMPLE: &str = include_str!("../../../../cli/examples/your_own_job.rs");
const PAGE: &str = include_str!("../../../../docs/your-own-job.md");

#[derive(Serialize)]
struct Call {
    url: String,
    body: String,
}

/// A server that answers a call as its body says, and counts the calls.
#[derive(Clone, Default)]
struct Server {
    calls: Arc<Mutex<HashMap<String, usize>>>,
    /// What fails for good at first, and succeeds later.
    mended: Arc<Mutex<bool>>,
    never: Arc<Notify>,
}

impl Server {
    async fn start() -> (Self, SocketAddr) {
        let server = Self::default();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().route("/", post(Self::answer)).with_state(server.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        (server, address)
    }

    async fn answer(State(server): State<Self>, body: String) -> StatusCode {
        let times = {
            let mut calls = server.calls.lock().unwrap();
            let times = calls.entry(body.clone()).or_default();
            *times += 1;
            *times
        };
        let mended = *server.mended.lock().unwrap();
        match body.split_whitespace().next() {
            Some("busy") if times == 1 => StatusCode::SERVICE_UNAVAILABLE,
            Some("gone") if !mended => StatusCode::GONE,
            Some("hang") => {
                server.never.notified().await;
                StatusCode::OK
            }
            _ => StatusCode::OK,
        }
    }

    fn calls(&self, body: &str) -> usize {
        self.calls.lock().unwrap().get(body).copied().unwrap_or_default()
    }

    fn total(&self) -> usize {
        self.calls.lock().unwrap().values().sum()
    }
}

/// An installation whose workers are the example.
async fn world() -> World {
    let mut world = World::new(&[("NO_PROXY", "127.0.0.1")]).await;
    world.program = PathBuf::from(MAILRUN).with_file_name("examples").join("your_own_job");
    assert!(world.program.is_file(), "{} is missing: cargo build --workspace --examples", world.program.display());
    world
}

async fn call(world: &World, address: SocketAddr, bodies: &[&str]) -> String {
    let calls: Vec<Call> =
        bodies.iter().map(|body| Call { url: format!("http://{address}"), body: (*body).to_owned() }).collect();
    match submit(&world.pool, NewRun::new("calls", "Calls"), &Data(&calls)).await.unwrap() {
        Submitted::Accepted(run_id) => format!("{}/runs/{run_id}", world.web),
        other => panic!("{other:?}"),
    }
}

fn counts(progress: &Value) -> [u64; 4] {
    ["sent", "failed", "unknown", "cancelled"].map(|state| progress[state].as_u64().unwrap())
}

#[test]
fn the_page_has_this_file_which_is_short() {
    assert!(PAGE.contains(&format!("```rust\n{}\n```", EXAMPLE.trim_end())), "docs/your-own-job.md differs");
    let lines = EXAMPLE.lines().filter(|line| !line.trim().is_empty() && !line.trim().starts_with("//")).count();
    println!("the example job has {lines} lines of code");
    assert!(lines <= 60, "{lines}");
}

#[tokio::test]
async fn rows_are_called_retried_and_replayed() {
    let mut world = world().await;
    let (server, address) = Server::start().await;
    world.workers();
    let run = call(&world, address, &["fine 1", "busy 2", "gone 3", "fine 4"]).await;
    assert_eq!(counts(&world.until_over(&run).await), [3, 1, 0, 0]);
    assert_eq!(["fine 1", "busy 2", "gone 3"].map(|body| server.calls(body)), [1, 2, 1]);
    let page = world.client.get(&run).send().await.unwrap().text().await.unwrap();
    assert!(page.contains("410 Gone") && page.contains("gone 3"), "the page names the row and the reason: {page}");
    *server.mended.lock().unwrap() = true;
    world.retry(&run, "failed").await;
    world.until_progress(&run, "the replay is counted", |progress| counts(progress) == [4, 0, 0, 0]).await;
    assert_eq!((server.calls("gone 3"), server.total()), (2, 6));
    world.counters_equal_counts().await;
}

#[tokio::test]
async fn a_cancelled_run_calls_nothing() {
    let mut world = world().await;
    let (server, address) = Server::start().await;
    let run = call(&world, address, &["fine 1", "fine 2"]).await;
    world.client.post(format!("{run}/cancel")).send().await.unwrap();
    world.workers();
    assert_eq!(counts(&world.until_over(&run).await), [0, 0, 0, 2]);
    assert_eq!(server.total(), 0);
}

#[tokio::test]
async fn calls_of_a_worker_that_was_killed_are_unknown_and_not_repeated() {
    let mut world = world().await;
    let (server, address) = Server::start().await;
    world.worker("fan-out,progress");
    let killed = world.worker("send");
    let run = call(&world, address, &["hang 1", "hang 2", "fine 3"]).await;
    until("the server has all calls", async || server.total() == 3).await;
    world.until_progress(&run, "one is counted", |progress| progress["sent"] == 1).await;
    world.kill(killed);
    world.worker("send");
    assert_eq!(counts(&world.until_over(&run).await), [1, 0, 2, 0]);
    assert_eq!(server.total(), 3, "what may have had an effect is not repeated");
    world.counters_equal_counts().await;
}

/// Any worker may receive any item, so one without the job must not run beside those that have it.
#[tokio::test]
async fn a_worker_without_the_job_does_not_start_beside_one_that_has_it() {
    let mut world = world().await;
    world.worker("send");
    let registered = "SELECT count(*) FROM workers";
    until("it has registered", async || {
        sqlx::query_scalar::<_, i64>(registered).fetch_one(&world.pool).await.unwrap() == 1
    })
    .await;
    world.program = PathBuf::from(MAILRUN);
    let other = world.worker("send");
    assert!(!world.until_ended(other).await);
    assert!(
        world.log().contains("the list of jobs is invitations,test_mail here and calls,invitations,test_mail there")
    );
}
