//! Access to the pages: passwords, proxies, and settings that would expose the pages.

use std::process::{Command, Stdio};

use crate::support::{MAILRUN, World, field, until};
use reqwest::{Client, Response};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

const PASSWORD: (&str, &str) = ("MAILRUN_WEB__PASSWORD", "correct horse");

/// The error of `mailrun web` for refused settings, before it connects to anything.
fn refused(settings: &[(&str, &str)]) -> String {
    let mut command = Command::new(MAILRUN);
    command.arg("web").env("MAILRUN_WEB__LISTEN", "127.0.0.1:0").envs(settings.iter().copied());
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(!output.status.success(), "{settings:?}");
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn refuses_settings_that_expose_the_pages() {
    for (settings, key) in [
        (&[("MAILRUN_WEB__PUBLIC_URL", "https://invites.example.org")][..], "web.public_url"),
        (&[("MAILRUN_WEB__TRUSTED_PROXIES", "127.0.0.1,10.0.0.0/8")], "web.trusted_proxies"),
        (&[("MAILRUN_WEB__LISTEN", "0.0.0.0:0")], "web.listen"),
        (&[("MAILRUN_WEB__PASSWORD", "")], "web.password"),
        (&[("MAILRUN_WEB__PASSWORD", "hunter2"), ("MAILRUN_WEB__LISTEN", "0.0.0.0:0")], "web.password"),
        (&[("MAILRUN_WEB__PUBLIC_URL", "https://example.org/invites"), PASSWORD], "web.public_url"),
    ] {
        let said = refused(settings);
        assert!(said.contains(key.split('.').next_back().unwrap()), "{key}: {said}");
        assert!(!said.contains("hunter2"), "{said}");
    }
}

async fn get(client: &Client, url: String, headers: &[(&str, &str)]) -> Response {
    let request = headers.iter().fold(client.get(url), |request, (name, value)| request.header(*name, *value));
    request.send().await.unwrap()
}

#[tokio::test]
async fn refuses_proxied_requests_without_a_password() {
    let world = World::new(&[]).await;
    for header in [
        ("x-forwarded-for", "192.0.2.7"),
        ("x-forwarded-host", "invites.example.org"),
        ("forwarded", "for=192.0.2.7"),
        ("x-real-ip", "192.0.2.7"),
        ("via", "1.1 proxy"),
    ] {
        for path in ["/", "/runs", "/suppressions", "/runs/x/progress"] {
            let answer = get(&world.client, format!("{}{path}", world.web), &[header]).await;
            assert_eq!(answer.status(), 403, "{header:?} {path}");
        }
    }
    assert_eq!(get(&world.client, world.web.clone(), &[]).await.status(), 200);

    // Like nginx with `proxy_pass http://127.0.0.1:8080` and nothing else.
    let address = world.web.trim_start_matches("http://");
    for (version, status) in [("1.0", "403"), ("1.1", "200")] {
        let mut connection = TcpStream::connect(address).await.unwrap();
        let request = format!("GET / HTTP/{version}\r\nHost: {address}\r\nConnection: close\r\n\r\n");
        connection.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        connection.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer.split(' ').nth(1), Some(status), "{answer}");
    }
}

#[tokio::test]
async fn failed_logins_are_logged_and_limited() {
    let world = World::new(&[PASSWORD]).await;
    let attempt = async |password: &str| {
        let answer = world.client.get(&world.web).basic_auth("ann", Some(password)).send().await.unwrap();
        (answer.status().as_u16(), answer.headers().contains_key("retry-after"))
    };
    assert_eq!(world.client.get(&world.web).send().await.unwrap().status(), 401, "not an attempt");
    assert_eq!(attempt("correct horse").await, (200, false));
    // All at once: an attempt counts before its answer is delayed.
    let guesses: Vec<String> = (0..30).map(|number| format!("hunter{number}")).collect();
    let answers = futures::future::join_all(guesses.iter().map(|guess| attempt(guess))).await;
    let with = |status| answers.iter().filter(|answer| answer.0 == status).count();
    assert_eq!((with(401), with(429)), (10, 20), "{answers:?}");
    assert!(answers.iter().all(|(status, waits)| (*status == 429) == *waits), "{answers:?}");
    assert_eq!(attempt("correct horse").await, (429, true), "a correct guess is not checked either");
    let page = world.client.get(&world.web).send().await.unwrap().text().await.unwrap();
    assert!(page.contains("Login required"), "{page}");

    let log = world.log();
    let lines: Vec<_> = log.lines().filter(|line| line.contains("login failed")).collect();
    assert_eq!(lines.len(), 10, "{log}");
    assert!(!log.contains("hunter") && !log.contains("correct horse"), "{log}");
    assert!(lines.iter().all(|line| !line.contains("127.0.0.1")), "{lines:?}");
}

