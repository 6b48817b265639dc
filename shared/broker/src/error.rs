//! Why RabbitMQ can't be used at the moment.

use lapin::{
    ErrorKind,
    protocol::{AMQPErrorKind, AMQPSoftError},
};
use uuid::Uuid;

use crate::publisher::CONFIRMED_SOON;

/// Why RabbitMQ can't be used at the moment.
#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    /// Malformed AMQP URL. It may contain a password, so the message repeats neither the URL nor the parser's error.
    #[error("amqp.urls contains a URL that is not of the form amqp://user:password@host:port/vhost")]
    Url,
    /// The certificate authorities can't be read.
    #[error("amqp.ca_file can't be read: {0}")]
    Authorities(std::io::Error),
    /// No node could be reached, or the broker closed the channel or connection.
    #[error("RabbitMQ: {0}")]
    Amqp(#[from] lapin::Error),
    /// No reply in time: the broker is overloaded, blocked by an alarm, or unreachable.
    #[error("RabbitMQ did not answer in time")]
    Timeout,
    /// The broker returned or rejected a message: its queue is missing or full.
    #[error("RabbitMQ did not take a message for {0}")]
    Rejected(String),
    /// The caller's time limit passed before all confirms; the messages may still arrive.
    #[error("RabbitMQ did not confirm the messages within {} s", CONFIRMED_SOON.as_secs())]
    Unconfirmed,
    /// The virtual host belongs to another installation.
    #[error("the virtual host belongs to another Mailrun installation")]
    Foreign {
        /// Its id, if the broker names it.
        owner: Option<Uuid>,
    },
    /// The virtual host belongs to no installation.
    #[error("the virtual host is not set up: run `mailrun setup` with a user who may declare exchanges and queues")]
    Unmarked,
    /// The publisher has stopped, because the process is ending.
    #[error("the publisher is closed")]
    Closed,
    /// The connection is open, but must not or cannot be used any more.
    #[error("{0}")]
    Useless(&'static str),
}

impl BrokerError {
    /// Whether the broker replied that the queue does not exist.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Amqp(error) if is_not_found(error))
    }
}

pub(crate) fn is_not_found(error: &lapin::Error) -> bool {
    matches!(error.kind(), ErrorKind::ProtocolError(error)
        if *error.kind() == AMQPErrorKind::Soft(AMQPSoftError::NOTFOUND))
}
