//! Tests on real sockets, against servers that follow a script.

mod composing;
mod conversation;
mod encryption;
mod pipelining;
mod pool;
mod refusals;
mod server;

use std::{sync::Arc, time::Duration};

use mailrun_app::config::SmtpConfig;
use mailrun_core::template::Template;

use super::{super::*, circuit::ProbeDelay};
use server::{Server, Step};

/// A time limit short enough for a test to wait for.
const SHORT: Duration = Duration::from_millis(150);

/// A server that accepts one mail after the other.
fn takes_mail() -> Vec<Step> {
    let mut script = hello("250 hi");
    script.extend([
        Step::Loop,
        Step::Expect("MAIL", "250 ok"),
        Step::Expect("RCPT", "250 ok"),
        Step::Expect("DATA", "354 go"),
        Step::Content("250 2.0.0 taken"),
        Step::Loop,
    ]);
    script
}

fn hello(answer: &'static str) -> Vec<Step> {
    vec![Step::Say("220 hi"), Step::Expect("EHLO tests", answer)]
}

/// A conversation up to the step that is to fail, and that step.
fn until(stage: usize, last: Step) -> Vec<Step> {
    let all = [
        Step::Say("220 hi"),
        Step::Expect("EHLO", "250 hi"),
        Step::Expect("MAIL", "250 ok"),
        Step::Expect("RCPT", "250 ok"),
        Step::Expect("DATA", "354 go"),
    ];
    all.into_iter().take(stage).chain([last]).collect()
}

fn config(relays: &[String]) -> SmtpConfig {
    SmtpConfig {
        relays: relays.iter().map(|url| url.as_str().into()).collect(),
        hello: Some("tests".into()),
        ..SmtpConfig::default()
    }
}

fn short(relays: &[String]) -> SmtpConfig {
    SmtpConfig { connect_timeout: SHORT, command_timeout: SHORT, message_timeout: SHORT, ..config(relays) }
}

fn plain(server: &Server) -> String {
    format!("smtp://127.0.0.1:{}?tls=none", server.port)
}

/// A mailer that does not probe an unavailable relay again within the test.
fn mailer(config: &SmtpConfig) -> Smtp {
    let long = Duration::from_secs(600);
    Smtp::with_probe_delay(config, ProbeDelay { first: long, longest: long }).unwrap()
}

/// A mailer that probes an unavailable relay at once.
fn eager(config: &SmtpConfig) -> Smtp {
    Smtp::with_probe_delay(config, ProbeDelay { first: Duration::from_nanos(1), longest: Duration::from_nanos(2) })
        .unwrap()
}

fn mail(email: &str) -> Mail {
    Mail {
        message_id: "<1.abc@mailrun>".into(),
        run_id: None,
        email: email.into(),
        name: Some("Ann".into()),
        template: Arc::new(Template::new("Hello {{ name }}", "Come, {{ name }}.\n").unwrap()),
        unsubscribe: None,
    }
}

fn ann() -> Mail {
    mail("ann@example.org")
}

fn later(outcome: &Outcome) -> &str {
    let Outcome::Later(reason) = outcome else { panic!("{outcome:?}") };
    reason
}
