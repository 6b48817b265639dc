//! Bounces end to end: mails received by a mail server are returned and passed to `mailrun bounce`.

use std::{
    collections::HashMap,
    io::Write as _,
    process::{Command, Stdio},
};

use crate::support::{MAILRUN, World};
use mail_parser::MessageParser;
use mailrun_sink::{Options, Sink};
use reqwest::{
    Client,
    header::{AUTHORIZATION, HeaderValue},
    redirect,
};

const KEY: &str = "a-key-for-the-hook";
const PEOPLE: [&str; 6] = [
    "ann@example.org",
    "bob@example.org",
    "carol@example.org",
    "dora@bücher.example",
    "eve@example.org",
    "fay@example.org",
];

/// Passes a mail on like a mail server, and returns the exit code.
fn bounce(world: &World, settings: &[(&str, &str)], mail: &[u8]) -> i32 {
    let listen = world.web.strip_prefix("http://").unwrap();
    let mut command = Command::new(MAILRUN);
    command.arg("bounce").env_clear().env("MAILRUN_WEB__LISTEN", listen).env("MAILRUN_WEB__HOOK_KEY", KEY);
    command.envs(settings.iter().copied()).stdin(Stdio::piped()).stdout(Stdio::null());
    let mut child = command.spawn().unwrap();
    // A process that ends early closes the pipe; only its exit code matters.
    let _ = child.stdin.take().unwrap().write_all(mail);
    child.wait().unwrap().code().unwrap()
}

/// A delivery status notification about one message.
fn dsn(recipient: &str, status: &str, diagnostic: &str, message_id: &str) -> Vec<u8> {
    format!(
        "Return-Path: <>\nFrom: MAILER-DAEMON@mx.example.net\nTo: bounces@party.example\nSubject: Undelivered mail\n\
         MIME-Version: 1.0\nContent-Type: multipart/report; report-type=delivery-status; boundary=b0\n\n\
         --b0\nContent-Type: text/plain\n\nIt could not be delivered.\n\n\
         --b0\nContent-Type: message/delivery-status\n\nReporting-MTA: dns; mx.example.net\n\n\
         Final-Recipient: rfc822; {recipient}\nAction: failed\nStatus: {status}\nDiagnostic-Code: smtp; {diagnostic}\n\n\
         --b0\nContent-Type: text/rfc822-headers\n\nMessage-ID: <{message_id}>\nSubject: You are invited\n\n--b0--\n"
    )
    .into_bytes()
}

async fn suppressed(world: &World) -> Vec<(String, String)> {
    sqlx::query_as("SELECT email, reason::text FROM suppressions ORDER BY number").fetch_all(&world.pool).await.unwrap()
}

