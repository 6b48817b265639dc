//! What a virtual host says about the ledger that it belongs to: which installation's it is, and its latest epoch.
//!
//! RabbitMQ compares the arguments of an exchange that is declared twice. So the exchange `mailrun.installation` names its
//! owner in its alternate exchange, `mailrun.installation.<id>`: the first declaration wins, and another installation's is
//! refused, without a race. The latest epoch is the only message of the queue `mailrun.epoch`.

use lapin::{
    BasicProperties, Channel, ErrorKind, ExchangeKind,
    options::{
        BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, ExchangeDeclareOptions, ExchangeDeleteOptions,
    },
    protocol::{AMQPErrorKind, AMQPSoftError},
    types::{AMQPValue, FieldTable},
};
use tokio::time::timeout;
use tracing::warn;
use uuid::Uuid;

use crate::{
    broker::{Broker, BrokerError},
    message::{EpochMessage, Message as _, decode, encode},
    topology,
};

/// The exchange whose alternate exchange names the owner.
const OWNED: &str = "mailrun.installation";
const PERSISTENT: u8 = 2;

/// The exchange that only the installation `id` declares.
#[must_use]
pub fn exchange_of(id: Uuid) -> String {
    format!("{OWNED}.{id}")
}

/// What to do about a virtual host's owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// Mark an unmarked virtual host; refuse one that belongs to another installation.
    Adopt,
    /// Look only: for users who may not declare exchanges.
    Verify,
    /// Mark it, whoever owned it before.
    TakeOver,
}

/// Makes sure that the virtual host belongs to the installation `id`.
///
/// # Errors
/// [`BrokerError::Foreign`] if it belongs to another one, [`BrokerError::Unmarked`] if it belongs to none and `claim` is
/// [`Claim::Verify`].
pub async fn claim(broker: &Broker, id: Uuid, claim: Claim) -> Result<(), BrokerError> {
    match claim {
        Claim::Verify => verify(broker, id).await,
        Claim::Adopt => adopt(broker, id).await,
        Claim::TakeOver => {
            match adopt(broker, id).await {
                Err(BrokerError::Foreign { owner }) => {
                    on_channel(broker, async |channel| {
                        delete(&channel, OWNED).await?;
                        if let Some(owner) = owner {
                            delete(&channel, &exchange_of(owner)).await?;
                        }
                        Ok(())
                    })
                    .await?;
                }
                claimed => return claimed,
            }
            adopt(broker, id).await?;
            // In place of the former owner's; the next process that starts marks its epoch.
            write_epoch(broker, id, 0).await
        }
    }
}

async fn verify(broker: &Broker, id: Uuid) -> Result<(), BrokerError> {
    if exists(broker, &exchange_of(id)).await? {
        Ok(())
    } else if exists(broker, OWNED).await? {
        Err(BrokerError::Foreign { owner: None })
    } else {
        Err(BrokerError::Unmarked)
    }
}

async fn exists(broker: &Broker, exchange: &str) -> Result<bool, BrokerError> {
    let looked = on_channel(broker, async |channel| {
        let options = ExchangeDeclareOptions { passive: true, ..ExchangeDeclareOptions::default() };
        channel.exchange_declare(exchange.into(), ExchangeKind::Fanout, options, FieldTable::default()).await
    });
    match looked.await {
        Ok(()) => Ok(true),
        Err(BrokerError::Amqp(error)) if soft_error(&error) == Some(AMQPSoftError::NOTFOUND) => Ok(false),
        Err(error) => Err(error),
    }
}

