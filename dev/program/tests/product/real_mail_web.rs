//! The pages and commands for real mail: texts, tests, unsubscribing, bounces, and the suppression list.

use std::{mem, process::Command};

use crate::support::{World, field, people, until};
use mailrun_broker::topology::depth;
use mailrun_core::{
    message::{ItemMessage, encode},
    signed_id::Named,
    unsubscribe::Signer,
};
use mailrun_ledger::signing;
use reqwest::{
    Client, Response,
    header::{AUTHORIZATION, HeaderValue, LOCATION},
    redirect,
};
use uuid::Uuid;

const KEY: &str = "a-key-for-the-hook";
const PUBLIC: (&str, &str) = ("MAILRUN_WEB__PUBLIC_URL", "https://invites.example.org/");
const PASSWORD: (&str, &str) = ("MAILRUN_WEB__PASSWORD", "let me in");

fn logged_in() -> Client {
    let login = HeaderValue::from_static("Basic OmxldCBtZSBpbg==");
    let client = Client::builder().no_proxy().redirect(redirect::Policy::none());
    client.default_headers([(AUTHORIZATION, login)].into_iter().collect()).build().unwrap()
}

/// The unsubscribe link of an address, with the actual address of the web server.
async fn link(world: &World, email: &str) -> String {
    let (item_id, run_id) =
        sqlx::query_as("SELECT i.id, i.run_id FROM run_items i JOIN users u ON u.id = i.user_id WHERE u.email = $1")
            .bind(email)
            .fetch_one(&world.pool)
            .await
            .unwrap();
    format!("{}/u/{}", world.web, signer(world).await.token(Named { run_id, item_id }))
}

async fn signer(world: &World) -> Signer {
    Signer::new(&signing::key(&mut world.pool.acquire().await.unwrap()).await.unwrap())
}

async fn suppressed(world: &World) -> Vec<(String, String)> {
    sqlx::query_as("SELECT email, reason::text FROM suppressions ORDER BY number").fetch_all(&world.pool).await.unwrap()
}

fn pairs(list: &[(String, String)]) -> Vec<(&str, &str)> {
    list.iter().map(|(email, reason)| (email.as_str(), reason.as_str())).collect()
}

async fn page(world: &World, path: &str) -> String {
    world.client.get(format!("{}{path}", world.web)).send().await.unwrap().text().await.unwrap()
}

async fn post(world: &World, path: &str, form: &[(&str, &str)]) -> Response {
    world.client.post(format!("{}{path}", world.web)).form(form).send().await.unwrap()
}

/// Like a mail provider: from another site, with the public host, without a login.
async fn one_click(world: &World, link: &str) -> (u16, String) {
    let answer = world
        .client
        .post(link)
        .header("host", "invites.example.org")
        .header("origin", "https://mail.example.com")
        .header("sec-fetch-site", "cross-site")
        .form(&[("List-Unsubscribe", "One-Click")])
        .send()
        .await
        .unwrap();
    (answer.status().as_u16(), answer.text().await.unwrap())
}

