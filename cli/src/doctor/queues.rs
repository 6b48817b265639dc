//! RabbitMQ: whether it is reachable and accepts messages, and whether all exchanges and queues exist as declared.

use std::{collections::HashMap, sync::Arc, time::Duration};

use lapin::{
    BasicProperties, Channel, Confirmation, ErrorKind,
    options::{BasicPublishOptions, ConfirmSelectOptions},
    protocol::AMQPErrorKind,
};
use mailrun_app::config::{AmqpConfig, Config};
use mailrun_broker::{
    Broker, BrokerError, Link, Publisher,
    topology::{self, Queue},
};
use mailrun_core::queue::{DEAD, EXCHANGE, ITEMS, RESULTS, RUNS, RUNS_PAUSED, RUNS_WAIT};
use tokio::time::timeout;

use super::{
    Target,
    report::{Finding, Report},
};

const CHECK: &str = "RabbitMQ";
pub(super) const QUEUES: &str = "queues";
/// Time limit for a publisher confirm.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(5);
/// Time limit for all other operations together.
const TIMEOUT: Duration = Duration::from_secs(60);
/// A routing key without a queue: the broker confirms and drops the message.
const NOWHERE: &str = "mailrun.doctor";

const NOT_ALLOWED: u16 = 403;
const NOT_FOUND: u16 = 404;
const DIFFERENT: u16 = 406;

/// A queue's messages and consumers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Depth {
    pub(super) messages: u32,
    pub(super) consumers: u32,
}

impl Depth {
    fn of(queue: &lapin::Queue) -> Self {
        Self { messages: queue.message_count(), consumers: queue.consumer_count() }
    }
}

/// The reachable RabbitMQ.
pub(super) struct RabbitMq {
    pub(super) broker: Arc<Broker>,
    /// None: it accepts no messages.
    pub(super) publisher: Option<Publisher>,
    connection: Link,
    depths: HashMap<String, Depth>,
}

impl RabbitMq {
    /// A new channel.
    pub(super) async fn channel(&self) -> lapin::Result<Channel> {
        self.connection.channel().await
    }

    /// A queue's depth as examined; 0 if the queue is missing.
    pub(super) fn depth(&self, queue: &str) -> Depth {
        self.depths.get(queue).copied().unwrap_or_default()
    }

    /// A queue's present depth.
    pub(super) async fn depth_now(&self, queue: &str) -> lapin::Result<Depth> {
        let channel = self.channel().await?;
        let found = topology::look(&channel, queue).await?;
        let _ = channel.close(200, "done".into()).await;
        Ok(Depth::of(&found))
    }

    /// The messages on these queues.
    pub(super) fn messages<'a>(&self, queues: impl IntoIterator<Item = &'a str>) -> u32 {
        queues.into_iter().map(|queue| self.depth(queue).messages).sum()
    }

    /// The messages on all item queues.
    pub(super) fn items(&self) -> u32 {
        self.messages(self.broker.item_queues().iter().map(AsRef::as_ref))
    }
}

/// Checks it, and declares what is missing if asked to. None: it is unavailable.
pub(super) async fn examine(target: &Target, report: &mut Report) -> Option<RabbitMq> {
    match inspect(target, report).await {
        Ok(rabbitmq) => {
            if rabbitmq.publisher.is_some() {
                report.fine(CHECK, "available, and accepts messages");
            }
            Some(rabbitmq)
        }
        Err(error) => {
            report.add(Finding::new(
                CHECK,
                "RabbitMQ is unavailable",
                format!(
                    "{error}. Until it is available, lists are accepted but not sent. Nothing is lost, even if RabbitMQ loses all \
                    messages: the sweeper republishes them from the ledger"
                ),
                "Start RabbitMQ, or correct amqp.urls or AMQP_URL",
            ));
            None
        }
    }
}

async fn inspect(target: &Target, report: &mut Report) -> Result<RabbitMq, BrokerError> {
    // Connecting normally declares the topology; here, missing parts must be seen first.
    let amqp = AmqpConfig { declare_topology: false, ..target.config.amqp.clone() };
    let broker = Config { amqp, ..target.config.clone() }.broker("mailrun doctor");
    let connection = broker.connect("inspect").await?;
    let mut rabbitmq = RabbitMq { broker, publisher: None, connection, depths: HashMap::new() };
    let examined = timeout(TIMEOUT, examine_topology(target, &mut rabbitmq, report)).await;
    examined.map_err(|_| BrokerError::Timeout)??;
    // On its own connection, because one that an alarm blocks cannot even be closed.
    let connection = rabbitmq.broker.connect("publish").await?;
    let accepts = timeout(TIMEOUT, accepts_messages(&connection)).await;
    connection.close().await;
    match accepts.map_err(|_| BrokerError::Timeout)?? {
        Accepts::Yes => rabbitmq.publisher = Some(rabbitmq.broker.publisher(1)),
        Accepts::NoExchange => {}
        Accepts::No(why) => report.add(Finding::new(
            CHECK,
            "RabbitMQ accepts no messages",
            format!(
                "{why}. Until it does, nothing is sent or counted; all messages wait, and none is lost. Repairs that publish are \
                not possible meanwhile"
            ),
            "See rabbitmq-diagnostics alarms: free disk space, or add memory",
        )),
    }
    Ok(rabbitmq)
}

