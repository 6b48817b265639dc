//! The real mailer: hands mail to relays over SMTP, on pooled connections.
//!
//! A mail waits for its recipient's domain and for a connection. It then goes to a relay that accepts mail, and to the next
//! one if that relay proves unavailable. `relays` chooses the relay, `session` speaks SMTP, and `verdict` decides what a
//! failure means.

mod blame;
mod breaker;
mod circuit;
mod connect;
mod dialogue;
mod domains;
mod idle;
mod limits;
mod line;
mod login;
mod relays;
mod reply;
mod session;
mod tls;
mod verdict;

use std::{
    future::pending,
    panic::resume_unwind,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use mailrun_app::config::{InvalidSetting, SmtpConfig};
use mailrun_core::{metric, outcome::Withdrawn, reply::ReplyClass};
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
    circuit::ProbeDelay,
    domains::Domains,
    idle::Idle,
    limits::{Deadline, Limits},
    line::{Following, Given, Line, News},
    relays::{Choice, Endpoint, Relays},
    reply::reason,
    session::Session,
    verdict::{ACCEPTED, Failure, NO_ANSWER, Pause, Verdict},
};
use super::{
    Mail, Mailer, Outcome, Stopped,
    message::{ComposedMail, Composer, ComposerError},
};
use crate::attempt::Attempt;
use crate::gate::Gate;

pub use self::tls::TlsError;

/// The values of the `class` label under which replies are counted.
pub fn reply_classes() -> impl Iterator<Item = &'static str> {
    [ACCEPTED, NO_ANSWER].into_iter().chain(ReplyClass::ALL.map(ReplyClass::name))
}

