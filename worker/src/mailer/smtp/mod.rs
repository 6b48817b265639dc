//! The real mailer: hands mail to relays by SMTP, over connections that it keeps.
//!
//! A mail waits for its recipient's domain and for a connection, then goes to a relay that takes mail, and to the next one if
//! that one turns out to be away. `relays` says where to, `session` holds the conversation, `verdict` says what follows from
//! what went wrong in it.

mod blame;
mod breaker;
mod circuit;
mod connect;
mod dialogue;
mod domains;
mod idle;
mod limits;
mod login;
mod relays;
mod reply;
mod session;
mod tls;
mod verdict;

use std::{
    panic::resume_unwind,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use mailrun_app::config::{InvalidSetting, SmtpConfig};
use mailrun_core::{metric, reply::ReplyClass};
use mailrun_ledger::{
    relay_stops::{Fault, RelayStop},
    stored::Stored,
};
use metrics::counter;
use tokio::{
    select,
    sync::{OwnedSemaphorePermit, Semaphore},
    task::spawn_blocking,
    time::{sleep, sleep_until},
};
use tracing::{error, info};

use self::{
    breaker::{Breaker, Decision, Refusal},
    circuit::Patience,
    domains::Domains,
    idle::Idle,
    limits::{Deadline, Limits},
    relays::{Choice, Endpoint, Relays},
    reply::reason,
    session::Session,
    verdict::{ACCEPTED, Failure, NO_ANSWER, Pause, Verdict},
};
use super::{
    Mail, Mailer, Outcome, Stopped,
    message::{Composer, ComposerError, Letter},
};
use crate::attempt::Attempt;
use crate::gate::Gate;

pub use self::tls::TlsError;

/// What the answers of mail servers are counted as.
pub fn reply_classes() -> impl Iterator<Item = &'static str> {
    [ACCEPTED, NO_ANSWER].into_iter().chain(ReplyClass::ALL.map(ReplyClass::name))
}

/// Why the relays can't be used as configured.
#[derive(Debug, thiserror::Error)]
pub enum SmtpError {
    /// A setting.
    #[error(transparent)]
    Setting(#[from] InvalidSetting),
    /// Mail can't be written.
    #[error(transparent)]
    Composer(#[from] ComposerError),
    /// Connections can't be encrypted.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// Why an attempt is put off that waited for a connection for almost all of its time.
const NO_CONNECTION: &str = "no connection to the mail server became free in time";

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
    breaker: Mutex<Breaker>,
    /// Relays that were stopped here, and not written down yet.
    stopped: Mutex<Vec<Stopped>>,
    /// What it calls itself; none: its address on each connection.
    hello: Option<String>,
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
            idle: Idle::new(config.idle),
            breaker: Mutex::new(Breaker::new(config.breaker)),
            stopped: Mutex::default(),
            hello: config.hello.clone().or_else(host_name),
            limits: Limits::new(config),
            config: config.clone(),
            tidied: AtomicBool::new(false),
        })))
    }
}

#[async_trait]
impl Mailer for Smtp {
    async fn send(&self, mail: &Mail, attempt: &Attempt) -> Outcome {
        let decision = self.0.breaker().before(&mail.message_id, Instant::now());
        match decision {
            Some(Decision::Wait(reason)) => return Outcome::Later(reason),
            Some(Decision::Fail(reason)) => return Outcome::failed(reason),
            None => {}
        }
        let letter = match self.0.compose(mail).await {
            Ok(letter) => letter,
            Err(outcome) => return outcome,
        };
        let turn = async {
            let domain = self.0.domains.enter(&letter.domain).await;
            (domain, Arc::clone(&self.0.permits).acquire_owned().await)
        };
        let deadline = self.0.limits.begin();
        // Whoever waits for a connection must not wait for one to a relay that went away, nor for too long.
        let (_domain, permit) = select! {
            (domain, Ok(permit)) = turn => (domain, permit),
            reason = self.0.relays.closed() => return Outcome::Later(reason),
            () = sleep_until(deadline.before_message()) => return Outcome::Later(NO_CONNECTION.into()),
        };
        self.0.carry(mail, &letter, attempt, permit, &deadline).await
    }