#[tokio::test]
async fn one_click_unsubscribes_and_later_runs_skip_the_person() {
    let mut world = World::new(&[PUBLIC, PASSWORD]).await;
    let anonymous = mem::replace(&mut world.client, logged_in());
    world.workers();
    let run = world.invite("ann@example.org\nbob@example.org").await;
    world.until_over(&run).await;
    let logged_in = mem::replace(&mut world.client, anonymous);
    let link = link(&world, "ann@example.org").await;

    let asked = world.client.get(&link).header("host", "invites.example.org").send().await.unwrap();
    assert_eq!(asked.status(), 200);
    let asked = asked.text().await.unwrap();
    assert!(asked.contains("a…@example.org") && !asked.contains("ann@example.org"), "{asked}");
    assert_eq!(suppressed(&world).await, [], "opening the page unsubscribes nobody");

    for _ in 0..2 {
        let (status, page) = one_click(&world, &link).await;
        assert_eq!(status, 200);
        assert!(page.contains("<h1>Unsubscribed"), "{page}");
    }
    assert_eq!(pairs(&suppressed(&world).await), [("ann@example.org", "unsubscribed")]);
    assert!(world.client.get(&link).send().await.unwrap().text().await.unwrap().contains("Already unsubscribed"));

    let (status, page) = one_click(&world, &format!("{}/u/AAAAAAAAACq7AzdmFRcHJIe4zqRIXDj4", world.web)).await;
    assert_eq!(status, 404);
    assert!(page.contains("Incomplete link"), "{page}");
    sqlx::query("DELETE FROM run_items").execute(&world.pool).await.unwrap();
    let (status, page) = one_click(&world, &link).await;
    assert_eq!(status, 410);
    assert!(page.contains("Invitation not found"), "{page}");
    for path in ["/", "/runs", "/suppressions"] {
        let url = format!("{}{path}", world.web);
        assert_eq!(world.client.get(url).send().await.unwrap().status(), 401, "{path}");
    }

    world.client = logged_in;
    let run = world.invite("ann@example.org\ncarol@example.org").await;
    assert_eq!(world.until_over(&run).await["total"], 1);
    let results = world.client.get(&run).send().await.unwrap().text().await.unwrap();
    assert!(results.contains("suppression list"), "{results}");
    let left_out: i32 =
        sqlx::query_scalar("SELECT suppressed FROM runs WHERE total = 1").fetch_one(&world.pool).await.unwrap();
    assert_eq!(left_out, 1);
}

#[tokio::test]
async fn a_link_works_with_characters_added_by_mail_programs() {
    let mut world = World::new(&[PUBLIC, PASSWORD]).await;
    let anonymous = mem::replace(&mut world.client, logged_in());
    world.invite("ann@example.org\nbob@example.org\ncarol@example.org").await;
    world.client = anonymous;
    let ann = link(&world, "ann@example.org").await;
    let (start, token) = ann.rsplit_once('/').unwrap();
    assert!(token.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit()), "{ann}");
    let get = async |url: String| world.client.get(url).header("host", "invites.example.org").send().await.unwrap();
    for end in ["", ".", ",", ")", ">", "/", ").", "%3E", "./", "?utm_source=x"] {
        let answer = get(format!("{ann}{end}")).await;
        assert_eq!(answer.status(), 200, "{end}");
        assert!(answer.text().await.unwrap().contains("a…@example.org"), "{end}");
    }
    let bob = link(&world, "bob@example.org").await;
    assert_eq!(one_click(&world, &format!("{bob}>.")).await.0, 200);
    let carol = link(&world, "carol@example.org").await;
    let upper = carol.strip_prefix(start).unwrap().to_uppercase();
    assert_eq!(one_click(&world, &format!("{start}{upper}")).await.0, 200);
    let expected = [("bob@example.org", "unsubscribed"), ("carol@example.org", "unsubscribed")];
    assert_eq!(pairs(&suppressed(&world).await), expected);
    // Any other path below it is answered without a login.
    for path in ["/u", "/u/", "/u/x/y", "/u/%2F", "/u/-_.,)%3E"] {
        assert_eq!(get(format!("{}{path}", world.web)).await.status(), 404, "{path}");
    }
}

#[tokio::test]
async fn a_link_of_another_run_unsubscribes_nobody() {
    let mut world = World::new(&[PUBLIC, PASSWORD]).await;
    world.client = logged_in();
    world.invite("ann@example.org").await;
    let item_id: i64 = sqlx::query_scalar("SELECT id FROM run_items").fetch_one(&world.pool).await.unwrap();
    // As after a restore: the number belongs to another person now.
    let token = signer(&world).await.token(Named { run_id: Uuid::new_v4(), item_id });
    assert_eq!(one_click(&world, &format!("{}/u/{token}", world.web)).await.0, 410);
    assert_eq!(suppressed(&world).await, []);
}

