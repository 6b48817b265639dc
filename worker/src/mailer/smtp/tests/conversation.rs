//! The outcome of a mail for every reply, at every stage.

use super::*;

/// Sends one mail to a server with this script.
async fn outcome(script: Vec<Step>) -> Outcome {
    let server = Server::start(vec![script]).await;
    mailer(&config(&[plain(&server)])).send(&ann(), &Attempt::unchecked()).await
}

fn failed(reason: &str, bad_address: bool) -> Outcome {
    Outcome::Failed { reason: reason.into(), flagged: bad_address }
}

#[tokio::test]
async fn a_mail_is_delivered() {
    let server = Server::start(vec![takes_mail()]).await;
    let mailer = mailer(&config(&[plain(&server)]));
    assert_eq!(mailer.send(&ann(), &Attempt::unchecked()).await, Outcome::Sent);
    assert_eq!(server.heard(), ["EHLO tests", "MAIL FROM:<mailrun@localhost>", "RCPT TO:<ann@example.org>", "DATA"]);
    assert_eq!(mailer.gate(), Gate::Open);
}

#[tokio::test]
async fn a_refusal_before_the_mail_makes_the_relay_unavailable() {
    for script in [
        until(0, Step::Say("554 5.7.1 no")),
        until(0, Step::Say("421 busy")),
        until(1, Step::Expect("EHLO", "550 no")),
        until(2, Step::Expect("MAIL", "421 4.7.0 too many connections")),
        until(2, Step::Expect("MAIL", "451 4.3.0 text")),
        until(2, Step::Expect("MAIL", "554 5.7.1 text")),
        until(4, Step::Expect("DATA", "421 closing")),
    ] {
        let server = Server::start(vec![script]).await;
        let mailer = mailer(&config(&[plain(&server)]));
        let outcome = mailer.send(&ann(), &Attempt::unchecked()).await;
        assert!(matches!(&outcome, Outcome::Later(_)), "{outcome:?}");
        assert!(matches!(mailer.gate(), Gate::Closed { reason, .. } if reason == later(&outcome)));
    }
}

#[tokio::test]
async fn a_refusal_of_the_mail_fails_or_retries_the_mail() {
    for (stage, command) in [(3, "RCPT"), (4, "DATA")] {
        let script = until(stage, Step::Expect(command, "451 4.3.0 text"));
        assert_eq!(outcome(script).await, Outcome::Retry("451 4.3.0 text".into()));
        let script = until(stage, Step::Expect(command, "554 5.7.1 text"));
        assert_eq!(outcome(script).await, failed("554 5.7.1 text", false));
    }
    assert_eq!(outcome(until(5, Step::Content("451 4.3.0 text"))).await, Outcome::Retry("451 4.3.0 text".into()));
    assert_eq!(outcome(until(5, Step::Content("554 5.7.1 spam"))).await, failed("554 5.7.1 spam", false));
    let unknown = Step::Expect("RCPT", "550-5.1.1 <ann@example.org>: no such\r\n550 5.1.1 user");
    assert_eq!(outcome(until(3, unknown)).await, failed("550 5.1.1 <recipient>: no such user", true));
    assert_eq!(outcome(until(3, Step::Expect("RCPT", "550 no"))).await, failed("550 no", false));
}

#[tokio::test]
async fn a_connection_lost_before_the_message_costs_a_try() {
    for stage in [2, 3, 4] {
        let outcome = outcome(until(stage, Step::Drop)).await;
        assert!(matches!(&outcome, Outcome::Retry(reason) if reason.contains("lost")), "{outcome:?}");
    }
}

#[tokio::test]
async fn a_connection_lost_after_the_message_leaves_it_unknown() {
    let outcome = outcome(until(5, Step::Drop)).await;
    assert!(matches!(&outcome, Outcome::Unknown(reason) if reason.contains("the message")), "{outcome:?}");
}

