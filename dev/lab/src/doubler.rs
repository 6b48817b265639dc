//! Publishes each message of a virtual host a second time, to test that duplicates are neither counted nor sent twice.
//!
//! An additional queue is bound beside each queue and receives a copy of each message. Each copy is published again over the default
//! exchange, from which nothing is copied.

use std::time::Duration;

use anyhow::{Context as _, Result};
use futures::StreamExt as _;
use lapin::{
    Channel, Connection, ConnectionProperties,
    options::{
        BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, QueueBindOptions,
        QueueDeclareOptions,
    },
    types::{AMQPValue, FieldTable},
};
use mailrun_core::queue::EXCHANGE;
use tokio::{task::JoinHandle, time::sleep};

const COPIES: &str = "lab.copies";
const PREFETCH: u16 = 500;
/// Pause before reconnecting.
const AGAIN: Duration = Duration::from_millis(200);

/// Duplicates messages until it is dropped.
#[derive(Debug)]
pub struct Doubler(JoinHandle<()>);

impl Doubler {
    /// Starts to duplicate the messages of these queues. The exchange must exist.
    pub async fn start(url: &str, queues: &[String]) -> Result<Self> {
        let (connection, channel) = open(url, queues).await.context("messages can't be doubled")?;
        let (url, queues) = (url.to_owned(), queues.to_vec());
        Ok(Self(tokio::spawn(async move {
            let mut open_now = Some((connection, channel));
            loop {
                let opened = match open_now.take() {
                    Some(opened) => Ok(opened),
                    None => open(&url, &queues).await,
                };
                // Any error, such as a killed node, is a fault that the pipeline must survive, and so must this.
                if let Ok((_connection, channel)) = opened {
                    let _ = double(&channel).await;
                }
                sleep(AGAIN).await;
            }
        })))
    }
}

impl Drop for Doubler {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn open(url: &str, queues: &[String]) -> lapin::Result<(Connection, Channel)> {
    let connection = Connection::connect(url, ConnectionProperties::default()).await?;
    let channel = connection.create_channel().await?;
    let mut quorum = FieldTable::default();
    quorum.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
    let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(COPIES.into(), durable, quorum).await?;
    for queue in queues {
        let (exchange, key) = (EXCHANGE.into(), queue.as_str().into());
        channel.queue_bind(COPIES.into(), exchange, key, QueueBindOptions::default(), FieldTable::default()).await?;
    }
    channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
    Ok((connection, channel))
}

async fn double(channel: &Channel) -> lapin::Result<()> {
    let mut copies = channel
        .basic_consume(COPIES.into(), "doubler".into(), BasicConsumeOptions::default(), FieldTable::default())
        .await?;
    while let Some(copy) = copies.next().await {
        let copy = copy?;
        let queue = copy.routing_key.clone();
        channel.basic_publish("".into(), queue, BasicPublishOptions::default(), &copy.data, copy.properties).await?;
        channel.basic_ack(copy.delivery_tag, BasicAckOptions::default()).await?;
    }
    Ok(())
}
