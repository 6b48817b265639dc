//! Commands sent together (RFC 2920), and messages in chunks (RFC 3030).

use std::collections::HashMap;

use futures::future::join_all;
use proptest::prelude::*;

use super::*;

const OFFERED: &str = "250-hi\r\n250-PIPELINING\r\n250 CHUNKING";

/// One mail that is accepted.
const ACCEPTED: [Step; 4] = [
    Step::Expect("MAIL", "250 ok"),
    Step::Expect("RCPT", "250 ok"),
    Step::Expect("DATA", "354 go"),
    Step::Content("250 2.0.0 taken"),
];

/// A conversation with these steps, after which all mail is accepted.
fn then(steps: &[Step]) -> Vec<Step> {
    hello(OFFERED)
        .into_iter()
        .chain(steps.iter().cloned())
        .chain([Step::Loop])
        .chain(ACCEPTED)
        .chain([Step::Loop])
        .collect()
}

fn numbered(number: usize) -> Mail {
    Mail { message_id: format!("<{number}.abc@mailrun>"), ..mail(&format!("p{number}@example.org")) }
}

/// Sends this many mails at the same time over one connection. Their outcomes are in the order of the mails.
async fn send(server: &Server, count: usize, parameters: &str) -> Vec<Outcome> {
    let relay = plain(server) + parameters;
    let mailer = mailer(&SmtpConfig { connections: 1, ..config(&[relay]) });
    let send = |number| {
        let mailer = &mailer;
        async move { mailer.send(&numbered(number), &Attempt::unchecked()).await }
    };
    join_all((0..count).map(send)).await
}

#[tokio::test]
async fn a_mail_on_a_busy_connection_takes_one_round_trip() {
    let server = Server::start(vec![then(&[])]).await;
    let outcomes = send(&server, 20, "").await;
    assert!(outcomes.iter().all(|outcome| *outcome == Outcome::Sent), "{outcomes:?}");
    assert_eq!((server.connections(), server.count("RSET"), server.taken().len()), (1, 0, 20));
    // EHLO, the first envelope, and then each message with the envelope of the next.
    assert!(server.turns() <= 22 + 2, "{}", server.turns());
}

#[tokio::test]
async fn a_relay_without_pipelining_gets_one_command_at_a_time() {
    for (hello, parameters) in [("250 hi", ""), (OFFERED, "&pipelining=off")] {
        let mut script = takes_mail();
        script[1] = Step::Expect("EHLO", hello);
        let server = Server::start(vec![script]).await;
        let outcomes = send(&server, 3, parameters).await;
        assert!(outcomes.iter().all(|outcome| *outcome == Outcome::Sent), "{outcomes:?}");
        assert!(server.turns() > 3 * 4, "{}", server.turns());
        assert_eq!(server.count("RSET"), 0);
    }
}

#[tokio::test]
async fn a_refused_recipient_affects_no_other_mail() {
    let refused = [
        Step::Expect("MAIL", "250 ok"),
        Step::Expect("RCPT", "550 5.1.1 no such user"),
        Step::Expect("DATA", "503 5.5.1 no recipients"),
    ];
    // A server may also ask for the message of no one.
    let asked = [
        Step::Expect("MAIL", "250 ok"),
        Step::Expect("RCPT", "550 5.1.1 no such user"),
        Step::Expect("DATA", "354 go"),
        Step::Expect(".", "554 5.5.1 no recipients"),
    ];
    for steps in [&refused[..], &asked[..]] {
        let server = Server::start(vec![then(&[&ACCEPTED[..], steps].concat())]).await;
        let outcomes = send(&server, 4, "").await;
        assert!(matches!(&outcomes[1], Outcome::Failed { flagged: true, .. }), "{outcomes:?}");
        for number in [0, 2, 3] {
            assert_eq!(outcomes[number], Outcome::Sent, "{outcomes:?}");
        }
        assert_eq!(server.connections(), 1);
        assert_eq!(server.taken(), [0, 2, 3].map(|number| format!("p{number}@example.org")));
    }
}

#[tokio::test]
async fn a_refused_message_leaves_the_next_mail_its_connection() {
    let refused = [&ACCEPTED[..3], &[Step::Content("554 5.7.1 spam")]].concat();
    let server = Server::start(vec![then(&refused)]).await;
    let outcomes = send(&server, 3, "").await;
    assert!(matches!(&outcomes[0], Outcome::Failed { .. }), "{outcomes:?}");
    assert_eq!(outcomes[1..], [Outcome::Sent, Outcome::Sent]);
    assert_eq!((server.connections(), server.count("RSET")), (1, 0));
}

#[tokio::test]
async fn a_connection_lost_with_a_message_leaves_only_that_one_unknown() {
    let dropped = [&ACCEPTED[..], &ACCEPTED[..3], &[Step::ContentAndDrop]].concat();
    let server = Server::start(vec![then(&dropped), then(&[])]).await;
    let outcomes = send(&server, 4, "").await;
    assert!(matches!(&outcomes[1], Outcome::Unknown(_)), "{outcomes:?}");
    for number in [0, 2, 3] {
        assert_eq!(outcomes[number], Outcome::Sent, "{outcomes:?}");
    }
    assert_eq!(server.connections(), 2);
}