/// Invites [`PEOPLE`] by SMTP; returns the Message-ID and the link of each.
async fn invited() -> (World, HashMap<&'static str, (String, String)>) {
    let sink = Sink::start(Options::default()).await.unwrap();
    let relays = format!("smtp://{}?tls=none", sink.address());
    let mut world = World::new(&[
        ("MAILRUN_MAILER__KIND", "smtp"),
        ("MAILRUN_MAILER__SMTP__RELAYS", &relays),
        ("MAILRUN_MAILER__SMTP__FROM", "zoe@party.example"),
        ("MAILRUN_WEB__HOOK_KEY", KEY),
        ("MAILRUN_WEB__PUBLIC_URL", "https://invites.example.org"),
        ("MAILRUN_WEB__PASSWORD", "let me in"),
    ])
    .await;
    let login = HeaderValue::from_static("Basic OmxldCBtZSBpbg==");
    let client = Client::builder().no_proxy().redirect(redirect::Policy::none());
    world.client = client.default_headers([(AUTHORIZATION, login)].into_iter().collect()).build().unwrap();
    world.workers();
    let run = world.invite(&PEOPLE.join("\n")).await;
    assert_eq!(world.until_over(&run).await["sent"], 6);
    let mut sent = HashMap::new();
    for message in sink.mailbox().newest(None, 100) {
        let mail = MessageParser::default().parse(&message.raw).unwrap();
        let link = mail.header_raw("List-Unsubscribe").unwrap().trim().to_owned();
        let to = message.to[0].replace("xn--bcher-kva", "bücher");
        let to = *PEOPLE.iter().find(|one| **one == to).unwrap();
        sent.insert(to, (mail.message_id().unwrap().to_owned(), link));
    }
    assert_eq!(sent.len(), 6);
    (world, sent)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bounce_suppresses_the_recipient_of_the_named_message() {
    let (world, sent) = invited().await;
    let id = |email: &str| sent[email].0.as_str();
    const GONE: &str = "550 5.1.1 no such user";
    // Forged: with no message of ours, another person's, or an id in the previous format.
    for (recipient, message_id) in [
        ("ann@example.org", "64001.12b06094beb35fa29ecb1750595e94db@party.example"),
        ("ann@example.org", &format!("{}@party.example", "a".repeat(64))),
        ("ann@example.org", id("bob@example.org")),
        ("victim@example.net", id("bob@example.org")),
    ] {
        assert_eq!(bounce(&world, &[], &dsn(recipient, "5.1.1", GONE, message_id)), 0);
    }
    // About the sender, the network or the mail.
    for (status, diagnostic) in [
        ("5.0.0", "550 5.7.1 Message refused by local policy"),
        ("5.0.0", "552 Mailbox limit exceeded"),
        ("5.1.8", "550 5.1.8 Access denied, bad outbound sender"),
        ("5.4.316", "550 5.4.316 Message expired, connection refused"),
        ("4.4.1", "connection timed out"),
    ] {
        assert_eq!(bounce(&world, &[], &dsn("ann@example.org", status, diagnostic, id("ann@example.org"))), 0);
    }
    // One mail about many people.
    let mut many =
        String::from_utf8(dsn("bob@example.org", "5.7.1", "550 5.7.1 refused", id("bob@example.org"))).unwrap();
    let group =
        |number| format!("Final-Recipient: rfc822; guest-{number}@example.org\nAction: failed\nStatus: 5.1.1\n\n");
    let groups: String = (0..5_000).map(group).collect();
    many = many.replace("\nFinal-Recipient", &format!("\n{groups}Final-Recipient"));
    assert_eq!(bounce(&world, &[], many.as_bytes()), 0);
    assert_eq!(suppressed(&world).await, []);

    assert_eq!(bounce(&world, &[], &dsn("Ann@Example.org", "5.1.1", GONE, id("ann@example.org"))), 0);
    // The two spellings of a domain are one mailbox.
    assert_eq!(bounce(&world, &[], &dsn("dora@xn--bcher-kva.example", "5.0.0", GONE, id("dora@bücher.example"))), 0);
    let qmail = format!(
        "Return-Path: <>\nFrom: MAILER-DAEMON@mx.example.net\nSubject: failure notice\n\n\
         Hi. This is the qmail-send program at mx.example.net.\nThis is a permanent error; I've given up.\n\n\
         <bob@example.org>:\nRemote host said: {GONE}\n\n--- Below this line is a copy of the message.\n\nMessage-ID: <{}>\n",
        id("bob@example.org")
    );
    assert_eq!(bounce(&world, &[], qmail.as_bytes()), 0);
    // A relay has replaced the Message-ID; the unsubscribe link remains.
    let replaced = String::from_utf8(dsn("eve@example.org", "5.1.1", GONE, "0102@relay.example")).unwrap();
    let replaced =
        replaced.replace("Subject: You", &format!("List-Unsubscribe: {}\nSubject: You", sent["eve@example.org"].1));
    assert_eq!(bounce(&world, &[], replaced.as_bytes()), 0);
    let arf = |kind: &str| {
        format!(
            "From: feedback@provider.example\nMIME-Version: 1.0\n\
             Content-Type: multipart/report; report-type=feedback-report; boundary=b0\n\n\
             --b0\nContent-Type: message/feedback-report\n\nFeedback-Type: {kind}\nVersion: 1\n\n\
             --b0\nContent-Type: message/rfc822\n\nMessage-ID: <{}>\nTo: carol@example.org\n\nHello\n\n--b0--\n",
            id("carol@example.org")
        )
    };
    assert_eq!(bounce(&world, &[], arf("auth-failure").as_bytes()), 0);
    assert_eq!(bounce(&world, &[], arf("abuse").as_bytes()), 0);
    let expected = [
        ("ann@example.org", "bounced"),
        ("dora@", "bounced"),
        ("bob@example.org", "bounced"),
        ("eve@example.org", "bounced"),
        ("carol@example.org", "complained"),
    ];
    let found = suppressed(&world).await;
    assert_eq!(found.len(), expected.len(), "{found:?}");
    for ((email, reason), (start, why)) in found.iter().zip(expected) {
        assert!(email.starts_with(start) && reason == why, "{found:?}");
    }
    for email in PEOPLE {
        assert!(!world.log().contains(email), "an address is in the log");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bounce_is_deferred_while_the_web_server_is_down_and_never_returned() {
    let mut world = World::new(&[("MAILRUN_WEB__HOOK_KEY", KEY)]).await;
    let report = dsn("ann@example.org", "5.1.1", "550 5.1.1 no such user", "x@party.example");
    assert_eq!(bounce(&world, &[], &report), 0);
    let reply = b"From: Ann <ann@example.org>\nSubject: Out of office\nAuto-Submitted: auto-replied\n\nI am away.\n";
    let long = [&report[..], &vec![b'x'; 6 * 1024 * 1024]].concat();
    for mail in [&reply[..], b"", b"hello", b"{", &[0xff; 1000], b"From: a@x.org\n\n", &long] {
        assert_eq!(bounce(&world, &[], mail), 0, "other mail is not a failure");
    }
    let other_key = ("MAILRUN_WEB__HOOK_KEY", "another-key-for-the-hook");
    assert_eq!(bounce(&world, &[other_key], &report), 75);
    assert_eq!(bounce(&world, &[("MAILRUN_WEB__HOOK_KEY", "short")], &report), 75, "invalid settings");
    assert_eq!(bounce(&world, &[("MAILRUN_WEB__LISTEN", "127.0.0.1:1")], &report), 75);
    let wrong = Command::new(MAILRUN).args(["bounce", "--nonsense"]).stdin(Stdio::null()).status().unwrap();
    assert_eq!(wrong.code(), Some(75));
    world.kill(0);
    for mail in [&report[..], reply, b""] {
        assert_eq!(bounce(&world, &[], mail), 75);
    }
}