/// How an exchange or a queue compares with its declaration.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Compared {
    Equal(Depth),
    Missing,
    /// Its arguments differ; the broker's message.
    Different(String),
}

/// Interprets the broker's refusal. Err: it is not about the topology.
fn refused(error: lapin::Error) -> Result<Compared, lapin::Error> {
    match code(&error) {
        Some(NOT_FOUND) => Ok(Compared::Missing),
        Some(DIFFERENT) => Ok(Compared::Different(message(&error))),
        _ => Err(error),
    }
}

fn code(error: &lapin::Error) -> Option<u16> {
    match error.kind() {
        ErrorKind::ProtocolError(error) => match error.kind() {
            AMQPErrorKind::Soft(soft) => Some(soft.get_id()),
            AMQPErrorKind::Hard(_) => None,
        },
        _ => None,
    }
}

fn message(error: &lapin::Error) -> String {
    match error.kind() {
        ErrorKind::ProtocolError(error) => error.get_message().to_string(),
        _ => error.to_string(),
    }
}

/// An error closes the channel, so each check uses a new one.
async fn compare(rabbitmq: &RabbitMq, queue: &Queue) -> lapin::Result<Compared> {
    let channel = rabbitmq.channel().await?;
    let found = match queue.look(&channel).await {
        Ok(found) => found,
        Err(error) => return refused(error),
    };
    // It exists, so this creates nothing and only compares the arguments.
    match queue.declare(&channel).await {
        Ok(_) => {
            let _ = channel.close(200, "done".into()).await;
        }
        // A user without the right to declare cannot see the arguments.
        Err(error) if code(&error) == Some(NOT_ALLOWED) => {}
        Err(error) => return refused(error),
    }
    Ok(Compared::Equal(Depth::of(&found)))
}

async fn compare_exchanges(rabbitmq: &RabbitMq) -> lapin::Result<Compared> {
    let channel = rabbitmq.channel().await?;
    if let Err(error) = topology::look_at_exchanges(&channel).await {
        return refused(error);
    }
    match topology::declare_exchanges(&channel).await {
        Err(error) if code(&error) != Some(NOT_ALLOWED) => refused(error),
        _ => Ok(Compared::Equal(Depth::default())),
    }
}

async fn declare(rabbitmq: &RabbitMq, queue: &Queue) -> lapin::Result<()> {
    let channel = rabbitmq.channel().await?;
    queue.declare(&channel).await?;
    queue.bind(&channel).await?;
    channel.close(200, "declared".into()).await
}

async fn declare_exchanges(rabbitmq: &RabbitMq) -> lapin::Result<()> {
    let channel = rabbitmq.channel().await?;
    topology::declare_exchanges(&channel).await
}

async fn examine_topology(target: &Target, rabbitmq: &mut RabbitMq, report: &mut Report) -> Result<(), BrokerError> {
    let queues = topology::queues(rabbitmq.broker.item_queues(), &target.config.all_rungs());
    match compare_exchanges(rabbitmq).await? {
        Compared::Equal(_) => {}
        Compared::Missing => report.add(target.repair(exchange_missing(), declare_exchanges(rabbitmq)).await),
        Compared::Different(message) => report.add(exchange_different(&message)),
    }
    for queue in &queues {
        match compare(rabbitmq, queue).await? {
            Compared::Equal(depth) => {
                rabbitmq.depths.insert(queue.name.to_string(), depth);
                if target.fix {
                    // AMQP cannot list bindings, and repeating a binding changes nothing. A user without the right to bind has not
                    // lost any bindings either.
                    let _ = declare(rabbitmq, queue).await;
                }
            }
            Compared::Missing => report.add(target.repair(missing(&queue.name), declare(rabbitmq, queue)).await),
            Compared::Different(message) => report.add(different(&queue.name, &message)),
        }
    }
    if !report.has_found(QUEUES) {
        let depths: Vec<String> = [RUNS, ITEMS, RESULTS, DEAD]
            .iter()
            .map(|queue| match *queue {
                ITEMS => format!("{ITEMS} {}", rabbitmq.items()),
                queue => format!("{queue} {}", rabbitmq.depth(queue).messages),
            })
            .collect();
        report.fine(QUEUES, format!("all {} exist as declared; messages: {}", queues.len(), depths.join(", ")));
    }
    Ok(())
}

