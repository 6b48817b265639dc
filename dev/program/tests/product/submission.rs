//! What the form says of a list when the database goes away while it is taken in, and when it is sent again.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
};

use crate::support::{World, field, until};
use reqwest::header::LOCATION;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, copy},
    net::{TcpListener, TcpStream},
};
use url::Url;

/// What the proxy in front of PostgreSQL does.
const PASS: u8 = 0;
/// It cuts a submission off when its commit is on its way, and everyone from then on.
const CUT_AT_COMMIT: u8 = 1;
/// The same before the commit.
const CUT_BEFORE: u8 = 2;
const DEAD: u8 = 3;

/// Starts the proxy, and has the pages use it.
async fn behind_proxy(world: &mut World) -> Arc<AtomicU8> {
    let mut url = Url::parse(&world.stack.database_url(&world.name)).unwrap();
    let server = format!("127.0.0.1:{}", url.port().unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    url.set_port(Some(listener.local_addr().unwrap().port())).unwrap();
    let mode = Arc::new(AtomicU8::new(PASS));
    let shared = Arc::clone(&mode);
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            tokio::spawn(pass_on(client, server.clone(), Arc::clone(&shared)));
        }
    });
    world.kill(0);
    world.set("DATABASE_URL", url.into());
    world.start(&["web"]);
    until("the pages answer", async || {
        world.client.get(&world.web).send().await.is_ok_and(|page| page.status() == 200)
    })
    .await;
    mode
}

async fn pass_on(client: TcpStream, server: String, mode: Arc<AtomicU8>) {
    if mode.load(Ordering::SeqCst) == DEAD {
        return;
    }
    let server = TcpStream::connect(server).await.unwrap();
    let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
        (client.into_split(), server.into_split());
    let answers = tokio::spawn(async move { copy(&mut from_server, &mut to_client).await });
    let (mut buffer, mut submits) = (vec![0; 64 * 1024], false);
    while let Ok(read @ 1..) = from_client.read(&mut buffer).await {
        let sent = &buffer[..read];
        let holds = |what: &[u8]| sent.windows(what.len()).any(|window| window == what);
        submits |= holds(b"CREATE TEMP TABLE listed");
        let cut = match mode.load(Ordering::SeqCst) {
            CUT_BEFORE => submits,
            CUT_AT_COMMIT => submits && holds(b"COMMIT\0"),
            mode => mode == DEAD,
        };
        if cut {
            mode.store(DEAD, Ordering::SeqCst);
            answers.abort();
            // The answer stays out, and the commit arrives.
            if holds(b"COMMIT\0") {
                let _ = to_server.write_all(sent).await;
                let _ = to_server.shutdown().await;
                let _ = answers.await;
            }
            return;
        }
        if to_server.write_all(sent).await.is_err() {
            break;
        }
    }
    answers.abort();
}

async fn page(world: &World, path: &str) -> String {
    world.client.get(format!("{}{path}", world.web)).send().await.unwrap().text().await.unwrap()
}

#[tokio::test]
async fn nothing_was_kept_is_said_only_when_it_is_certain() {
    let mut world = World::new(&[]).await;
    let mode = behind_proxy(&mut world).await;
    let token = world.token().await;

    mode.store(CUT_BEFORE, Ordering::SeqCst);
    let (status, said) = world.submit(&token, "ann@example.org").await.unwrap_err();
    assert_eq!(status, 503);
    assert!(said.contains("Nothing was saved"), "{said}");

    let unknown = "It is not known whether the list was accepted. Send it again: nobody will be mailed twice.";
    mode.store(CUT_AT_COMMIT, Ordering::SeqCst);
    for attempt in ["the commit's answer is lost", "the database is away, and the first click may have been accepted"] {
        let (status, said) = world.submit(&token, "ann@example.org").await.unwrap_err();
        assert_eq!(status, 503, "{attempt}");
        assert!(said.contains(unknown) && !said.contains("Nothing was saved"), "{attempt}: {said}");
    }
    let (_, said) = world.submit("00000000-0000-4000-8000-000000000007", "bob@example.org").await.unwrap_err();
    assert!(said.contains("Nothing was saved"), "another list was never accepted: {said}");

    mode.store(PASS, Ordering::SeqCst);
    let run = world.submit(&token, "ann@example.org").await.unwrap();
    assert_eq!(world.progress(&run).await["total"], 1);
    let runs: i64 = sqlx::query_scalar("SELECT count(*) FROM runs").fetch_one(&world.pool).await.unwrap();
    assert_eq!(runs, 1, "the commit had arrived");
}

#[tokio::test]
async fn a_list_that_is_sent_again_after_its_run_was_cancelled_is_not_lost_on_that_run() {
    let mut world = World::new(&[]).await;
    let token = world.token().await;
    let cancelled = world.submit(&token, "ann@example.org").await.unwrap();
    world.client.post(format!("{cancelled}/cancel")).send().await.unwrap();
    world.workers();
    world.until_over(&cancelled).await;

    let (status, said) = world.submit(&token, "ann@example.org").await.unwrap_err();
    assert_eq!(status, 422);
    assert!(said.contains("its run was cancelled") && said.contains("ann@example.org"), "{said}");
    let fresh = field(&said, "token");
    assert_ne!(fresh, token);
    let again = world.submit(&fresh, "ann@example.org").await.unwrap();
    assert_ne!(again, cancelled);
    assert_eq!(world.until_over(&again).await["sent"], 1);
}

#[tokio::test]
async fn the_same_form_with_another_rate_says_which_one_applies() {
    let world = World::new(&[]).await;
    let token = world.token().await;
    let send = async |rate: &str| {
        let form =
            HashMap::from([("token", token.as_str()), ("emails", "ann@example.org"), ("sends_per_second", rate)]);
        let answer = world.client.post(format!("{}/invites", world.web)).form(&form).send().await.unwrap();
        answer.headers()[LOCATION].to_str().unwrap().to_owned()
    };
    let run = send("10").await;
    assert_eq!(send("10").await, run, "a second click");
    for (rate, words) in [("50", "the rate limit 50 a second"), ("", "no rate limit")] {
        let landed = send(rate).await;
        assert!(landed.starts_with(&run), "{landed}");
        let said = page(&world, &landed).await;
        assert!(said.contains("with the rate limit 10 a second, which still applies"), "{said}");
        assert!(said.contains(&format!("again with {words} changed nothing")), "{said}");
    }
    assert!(!page(&world, &run).await.contains("still applies"));
}
