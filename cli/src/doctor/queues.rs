//! RabbitMQ: whether it answers and takes messages, and whether every exchange and queue is there as it has to be.

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
use mailrun_core::queue::{DEAD, EXCHANGE, ITEMS, RESULTS, RUNS, RUNS_PAUSED, RUNS_WAIT, TESTS};
use tokio::time::timeout;

use super::{
    Patient,
    report::{Finding, Report},
};

const CHECK: &str = "RabbitMQ";
pub(super) const QUEUES: &str = "queues";
/// A broker that has confirmed nothing by then takes no messages.
const PATIENCE: Duration = Duration::from_secs(5);
/// It answers questions within this time, however many there are.
const LONGEST_LOOK: Duration = Duration::from_secs(60);
/// Nothing is bound to it: the broker takes such a message, confirms it and drops it.
const NOWHERE: &str = "mailrun.doctor";

const NOT_ALLOWED: u16 = 403;
const NOT_FOUND: u16 = 404;
const DIFFERENT: u16 = 406;

/// What is on a queue, and who reads it.
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

/// RabbitMQ, when it answers.
pub(super) struct Conveyor {
    pub(super) broker: Arc<Broker>,
    /// None: it takes no messages.
    pub(super) publisher: Option<Publisher>,
    connection: Link,
    depths: HashMap<String, Depth>,
}

impl Conveyor {
    /// A channel of its own.
    ///
    /// # Errors
    /// The broker's.
    pub(super) async fn channel(&self) -> lapin::Result<Channel> {
        self.connection.channel().await
    }

    /// What is on a queue; nothing, if it is not there.
    pub(super) fn depth(&self, queue: &str) -> Depth {
        self.depths.get(queue).copied().unwrap_or_default()
    }

    /// The same, looked at once more.
    ///
    /// # Errors
    /// The broker's.
    pub(super) async fn depth_now(&self, queue: &str) -> lapin::Result<Depth> {
        let channel = self.channel().await?;
        let found = topology::look(&channel, queue).await?;
        let _ = channel.close(200, "looked".into()).await;
        Ok(Depth::of(&found))
    }

    /// Messages that wait on these queues together.
    pub(super) fn messages<'a>(&self, queues: impl IntoIterator<Item = &'a str>) -> u32 {
        queues.into_iter().map(|queue| self.depth(queue).messages).sum()
    }

    /// Messages with items, on however many queues.
    pub(super) fn items(&self) -> u32 {
        self.messages(self.broker.item_queues().iter().map(AsRef::as_ref))
    }
}

/// Looks at it, and puts back what is missing, if that is wanted. None: it can't be used.
pub(super) async fn examine(patient: &Patient, report: &mut Report) -> Option<Conveyor> {
    match look(patient, report).await {
        Ok(conveyor) => {
            if conveyor.publisher.is_some() {
                report.fine(CHECK, "answers, and takes messages");
            }
            Some(conveyor)
        }
        Err(error) => {
            report.add(Finding::new(
                CHECK,
                "RabbitMQ can't be used",
                format!(
                    "{error}. While that lasts lists are accepted, and nothing of them is sent. Nothing is lost by it, not \
                     even if RabbitMQ loses all it holds: the ledger knows what is missing, and the sweeper puts it back"
                ),
                "Start RabbitMQ, or mend its address in amqp.urls or AMQP_URL",
            ));
            None
        }
    }
}

async fn look(patient: &Patient, report: &mut Report) -> Result<Conveyor, BrokerError> {
    // Whoever connects declares what is missing; here it is to be seen first.
    let amqp = AmqpConfig { declare_topology: false, ..patient.config.amqp.clone() };
    let broker = Config { amqp, ..patient.config.clone() }.broker("mailrun doctor");
    let connection = broker.connect("look").await?;
    let mut conveyor = Conveyor { broker, publisher: None, connection, depths: HashMap::new() };
    let examined = timeout(LONGEST_LOOK, examine_topology(patient, &mut conveyor, report)).await;
    examined.map_err(|_| BrokerError::Timeout)??;
    // On a connection of its own: one that is blocked by an alarm does not even let go of what it has.
    let connection = conveyor.broker.connect("try").await?;
    let taken = timeout(LONGEST_LOOK, takes_messages(&connection)).await;
    connection.close().await;
    match taken.map_err(|_| BrokerError::Timeout)?? {
        Taken::Yes => conveyor.publisher = Some(conveyor.broker.publisher(1)),
        Taken::NoExchange => {}
        Taken::No(why) => report.add(Finding::new(
            CHECK,
            "RabbitMQ takes no messages",
            format!(
                "{why}. Nothing is sent and nothing is counted until it does; all of it waits, and none is lost. What would \
                 have to be published can't be repaired meanwhile"
            ),
            "See rabbitmq-diagnostics alarms: make room on its disk, or give it more memory",
        )),
    }
    Ok(conveyor)
}

