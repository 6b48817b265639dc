//! Who carries the mail.

mod encoding;
mod message;
mod simulated;
mod smtp;

use std::sync::Arc;

use async_trait::async_trait;
use mailrun_app::config::{MailerConfig, MailerKind};
use mailrun_core::template::Template;
use mailrun_ledger::relay_stops::RelayStop;
use uuid::Uuid;

use crate::{attempt::Attempt, gate::Gate};

pub use mailrun_core::outcome::Outcome;

pub use message::ComposerError;
pub use simulated::{Simulated, SimulatedError};
pub use smtp::{Smtp, SmtpError, TlsError, reply_classes};

/// One invitation, ready to be sent.
#[derive(Clone, Debug)]
pub struct Mail {
    /// The same on every attempt, so that a mail server or a reader can tell a repetition.
    pub message_id: String,
    /// The run that is paused if the mail's relay is stopped; none: it belongs to no run of invitations.
    pub run_id: Option<Uuid>,
    /// The recipient.
    pub email: String,
    /// The recipient's name.
    pub name: Option<String>,
    /// What the run says to everybody: a mailer that sends renders it for this recipient.
    pub template: Arc<Template>,
    /// Where the recipient can say that this is enough; none: the installation has no address that others can reach.
    pub unsubscribe: Option<String>,
}

/// A relay that the mailer has stopped, since many refusals could not be explained.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stopped {
    /// The relay, as host:port.
    pub relay: String,
    /// What was counted, and the relay's words.
    pub reason: String,
    /// What the refusals have in common.
    pub alike: Vec<String>,
    /// The runs whose mail was refused.
    pub runs: Vec<Uuid>,
}

/// Sends mail, as many at a time as are asked of it.
#[async_trait]
pub trait Mailer: Send + Sync {
    /// Hands `mail` to the mail server. Asks `attempt` before the mail is offered ([`Attempt::may_proceed`]), and again before
    /// the bytes that let the server accept it ([`Attempt::may_commit`]).
    async fn send(&self, mail: &Mail, attempt: &Attempt) -> Outcome;

    /// Whether to send at present. Whoever sends all the same gets [`Outcome::Later`].
    fn gate(&self) -> Gate {
        Gate::Open
    }

    /// Whether it may stop relays: then it has to be told what the ledger knows of that.
    fn stops_relays(&self) -> bool {
        false
    }

    /// Relays that it has stopped since it was asked last.
    fn take_stopped(&self) -> Vec<Stopped> {
        Vec::new()
    }

    /// What the ledger knows of stopped relays, with the answers of operators.
    fn learn(&self, _stops: &[RelayStop]) {}

    /// Whether it writes what its recipients read: then a mail carries its link.
    fn writes_mail(&self) -> bool {
        true
    }

    /// Whether a mail that failed may be tried again within a moment. Real servers penalise immediate retries.
    fn allows_immediate_retry(&self) -> bool {
        false
    }
}

/// Why the mailer can't be used as configured.
#[derive(Debug, thiserror::Error)]
pub enum MailerError {
    /// The simulated one.
    #[error(transparent)]
    Simulated(#[from] SimulatedError),
    /// The real one.
    #[error(transparent)]
    Smtp(#[from] SmtpError),
}

/// A mailer for a process that does not send.
#[must_use]
pub fn none() -> Arc<dyn Mailer> {
    Arc::new(NoMailer)
}

struct NoMailer;

#[async_trait]
impl Mailer for NoMailer {
    async fn send(&self, _: &Mail, _: &Attempt) -> Outcome {
        Outcome::Later("this process does not send".into())
    }
}

/// The mailer that the configuration asks for.
///
/// # Errors
/// When it can't be used as configured.
pub fn mailer(config: &MailerConfig) -> Result<Arc<dyn Mailer>, MailerError> {
    Ok(match config.kind {
        MailerKind::Simulated => Arc::new(Simulated::new(&config.simulated)?),
        MailerKind::Smtp => Arc::new(Smtp::new(&config.smtp)?),
    })
}