#[tokio::test]
async fn a_link_of_an_earlier_version_still_works() {
    let mut world = World::new(&[PUBLIC, PASSWORD]).await;
    world.client = logged_in();
    sqlx::query("UPDATE signing_key SET key = 'key'").execute(&world.pool).await.unwrap();
    sqlx::query("ALTER TABLE run_items ALTER COLUMN id RESTART WITH 42").execute(&world.pool).await.unwrap();
    world.invite("ann@example.org").await;
    let (status, page) = one_click(&world, &format!("{}/u/AAAAAAAAACq7AzdmFRcHJIe4zqRIXDj4.", world.web)).await;
    assert_eq!(status, 200, "{page}");
    assert_eq!(pairs(&suppressed(&world).await), [("ann@example.org", "unsubscribed")]);
}

#[tokio::test]
async fn suppressed_addresses_are_listed_and_skipped() {
    let mut world = World::new(&[]).await;
    world.workers();
    assert_eq!(post(&world, "/suppressions", &[("email", "Ann <Ann@Example.org>")]).await.status(), 303);
    let refused = post(&world, "/suppressions", &[("email", "nobody")]).await;
    assert_eq!(refused.status(), 422);
    assert!(refused.text().await.unwrap().contains("This has no @ sign."));

    let run = world.invite("ann@example.org\nbob@example.org").await;
    let over = world.until_over(&run).await;
    assert_eq!((over["total"].as_i64(), over["sent"].as_i64()), (Some(1), Some(1)));
    let results = world.client.get(&run).send().await.unwrap().text().await.unwrap();
    assert!(results.contains("suppression list"), "{results}");
    let (status, refused) = world.submit(&world.token().await, "ann@example.org").await.unwrap_err();
    assert_eq!(status, 422);
    assert!(refused.contains("Nobody in the list can be invited.") && refused.contains("on the suppression list"));

    let list = page(&world, "/suppressions").await;
    assert!(list.contains("ann@example.org") && list.contains("Added manually"), "{list}");
    let number: i64 = sqlx::query_scalar("SELECT number FROM suppressions").fetch_one(&world.pool).await.unwrap();
    assert_eq!(post(&world, &format!("/suppressions/{number}/remove"), &[]).await.status(), 303);
    let run = world.invite("ann@example.org").await;
    assert_eq!(world.until_over(&run).await["sent"], 1);
}

#[tokio::test]
async fn a_person_suppressed_during_a_run_is_skipped() {
    let mut world = World::new(&[PUBLIC, PASSWORD]).await;
    world.client = logged_in();
    let run = world.invite(&people(40)).await;
    world.client.post(format!("{run}/pause")).send().await.unwrap();
    world.workers();
    for email in ["guest-000007@example.org", "guest-000031@example.org"] {
        let link = link(&world, email).await;
        assert_eq!(one_click(&world, &link).await.0, 200);
    }
    world.client.post(format!("{run}/resume")).send().await.unwrap();
    let over = world.until_over(&run).await;
    assert_eq!((over["sent"].as_i64(), over["skipped"].as_i64()), (Some(38), Some(2)));
    world.counters_equal_counts().await;
    assert_eq!(world.handed_over().len(), 38);
    let results = world.client.get(&run).send().await.unwrap().text().await.unwrap();
    assert!(results.contains("2 people were skipped"), "{results}");
}

/// A signed message of Amazon SNS.
fn sns_bounce() -> String {
    let signature = include_str!("../../../../web/src/sns/test_sha1.txt").trim();
    include_str!("../../../../web/src/report/fixtures/sns_bounce.json").replace("EXAMPLE", signature)
}