/// The SMTP configuration is not usable.
#[derive(Debug, thiserror::Error)]
pub enum SmtpError {
    /// An invalid setting.
    #[error(transparent)]
    Setting(#[from] InvalidSetting),
    /// The sender addresses or the DKIM key.
    #[error(transparent)]
    Composer(#[from] ComposerError),
    /// The certificate authorities.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// The reason of an attempt that is deferred because it spent almost its whole time limit waiting for a connection.
const NO_CONNECTION: &str = "no connection to the mail server became free in time";

/// A mail that has waited this long for a certain connection may get any other.
const LONGEST_IN_LINE: Duration = Duration::from_secs(60);

/// The SMTP mailer.
pub struct Smtp(Arc<Shared>);

/// State shared by all attempts of this process.
struct Shared {
    composer: Composer,
    relays: Relays,
    /// One permit per connection, held while the connection is in use or being closed. Never fewer free permits than idle
    /// connections.
    permits: Arc<Semaphore>,
    domains: Domains,
    line: Line,
    idle: Idle,
    breaker: Mutex<Breaker>,
    /// Relays stopped by this process and not yet recorded in the ledger.
    stopped: Mutex<Vec<Stopped>>,
    /// The EHLO name. `None`: the local address of each connection.
    hello: Option<String>,
    limits: Limits,
    config: SmtpConfig,
    /// Whether the task that closes expired idle connections is running.
    closes_idle: AtomicBool,
}

impl Smtp {
    /// Opens no connection yet.
    ///
    /// # Errors
    /// If a relay, a sender, a key or a certificate is not usable.
    pub fn new(config: &SmtpConfig) -> Result<Self, SmtpError> {
        Self::with_probe_delay(config, ProbeDelay::default())
    }

    fn with_probe_delay(config: &SmtpConfig, probe_delay: ProbeDelay) -> Result<Self, SmtpError> {
        Ok(Self(Arc::new(Shared {
            composer: Composer::new(config)?,
            relays: Relays::new(config.relays()?, probe_delay)?,
            permits: Arc::new(Semaphore::new(config.connections)),
            domains: Domains::new(config.per_domain),
            line: Line::default(),
            idle: Idle::new(config.idle),
            breaker: Mutex::new(Breaker::new(config.breaker)),
            stopped: Mutex::default(),
            hello: config.hello.clone().or_else(host_name),
            limits: Limits::new(config),
            config: config.clone(),
            closes_idle: AtomicBool::new(false),
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
        let composed = match self.0.compose(mail).await {
            Ok(composed) => Arc::new(composed),
            Err(outcome) => return outcome,
        };
        let deadline = self.0.limits.begin();
        let waiting = async {
            let domain = self.0.domains.enter(&composed.domain).await;
            (domain, self.0.turn(&composed, attempt).await)
        };
        // Stop waiting for a connection when every relay closes, or when too little time is left to send the message.
        let (_domain, turn) = select! {
            turn = waiting => turn,
            reason = self.0.relays.closed() => return Outcome::Later(reason),
            () = sleep_until(deadline.before_message()) => return Outcome::Later(NO_CONNECTION.into()),
        };
        match turn {
            Turn::Withdrawn(withdrawn) => Outcome::Withdrawn(withdrawn),
            Turn::Connect(permit) => self.0.try_relays(mail, &composed, attempt, permit, None, &deadline).await,
            Turn::Given(given) => {
                let Given { relay, session, permit } = *given;
                self.0.try_relays(mail, &composed, attempt, permit, Some((relay, session)), &deadline).await
            }
        }
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
                self.0.relays.stop(number, &stopped_text(&stop.reason));
            } else if !self.0.stopped().iter().any(|stopped| stopped.relay == name) && self.0.relays.release(number) {
                info!(relay = name, "relay stop answered, trying the relay again");
                self.0.breaker().released(number);
            }
        }
    }
}

/// How a mail gets a connection.
enum Turn {
    /// It may open a connection, or use an idle one.
    Connect(OwnedSemaphorePermit),
    /// Its envelope was sent on this connection.
    Given(Box<Given>),
    Withdrawn(Withdrawn),
}

/// The text shown for a stopped relay.
fn stopped_text(reason: &str) -> String {
    format!(
        "{reason}. Was it us or them? Answer with `mailrun relay it-was-us` or `it-was-them`, or on the page Stopped relays"
    )
}

impl Shared {
    /// Composes a mail. Slow work runs on a blocking thread, so that it delays neither SMTP conversations nor heartbeats.
    async fn compose(self: &Arc<Self>, mail: &Mail) -> Result<ComposedMail, Outcome> {
        if !self.composer.takes_long(mail) {
            return self.composer.compose(mail);
        }
        let (this, mail) = (Arc::clone(self), mail.clone());
        match spawn_blocking(move || this.composer.compose(&mail)).await {
            Ok(composed) => composed,
            Err(error) if error.is_panic() => resume_unwind(error.into_panic()),
            Err(_) => Err(Outcome::Later("the process is stopping".into())),
        }
    }

    /// Waits for a connection: a permit, or the connection of a mail whose message is on its way. Dropping this future leaves the
    /// line; a connection that is given then is closed.
    async fn turn(&self, composed: &Arc<ComposedMail>, attempt: &Attempt) -> Turn {
        loop {
            if let Ok(permit) = Arc::clone(&self.permits).try_acquire_owned() {
                return Turn::Connect(permit);
            }
            let Some(relay) = self.relays.draw(&[]) else { return self.permit().await };
            let mut place = self.line.join(relay, Arc::clone(composed), attempt.clone());
            let news = select! {
                biased;
                news = &mut place.news => news,
                // Also if it was chosen: it does not wait for long for another message's reply.
                () = sleep(LONGEST_IN_LINE) => continue,
                turn = self.permit() => {
                    if place.leave() {
                        return turn;
                    }
                    // It was chosen at the same moment.
                    drop(turn);
                    (&mut place.news).await
                }
            };
            match news {
                Ok(News::Given(given)) => return Turn::Given(given),
                Ok(News::Withdrawn(withdrawn)) => return Turn::Withdrawn(withdrawn),
                // That connection failed before anything was handed over.
                Err(_) => {}
            }
        }
    }

    async fn permit(&self) -> Turn {
        match Arc::clone(&self.permits).acquire_owned().await {
            Ok(permit) => Turn::Connect(permit),
            // The semaphore is never closed.
            Err(_) => pending().await,
        }
    }

    /// Tries the relays in turn until one settles the mail. `given`: the connection on which its envelope was sent.
    async fn try_relays(
        self: &Arc<Self>,
        mail: &Mail,
        composed: &ComposedMail,
        attempt: &Attempt,
        permit: OwnedSemaphorePermit,
        mut given: Option<(usize, Session)>,
        deadline: &Deadline,
    ) -> Outcome {
        let mut tried = Vec::new();
        let mut why = None;
        loop {
            // Subscribe before choosing, so that no change in between is missed.
            let mut changes = self.relays.changes();
            let (ticket, session) = match given.take() {
                Some((number, session)) => (self.relays.on(number), Some(session)),
                None => match self.relays.choose(&tried) {
                    Choice::Relay(ticket) => (ticket, None),
                    Choice::Wait => {
                        let _ = changes.changed().await;
                        continue;
                    }
                    Choice::None(reason) => return Outcome::Later(why.unwrap_or(reason)),
                },
            };
            let number = ticket.number;
            let (result, used) = self.deliver(number, ticket.endpoint, session, composed, attempt, deadline).await;
            let Err(failure) = result else {
                counter!(metric::REPLIES, "class" => ACCEPTED).increment(1);
                ticket.endpoint.blame().accepted(&composed.recipient);
                self.breaker().answered(number, Instant::now());
                ticket.answered();
                self.pass_on(number, used, permit);
                return Outcome::Sent;
            };
            if let Some(class) = failure.class() {
                counter!(metric::REPLIES, "class" => class).increment(1);
            }
            let verdict = anonymous(failure.verdict(), composed);
            let concerns_relay = match &verdict {
                Verdict::Refused(_) => ticket.endpoint.blame().refused(&composed.recipient),
                Verdict::Deferred(_) => ticket.endpoint.blame().deferred(&composed.recipient, &composed.domain),
                _ => false,
            };
            match verdict {
                Verdict::Refused(pause) | Verdict::Deferred(pause) if !concerns_relay => {
                    ticket.answered();
                    self.pass_on(number, used, permit);
                    return Outcome::Retry(pause.reason);
                }
                Verdict::Unavailable(pause) | Verdict::Refused(pause) | Verdict::Deferred(pause) => {
                    drop(used);
                    why = Some(pause.reason.clone());
                    ticket.unavailable(pause);
                    tried.push(number);
                }
                Verdict::Mail(outcome) => {
                    if matches!(outcome, Outcome::Failed { .. }) {
                        self.breaker().answered(number, Instant::now());
                    }
                    ticket.answered();
                    self.pass_on(number, used, permit);
                    return outcome;
                }
                Verdict::Unexplained { reason, alike } => {
                    ticket.answered();
                    self.pass_on(number, used, permit);
                    let Some(run_id) = mail.run_id else {
                        return Outcome::failed(reason);
                    };
                    let message_id = mail.message_id.clone();
                    let recipient = composed.recipient.clone();
                    return self.refused(number, Refusal { message_id, run_id, recipient, reason, alike });
                }
                Verdict::Withdrawn(withdrawn) => {
                    // Dropping a trial ticket hands the trial to the next mail.
                    self.pass_on(number, used, permit);
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

    /// A message was refused permanently, for an unknown reason.
    fn refused(&self, number: usize, refusal: Refusal) -> Outcome {
        let (decision, trips) = {
            let mut breaker = self.breaker();
            (breaker.refused(number, refusal, Instant::now()), breaker.take_trips())
        };
        for trip in trips {
            let relay = self.relays.names().into_iter().nth(trip.relay).unwrap_or_default();
            error!(%relay, reason = trip.reason, "relay stopped after unexplained refusals, see mailrun relay");
            self.relays.stop(trip.relay, &stopped_text(&trip.reason));
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

    /// Delivers over a given, an idle or a new connection. Also returns the connection, if it can be used again.
    async fn deliver(
        &self,
        number: usize,
        endpoint: &Endpoint,
        given: Option<Session>,
        composed: &ComposedMail,
        attempt: &Attempt,
        deadline: &Deadline,
    ) -> (Result<(), Failure>, Used) {
        if let Some(session) = given.or_else(|| self.idle.take(number, Instant::now())) {
            match self.converse(number, session, composed, attempt, deadline).await {
                // The connection was dead, and no message was handed over: use a new one.
                (Err(failure), _) if failure.is_stale() => {}
                done => return done,
            }
        }
        // The connection limit covers all relays: close an idle connection to another relay first.
        while let Some(session) = self.idle.beyond(self.permits.available_permits()) {
            session.quit().await;
        }
        let tls = endpoint.tls.as_ref();
        match Session::open(&endpoint.relay, &endpoint.manners, tls, self.hello.as_deref(), deadline).await {
            Ok(session) => self.converse(number, session, composed, attempt, deadline).await,
            Err(failure) => (Err(failure), Used::default()),
        }
    }

    /// Delivers over this connection. If another mail waits for one, its envelope is sent with the message.
    async fn converse(
        &self,
        number: usize,
        mut session: Session,
        composed: &ComposedMail,
        attempt: &Attempt,
        deadline: &Deadline,
    ) -> (Result<(), Failure>, Used) {
        let mut following = None;
        let choose = |session: &Session| {
            if session.mails() < self.config.messages_per_connection {
                following = self.line.next(number, |mail| session.takes(mail));
            }
            following.as_ref().map(|following| Arc::clone(&following.mail))
        };
        let result = session.deliver(composed, attempt, deadline, choose).await;
        let goes_on = result.as_ref().err().is_none_or(Failure::leaves_a_connection) && session.is_clean();
        let used = if goes_on { Used { session: Some(session), following } } else { Used::default() };
        (result, used)
    }

    /// Gives the connection to the mail whose envelope was sent, keeps it for the next one, or closes it after
    /// `messages_per_connection`. QUIT runs in the background and holds the permit until it is done.
    fn pass_on(self: &Arc<Self>, number: usize, used: Used, permit: OwnedSemaphorePermit) {
        let Some(session) = used.session else { return };
        if let Some(following) = used.following {
            return following.give(Given { relay: number, session, permit });
        }
        if session.mails() < self.config.messages_per_connection {
            self.idle.put(number, session, Instant::now());
            drop(permit);
        } else {
            tokio::spawn(async move {
                session.quit().await;
                drop(permit);
            });
        }
        if !self.closes_idle.swap(true, Ordering::Relaxed) {
            tokio::spawn(close_expired(Arc::downgrade(self), self.config.idle));
        }
    }
}

/// Closes connections that were idle for `idle`. Ends with the mailer.
async fn close_expired(shared: Weak<Shared>, idle: Duration) {
    loop {
        sleep(idle).await;
        let Some(shared) = shared.upgrade() else { return };
        for session in shared.idle.expired(Instant::now()) {
            // QUIT needs a permit, because the connection stays open until the server replies. Without a free permit, just drop it.
            let permit = shared.permits.try_acquire();
            if permit.is_ok() {
                session.quit().await;
            }
        }
    }
}

/// A connection after a mail.
#[derive(Default)]
struct Used {
    /// `None`: it cannot be used again.
    session: Option<Session>,
    /// The mail whose envelope was sent on it.
    following: Option<Following>,
}

/// The verdict without the recipient's address, fit to be stored and shown.
fn anonymous(verdict: Verdict, composed: &ComposedMail) -> Verdict {
    let clean = |text: String| reason(&text, &[&composed.to, &composed.recipient]);
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
        Verdict::Unavailable(pause) => Verdict::Unavailable(paused(pause)),
        Verdict::Refused(pause) => Verdict::Refused(paused(pause)),
        Verdict::Deferred(pause) => Verdict::Deferred(paused(pause)),
        Verdict::Unexplained { reason, alike } => {
            // Some servers quote the mailbox without its domain.
            let local = composed.recipient.split('@').next().unwrap_or_default().to_lowercase();
            let names: Vec<&str> = local.split(|c: char| !c.is_alphanumeric()).collect();
            let alike: Vec<&str> = alike.split(' ').filter(|word| !names.contains(word)).collect();
            Verdict::Unexplained { reason: clean(reason), alike: alike.join(" ") }
        }
        Verdict::Mail(what) => Verdict::Mail(outcome(what)),
        Verdict::Broken(what) => Verdict::Broken(outcome(what)),
        Verdict::Withdrawn(withdrawn) => Verdict::Withdrawn(withdrawn),
    }
}

/// The host's name if it is fully qualified: servers reject bare names.
fn host_name() -> Option<String> {
    let name = rustix::system::uname();
    let name = name.nodename().to_string_lossy();
    let label =
        |label: &str| !label.is_empty() && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    (name.contains('.') && name.split('.').all(label)).then(|| name.into_owned())
}

#[cfg(test)]
mod tests;
