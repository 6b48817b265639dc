//! The demo with real mail: its own mail server, with the latency of a distant one, and the same *Internet Down*.

use std::{
    ffi::OsString,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Result, bail, ensure};
use clap::{Args, ValueEnum};
use serde::Serialize;

use mailrun_lab::{
    local::{SENDERS, to_sink},
    people::guest_number,
};
use mailrun_sink::{self, Action, Sink, Stage};

/// Every Nth guest is refused until the mail server recovers, like with the simulated mailer.
const DOWN_EVERY: u32 = 100;

/// The mailer of the demo.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mailer {
    /// Sends are simulated, as configured
    Simulated,
    /// A mail server on this machine that accepts mail by SMTP and delivers none
    Smtp,
}

/// Options of `mailrun demo` with a mail server.
#[derive(Args, Clone, Copy, Debug)]
// Without a group: it would have the same name as that of the demo's own options.
#[group(skip)]
pub(super) struct Options {
    /// How mail is sent
    #[arg(long, value_enum, default_value_t = Mailer::Simulated)]
    mailer: Mailer,
    /// smtp: latency of the mail server per mail
    #[arg(long, default_value_t = 50)]
    latency_ms: u32,
    /// smtp: connections to the mail server, of all workers together
    #[arg(long, default_value_t = 80, value_parser = clap::value_parser!(u32).range(2..=400))]
    connections: u32,
    /// smtp: the run's rate limit in sends per second; 0: none
    #[arg(long, default_value_t = 1_000)]
    rate: u32,
}

impl Options {
    /// Starts the mail server, if one is requested.
    pub(super) async fn start(&self) -> Result<Option<Server>> {
        if self.mailer == Mailer::Simulated {
            return Ok(None);
        }
        let latency = Duration::from_millis(self.latency_ms.into());
        let sink = Sink::start(mailrun_sink::Options { latency, keep: 0, ..mailrun_sink::Options::default() }).await?;
        let (down, sends) = (Arc::new(AtomicBool::new(true)), Arc::new(Sends::default()));
        sink.set_rule(Some({
            let (down, sends) = (Arc::clone(&down), Arc::clone(&sends));
            Arc::new(move |stage: Stage<'_>, _: &mailrun_sink::Session| match stage {
                Stage::Rcpt(recipient) => {
                    sends.count();
                    if down.load(Ordering::Relaxed) && is_unlucky(recipient) {
                        Action::Reply(550, "5.7.0 Internet Down".into())
                    } else {
                        Action::GoOn
                    }
                }
                _ => Action::GoOn,
            }) as mailrun_sink::Rule
        }));
        Ok(Some(Server { sink, options: *self, down, sends }))
    }

    /// A running Mailrun already has its own mailer.
    pub(super) fn refuse_a_running_mailrun(&self) -> Result<()> {
        if self.mailer == Mailer::Smtp {
            bail!("the running Mailrun uses its own mailer; stop it and run the demo again");
        }
        Ok(())
    }
}

/// The demo's guests are numbered.
fn is_unlucky(recipient: &str) -> bool {
    guest_number(recipient).is_some_and(|number| number.is_multiple_of(DOWN_EVERY))
}

/// Mails that the workers began to hand over, including refused ones: a rate limit applies to them.
#[derive(Debug, Default)]
struct Sends(Mutex<Option<(Instant, Instant, u32)>>);

impl Sends {
    fn count(&self) {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let (first, _, count) = seen.unwrap_or((now, now, 0));
        *seen = Some((first, now, count + 1));
    }

    /// Sends per second, from the first to the last.
    fn rate(&self) -> Option<f64> {
        let (first, last, count) = (*self.0.lock().unwrap_or_else(PoisonError::into_inner))?;
        let seconds = (last - first).as_secs_f64();
        (seconds > 0.0).then(|| f64::from(count - 1) / seconds)
    }
}

/// The mail server of a demo.
pub(super) struct Server {
    sink: Sink,
    options: Options,
    down: Arc<AtomicBool>,
    sends: Arc<Sends>,
}

/// Its observations.
#[derive(Debug, Serialize)]
pub(super) struct Results {
    /// Distinct mails received.
    received: u64,
    /// Mails received more than once.
    received_twice: u64,
    /// The run's rate limit in sends per second; null: none.
    rate_set: Option<u32>,
    /// Sends per second that the mail server observed, from the first to the last of the first pass.
    rate_got: Option<f64>,
    /// The most connections open at the same time.
    connections: usize,
    /// Connections divided by latency: the maximum without a rate limit.
    bound_items_per_second: f64,
}

impl Server {
    /// Settings that make the workers use it.
    pub(super) fn settings(&self) -> Vec<(OsString, OsString)> {
        let connections = self.options.connections as usize / SENDERS;
        let mut settings = to_sink(self.sink.address());
        settings.push(("MAILRUN_MAILER__SMTP__CONNECTIONS".into(), connections.to_string().into()));
        settings
    }

    /// The requested rate limit.
    pub(super) fn rate_set(&self) -> Option<u32> {
        Some(self.options.rate).filter(|rate| *rate > 0)
    }

    /// Sends per second so far.
    pub(super) fn rate_got(&self) -> Option<f64> {
        self.sends.rate()
    }

    /// Ends *Internet Down*.
    pub(super) fn recover(&self) {
        self.down.store(false, Ordering::Relaxed);
    }

    /// Its observations.
    pub(super) fn results(&self, rate_got: Option<f64>) -> Results {
        let latency = f64::from(self.options.latency_ms.max(1)) / 1_000.0;
        let connections = self.options.connections as usize / SENDERS * SENDERS;
        Results {
            received: self.sink.received(),
            received_twice: self.sink.received_twice(),
            rate_set: self.rate_set(),
            rate_got,
            connections: self.sink.most_connections(),
            bound_items_per_second: connections as f64 / latency,
        }
    }
}

impl Results {
    /// Checks that everyone received one mail.
    pub(super) fn check(&self, recipients: u32) -> Result<()> {
        ensure!(
            self.received == u64::from(recipients) && self.received_twice == 0,
            "the mail server received {} of {recipients} mails, and {} of them more than once",
            self.received,
            self.received_twice
        );
        Ok(())
    }
}
