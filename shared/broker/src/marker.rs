//! What a virtual host stores about its ledger: the installation that it belongs to, and the latest epoch.
//!
//! RabbitMQ compares the arguments when an exchange is declared again. So the exchange `mailrun.installation` names its owner in
//! its alternate exchange, `mailrun.installation.<id>`: the first declaration wins, and one by another installation is refused,
//! without a race. The latest epoch is the only message of the queue `mailrun.epoch`.

use std::time::Duration;

use lapin::{
    BasicProperties, Channel, ErrorKind, ExchangeKind,
    options::{
        BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, ExchangeDeclareOptions, ExchangeDeleteOptions,
    },
    protocol::{AMQPErrorKind, AMQPSoftError},
    types::{AMQPValue, FieldTable},
};
use mailrun_core::queue;
use tokio::time::timeout;
use tracing::warn;
use uuid::Uuid;

use crate::{Broker, BrokerError, Link};
use mailrun_core::message::{EpochMessage, Message as _, decode, encode};

/// The exchange whose alternate exchange names the owner.
const OWNED: &str = "mailrun.installation";
const PERSISTENT: u8 = 2;

/// The exchange that only the installation `id` declares.
#[must_use]
pub fn exchange_of(id: Uuid) -> String {
    format!("{OWNED}.{id}")
}

/// How to check or set the owner of a virtual host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// Mark an unmarked virtual host; refuse one of another installation.
    Adopt,
    /// Only check: for users who may not declare exchanges.
    Verify,
    /// Mark it, replacing any other owner.
    TakeOver,
}

/// Access to the marker of a virtual host, over a separate connection.
#[derive(Debug)]
pub struct Marker {
    link: Link,
    limit: Duration,
}

impl Marker {
    /// Connects.
    pub async fn open(broker: &Broker) -> Result<Self, BrokerError> {
        Ok(Self { link: broker.connect("marker").await?, limit: broker.answer_timeout() })
    }

    /// Makes sure that the virtual host belongs to the installation `id`.
    ///
    /// # Errors
    /// [`BrokerError::Foreign`] if it belongs to another one, [`BrokerError::Unmarked`] if it belongs to none and `claim` is
    /// [`Claim::Verify`].
    pub async fn claim(&self, id: Uuid, claim: Claim) -> Result<(), BrokerError> {
        match claim {
            Claim::Verify => self.verify(id).await,
            Claim::Adopt => self.adopt(id).await,
            Claim::TakeOver => match self.adopt(id).await {
                Err(BrokerError::Foreign { owner }) => {
                    self.on_channel(async |channel| {
                        delete(&channel, OWNED).await?;
                        match owner {
                            Some(owner) => delete(&channel, &exchange_of(owner)).await,
                            None => Ok(()),
                        }
                    })
                    .await?;
                    self.adopt(id).await?;
                    // Replaces the former owner's epoch. The next process that starts writes its own.
                    self.write_epoch(id, 0).await
                }
                claimed => claimed,
            },
        }
    }

    async fn verify(&self, id: Uuid) -> Result<(), BrokerError> {
        if self.exists(&exchange_of(id)).await? {
            Ok(())
        } else if self.exists(OWNED).await? {
            Err(BrokerError::Foreign { owner: None })
        } else {
            Err(BrokerError::Unmarked)
        }
    }

    async fn exists(&self, exchange: &str) -> Result<bool, BrokerError> {
        let looked = self.on_channel(async |channel| {
            let options = ExchangeDeclareOptions { passive: true, ..ExchangeDeclareOptions::default() };
            channel.exchange_declare(exchange.into(), ExchangeKind::Fanout, options, FieldTable::default()).await
        });
        match looked.await {
            Ok(()) => Ok(true),
            Err(BrokerError::Amqp(error)) if soft_error(&error) == Some(AMQPSoftError::NOTFOUND) => Ok(false),
            Err(error) => Err(error),
        }
    }

    async fn adopt(&self, id: Uuid) -> Result<(), BrokerError> {
        let own = exchange_of(id);
        let declared = self.on_channel(async |channel| {
            let options = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
            channel.exchange_declare(own.as_str().into(), ExchangeKind::Fanout, options, FieldTable::default()).await?;
            let mut owner = FieldTable::default();
            owner.insert("alternate-exchange".into(), AMQPValue::LongString(own.as_str().into()));
            channel.exchange_declare(OWNED.into(), ExchangeKind::Fanout, options, owner).await
        });
        match declared.await {
            Err(BrokerError::Amqp(error)) if soft_error(&error) == Some(AMQPSoftError::PRECONDITIONFAILED) => {
                // The exchange just declared would make the virtual host look like ours.
                self.on_channel(async |channel| delete(&channel, &own).await).await?;
                // RabbitMQ truncates long error texts, so the owner may be missing from it.
                let owner = match owner_in(&error.to_string(), id) {
                    Some(owner) => Some(owner),
                    None => self.read().await?.map(|marker| marker.installation).filter(|owner| *owner != id),
                };
                Err(BrokerError::Foreign { owner })
            }
            declared => declared,
        }
    }

