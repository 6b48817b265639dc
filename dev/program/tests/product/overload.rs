//! Slow, silent and numerous clients, and pages that wait: other clients are not delayed.

use std::time::Duration;

use crate::support::{World, until};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{sleep, timeout},
};

/// Longer than any slow machine needs.
const TIMEOUT: Duration = Duration::from_secs(120);

fn address(world: &World) -> String {
    world.web.trim_start_matches("http://").to_owned()
}

async fn send(world: &World, text: &str) -> TcpStream {
    let mut connection = TcpStream::connect(address(world)).await.unwrap();
    connection.write_all(text.as_bytes()).await.unwrap();
    connection
}

/// Reads until the server closes the connection.
async fn rest(mut connection: TcpStream) -> String {
    let mut answer = Vec::new();
    let _ = timeout(TIMEOUT, connection.read_to_end(&mut answer)).await.expect("it is never closed");
    String::from_utf8(answer).unwrap()
}

#[tokio::test]
async fn closes_silent_idle_and_old_connections() {
    let mut world = World::new(&[("MAILRUN_WEB__HEADER_TIMEOUT_MS", "300")]).await;
    for begun in ["", "GET / HT", "GET / HTTP/1.1\r\nHost: localhost\r\n"] {
        assert!(!rest(send(&world, begun).await).await.contains("200 OK"), "{begun:?}");
    }
    let answered = rest(send(&world, "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n").await).await;
    assert!(answered.starts_with("HTTP/1.1 200 OK"), "{answered}");

    world.kill(0);
    world.set("MAILRUN_WEB__HEADER_TIMEOUT_MS", "3600000".into());
    world.set("MAILRUN_WEB__CONNECTION_AGE_MS", "1".into());
    world.start(&["web"]);
    until("the pages answer", async || world.client.get(&world.web).send().await.is_ok()).await;
    let answered = rest(send(&world, "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n").await).await;
    assert!(answered.is_empty() || answered.starts_with("HTTP/1.1 200 OK"), "{answered}");
}

#[tokio::test]
async fn connections_over_the_limit_are_served_later() {
    let world = World::new(&[("MAILRUN_WEB__MAX_CONNECTIONS", "2"), ("MAILRUN_WEB__HEADER_TIMEOUT_MS", "200")]).await;
    // Silent clients occupy all connections.
    let mut silent = Vec::new();
    for _ in 0..20 {
        silent.push(send(&world, "GET / HTTP/1.1\r\n").await);
    }
    let answered = rest(send(&world, "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n").await).await;
    assert!(answered.starts_with("HTTP/1.1 200 OK"), "{answered}");
}

#[tokio::test]
async fn slow_uploads_do_not_block_other_forms() {
    let world = World::new(&[("MAILRUN_WEB__MAX_BODY_BYTES", "10000000")]).await;
    let head = "POST /invites HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-www-form-urlencoded\r\n";
    let mut slow = Vec::new();
    for _ in 0..4 {
        let mut upload = send(&world, &format!("{head}Content-Length: 10000000\r\n\r\nemails=")).await;
        // A byte from time to time, so that it does not time out.
        slow.push(tokio::spawn(async move {
            while upload.write_all(b"x").await.is_ok() {
                sleep(Duration::from_secs(5)).await;
            }
        }));
    }
    let list: String = (0..10_000).map(|number| format!("guest-{number}@example.org\n")).collect();
    world.invite(&list).await;
    world.invite("ann@example.org").await;
    slow.into_iter().for_each(|upload| upload.abort());
}

/// Whether the outbox is empty.
async fn is_published(world: &World) -> bool {
    let waiting = "SELECT count(*) FROM outbox WHERE published_at IS NULL";
    sqlx::query_scalar::<_, i64>(waiting).fetch_one(&world.pool).await.unwrap() == 0
}

#[tokio::test]
async fn pages_waiting_for_the_database_do_not_delay_the_outbox() {
    let mut world = World::new(&[]).await;
    let run = world.invite("ann@example.org").await;
    until("the run is published", async || is_published(&world).await).await;
    world.kill(0);
    world.set("MAILRUN_DATABASE__MAX_CONNECTIONS", "1".into());
    world.set("MAILRUN_DATABASE__ANSWER_TIMEOUT_MS", "3600000".into());
    world.start(&["web"]);
    until("the pages answer", async || world.client.get(&world.web).send().await.is_ok()).await;

    // A page holds the pages' only connection as long as this transaction lasts.
    let mut lock = world.pool.begin().await.unwrap();
    sqlx::query("LOCK TABLE runs IN ACCESS EXCLUSIVE MODE").execute(&mut *lock).await.unwrap();
    let (client, url) = (world.client.clone(), run.clone());
    let page = tokio::spawn(async move { client.get(url).send().await });
    until("the page waits", async || {
        let waiting = "SELECT count(*) FROM pg_locks l JOIN pg_stat_activity a USING (pid)
                       WHERE NOT l.granted AND a.datname = current_database()";
        sqlx::query_scalar::<_, i64>(waiting).fetch_one(&world.pool).await.unwrap() > 0
    })
    .await;
    sqlx::query("UPDATE outbox SET published_at = NULL").execute(&world.pool).await.unwrap();
    until("the outbox is published meanwhile", async || is_published(&world).await).await;
    assert_eq!(world.client.get(format!("{}/healthz", world.web)).send().await.unwrap().status(), 200);
    lock.rollback().await.unwrap();
    assert_eq!(page.await.unwrap().unwrap().status(), 200);
}