#[tokio::test]
async fn an_unusual_reply_to_the_message_counts() {
    assert_eq!(outcome(until(5, Step::Content("250"))).await, Outcome::Sent);
    assert_eq!(outcome(until(5, Step::Content("250-a\r\n250 b"))).await, Outcome::Sent);
    assert!(matches!(outcome(until(5, Step::Content("354 go on"))).await, Outcome::Unknown(_)));
    assert!(matches!(outcome(until(5, Step::Content("what?"))).await, Outcome::Unknown(_)));
    assert!(matches!(outcome(until(4, Step::Expect("DATA", "250 ok"))).await, Outcome::Retry(_)));
}

#[tokio::test]
async fn a_silent_server_times_out_at_every_step() {
    for stage in 0..=5 {
        let server = Server::start(vec![until(stage, Step::Hang)]).await;
        let outcome = mailer(&short(&[plain(&server)])).send(&ann(), &Attempt::unchecked()).await;
        let (Outcome::Later(reason) | Outcome::Retry(reason) | Outcome::Unknown(reason)) = &outcome else {
            panic!("{outcome:?}")
        };
        assert!(reason.ends_with("within 150ms"), "{reason}");
        match stage {
            0 | 1 => assert!(matches!(outcome, Outcome::Later(_))),
            2..=4 => assert!(matches!(outcome, Outcome::Retry(_))),
            _ => assert!(matches!(outcome, Outcome::Unknown(_))),
        }
    }
}

#[tokio::test]
async fn an_unreachable_relay_is_unavailable() {
    let server = Server::start(vec![vec![]]).await;
    let vacant = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let outcome =
        mailer(&config(&[format!("smtp://127.0.0.1:{vacant}?tls=none")])).send(&ann(), &Attempt::unchecked()).await;
    assert!(later(&outcome).starts_with("the mail server can't be reached"), "{outcome:?}");
    let outcome = mailer(&config(&[plain(&server)])).send(&ann(), &Attempt::unchecked()).await;
    assert!(later(&outcome).contains("the greeting"), "{outcome:?}");
}

#[tokio::test]
async fn a_server_without_smtputf8_gets_no_utf8_address() {
    let petr = || mail("пётр@example.org");
    let server = Server::start(vec![takes_mail()]).await;
    let first = mailer(&SmtpConfig { connections: 1, ..config(&[plain(&server)]) });
    let outcome = first.send(&petr(), &Attempt::unchecked()).await;
    assert!(
        matches!(&outcome, Outcome::Failed { reason, flagged: false } if reason.contains("SMTPUTF8")),
        "{outcome:?}"
    );
    // The connection can still be used.
    assert_eq!(first.send(&ann(), &Attempt::unchecked()).await, Outcome::Sent);
    assert_eq!(server.connections(), 1);

    let mut script = hello("250-hi\r\n250-8BITMIME\r\n250-SIZE 9999\r\n250 SMTPUTF8");
    script.extend(takes_mail().into_iter().skip(2));
    let server = Server::start(vec![script]).await;
    assert_eq!(mailer(&config(&[plain(&server)])).send(&petr(), &Attempt::unchecked()).await, Outcome::Sent);
    let heard = server.heard();
    assert!(heard[1].contains(" SIZE=") && heard[1].ends_with(" BODY=8BITMIME SMTPUTF8"), "{heard:?}");
    assert_eq!(heard[2], "RCPT TO:<пётр@example.org>");
}

#[tokio::test]
async fn no_address_can_end_a_command() {
    let server = Server::start(vec![takes_mail()]).await;
    let mailer = mailer(&config(&[plain(&server)]));
    for email in
        ["a@example.org>\r\nRCPT TO:<eve@example.org", "a@example.org\nDATA", "a> b@example.org", "<a@b>@c.org"]
    {
        let outcome = mailer.send(&mail(email), &Attempt::unchecked()).await;
        assert!(matches!(outcome, Outcome::Failed { flagged: true, .. }), "{email}: {outcome:?}");
    }
    assert_eq!(server.connections(), 0);
}