/// How something is found that has to be there.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Found {
    Right(Depth),
    Missing,
    /// It is something else; in the broker's words.
    Different(String),
}

/// What the broker's refusal means. Err: nothing about the topology.
fn refused(error: lapin::Error) -> Result<Found, lapin::Error> {
    match code(&error) {
        Some(NOT_FOUND) => Ok(Found::Missing),
        Some(DIFFERENT) => Ok(Found::Different(words(&error))),
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

fn words(error: &lapin::Error) -> String {
    match error.kind() {
        ErrorKind::ProtocolError(error) => error.get_message().to_string(),
        _ => error.to_string(),
    }
}

/// A refusal costs the channel, so each question gets one of its own.
async fn find(conveyor: &Conveyor, queue: &Queue) -> lapin::Result<Found> {
    let channel = conveyor.channel().await?;
    let found = match queue.look(&channel).await {
        Ok(found) => found,
        Err(error) => return refused(error),
    };
    // It exists, so this creates nothing, and says whether the arguments are the same.
    match queue.declare(&channel).await {
        Ok(_) => {
            let _ = channel.close(200, "looked".into()).await;
        }
        // Who may not declare can't see the arguments.
        Err(error) if code(&error) == Some(NOT_ALLOWED) => {}
        Err(error) => return refused(error),
    }
    Ok(Found::Right(Depth::of(&found)))
}

async fn find_exchanges(conveyor: &Conveyor) -> lapin::Result<Found> {
    let channel = conveyor.channel().await?;
    if let Err(error) = topology::look_at_exchanges(&channel).await {
        return refused(error);
    }
    match topology::declare_exchanges(&channel).await {
        Err(error) if code(&error) != Some(NOT_ALLOWED) => refused(error),
        _ => Ok(Found::Right(Depth::default())),
    }
}

async fn put_back(conveyor: &Conveyor, queue: &Queue) -> lapin::Result<()> {
    let channel = conveyor.channel().await?;
    queue.declare(&channel).await?;
    queue.bind(&channel).await?;
    channel.close(200, "declared".into()).await
}

async fn put_back_exchanges(conveyor: &Conveyor) -> lapin::Result<()> {
    let channel = conveyor.channel().await?;
    topology::declare_exchanges(&channel).await
}

async fn examine_topology(patient: &Patient, conveyor: &mut Conveyor, report: &mut Report) -> Result<(), BrokerError> {
    let queues = topology::queues(conveyor.broker.item_queues(), &patient.config.all_rungs());
    match find_exchanges(conveyor).await? {
        Found::Right(_) => {}
        Found::Missing => report.add(patient.mend(exchange_missing(), put_back_exchanges(conveyor)).await),
        Found::Different(words) => report.add(exchange_different(&words)),
    }
    for queue in &queues {
        match find(conveyor, queue).await? {
            Found::Right(depth) => {
                conveyor.depths.insert(queue.name.to_string(), depth);
                if patient.fix {
                    // AMQP has no way to look at bindings, and binding again changes nothing. Who has no right to did not
                    // lose them either.
                    let _ = put_back(conveyor, queue).await;
                }
            }
            Found::Missing => report.add(patient.mend(missing(&queue.name), put_back(conveyor, queue)).await),
            Found::Different(words) => report.add(different(&queue.name, &words)),
        }
    }
    if !report.has_found(QUEUES) {
        let depths: Vec<String> = [RUNS, ITEMS, RESULTS, DEAD]
            .iter()
            .map(|queue| match *queue {
                ITEMS => format!("{ITEMS} {}", conveyor.items()),
                queue => format!("{queue} {}", conveyor.depth(queue).messages),
            })
            .collect();
        report.fine(
            QUEUES,
            format!("all {} are there, as they have to be; waiting: {}", queues.len(), depths.join(", ")),
        );
    }
    Ok(())
}

/// What a queue is for, as far as the recipients are concerned.
fn meaning(queue: &str) -> &'static str {
    match queue {
        RUNS | RUNS_WAIT => "runs don't begin or go on",
        RUNS_PAUSED => "paused runs don't go on when they are resumed",
        RESULTS => "what was sent is not counted",
        TESTS => "tests are not sent",
        DEAD => "invitations that can't be sent are held by their workers",
        queue if queue.starts_with(ITEMS) => "nothing is sent",
        _ => "what has to be tried again later is held by its workers",
    }
}

fn missing(queue: &str) -> Finding {
    Finding::new(
        QUEUES,
        format!("{queue} is missing"),
        format!(
            "Without it {}. What it held is not lost: the ledger knows it, and the sweeper puts it back",
            meaning(queue)
        ),
        "--fix declares it, and binds it. A Mailrun process that connects does the same",
    )
}

fn different(queue: &str, words: &str) -> Finding {
    Finding::new(
        QUEUES,
        format!("{queue} has other arguments"),
        format!(
            "{words}. No Mailrun process that declares its queues can connect, so that {}; and the arguments are those that \
             keep messages from being lost or going round for ever",
            meaning(queue)
        ),
        format!(
            "RabbitMQ can't change them. Stop the workers, delete {queue} in the management console, and run mailrun doctor \
             --fix: what it held, the ledger knows. If the settings differ from those of the workers (retry.rungs_ms, \
             amqp.item_queues), use theirs instead"
        ),
    )
}

fn exchange_missing() -> Finding {
    Finding::new(
        QUEUES,
        "an exchange is missing",
        "Nothing can be published, so nothing is sent or counted. Workers hold what they have, and nothing is lost",
        "--fix declares the exchanges, and binds the queues to them. A Mailrun process that connects does the same",
    )
}

fn exchange_different(words: &str) -> Finding {
    Finding::new(
        QUEUES,
        "an exchange is of another kind",
        format!("{words}. No Mailrun process that declares its exchanges can connect"),
        "Delete it in the management console, and run mailrun doctor --fix",
    )
}

/// Whether messages are taken.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Taken {
    Yes,
    /// There is none to publish to, which is a finding already.
    NoExchange,
    /// Why not, as far as can be told.
    No(String),
}