#[tokio::test]
async fn accepts_a_form_through_a_proxy() {
    let world = World::new(&[
        PASSWORD,
        ("MAILRUN_WEB__TRUSTED_PROXIES", "127.0.0.1, 10.0.0.0/8"),
        ("MAILRUN_WEB__PUBLIC_URL", "https://public.example"),
    ])
    .await;
    let page =
        world.client.get(&world.web).basic_auth("", Some(PASSWORD.1)).send().await.unwrap().text().await.unwrap();
    let token = field(&page, "token");
    let send = async |headers: &[(&str, &str)]| {
        let form = [("token", token.as_str()), ("emails", "ann@example.org")];
        let request = world.client.post(format!("{}/invites", world.web)).basic_auth("", Some(PASSWORD.1)).form(&form);
        let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
        request.send().await.unwrap().status().as_u16()
    };
    let forwarded = [
        ("x-forwarded-for", "192.0.2.7"),
        ("x-forwarded-host", "invites.example.org"),
        ("x-forwarded-port", "8443"),
        ("x-forwarded-proto", "https"),
    ];
    let from = |origin| [&forwarded[..], &[("origin", origin)]].concat();
    assert_eq!(send(&from("https://invites.example.org:8443")).await, 303);
    assert_eq!(send(&[("host", "internal"), ("origin", "https://public.example")]).await, 303, "the public address");
    for origin in ["http://invites.example.org:8443", "https://invites.example.org", "https://evil.example", "null"] {
        assert_eq!(send(&from(origin)).await, 403, "{origin}");
    }

    // The limit applies to each client that the proxy names.
    let login = async |client: &str, password: &str| {
        let request = world.client.get(&world.web).basic_auth("", Some(password)).header("x-forwarded-for", client);
        request.send().await.unwrap().status().as_u16()
    };
    futures::future::join_all((0..10).map(|_| login("192.0.2.66", "wrong password"))).await;
    assert_eq!(login("192.0.2.66", PASSWORD.1).await, 429);
    assert_eq!(login("192.0.2.7", PASSWORD.1).await, 200);
    until("the run is kept", async || {
        sqlx::query_scalar::<_, i64>("SELECT count(*) FROM runs").fetch_one(&world.pool).await.unwrap() == 1
    })
    .await;
}

#[tokio::test]
async fn json_routes_answer_errors_as_problem_details() {
    let world = World::new(&[PASSWORD]).await;
    let ask = async |method: &str, path: &str, password: Option<&str>| {
        let request = world.client.request(method.parse().unwrap(), format!("{}{path}", world.web));
        let request = match password {
            Some(password) => request.basic_auth("", Some(password)),
            None => request,
        };
        request.header("accept", "application/json").send().await.unwrap()
    };
    let progress = "/runs/00000000-0000-4000-8000-000000000007/progress";
    let password = Some(PASSWORD.1);
    for (method, path, password, status) in [
        ("GET", progress, None, 401),
        ("GET", progress, Some("wrong password"), 401),
        ("GET", progress, password, 404),
        ("GET", "/runs/x/progress", password, 404),
        ("DELETE", progress, password, 405),
        ("DELETE", "/invites/count", password, 405),
        ("GET", "/nothing", None, 401),
        ("GET", "/nothing", password, 404),
    ] {
        let answer = ask(method, path, password).await;
        assert_eq!(answer.status(), status, "{method} {path}");
        assert_eq!(answer.headers()["content-type"], "application/problem+json", "{method} {path}");
        assert_eq!(answer.headers().contains_key("allow"), status == 405, "{method} {path}");
        let problem: Value = answer.json().await.unwrap();
        assert_eq!((&problem["type"], &problem["status"]), (&"about:blank".into(), &status.into()), "{path}");
        assert!(problem["title"].is_string() && problem["detail"].is_string(), "{problem}");
    }
    // A page's error remains a page.
    let page = ask("GET", "/runs/x", password).await;
    assert_eq!(
        (page.status().as_u16(), &page.headers()["content-type"]),
        (404, &"text/html; charset=utf-8".parse().unwrap())
    );
}

#[tokio::test]
async fn does_not_log_the_token_of_a_link() {
    let world = World::new(&[PASSWORD, ("RUST_LOG", "info,mailrun_web=trace,tower_http=trace,hyper=trace")]).await;
    for path in ["/u/s3cr3ttoken", "/u/s3cr3ttoken/more", "//u/s3cr3ttoken", "/U/s3cr3ttoken", "/u/?s3cr3ttoken"] {
        world.client.get(format!("{}{path}", world.web)).send().await.unwrap();
        world.client.post(format!("{}{path}", world.web)).send().await.unwrap();
    }
    let log = world.log();
    assert!(log.contains("/u/{*token}"), "{log}");
    assert!(!log.contains("s3cr3ttoken"), "{log}");
}
