//! The connection pool: limits, reuse, expiry.

use futures::future::join_all;

use super::*;

/// Accepts one mail, and closes the connection when the next one begins.
fn takes_one() -> Vec<Step> {
    let mut script = until(5, Step::Content("250 taken"));
    script.push(Step::Drop);
    script
}

/// A conversation that continues only after `count` connections were opened.
fn gathered(count: usize) -> Vec<Step> {
    let mut script = takes_mail();
    script.insert(2, Step::Gather(count));
    script
}

#[tokio::test]
async fn a_connection_is_reused() {
    let server = Server::start(vec![takes_mail()]).await;
    let mailer = mailer(&config(&[plain(&server)]));
    for _ in 0..5 {
        assert_eq!(mailer.send(&ann(), &Attempt::unchecked()).await, Outcome::Sent);
    }
    assert_eq!(server.connections(), 1);
}

#[tokio::test]
async fn a_connection_is_reused_after_a_refused_mail() {
    let mut script = until(3, Step::Expect("RCPT", "550 5.1.1 no"));
    script.push(Step::Expect("RSET", "250 ok"));
    script.extend(takes_mail().into_iter().skip(2));
    let server = Server::start(vec![script]).await;
    // With a single connection, the next mail waits until this one is released.
    let mailer = mailer(&SmtpConfig { connections: 1, ..config(&[plain(&server)]) });
    assert!(matches!(mailer.send(&ann(), &Attempt::unchecked()).await, Outcome::Failed { flagged: true, .. }));
    assert_eq!(mailer.send(&ann(), &Attempt::unchecked()).await, Outcome::Sent);
    assert_eq!((server.connections(), server.count("RSET")), (1, 1));
}

#[tokio::test]
async fn a_connection_that_died_while_idle_is_replaced() {
    let idle = || until(5, Step::Content("250 taken")).into_iter().chain([Step::Expect("MAIL", "421 idle")]).collect();
    for first in [takes_one(), idle()] {
        let server = Server::start(vec![first, takes_mail()]).await;
        let mailer = mailer(&config(&[plain(&server)]));
        for _ in 0..3 {
            assert_eq!(mailer.send(&ann(), &Attempt::unchecked()).await, Outcome::Sent);
        }
        assert_eq!(server.connections(), 2);
    }
}

#[tokio::test]
async fn a_dead_connection_is_replaced_only_once() {
    let server = Server::start(vec![takes_one(), until(2, Step::Drop)]).await;
    let mailer = mailer(&config(&[plain(&server)]));
    assert_eq!(mailer.send(&ann(), &Attempt::unchecked()).await, Outcome::Sent);
    assert!(matches!(mailer.send(&ann(), &Attempt::unchecked()).await, Outcome::Retry(_)));
    assert_eq!(server.connections(), 2);
}

#[tokio::test]
async fn there_are_never_more_connections_than_allowed() {
    let server = Server::start(vec![gathered(3)]).await;
    let mailer = mailer(&SmtpConfig { connections: 3, messages_per_connection: 4, ..config(&[plain(&server)]) });
    let outcomes = join_all((0..50).map(|_| async { mailer.send(&ann(), &Attempt::unchecked()).await })).await;
    assert!(outcomes.iter().all(|outcome| *outcome == Outcome::Sent), "{outcomes:?}");
    assert!(server.most_open() <= 3, "{}", server.most_open());
    assert!(server.connections() >= 50 / 4, "{}", server.connections());
}

#[tokio::test]
async fn a_connection_is_closed_after_its_maximum_of_mails() {
    let server = Server::start(vec![takes_mail()]).await;
    let mailer = mailer(&SmtpConfig { connections: 1, messages_per_connection: 2, ..config(&[plain(&server)]) });
    for _ in 0..5 {
        assert_eq!(mailer.send(&ann(), &Attempt::unchecked()).await, Outcome::Sent);
    }
    assert_eq!((server.connections(), server.count("QUIT")), (3, 2));
}

#[tokio::test]
async fn an_idle_connection_is_closed() {
    let server = Server::start(vec![takes_mail()]).await;
    let mailer = mailer(&SmtpConfig { idle: Duration::from_millis(20), ..config(&[plain(&server)]) });
    assert_eq!(mailer.send(&ann(), &Attempt::unchecked()).await, Outcome::Sent);
    // A slow machine may need longer.
    while server.count("QUIT") == 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(mailer.send(&ann(), &Attempt::unchecked()).await, Outcome::Sent);
    assert_eq!(server.connections(), 2);
}