/// Publishes messages that lead nowhere. A broker in an alarm tells nobody who does not publish: it still takes the first
/// message of a connection, and reads nothing more from it then.
async fn takes_messages(connection: &Link) -> lapin::Result<Taken> {
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
    Ok(match timeout(PATIENCE, publish).await {
        Ok(Ok(Confirmation::Ack(_))) => Taken::Yes,
        Ok(Ok(_)) => Taken::No("It refused one".to_owned()),
        Ok(Err(error)) if code(&error) == Some(NOT_FOUND) => Taken::NoExchange,
        Ok(Err(error)) => Taken::No(words(&error)),
        Err(_) if connection.status().blocked() => Taken::No("An alarm blocks whoever publishes".to_owned()),
        Err(_) => Taken::No(format!("It has not confirmed one within {} s", PATIENCE.as_secs())),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use lapin::protocol::{AMQPError, AMQPSoftError};

    fn error(soft: AMQPSoftError) -> lapin::Error {
        ErrorKind::ProtocolError(AMQPError::new(soft.into(), "in its words".into())).into()
    }

    #[test]
    fn a_refusal_tells_missing_from_different() {
        assert_eq!(refused(error(AMQPSoftError::NOTFOUND)).unwrap(), Found::Missing);
        let different = refused(error(AMQPSoftError::PRECONDITIONFAILED)).unwrap();
        assert_eq!(different, Found::Different("in its words".into()));
        assert!(refused(error(AMQPSoftError::ACCESSREFUSED)).is_err());
    }

    #[test]
    fn what_a_missing_queue_means_is_told() {
        assert!(missing("mailrun.items.2").what.starts_with("Without it nothing is sent."));
        assert!(missing("mailrun.retry.5s").what.contains("tried again later"));
    }
}
