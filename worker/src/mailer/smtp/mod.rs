//! The real mailer: hands mail to relays by SMTP, over connections that it keeps.
//!
//! A mail waits for its recipient's domain and for a connection, then goes to a relay that takes mail, and to the next one if
//! that one turns out to be away. `relays` says where to, `session` holds the conversation, `verdict` says what follows from
//! what went wrong in it.

mod circuit;
mod dialogue;
mod domains;
mod idle;
mod login;
mod relays;
mod reply;
mod session;
mod tls;
mod verdict;

use std::{
    panic::resume_unwind,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use mailrun_shared::config::{ConfigError, SmtpConfig};
use tokio::{
    select,
    sync::{OwnedSemaphorePermit, Semaphore},
    task::spawn_blocking,
    time::sleep,
};

use self::{
    circuit::Patience,
    domains::Domains,
    idle::Idle,
    relays::{Choice, Endpoint, Relays},
    reply::reason,
    session::{Limits, Session},
    verdict::{Failure, Verdict},
};
use super::{
    Lane, Mail, Mailer, Outcome,
    message::{Composer, ComposerError, Letter},
};
use crate::attempt::Attempt;

pub use self::tls::TlsError;

/// Why the relays can't be used as configured.
#[derive(Debug, thiserror::Error)]
pub enum SmtpError {
    /// A setting.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Mail can't be written.
    #[error(transparent)]
    Composer(#[from] ComposerError),
    /// Connections can't be encrypted.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// Sends through relays.
pub struct Smtp(Arc<Carriers>);

/// What the senders of this process share.
struct Carriers {
    composer: Composer,
    relays: Relays,
    /// One for each connection, held while it is used or closed. There are never more idle ones than permits left.
    permits: Arc<Semaphore>,
    domains: Domains,
    idle: Idle,
    hello: String,
    limits: Limits,
    config: SmtpConfig,
    /// Somebody closes connections that waited for too long.
    tidied: AtomicBool,
}

impl Smtp {
    /// Connects to nobody yet.
    ///
    /// # Errors
    /// When a relay, a sender, a key or a certificate can't be used.
    pub fn new(config: &SmtpConfig) -> Result<Self, SmtpError> {
        Self::with_patience(config, Patience::default())
    }

    fn with_patience(config: &SmtpConfig, patience: Patience) -> Result<Self, SmtpError> {
        Ok(Self(Arc::new(Carriers {
            composer: Composer::new(config)?,
            relays: Relays::new(config.relays()?, patience)?,
            permits: Arc::new(Semaphore::new(config.connections)),
            domains: Domains::new(config.per_domain),
            idle: Idle::new(config.idle()),
            hello: config.hello.clone().unwrap_or_else(host_name),
            limits: Limits::new(config),
            config: config.clone(),
            tidied: AtomicBool::new(false),
        })))
    }
}

#[async_trait]
impl Mailer for Smtp {
    async fn send(&self, mail: &Mail, attempt: &Attempt) -> Outcome {
        let letter = match self.0.compose(mail).await {
            Ok(letter) => letter,
            Err(outcome) => return outcome,
        };
        let turn = async {
            let domain = self.0.domains.enter(&letter.domain).await;
            (domain, Arc::clone(&self.0.permits).acquire_owned().await)
        };
        // Whoever waits for a connection must not wait for one to a relay that went away.
        let (_domain, permit) = select! {
            (domain, Ok(permit)) = turn => (domain, permit),
            reason = self.0.relays.closed() => return Outcome::Later(reason),
        };
        self.0.carry(&letter, attempt, permit).await
    }

    fn lane(&self) -> Lane {
        self.0.relays.lane()
    }
}

impl Carriers {
    /// Writes a mail. What takes long is done on a thread for such work, so that it delays no conversation and no heartbeat.
    async fn compose(self: &Arc<Self>, mail: &Mail) -> Result<Letter, Outcome> {
        if !self.composer.takes_long(mail) {
            return self.composer.compose(mail);
        }
        let (this, mail) = (Arc::clone(self), mail.clone());
        match spawn_blocking(move || this.composer.compose(&mail)).await {
            Ok(letter) => letter,
            Err(error) if error.is_panic() => resume_unwind(error.into_panic()),
            Err(_) => Err(Outcome::Later("the process is stopping".into())),
        }
    }

    /// Tries one relay after the other.
    async fn carry(self: &Arc<Self>, letter: &Letter, attempt: &Attempt, permit: OwnedSemaphorePermit) -> Outcome {
        let mut tried = Vec::new();
        let mut why = None;
        loop {
            // Before the look, so that no change is missed between the two.
            let mut changes = self.relays.changes();
            let ticket = match self.relays.choose(&tried) {
                Choice::Relay(ticket) => ticket,
                Choice::Wait => {
                    let _ = changes.changed().await;
                    continue;
                }
                Choice::None(reason) => return Outcome::Later(why.unwrap_or(reason)),
            };
            let number = ticket.number;
            let (result, session) = self.converse(number, ticket.endpoint, letter, attempt).await;
            let Err(failure) = result else {
                ticket.answered();
                self.put_back(number, session, true, permit);
                return Outcome::Sent;
            };
            match anonymous(failure.verdict(), letter) {
                Verdict::Away(reason) => {
                    drop(session);
                    ticket.away(&reason);
                    tried.push(number);
                    why = Some(reason);
                }
                Verdict::Mail(outcome) => {
                    ticket.answered();
                    self.put_back(number, session, false, permit);
                    return outcome;
                }
                Verdict::Withdrawn(withdrawn) => {
                    // A trial that is dropped is left to the next mail.
                    self.put_back(number, session, true, permit);
                    return Outcome::Withdrawn(withdrawn);
                }
                Verdict::Broken(outcome) => {
                    if let Outcome::Retry(reason) | Outcome::Unknown(reason) = &outcome {
                        ticket.broken(reason);
                    }
                    return outcome;
                }
            }
        }
    }

    /// Hands a letter to a relay, over a connection that is there or a new one. What is left of it, if it can be used again.
    async fn converse(
        &self,
        number: usize,
        endpoint: &Endpoint,
        letter: &Letter,
        attempt: &Attempt,
    ) -> (Result<(), Failure>, Option<Session>) {
        if let Some(mut session) = self.idle.take(number, Instant::now()) {
            match session.deliver(letter, attempt).await {
                // It died while nobody used it, and nothing was handed over yet.
                Err(failure) if failure.is_stale() => {}
                result => return left(result, session),
            }
        }
        // A connection to another relay may have to go first.
        while let Some(session) = self.idle.beyond(self.permits.available_permits()) {
            session.quit().await;
        }
        match Session::open(&endpoint.relay, endpoint.tls.as_ref(), &self.hello, self.limits).await {
            Ok(mut session) => left(session.deliver(letter, attempt).await, session),
            Err(failure) => (Err(failure), None),
        }
    }

    /// Puts a connection by, or closes it if it has done enough. Nobody waits for that, but for the permit.
    fn put_back(self: &Arc<Self>, number: usize, session: Option<Session>, clean: bool, permit: OwnedSemaphorePermit) {
        let Some(mut session) = session else { return };
        let used_up = session.mails >= self.config.messages_per_connection;
        if clean && !used_up {
            self.idle.put(number, session, Instant::now());
            drop(permit);
        } else {
            let this = Arc::clone(self);
            tokio::spawn(async move {
                if used_up {
                    session.quit().await;
                } else if session.reset().await {
                    this.idle.put(number, session, Instant::now());
                }
                drop(permit);
            });
        }
        if !self.tidied.swap(true, Ordering::Relaxed) {
            tokio::spawn(tidy(Arc::downgrade(self), self.config.idle()));
        }
    }
}

/// Closes connections that nobody used for `idle`, for as long as there is anybody who could use them.
async fn tidy(carriers: Weak<Carriers>, idle: Duration) {
    loop {
        sleep(idle).await;
        let Some(carriers) = carriers.upgrade() else { return };
        for session in carriers.idle.expired(Instant::now()) {
            // It counts as used until it is closed. If all others are used, they may not wait for a farewell.
            let permit = carriers.permits.try_acquire();
            if permit.is_ok() {
                session.quit().await;
            }
        }
    }
}

/// What came of it, and the connection if it can go on.
fn left(result: Result<(), Failure>, session: Session) -> (Result<(), Failure>, Option<Session>) {
    let goes_on = result.as_ref().err().is_none_or(Failure::leaves_a_connection);
    (result, goes_on.then_some(session))
}

/// The verdict in words that can be kept and shown.
fn anonymous(verdict: Verdict, letter: &Letter) -> Verdict {
    let clean = |text: String| reason(&text, &[&letter.to, &letter.known_as]);
    let outcome = |outcome| match outcome {
        Outcome::Sent => Outcome::Sent,
        Outcome::Retry(text) => Outcome::Retry(clean(text)),
        Outcome::Later(text) => Outcome::Later(clean(text)),
        Outcome::Failed { reason, bad_address } => Outcome::Failed { reason: clean(reason), bad_address },
        Outcome::Unknown(text) => Outcome::Unknown(clean(text)),
        Outcome::Withdrawn(withdrawn) => Outcome::Withdrawn(withdrawn),
    };
    match verdict {
        Verdict::Away(text) => Verdict::Away(clean(text)),
        Verdict::Mail(what) => Verdict::Mail(outcome(what)),
        Verdict::Broken(what) => Verdict::Broken(outcome(what)),
        Verdict::Withdrawn(withdrawn) => Verdict::Withdrawn(withdrawn),
    }
}

/// What this host calls itself.
fn host_name() -> String {
    let name = rustix::system::uname();
    let name = name.nodename().to_string_lossy();
    if !name.is_empty() && name.chars().all(|c| c.is_ascii_graphic()) { name.into_owned() } else { "localhost".into() }
}

#[cfg(test)]
mod tests;
