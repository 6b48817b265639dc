//! Sends mail: the [`Mailer`] trait and its two implementations, simulated and SMTP.

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

/// One mail to one recipient, not yet rendered.
#[derive(Clone, Debug)]
pub struct Mail {
    /// The same on every attempt, so that a mail server or a mail client can recognise a duplicate.
    pub message_id: String,
    /// The run to pause if the mail's relay is stopped. `None`: the mail belongs to no run of invitations.
    pub run_id: Option<Uuid>,
    /// The recipient.
    pub email: String,
    /// The recipient's name.
    pub name: Option<String>,
    /// The run's texts. A mailer that really sends renders them for this recipient.
    pub template: Arc<Template>,
    /// One-click unsubscribe URL (RFC 8058). `None`: the installation has no public address.
    pub unsubscribe: Option<String>,
}

/// A relay that the mailer stopped after many unexplained refusals.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stopped {
    /// `host:port`.
    pub relay: String,
    /// The counts that tripped the breaker, and the relay's last reply.
    pub reason: String,
    /// The normalized texts of the refusals.
    pub alike: Vec<String>,
    /// The runs whose mail was refused.
    pub runs: Vec<Uuid>,
}

/// Sends mail. Calls to [`Mailer::send`] may run concurrently; the caller bounds how many.
#[async_trait]
pub trait Mailer: Send + Sync {
    /// Hands `mail` to the relay. Calls [`Attempt::may_proceed`] before it offers the mail, and [`Attempt::may_commit`] before it
    /// sends the bytes that let the relay accept the mail.
    async fn send(&self, mail: &Mail, attempt: &Attempt) -> Outcome;

    /// Whether the mailer accepts work at present. If it does not, [`Mailer::send`] returns [`Outcome::Later`].
    fn gate(&self) -> Gate {
        Gate::Open
    }

    /// Whether this mailer can stop relays. If so, the caller must keep it informed through [`Mailer::learn`].
    fn stops_relays(&self) -> bool {
        false
    }

    /// The relays stopped since the last call.
    fn take_stopped(&self) -> Vec<Stopped> {
        Vec::new()
    }

    /// Tells the mailer which relay stops the ledger holds, and how operators answered them.
    fn learn(&self, _stops: &[RelayStop]) {}

    /// Whether mail reaches real recipients. Only then does it need an unsubscribe URL.
    fn writes_mail(&self) -> bool {
        true
    }

    /// Whether a failed mail may be retried at once. Real servers penalise immediate retries.
    fn allows_immediate_retry(&self) -> bool {
        false
    }
}

/// The mailer's configuration is not usable.
#[derive(Debug, thiserror::Error)]
pub enum MailerError {
    /// The simulated mailer.
    #[error(transparent)]
    Simulated(#[from] SimulatedError),
    /// The SMTP mailer.
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

/// Builds the configured mailer.
///
/// # Errors
/// If its configuration is not usable.
pub fn mailer(config: &MailerConfig) -> Result<Arc<dyn Mailer>, MailerError> {
    Ok(match config.kind {
        MailerKind::Simulated => Arc::new(Simulated::new(&config.simulated)?),
        MailerKind::Smtp => Arc::new(Smtp::new(&config.smtp)?),
    })
}