#[tokio::test]
async fn bounces_require_the_key_and_suppress() {
    let world = World::new(&[("MAILRUN_WEB__HOOK_KEY", KEY)]).await;
    let url = format!("{}/hooks/bounces", world.web);
    let report = |body: &str| {
        let request = world.client.post(&url).header("host", "invites.example.org");
        request.header("content-type", "text/plain").body(body.to_owned())
    };
    let postmark = include_str!("../../../../web/src/report/fixtures/postmark_bounce.json");
    let without = report(postmark).send().await.unwrap();
    assert_eq!(without.status(), 401);
    assert!(without.headers()["www-authenticate"].to_str().unwrap().starts_with("Basic"));
    assert_eq!(report(postmark).bearer_auth("another-key-for-the-hook").send().await.unwrap().status(), 401);
    // A topic that is not configured is refused, even with the key.
    let refused = report(&sns_bounce()).bearer_auth(KEY).send().await.unwrap();
    assert_eq!(refused.status(), 403);
    assert!(refused.text().await.unwrap().contains("web.sns_topics"));
    // It names no message of ours.
    let mail = include_str!("../../../../web/src/report/fixtures/postfix.eml");
    let taken = report(mail).bearer_auth(KEY).send().await.unwrap();
    assert_eq!(taken.text().await.unwrap(), "Accepted. Suppressed addresses: 0, new: 0.\n");
    assert_eq!(suppressed(&world).await, []);

    assert_eq!(report(postmark).basic_auth("mailrun", Some(KEY)).send().await.unwrap().status(), 200);
    let complaint = include_str!("../../../../web/src/report/fixtures/ses_complaint.json");
    let taken = report(complaint).bearer_auth(KEY).send().await.unwrap();
    assert_eq!(taken.text().await.unwrap(), "Accepted. Suppressed addresses: 1, new: 1.\n");
    // The first reason stays.
    let again = report(&complaint.replace("abuse", "fraud")).bearer_auth(KEY).send().await.unwrap();
    assert_eq!(again.text().await.unwrap(), "Accepted. Suppressed addresses: 1, new: 0.\n");
    let expected = [("john@example.com", "bounced"), ("richard@example.com", "complained")];
    assert_eq!(pairs(&suppressed(&world).await), expected);

    let unsupported = report("hello").bearer_auth(KEY).send().await.unwrap();
    assert_eq!(unsupported.status(), 400);
    assert!(unsupported.text().await.unwrap().contains("RFC 3464"));
    for (email, _) in expected {
        assert!(!world.log().contains(email), "an address is in the log");
    }
}

#[tokio::test]
async fn amazon_sns_messages_require_a_signature_and_no_key() {
    let certificate = concat!(env!("CARGO_MANIFEST_DIR"), "/../../web/src/sns/test_certificate.pem");
    let topic = "arn:aws:sns:eu-west-1:123456789012:bounces";
    let world = World::new(&[("MAILRUN_WEB__SNS_TOPICS", topic), ("MAILRUN_WEB__SNS_CERTIFICATES", certificate)]).await;
    let report = async |body: String| {
        let url = format!("{}/hooks/bounces", world.web);
        let request = world.client.post(url).header("host", "invites.example.org").body(body);
        let answer = request.send().await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap())
    };
    // Unsigned, changed, of another topic, with another host's certificate, and not of SNS at all.
    for wrong in [
        include_str!("../../../../web/src/report/fixtures/sns_bounce.json").to_owned(),
        sns_bounce().replace("Jane@example.com", "Mary@example.com"),
        sns_bounce().replace(topic, "arn:aws:sns:eu-west-1:210987654321:bounces"),
        sns_bounce().replace("https://sns.eu-west-1.amazonaws.com/Simple", "https://evil.example/Simple"),
    ] {
        assert_eq!(report(wrong).await.0, 403);
    }
    for other in [include_str!("../../../../web/src/report/fixtures/ses_complaint.json"), "hello"] {
        assert_eq!(report(other.to_owned()).await.0, 401, "raw delivery is not signed, and needs the key");
    }
    assert_eq!(suppressed(&world).await, []);

    let confirmation = include_str!("../../../../web/src/report/fixtures/sns_confirmation.json");
    let (status, noted) = report(confirmation.to_owned()).await;
    assert!(status == 200 && noted.contains("open the SubscribeURL"), "{status} {noted}");
    assert!(world.log().contains("https://sns.eu-west-1.amazonaws.com/?Action=ConfirmSubscription"));
    assert_eq!(report(sns_bounce()).await, (200, "Accepted. Suppressed addresses: 2, new: 2.\n".to_owned()));
    let expected = [("jane@example.com", "bounced"), ("richard@example.com", "bounced")];
    assert_eq!(pairs(&suppressed(&world).await), expected);
}

#[tokio::test]
async fn the_hook_is_disabled_without_a_key() {
    let world = World::new(&[]).await;
    let answer = world.client.post(format!("{}/hooks/bounces", world.web)).bearer_auth("").body("{}");
    assert_eq!(answer.send().await.unwrap().status(), 404);
}