    fn gate(&self) -> Gate {
        self.0.relays.gate()
    }

    fn stops_relays(&self) -> bool {
        true
    }

    fn take_stopped(&self) -> Vec<Stopped> {
        std::mem::take(&mut *self.0.stopped())
    }

    fn learn(&self, stops: &[RelayStop]) {
        let explained = stops
            .iter()
            .filter(|stop| stop.fault == Some(Stored::Known(Fault::Them)))
            .flat_map(|stop| stop.alike.clone());
        self.0.breaker().explain(explained);
        for (number, name) in self.0.relays.names().into_iter().enumerate() {
            let open = stops.iter().find(|stop| stop.relay == name && stop.fault.is_none());
            if let Some(stop) = open {
                self.0.breaker().stopped(number);
                self.0.relays.stop(number, &stopped_words(&stop.reason));
            } else if !self.0.stopped().iter().any(|stopped| stopped.relay == name) && self.0.relays.release(number) {
                info!(relay = name, "an operator has answered, trying the relay again");
                self.0.breaker().released(number);
            }
        }
    }
}

/// What the pages say of a stopped relay.
fn stopped_words(reason: &str) -> String {
    format!(
        "{reason}. Was it us or them? Answer with `mailrun relay it-was-us` or `it-was-them`, or on the page Stopped relays"
    )
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
    async fn carry(
        self: &Arc<Self>,
        mail: &Mail,
        letter: &Letter,
        attempt: &Attempt,
        permit: OwnedSemaphorePermit,
        deadline: &Deadline,
    ) -> Outcome {
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
            let (result, session) = self.converse(number, ticket.endpoint, letter, attempt, deadline).await;
            let Err(failure) = result else {
                counter!(metric::REPLIES, "class" => ACCEPTED).increment(1);
                ticket.endpoint.blame().accepted(&letter.known_as);
                self.breaker().answered(number, Instant::now());
                ticket.answered();
                self.put_back(number, session, true, permit);
                return Outcome::Sent;
            };
            if let Some(class) = failure.class() {
                counter!(metric::REPLIES, "class" => class).increment(1);
            }
            let verdict = anonymous(failure.verdict(), letter);
            let concerns_relay = match &verdict {
                Verdict::Refused(_) => ticket.endpoint.blame().refused(&letter.known_as),
                Verdict::Deferred(_) => ticket.endpoint.blame().deferred(&letter.known_as, &letter.domain),
                _ => false,
            };
            match verdict {
                Verdict::Refused(pause) | Verdict::Deferred(pause) if !concerns_relay => {
                    ticket.answered();
                    self.put_back(number, session, false, permit);
                    return Outcome::Retry(pause.reason);
                }
                Verdict::Away(pause) | Verdict::Refused(pause) | Verdict::Deferred(pause) => {
                    drop(session);
                    why = Some(pause.reason.clone());
                    ticket.away(pause);
                    tried.push(number);
                }
                Verdict::Mail(outcome) => {
                    if matches!(outcome, Outcome::Failed { .. }) {
                        self.breaker().answered(number, Instant::now());
                    }
                    ticket.answered();
                    self.put_back(number, session, false, permit);
                    return outcome;
                }
                Verdict::Unexplained { reason, alike } => {
                    ticket.answered();
                    self.put_back(number, session, false, permit);
                    let Some(run_id) = mail.run_id else {
                        return Outcome::failed(reason);
                    };
                    let message_id = mail.message_id.clone();
                    let recipient = letter.known_as.clone();
                    return self.refused(number, Refusal { message_id, run_id, recipient, reason, alike });
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

    /// A message was refused for good, and nobody knows why.
    fn refused(&self, number: usize, refusal: Refusal) -> Outcome {
        let (decision, trips) = {
            let mut breaker = self.breaker();
            (breaker.refused(number, refusal, Instant::now()), breaker.take_trips())
        };
        for trip in trips {
            let relay = self.relays.names().into_iter().nth(trip.relay).unwrap_or_default();
            error!(%relay, reason = trip.reason, "the relay is stopped until an operator says whose fault the refusals are");
            self.relays.stop(trip.relay, &stopped_words(&trip.reason));
            let runs = trip.runs;
            self.stopped().push(Stopped { relay, reason: trip.reason, alike: trip.alike, runs });
        }
        match decision {
            Decision::Wait(reason) => Outcome::Later(reason),
            Decision::Fail(reason) => Outcome::failed(reason),
        }
    }

    fn breaker(&self) -> MutexGuard<'_, Breaker> {
        self.breaker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stopped(&self) -> MutexGuard<'_, Vec<Stopped>> {
        self.stopped.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands a letter to a relay, over a connection that is there or a new one. What is left of it, if it can be used again.
    async fn converse(
        &self,
        number: usize,
        endpoint: &Endpoint,
        letter: &Letter,
        attempt: &Attempt,
        deadline: &Deadline,
    ) -> (Result<(), Failure>, Option<Session>) {
        if let Some(mut session) = self.idle.take(number, Instant::now()) {
            match session.deliver(letter, attempt, deadline).await {
                // It died while nobody used it, and nothing was handed over yet.
                Err(failure) if failure.is_stale() => {}
                result => return left(result, session),
            }
        }
        // A connection to another relay may have to go first.
        while let Some(session) = self.idle.beyond(self.permits.available_permits()) {
            session.quit().await;
        }
        match Session::open(&endpoint.relay, endpoint.tls.as_ref(), self.hello.as_deref(), deadline).await {
            Ok(mut session) => left(session.deliver(letter, attempt, deadline).await, session),
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
            tokio::spawn(tidy(Arc::downgrade(self), self.config.idle));
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
    let goes_on = result.as_ref().err().is_none_or(Failure::leaves_a_connection) && session.is_clean();
    (result, goes_on.then_some(session))
}

/// The verdict in words that can be kept and shown.
fn anonymous(verdict: Verdict, letter: &Letter) -> Verdict {
    let clean = |text: String| reason(&text, &[&letter.to, &letter.known_as]);
    let outcome = |outcome| match outcome {
        Outcome::Sent => Outcome::Sent,
        Outcome::Retry(text) => Outcome::Retry(clean(text)),
        Outcome::Later(text) => Outcome::Later(clean(text)),
        Outcome::Failed { reason, flagged } => Outcome::Failed { reason: clean(reason), flagged },
        Outcome::Unknown(text) => Outcome::Unknown(clean(text)),
        Outcome::Withdrawn(withdrawn) => Outcome::Withdrawn(withdrawn),
    };
    let paused = |pause: Pause| Pause { reason: clean(pause.reason), ..pause };
    match verdict {
        Verdict::Away(pause) => Verdict::Away(paused(pause)),
        Verdict::Refused(pause) => Verdict::Refused(paused(pause)),
        Verdict::Deferred(pause) => Verdict::Deferred(paused(pause)),
        Verdict::Unexplained { reason, alike } => {
            // Some servers name the mailbox without its domain.
            let local = letter.known_as.split('@').next().unwrap_or_default().to_lowercase();
            let names: Vec<&str> = local.split(|c: char| !c.is_alphanumeric()).collect();
            let alike: Vec<&str> = alike.split(' ').filter(|word| !names.contains(word)).collect();
            Verdict::Unexplained { reason: clean(reason), alike: alike.join(" ") }
        }
        Verdict::Mail(what) => Verdict::Mail(outcome(what)),
        Verdict::Broken(what) => Verdict::Broken(outcome(what)),
        Verdict::Withdrawn(withdrawn) => Verdict::Withdrawn(withdrawn),
    }
}

/// The name of this host, if it is a full one: servers refuse bare names.
fn host_name() -> Option<String> {
    let name = rustix::system::uname();
    let name = name.nodename().to_string_lossy();
    let label =
        |label: &str| !label.is_empty() && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    (name.contains('.') && name.split('.').all(label)).then(|| name.into_owned())
}

#[cfg(test)]
mod tests;