#[tokio::test]
async fn a_relay_that_mishandles_pipelining_gets_one_command_at_a_time() {
    let rejects = vec![
        Step::Say("220 hi"),
        Step::Expect("EHLO", OFFERED),
        Step::Expect("MAIL", "503 5.5.0 Improper use of SMTP command pipelining"),
    ];
    // It drops what it has read behind the first command.
    let forgets = vec![Step::Say("220 hi"), Step::Expect("EHLO", OFFERED), Step::Expect("MAIL", "250 ok"), Step::Hang];
    for first in [rejects, forgets] {
        let mut second = takes_mail();
        second[1] = Step::Expect("EHLO", OFFERED);
        let server = Server::start(vec![first, second]).await;
        let mailer = mailer(&short(&[plain(&server)]));
        let outcome = mailer.send(&ann(), &Attempt::unchecked()).await;
        assert!(matches!(outcome, Outcome::Retry(_)), "{outcome:?}");
        let before = server.turns();
        assert_eq!(mailer.send(&ann(), &Attempt::unchecked()).await, Outcome::Sent);
        assert!(server.turns() >= before + 5, "one command at a time");
        assert_eq!(mailer.gate(), Gate::Open);
    }
}

#[tokio::test]
async fn a_chunk_takes_one_round_trip() {
    let chunk = |answer| [Step::Expect("MAIL", "250 ok"), Step::Expect("RCPT", "250 ok"), Step::Chunk(answer)];
    let mut script = hello(OFFERED);
    script.extend(chunk("554 5.7.1 spam"));
    script.extend([
        Step::Expect("MAIL", "250 ok"),
        Step::Expect("RCPT", "550 5.1.1 no"),
        Step::Chunk("503 no recipients"),
    ]);
    script.push(Step::Loop);
    script.extend(chunk("250 taken"));
    script.push(Step::Loop);
    let server = Server::start(vec![script]).await;
    let outcomes = send(&server, 6, "&chunking=on").await;
    assert!(matches!(&outcomes[0], Outcome::Failed { .. }), "{outcomes:?}");
    assert!(matches!(&outcomes[1], Outcome::Failed { flagged: true, .. }), "{outcomes:?}");
    assert!(outcomes[2..].iter().all(|outcome| *outcome == Outcome::Sent), "{outcomes:?}");
    assert_eq!((server.connections(), server.taken().len()), (1, 4));
    let server = Server::start(vec![[hello(OFFERED), vec![Step::Expect("MAIL", "250 ok"), Step::Drop]].concat()]).await;
    assert!(matches!(send(&server, 1, "&chunking=on").await[0], Outcome::Unknown(_)), "it had the whole message");
}

/// What a server does to one of the mails.
fn fault() -> impl Strategy<Value = Vec<Step>> {
    let reply = prop_oneof![
        Just("421 4.3.2 closing"),
        Just("451 4.3.0 later"),
        Just("550 5.1.1 no such user"),
        Just("554 5.7.1 no"),
        Just("250 ok\r\n250 surplus"),
        Just("250-ok\r\n250 ok"),
        Just("what?"),
        Just("354 go"),
    ];
    let command = (0..3_usize, reply.clone(), any::<bool>()).prop_map(|(at, reply, asks)| {
        let mut steps = ACCEPTED.to_vec();
        let Step::Expect(command, _) = steps[at] else { unreachable!() };
        steps[at] = Step::Expect(command, reply);
        // A server that has refused a command refuses those that depend on it, or asks for the message of no one.
        if reply.starts_with(['4', '5']) {
            for later in &mut steps[at + 1..] {
                *later = match later {
                    Step::Expect("DATA", _) if asks => Step::Expect("DATA", "354 go"),
                    Step::Expect(command, _) => Step::Expect(command, "503 5.5.1 out of order"),
                    _ if asks && at < 2 => Step::Content("554 5.5.1 no recipients"),
                    _ => Step::Loop,
                };
            }
            steps.retain(|step| !matches!(step, Step::Loop));
        }
        steps
    });
    let dropped = (0..4_usize).prop_map(|at| {
        let mut steps = ACCEPTED[..at].to_vec();
        steps.push(Step::Drop);
        steps
    });
    let message = reply.prop_map(|reply| [&ACCEPTED[..3], &[Step::Content(reply)]].concat());
    let after_message = Just([&ACCEPTED[..3], &[Step::ContentAndDrop]].concat());
    prop_oneof![command, dropped, message, after_message]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever a server does to one of several mails on a connection: what it has taken is sent or unknown, nothing else is, and
    /// nothing is handed over twice.
    #[test]
    fn an_outcome_is_never_a_promise_that_the_server_did_not_keep(
        before in 0..3_usize,
        fault in fault(),
        second in proptest::option::of(fault()),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (outcomes, taken) = runtime.block_on(async {
            let accepted = ACCEPTED.iter().cloned().cycle().take(before * ACCEPTED.len());
            let steps: Vec<Step> = accepted.chain(fault).chain(second.into_iter().flatten()).collect();
            let server = Server::start(vec![then(&steps), then(&[])]).await;
            let relay = plain(&server);
            let mailer = mailer(&SmtpConfig { connections: 1, ..short(&[relay]) });
            let send = |number| {
                let mailer = &mailer;
                async move { mailer.send(&numbered(number), &Attempt::unchecked()).await }
            };
            (join_all((0..6).map(send)).await, server.taken())
        });
        let mut count: HashMap<String, usize> = HashMap::new();
        for recipient in &taken {
            *count.entry(recipient.clone()).or_default() += 1;
        }
        for (number, outcome) in outcomes.iter().enumerate() {
            let times = count.get(&format!("p{number}@example.org")).copied().unwrap_or_default();
            let possible = match outcome {
                Outcome::Sent => times == 1,
                Outcome::Unknown(_) => times <= 1,
                _ => times == 0,
            };
            prop_assert!(possible, "mail {number} was taken {times} times: {outcomes:?}");
        }
    }
}
