//! Refusals about us pause the relay; refusals about a recipient affect only that recipient.

use super::*;

/// Each entry is the reply to RCPT of one mail, all on one connection.
fn answers(replies: &[&'static str]) -> Vec<Step> {
    let mut script = hello("250 hi");
    for reply in replies {
        script.extend([Step::Expect("MAIL", "250 ok"), Step::Expect("RCPT", reply)]);
        if reply.starts_with('2') {
            script.extend([Step::Expect("DATA", "354 go"), Step::Content("250 taken")]);
        } else {
            script.push(Step::Expect("RSET", "250 ok"));
        }
    }
    script
}

async fn send(mailer: &Smtp, email: &str) -> Outcome {
    mailer.send(&mail(email), &Attempt::unchecked()).await
}

#[tokio::test]
async fn a_refusal_about_us_pauses_the_relay_and_fails_no_mail() {
    for refusal in [
        "550 relay not permitted",
        "550 Please turn on SMTP Authentication in your mail client",
        "504 5.5.2 <w>: Helo command rejected: need fully-qualified hostname",
        "553 5.7.1 <mailrun@localhost>: Sender address rejected: not owned by user bulk",
        "554 5.7.1 Service unavailable; Client host [192.0.2.1] blocked using list.example",
        "550 5.1.1 <ann@example.org>: too many recipients this hour",
        "550 exceeded its 24-hour sending limit",
    ] {
        let server = Server::start(vec![answers(&[refusal])]).await;
        let mailer = mailer(&config(&[plain(&server)]));
        let outcome = send(&mailer, "ann@example.org").await;
        assert!(refusal.contains(&later(&outcome)[..9]), "{outcome:?}");
        assert!(matches!(mailer.gate(), Gate::Closed { reason, .. } if reason == later(&outcome)));
    }
}

#[tokio::test]
async fn a_paused_relay_is_probed_with_one_message() {
    let server = Server::start(vec![answers(&["550 relay not permitted"]), takes_mail()]).await;
    let mailer = eager(&config(&[plain(&server)]));
    assert!(matches!(send(&mailer, "ann@example.org").await, Outcome::Later(_)));
    assert_eq!(mailer.gate(), Gate::Trying);
    assert_eq!(send(&mailer, "bob@example.org").await, Outcome::Sent);
    assert_eq!(mailer.gate(), Gate::Open);
}

#[tokio::test]
async fn a_single_deferred_recipient_costs_only_its_own_tries() {
    for deferral in ["454 4.7.1 relay access denied", "452 4.5.3 too many", "450 too many messages for this recipient"]
    {
        let script = [deferral, "250 ok", deferral, "250 ok", deferral, deferral, deferral, "250 ok"];
        let server = Server::start(vec![answers(&script)]).await;
        let mailer = mailer(&SmtpConfig { connections: 1, ..config(&[plain(&server)]) });
        for (number, answer) in script.iter().enumerate() {
            let email =
                if answer.starts_with('2') { format!("{number}@other.example") } else { "ann@example.org".into() };
            let outcome = send(&mailer, &email).await;
            assert_eq!(matches!(outcome, Outcome::Retry(_)), !answer.starts_with('2'), "{outcome:?}");
            assert_eq!(mailer.gate(), Gate::Open);
        }
    }
}

#[tokio::test]
async fn a_single_recipient_refused_again_does_not_pause_the_relay_again() {
    let refusal = "550 5.7.1 relaying denied";
    let script = vec![answers(&[refusal]), answers(&["250 ok", refusal, "250 ok", refusal])];
    let server = Server::start(script).await;
    let mailer = eager(&SmtpConfig { connections: 1, ..config(&[plain(&server)]) });
    assert!(matches!(send(&mailer, "ann@example.org").await, Outcome::Later(_)));
    for _ in 0..2 {
        assert_eq!(send(&mailer, "bob@example.org").await, Outcome::Sent);
        assert!(matches!(send(&mailer, "ann@example.org").await, Outcome::Retry(_)));
        assert_eq!(mailer.gate(), Gate::Open);
    }
}

#[tokio::test]
async fn deferrals_at_several_domains_pause_the_relay() {
    let server = Server::start(vec![answers(&["454 4.7.1 Relay access denied"; 9])]).await;
    let mailer = mailer(&SmtpConfig { connections: 1, ..config(&[plain(&server)]) });
    let mut outcomes = Vec::new();
    for domain in ["one.example", "one.example", "two.example"] {
        outcomes.push(send(&mailer, &format!("{}@{domain}", outcomes.len())).await);
    }
    assert!(matches!(outcomes[..], [Outcome::Retry(_), Outcome::Retry(_), Outcome::Later(_)]), "{outcomes:?}");
    assert!(matches!(mailer.gate(), Gate::Closed { reason, .. } if reason.contains("Relay access denied")));
}

#[tokio::test]
async fn greylisting_never_pauses_the_relay() {
    let server = Server::start(vec![answers(&["451 4.7.1 Greylisted, try again in 5 minutes"; 12])]).await;
    let mailer = mailer(&SmtpConfig { connections: 1, ..config(&[plain(&server)]) });
    for number in 0..12 {
        assert!(matches!(send(&mailer, &format!("a@{number}.example")).await, Outcome::Retry(_)));
    }
    assert_eq!(mailer.gate(), Gate::Open);
}

#[tokio::test]
async fn a_server_without_ehlo_gets_helo() {
    let old = |first| {
        let mut script = vec![Step::Say("220 hi"), Step::Expect("EHLO", first), Step::Expect("HELO tests", "250 hi")];
        script.extend(takes_mail().into_iter().skip(2));
        script
    };
    for first in ["500 what?", "502 not implemented", "550 no"] {
        let server = Server::start(vec![old(first)]).await;
        assert_eq!(send(&mailer(&config(&[plain(&server)])), "ann@example.org").await, Outcome::Sent);
    }
    // Not after 421, and not if a login is required.
    let server = Server::start(vec![old("421 closing")]).await;
    assert!(later(&send(&mailer(&config(&[plain(&server)])), "ann@example.org").await).contains("421"));
    let server = Server::start(vec![old("500 what?")]).await;
    let url = format!("smtp://ann:secret@127.0.0.1:{}?tls=none", server.port);
    assert!(later(&send(&mailer(&config(&[url])), "ann@example.org").await).contains("EHLO was refused"));
    assert_eq!(server.count("HELO"), 0);
}

#[tokio::test]
async fn a_bare_host_name_is_not_used_in_ehlo() {
    let server = Server::start(vec![takes_mail()]).await;
    let _ = send(&mailer(&SmtpConfig { hello: None, ..config(&[plain(&server)]) }), "ann@example.org").await;
    let heard = server.heard();
    let name = heard[0].strip_prefix("EHLO ").unwrap();
    assert!(name.contains('.') && (name.starts_with('[') || !name.starts_with("127")), "{name}");
}

#[tokio::test]
async fn unread_bytes_close_the_connection() {
    // After an accepted message: the mail was sent, and the next one uses another connection.
    let chatty = until(5, Step::Content("250 taken\r\n250 what else"));
    let server = Server::start(vec![chatty, takes_mail()]).await;
    let mailer = mailer(&SmtpConfig { connections: 1, ..config(&[plain(&server)]) });
    assert_eq!(send(&mailer, "ann@example.org").await, Outcome::Sent);
    assert_eq!(send(&mailer, "bob@example.org").await, Outcome::Sent);
    assert_eq!(server.connections(), 2);
    // Before the message: it was certainly not sent.
    let script = until(4, Step::Expect("DATA", "354 go\r\n250 taken"));
    let server = Server::start(vec![script]).await;
    let outcome = send(&super::mailer(&config(&[plain(&server)])), "ann@example.org").await;
    assert!(matches!(&outcome, Outcome::Retry(reason) if reason.contains("more than one reply")), "{outcome:?}");
}
