//! Why the pipeline can't use RabbitMQ at the moment.

use lapin::{
    ErrorKind,
    protocol::{AMQPErrorKind, AMQPSoftError},
};
use uuid::Uuid;

use crate::publisher::CONFIRMED_SOON;

/// Why the pipeline can't speak to RabbitMQ at the moment.
#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    /// Malformed AMQP URL. It may hold a password, so neither it nor the parser's words are repeated.
    #[error("amqp.urls holds something that is not amqp://user:password@host:port/vhost")]
    Url,
    /// The file with the authorities can't be read.
    #[error("amqp.ca_file can't be read: {0}")]
    Authorities(std::io::Error),
    /// No node could be reached, or the broker ended the conversation.
    #[error("RabbitMQ: {0}")]
    Amqp(#[from] lapin::Error),
    /// The broker is silent: overloaded, blocked by an alarm, or cut off.
    #[error("RabbitMQ did not answer in time")]
    Timeout,
    /// The broker has returned or rejected a message: its queue is missing, or full.
    #[error("RabbitMQ did not take a message for {0}")]
    Rejected(String),
    /// The caller could not wait any longer; the messages may still arrive.
    #[error("RabbitMQ has confirmed nothing for {} s", CONFIRMED_SOON.as_secs())]
    Unconfirmed,
    /// The virtual host belongs to another installation; which one, where the broker says so.
    #[error("the virtual host belongs to another Mailrun installation")]
    Foreign {
        /// Its id.
        owner: Option<Uuid>,
    },
    /// The virtual host belongs to no installation.
    #[error("the virtual host is not set up: run `mailrun setup` with a user who may declare exchanges and queues")]
    Unmarked,
    /// The process is ending.
    #[error("the publisher is closed")]
    Closed,
    /// The connection lives, and is of no use.
    #[error("{0}")]
    Useless(&'static str),
}

impl BrokerError {
    /// Whether the broker has said that there is no such queue.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Amqp(error) if is_not_found(error))
    }
}

pub(crate) fn is_not_found(error: &lapin::Error) -> bool {
    matches!(error.kind(), ErrorKind::ProtocolError(error)
        if *error.kind() == AMQPErrorKind::Soft(AMQPSoftError::NOTFOUND))
}