async fn adopt(broker: &Broker, id: Uuid) -> Result<(), BrokerError> {
    let own = exchange_of(id);
    let declared = on_channel(broker, async |channel| {
        let options = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
        channel.exchange_declare(own.as_str().into(), ExchangeKind::Fanout, options, FieldTable::default()).await?;
        let mut owner = FieldTable::default();
        owner.insert("alternate-exchange".into(), AMQPValue::LongString(own.as_str().into()));
        channel.exchange_declare(OWNED.into(), ExchangeKind::Fanout, options, owner).await
    });
    match declared.await {
        Err(BrokerError::Amqp(error)) if soft_error(&error) == Some(AMQPSoftError::PRECONDITIONFAILED) => {
            // It would make the virtual host look like ours.
            on_channel(broker, async |channel| delete(&channel, &own).await).await?;
            // RabbitMQ cuts long refusals off.
            let owner = match owner_in(&error.to_string(), id) {
                Some(owner) => Some(owner),
                None => read(broker).await?.map(|marker| marker.installation).filter(|owner| *owner != id),
            };
            Err(BrokerError::Foreign { owner })
        }
        declared => declared,
    }
}

async fn delete(channel: &Channel, exchange: &str) -> lapin::Result<()> {
    channel.exchange_delete(exchange.into(), ExchangeDeleteOptions::default()).await
}

/// The installation that the server's refusal names: *inequivalent arg … received '…<id>' but current is '…<owner>'*.
fn owner_in(text: &str, id: Uuid) -> Option<Uuid> {
    text.split(&format!("{OWNED}."))
        .skip(1)
        .filter_map(|rest| rest.get(..uuid::fmt::Hyphenated::LENGTH)?.parse().ok())
        .find(|owner| *owner != id)
}

/// The latest epoch of the installation `id` that was marked. None: none was. Several processes must not read it at the same
/// moment: the message is out of the queue meanwhile.
///
/// # Errors
/// The broker's.
pub async fn read_epoch(broker: &Broker, id: Uuid) -> Result<Option<i64>, BrokerError> {
    Ok(read(broker).await?.filter(|marker| marker.installation == id).map(|marker| marker.epoch))
}

async fn read(broker: &Broker) -> Result<Option<EpochMessage>, BrokerError> {
    let mut found = None;
    let looked = on_channel(broker, async |channel| {
        let got = channel.basic_get(topology::EPOCH.into(), BasicGetOptions::default()).await?;
        // It goes back to the queue when the channel closes.
        found = got.and_then(|got| decode::<EpochMessage>(None, &got.delivery.data).ok());
        Ok(())
    });
    match looked.await {
        // Only users who may declare queues create it.
        Err(BrokerError::Amqp(error)) if soft_error(&error) == Some(AMQPSoftError::NOTFOUND) => Ok(None),
        Err(BrokerError::Amqp(error)) if soft_error(&error) == Some(AMQPSoftError::ACCESSREFUSED) => {
            warn!("no right to read the queue {}: a restored backup is detected only by messages", topology::EPOCH);
            Ok(None)
        }
        looked => looked.map(|()| found),
    }
}

/// Marks the latest epoch, in place of an earlier one.
///
/// # Errors
/// The broker's.
pub async fn write_epoch(broker: &Broker, installation: Uuid, epoch: i64) -> Result<(), BrokerError> {
    on_channel(broker, async |channel| {
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        let properties = BasicProperties::default()
            .with_delivery_mode(PERSISTENT)
            .with_content_type("application/json".into())
            .with_type(EpochMessage::TYPE.into());
        let body = encode(&EpochMessage { epoch, installation });
        let options = BasicPublishOptions::default();
        channel
            .basic_publish(topology::EXCHANGE.into(), topology::EPOCH.into(), options, &body, properties)
            .await?
            .await?;
        Ok(())
    })
    .await
}

/// Does `work` on a channel of a connection of its own.
async fn on_channel(broker: &Broker, work: impl AsyncFnOnce(Channel) -> lapin::Result<()>) -> Result<(), BrokerError> {
    let link = broker.connect("marker").await?;
    let done = timeout(broker.answer_timeout(), async { work(link.channel().await?).await }).await;
    link.close().await;
    Ok(done.map_err(|_| BrokerError::Timeout)??)
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
    fn the_owner_is_read_from_the_refusal() {
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
