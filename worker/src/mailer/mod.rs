//! Who carries the mail. Each parallel send has a mailer of its own, as it would have a connection of its own.

mod simulated;

use async_trait::async_trait;
use mailrun_shared::config::MailerConfig;

pub use simulated::{Simulated, SimulatedError};

/// One invitation, ready to be sent.
#[derive(Clone, Debug)]
pub struct Mail {
    /// The same on every attempt, so that a mail server or a reader can tell a repetition.
    pub message_id: String,
    /// The recipient.
    pub email: String,
    /// The recipient's name.
    pub name: Option<String>,
    /// The subject.
    pub subject: String,
    /// The text.
    pub body: String,
    /// Its place in the run, from 1.
    pub position: i32,
    /// Which try of the present budget this is, from 1.
    pub tries: i16,
    /// How often a person has asked for it again.
    pub replays: i16,
}

/// What a mailer knows of a send. It is decided where the error is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The mail server accepted it.
    Sent,
    /// It was certainly not sent, for a reason that may pass.
    Retry(String),
    /// It was certainly not sent, and never will be.
    Failed(String),
}

/// Sends one mail at a time.
#[async_trait]
pub trait Mailer: Send {
    /// Hands `mail` to the mail server. When it returns, its fate is certain.
    async fn send(&mut self, mail: &Mail) -> Outcome;
}

/// Opens mailers.
pub trait Transport: Send + Sync {
    /// A mailer with a state (a connection, say) of its own. Cheap: it connects when it first sends.
    fn open(&self) -> Box<dyn Mailer>;
}

/// The transport that the configuration asks for.
///
/// # Errors
/// When it can't be used as configured.
pub fn transport(config: &MailerConfig) -> Result<Box<dyn Transport>, SimulatedError> {
    Ok(Box::new(Simulated::new(&config.simulated)?))
}