#[tokio::test]
async fn text_errors_are_shown_beside_the_field_and_the_text_is_kept() {
    let world = World::new(&[]).await;
    let token = world.token().await;
    let form = async |subject: &str, body: &str| {
        let fields = [("token", token.as_str()), ("emails", "ann@example.org"), ("subject", subject), ("body", body)];
        post(&world, "/invites", &fields).await
    };
    let refused = form("", "Come to the *party*").await;
    assert_eq!(refused.status(), 422);
    let refused = refused.text().await.unwrap();
    assert!(refused.contains("id=\"subject-problem\"") && !refused.contains("id=\"body-problem\""), "{refused}");
    assert!(refused.contains("Come to the *party*") && refused.contains("ann@example.org"), "{refused}");
    for subject in ["two\r\nlines", &"x".repeat(201)] {
        assert_eq!(form(subject, "Come!").await.status(), 422);
    }
    let refused = form("Hello", &"x".repeat(100_001)).await.text().await.unwrap();
    assert!(refused.contains("id=\"body-problem\""));

    let refused = form("Hello {{ name }}", "Dear {{ nmae }},\ncome!").await.text().await.unwrap();
    assert!(refused.contains("Line 1 of the text has the placeholder nmae"), "{refused}");
    assert!(refused.contains("id=\"body-problem\"") && !refused.contains("id=\"subject-problem\""), "{refused}");

    let accepted = form("Hello {{ name }}", "Come!\r\nBring cake.").await;
    assert_eq!(accepted.status(), 303);
    let again = form("Hello {{ name }}", "Come!\r\nBring cake.").await;
    assert_eq!(again.headers()[LOCATION], accepted.headers()[LOCATION], "a second click is the same run");
    let other = form("Hello {{ name }}", "Stay at home.").await;
    assert_eq!(other.status(), 422, "another text is not the same run");
    let runs: Vec<(String, String)> =
        sqlx::query_as("SELECT subject, body FROM runs").fetch_all(&world.pool).await.unwrap();
    assert_eq!(pairs(&runs), [("Hello {{ name }}", "Come!\nBring cake.")]);
}

#[tokio::test]
async fn a_test_is_sent_once_and_invites_nobody() {
    let mut world = World::new(&[]).await;
    world.workers();
    let form =
        [("subject", "Hello"), ("body", "Come!"), ("test_email", "Me@Example.org"), ("emails", "ann@example.org")];
    let answer = post(&world, "/tests", &form).await;
    assert_eq!(answer.status(), 303);
    let test = answer.headers()[LOCATION].to_str().unwrap().to_owned();
    until("the test is sent", async || page(&world, &test).await.contains("Test sent")).await;
    let script = page(&world, &test).await;
    let (_, script) = script.split_once("/static/test.js").unwrap();
    let script = page(&world, &format!("/static/test.js{}", script.split_once('"').unwrap().0)).await;
    assert!(script.contains("use strict"), "{script}");
    let id = test.strip_prefix("/tests/").unwrap();
    assert_eq!(world.handed_over(), [format!("<test.{id}@mailrun>")]);
    // A repetition is recognised; the worker has received it when the next test, behind it on the queue, is sent.
    let item_id: i64 = sqlx::query_scalar("SELECT id FROM run_items").fetch_one(&world.pool).await.unwrap();
    let again =
        ItemMessage { run_id: id.parse().unwrap(), item_id, attempt: 1, tries: 1, replays: 0, impersonal: true };
    world.publish("mailrun.items", &encode(&again)).await;
    let second = post(&world, "/tests", &form).await.headers()[LOCATION].to_str().unwrap().to_owned();
    assert_ne!(second, test, "a finished one can be repeated");
    until("the second test is sent", async || page(&world, &second).await.contains("Test sent")).await;
    assert_eq!(world.handed_over().len(), 2);
    let known: i64 = sqlx::query_scalar("SELECT count(*) FROM users").fetch_one(&world.pool).await.unwrap();
    assert_eq!(known, 0, "nobody is invited by a test");
    let back = page(&world, &format!("/?test={id}")).await;
    assert!(back.contains("value=\"Hello\"") && back.contains("Come!") && back.contains("me@example.org"), "{back}");

    let refused = post(&world, "/tests", &[("test_email", "nobody"), ("emails", "ann@example.org")]).await;
    assert_eq!(refused.status(), 422);
    let refused = refused.text().await.unwrap();
    assert!(refused.contains("This has no @ sign.") && refused.contains("ann@example.org"), "{refused}");
    assert!(!field(&refused, "token").is_empty());
    world.counters_equal_counts().await;
}