/// The effect of a missing queue on the recipients.
fn effect(queue: &str) -> &'static str {
    match queue {
        RUNS | RUNS_WAIT => "runs do not start or continue",
        RUNS_PAUSED => "resumed runs do not continue",
        RESULTS => "sent invitations are not counted",
        DEAD => "workers hold the invitations that failed",
        queue if queue.starts_with(ITEMS) => "nothing is sent",
        _ => "workers hold the invitations that wait for a retry",
    }
}

fn missing(queue: &str) -> Finding {
    Finding::new(
        QUEUES,
        format!("{queue} is missing"),
        format!(
            "Without it, {}. Its messages are not lost: the sweeper republishes them from the ledger",
            effect(queue)
        ),
        "--fix declares and binds it. A Mailrun process that connects does the same",
    )
}

fn different(queue: &str, message: &str) -> Finding {
    Finding::new(
        QUEUES,
        format!("{queue} has other arguments"),
        format!(
            "{message}. No Mailrun process that declares its queues can connect, so {}. The expected arguments keep messages from \
            being lost or circulating forever",
            effect(queue)
        ),
        format!(
            "RabbitMQ cannot change them. Stop the workers, delete {queue} in the management console, and run mailrun doctor --fix: \
            its messages are republished from the ledger. If the settings differ from those of the workers (retry.rungs_ms, \
            amqp.item_queues), use the workers' settings instead"
        ),
    )
}

fn exchange_missing() -> Finding {
    Finding::new(
        QUEUES,
        "an exchange is missing",
        "Nothing can be published, so nothing is sent or counted. Workers hold their messages, and nothing is lost",
        "--fix declares the exchanges and binds the queues. A Mailrun process that connects does the same",
    )
}

fn exchange_different(message: &str) -> Finding {
    Finding::new(
        QUEUES,
        "an exchange has another type",
        format!("{message}. No Mailrun process that declares its exchanges can connect"),
        "Delete it in the management console and run mailrun doctor --fix",
    )
}

/// Whether messages are accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Accepts {
    Yes,
    /// The exchange is missing, which is a finding already.
    NoExchange,
    /// The reason, if known.
    No(String),
}

/// Publishes messages to a routing key without a queue. A broker with an alarm notifies only publishers: it accepts the first
/// message of a connection and then stops reading from it.
async fn accepts_messages(connection: &Link) -> lapin::Result<Accepts> {
    let channel = connection.channel().await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    let publish = async || {
        let (options, properties) = (BasicPublishOptions::default(), BasicProperties::default());
        channel.basic_publish(EXCHANGE.into(), NOWHERE.into(), options, b"", properties).await?.await
    };
    let publish = async {
        publish().await?;
        publish().await
    };
    Ok(match timeout(CONFIRM_TIMEOUT, publish).await {
        Ok(Ok(Confirmation::Ack(_))) => Accepts::Yes,
        Ok(Ok(_)) => Accepts::No("It refused a message".to_owned()),
        Ok(Err(error)) if code(&error) == Some(NOT_FOUND) => Accepts::NoExchange,
        Ok(Err(error)) => Accepts::No(message(&error)),
        Err(_) if connection.status().blocked() => Accepts::No("An alarm blocks publishers".to_owned()),
        Err(_) => Accepts::No(format!("It did not confirm a message within {} s", CONFIRM_TIMEOUT.as_secs())),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use lapin::protocol::{AMQPError, AMQPSoftError};

    fn error(soft: AMQPSoftError) -> lapin::Error {
        ErrorKind::ProtocolError(AMQPError::new(soft.into(), "its message".into())).into()
    }

    #[test]
    fn tells_missing_from_different() {
        assert_eq!(refused(error(AMQPSoftError::NOTFOUND)).unwrap(), Compared::Missing);
        let different = refused(error(AMQPSoftError::PRECONDITIONFAILED)).unwrap();
        assert_eq!(different, Compared::Different("its message".into()));
        assert!(refused(error(AMQPSoftError::ACCESSREFUSED)).is_err());
    }

    #[test]
    fn reports_the_effect_of_a_missing_queue() {
        assert!(missing("mailrun.items.2").what.starts_with("Without it, nothing is sent."));
        assert!(missing("mailrun.retry.5s").what.contains("wait for a retry"));
    }
}
