//! RabbitMQ: the topology, connections, the publisher and consumers. It knows nothing of the ledger.
//!
//! Publishers and consumers use separate connections: when the broker blocks a publisher, it blocks the whole connection,
//! including its acks and heartbeats.

mod connection;
pub mod consumer;
pub mod dead_letters;
pub mod epoch;
mod error;
mod link;
pub mod marker;
mod outgoing;
pub mod outlook;
mod publisher;
mod rejections;
pub mod settings;
pub mod topology;
pub mod watchdog;

pub use self::{
    connection::Broker,
    error::BrokerError,
    link::Link,
    outgoing::{DIED_AT_HEADER, EPOCH_HEADER, ERROR_HEADER, NotUnderstood, Outgoing, REASON_HEADER, epoch_of},
    publisher::Publisher,
    rejections::{Rejection, Rejections},
    topology::depth,
};