#[tokio::test]
async fn a_test_that_fails_is_not_retried_and_leaves_no_dead_letter() {
    // Every item fails for as long as it is tried.
    let mut world = World::new(&[("MAILRUN_MAILER__SIMULATED__DOWN_EVERY", "1")]).await;
    world.workers();
    let form = [("subject", "Hello"), ("body", "Come!"), ("test_email", "me@example.org")];
    let test = post(&world, "/tests", &form).await.headers()[LOCATION].to_str().unwrap().to_owned();
    until("the test has failed", async || page(&world, &test).await.contains("Test not sent")).await;
    assert!(page(&world, &test).await.contains("Internet Down"));
    assert_eq!(depth(&world.channel().await, "mailrun.dead").await.unwrap(), 0);
    assert!(!page(&world, "/runs").await.contains(test.strip_prefix("/tests/").unwrap()), "it is in no list");
    let attempts: i64 = sqlx::query_scalar("SELECT count(*) FROM attempts").fetch_one(&world.pool).await.unwrap();
    assert_eq!(attempts, 1);
}

#[tokio::test]
async fn a_test_waits_for_a_sender_and_a_second_click_is_the_same_test() {
    let mut world = World::new(&[]).await;
    let form = [("subject", "Hello"), ("body", "Come!"), ("test_email", "me@example.org")];
    let first = post(&world, "/tests", &form).await.headers()[LOCATION].to_str().unwrap().to_owned();
    let second = post(&world, "/tests", &form).await.headers()[LOCATION].to_str().unwrap().to_owned();
    assert_eq!(first, second);
    assert!(page(&world, &first).await.contains("Sending the test"));
    world.worker("send,progress");
    until("the test is sent", async || page(&world, &first).await.contains("Test sent")).await;
}

#[tokio::test]
async fn an_operator_lists_adds_and_removes_suppressions() {
    let world = World::new(&[]).await;
    let run = |args: &[&str]| {
        let output = Command::new(crate::support::MAILRUN)
            .arg("suppressions")
            .args(args)
            .env("DATABASE_URL", world.stack.database_url(&world.name))
            .env("AMQP_URL", world.stack.amqp_url(&world.name))
            .output()
            .unwrap();
        (output.status.success(), String::from_utf8(output.stdout).unwrap())
    };
    assert_eq!(run(&["list"]), (true, "The suppression list is empty.\n".into()));
    let (ok, said) = run(&["add", "Ann@example.org", "bob@example.org"]);
    assert!(ok);
    assert_eq!(said, "2 addresses are suppressed.\n");
    assert!(!run(&["add", "carol@example.org", "nobody"]).0);
    assert_eq!(run(&["add", "ann@example.org"]).1, "0 addresses are suppressed; 1 was suppressed before.\n");
    assert_eq!(
        run(&["remove", "bob@example.org", "dora@example.org"]).1,
        "1 address is removed from the list and can be invited again; 1 was not on the list.\n"
    );
    let (_, list) = run(&[]);
    assert!(list.contains("ann@example.org") && list.ends_with("1 address is suppressed.\n"), "{list}");
}

#[tokio::test]
async fn an_operator_sends_one_mail_and_gets_its_result() {
    let world = World::new(&[]).await;
    assert!(world.run_to_end(&["test-send", "me@example.org"]));
    assert!(world.handed_over()[0].starts_with("<test."));
    assert!(!world.run_to_end(&["test-send", "nobody"]));
    assert!(world.log().contains("has no @ sign"), "{}", world.log());
}