    /// The latest epoch stored for the installation `id`, if any. Only one process may read it at a time, since the message is not
    /// on the queue meanwhile.
    pub async fn read_epoch(&self, id: Uuid) -> Result<Option<i64>, BrokerError> {
        Ok(self.read().await?.filter(|marker| marker.installation == id).map(|marker| marker.epoch))
    }

    async fn read(&self) -> Result<Option<EpochMessage>, BrokerError> {
        let looked = self.on_channel(async |channel| {
            let got = channel.basic_get(queue::EPOCH.into(), BasicGetOptions::default()).await?;
            // Not acked: it returns to the queue when the channel closes.
            Ok(got.and_then(|got| decode::<EpochMessage>(None, &got.delivery.data).ok()))
        });
        match looked.await {
            // Only users who may declare queues create this queue.
            Err(BrokerError::Amqp(error)) if soft_error(&error) == Some(AMQPSoftError::NOTFOUND) => Ok(None),
            Err(BrokerError::Amqp(error)) if soft_error(&error) == Some(AMQPSoftError::ACCESSREFUSED) => {
                warn!("no right to read the queue {}: a restored backup is detected only by messages", queue::EPOCH);
                Ok(None)
            }
            looked => looked,
        }
    }

    /// Stores the latest epoch, replacing an earlier one.
    pub async fn write_epoch(&self, installation: Uuid, epoch: i64) -> Result<(), BrokerError> {
        self.on_channel(async |channel| {
            channel.confirm_select(ConfirmSelectOptions::default()).await?;
            let properties = BasicProperties::default()
                .with_delivery_mode(PERSISTENT)
                .with_content_type("application/json".into())
                .with_type(EpochMessage::TYPE.into());
            let body = encode(&EpochMessage { epoch, installation });
            let options = BasicPublishOptions::default();
            channel
                .basic_publish(queue::EXCHANGE.into(), queue::EPOCH.into(), options, &body, properties)
                .await?
                .await?;
            Ok(())
        })
        .await
    }

    /// Runs `work` on a channel of its own, because an error closes the channel.
    async fn on_channel<T>(&self, work: impl AsyncFnOnce(Channel) -> lapin::Result<T>) -> Result<T, BrokerError> {
        let done = async {
            let channel = self.link.channel().await?;
            let done = work(channel.clone()).await?;
            channel.close(200, "done".into()).await?;
            Ok::<_, lapin::Error>(done)
        };
        Ok(timeout(self.limit, done).await.map_err(|_| BrokerError::Timeout)??)
    }

    /// Closes the connection and waits. Dropping it closes it in the background.
    pub async fn close(self) {
        self.link.close().await;
    }
}

async fn delete(channel: &Channel, exchange: &str) -> lapin::Result<()> {
    channel.exchange_delete(exchange.into(), ExchangeDeleteOptions::default()).await
}

/// Extracts the owner from the broker's error: *inequivalent arg … received '…<id>' but current is '…<owner>'*.
fn owner_in(text: &str, id: Uuid) -> Option<Uuid> {
    text.split(&format!("{OWNED}."))
        .skip(1)
        .filter_map(|rest| rest.get(..uuid::fmt::Hyphenated::LENGTH)?.parse().ok())
        .find(|owner| *owner != id)
}

fn soft_error(error: &lapin::Error) -> Option<AMQPSoftError> {
    match error.kind() {
        ErrorKind::ProtocolError(error) => match error.kind() {
            AMQPErrorKind::Soft(soft) => Some(soft.clone()),
            AMQPErrorKind::Hard(_) => None,
        },
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_owner_is_extracted_from_the_error() {
        let (me, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let text = format!(
            "PRECONDITION_FAILED - inequivalent arg 'alternate-exchange' for exchange 'mailrun.installation' in vhost '/': \
             received '{}' but current is '{}'",
            exchange_of(me),
            exchange_of(other)
        );
        assert_eq!(owner_in(&text, me), Some(other));
        assert_eq!(owner_in("PRECONDITION_FAILED", me), None);
    }
}
