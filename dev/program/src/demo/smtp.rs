//! The demo with real mail: a mail server of its own, with the latency of one far away, and the same *Internet Down*.

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

/// Every so manieth guest is refused until the mail server recovers, as by the simulated mailer.
const DOWN_EVERY: u32 = 100;

/// Who carries the demo's mail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mailer {
    /// Nobody: sends are simulated, as the settings say.
    Simulated,
    /// A mail server on this machine that accepts mail by SMTP, and delivers none.
    Smtp,
}

/// What `demo` can be asked for with a mail server.
#[derive(Args, Clone, Copy, Debug)]
// Without a group: it would have the name of that of the demo's own options.
#[group(skip)]
pub(super) struct Options {
    /// Who carries the mail.
    #[arg(long, value_enum, default_value_t = Mailer::Simulated)]
    mailer: Mailer,
    /// smtp: the mail server takes so long for each mail.
    #[arg(long, default_value_t = 50)]
    latency_ms: u32,
    /// smtp: connections to the mail server, of all workers together.
    #[arg(long, default_value_t = 80, value_parser = clap::value_parser!(u32).range(2..=400))]
    connections: u32,
    /// smtp: the run's rate limit, in sends a second; 0: none.
    #[arg(long, default_value_t = 1_000)]
    rate: u32,
}

impl Options {
    /// The mail server, if there is to be one.
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

    /// A Mailrun that runs already has its own idea of who carries the mail.
    pub(super) fn refuse_a_running_mailrun(&self) -> Result<()> {
        if self.mailer == Mailer::Smtp {
            bail!("a Mailrun runs here, and sends as it was started; stop it, and ask for the demo again");
        }
        Ok(())
    }
}

/// The demo's guests are numbered.
fn is_unlucky(recipient: &str) -> bool {
    guest_number(recipient).is_some_and(|number| number.is_multiple_of(DOWN_EVERY))
}

/// Mails that the workers have begun to hand over, refused ones too: a rate limit is about them.
#[derive(Debug, Default)]
struct Sends(Mutex<Option<(Instant, Instant, u32)>>);

impl Sends {
    fn count(&self) {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let (first, _, count) = seen.unwrap_or((now, now, 0));
        *seen = Some((first, now, count + 1));
    }

    /// Sends a second, from the first to the last.
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

/// What it saw.
#[derive(Debug, Serialize)]
pub(super) struct Figures {
    /// Different mails that arrived.
    received: u64,
    /// Those of them that arrived more than once.
    received_twice: u64,
    /// The run's rate limit, in sends a second; null: none.
    rate_set: Option<u32>,
    /// Sends a second that the mail server saw, from the first to the last of the first pass.
    rate_got: Option<f64>,
    /// The most connections that were open at the same time.
    connections: usize,
    /// Connections divided by latency: what they allow without a limit.
    bound_items_per_second: f64,
}

impl Server {
    /// What makes the workers send to it.
    pub(super) fn settings(&self) -> Vec<(OsString, OsString)> {
        let connections = self.options.connections as usize / SENDERS;
        let mut settings = to_sink(self.sink.address());
        settings.push(("MAILRUN_MAILER__SMTP__CONNECTIONS".into(), connections.to_string().into()));
        settings
    }

    /// The rate limit to ask for.
    pub(super) fn rate_set(&self) -> Option<u32> {
        Some(self.options.rate).filter(|rate| *rate > 0)
    }

    /// Sends a second, so far.
    pub(super) fn rate_got(&self) -> Option<f64> {
        self.sends.rate()
    }

    /// The Internet is back.
    pub(super) fn recover(&self) {
        self.down.store(false, Ordering::Relaxed);
    }

    /// What it has seen.
    pub(super) fn figures(&self, rate_got: Option<f64>) -> Figures {
        let latency = f64::from(self.options.latency_ms.max(1)) / 1_000.0;
        let connections = self.options.connections as usize / SENDERS * SENDERS;
        Figures {
            received: self.sink.received(),
            received_twice: self.sink.received_twice(),
            rate_set: self.rate_set(),
            rate_got,
            connections: self.sink.most_connections(),
            bound_items_per_second: connections as f64 / latency,
        }
    }
}

impl Figures {
    /// Everybody got one mail.
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