#[tokio::test]
async fn an_idle_connection_makes_room_for_one_to_another_relay() {
    let first = Server::start(vec![takes_mail()]).await;
    let second = Server::start(vec![takes_mail()]).await;
    let mailer = mailer(&SmtpConfig { connections: 1, ..config(&[plain(&first), plain(&second)]) });
    for _ in 0..60 {
        assert_eq!(mailer.send(&ann(), &Attempt::unchecked()).await, Outcome::Sent);
    }
    for server in [first, second] {
        // At most its last connection may still be open.
        assert!(server.connections() > 1 && server.count("QUIT") + 1 >= server.connections());
        assert!(server.most_open() <= 2);
    }
}

#[tokio::test]
async fn connections_per_domain_are_bounded() {
    let server = Server::start(vec![gathered(2)]).await;
    let mailer = mailer(&SmtpConfig { per_domain: 1, connections: 10, ..config(&[plain(&server)]) });
    let mails = ["a@one.example", "b@ONE.example", "c@two.example", "d@two.example", "e@one.example"];
    let outcomes = join_all(mails.map(|email| {
        let mailer = &mailer;
        async move { mailer.send(&mail(email), &Attempt::unchecked()).await }
    }))
    .await;
    assert!(outcomes.iter().all(|outcome| *outcome == Outcome::Sent), "{outcomes:?}");
    assert_eq!(server.most_open(), 2);
}

#[tokio::test]
async fn the_next_relay_takes_over_from_an_unavailable_one() {
    let away = Server::start(vec![until(0, Step::Say("421 busy"))]).await;
    let there = Server::start(vec![takes_mail()]).await;
    let mailer = mailer(&config(&[plain(&away) + "&weight=1000", plain(&there)]));
    for _ in 0..20 {
        assert_eq!(mailer.send(&ann(), &Attempt::unchecked()).await, Outcome::Sent);
    }
    assert_eq!(mailer.gate(), Gate::Open);
    assert!(away.connections() <= 1);
    assert_eq!(there.count("DATA"), 20);
}

#[tokio::test]
async fn the_circuit_opens_lets_one_mail_try_and_closes() {
    let busy = || until(0, Step::Say("421 busy"));
    let server = Server::start(vec![busy(), busy(), takes_mail()]).await;
    let mailer = eager(&config(&[plain(&server)]));
    assert!(matches!(mailer.send(&ann(), &Attempt::unchecked()).await, Outcome::Later(_)));
    assert_eq!(mailer.gate(), Gate::Trying);
    assert!(matches!(mailer.send(&ann(), &Attempt::unchecked()).await, Outcome::Later(_)));
    assert_eq!(mailer.gate(), Gate::Trying);
    // Of many concurrent mails, one is the trial, and the others wait for its result.
    let outcomes = join_all((0..10).map(|_| async { mailer.send(&ann(), &Attempt::unchecked()).await })).await;
    assert!(outcomes.iter().all(|outcome| *outcome == Outcome::Sent), "{outcomes:?}");
    assert_eq!(mailer.gate(), Gate::Open);
}

#[tokio::test]
async fn no_connection_is_opened_while_the_circuit_is_open() {
    let server = Server::start(vec![until(0, Step::Say("421 busy"))]).await;
    let mailer = mailer(&config(&[plain(&server)]));
    for _ in 0..5 {
        assert_eq!(later(&mailer.send(&ann(), &Attempt::unchecked()).await), "the greeting was refused: 421 busy");
    }
    assert_eq!(server.connections(), 1);
}

#[tokio::test]
async fn a_mail_waiting_for_a_connection_is_deferred_when_the_relay_becomes_unavailable() {
    // The first mail gets no reply before its time limit, and holds the only connection.
    let server = Server::start(vec![until(1, Step::Hang)]).await;
    let mailer = mailer(&SmtpConfig { connections: 1, ..short(&[plain(&server)]) });
    let outcomes = join_all((0..10).map(|_| async { mailer.send(&ann(), &Attempt::unchecked()).await })).await;
    assert!(outcomes.iter().all(|outcome| later(outcome).contains("EHLO")), "{outcomes:?}");
    assert_eq!(server.connections(), 1);
}
