//! RabbitMQ: connections over a list of nodes, and a publisher that returns when the broker has the message on disk.
//!
//! Supervision is our own, not lapin's: any error or timeout tears the connection down and builds a new one, because a channel
//! error would otherwise leave its users waiting for ever. Publishing has its own connections,
//! since a broker that blocks a publisher stops everything else on that connection too, acks and heartbeats included.

mod link;
mod publisher;
mod rejections;

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties, ErrorKind,
    protocol::{AMQPErrorKind, AMQPSoftError},
    tcp::OwnedTLSConfig,
    types::{AMQPValue, FieldTable, ShortString},
    uri::AMQPUri,
};
use secrecy::{ExposeSecret, SecretString};
use tokio::time::timeout;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use self::publisher::CONFIRMED_SOON;
pub use self::{
    link::Link,
    publisher::Publisher,
    rejections::{Rejection, Rejections},
};

use crate::{
    config::{Config, authorities},
    epoch::{BEHIND, Epoch},
    health::Health,
    message::{DeadReason, ItemResult, Message, ResultsMessage, RunMessage, TestMessage, encode},
    topology,
};

const CONNECT_TIMEOUT_MS: u64 = 5_000;
const PERSISTENT: u8 = 2;
/// A queue that was missing is asked for again after this time.
const ASK_AGAIN: Duration = Duration::from_secs(10);
/// Headers go in one frame, of 128 KB at most: a message whose headers are larger can never be published. So much of others'
/// headers is kept.
const MAX_HEADERS_BYTES: usize = 64 * 1024;
/// So much of an error is kept in the header of a dead letter.
const MAX_ERROR_CHARS: usize = 1_000;

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

/// How to reach RabbitMQ.
#[derive(Debug)]
pub struct Broker {
    urls: Vec<SecretString>,
    /// Which node the next connection is tried at first.
    turn: AtomicUsize,
    name: String,
    declare: bool,
    item_queues: Arc<[Cow<'static, str>]>,
    retry_delays: Vec<Duration>,
    publish_twice: bool,
    answer_timeout: Duration,
    heartbeat_s: u16,
    epoch: Arc<Epoch>,
    ca_file: Option<PathBuf>,
    rejections: Rejections,
    health: Health,
    /// Queues that were found missing, and when.
    missing: Mutex<HashMap<String, Instant>>,
    /// Publishing, and connections that are being closed.
    tasks: TaskTracker,
}

impl Broker {
    /// `name` is what the management console shows the connections as.
    #[must_use]
    pub fn new(config: &Config, name: impl Into<String>) -> Arc<Self> {
        Self::with_health(config, name, Health::default())
    }

    /// The same, for a process that shows its health. Trouble with RabbitMQ is reported to `health`.
    #[must_use]
    pub fn with_health(config: &Config, name: impl Into<String>, health: Health) -> Arc<Self> {
        let (rejections, epoch) = (Rejections::default(), Arc::new(Epoch::default()));
        let rejected = rejections.clone();
        health.ask(move || rejected.words().map(|words| format!("RabbitMQ rejects messages: {words}")));
        let ledger = Arc::clone(&epoch);
        health.ask(move || match ledger.present() {
            None => Some("the ledger has not been compared with RabbitMQ yet".to_owned()),
            Some(_) => ledger.is_behind().then(|| BEHIND.to_owned()),
        });
        Arc::new(Self {
            urls: config.amqp.urls.clone(),
            // By chance, so that processes that start together don't all begin with the same node.
            turn: AtomicUsize::new(rand::random_range(0..config.amqp.urls.len().max(1))),
            name: name.into(),
            declare: config.amqp.declare_topology,
            item_queues: topology::item_queues(config.amqp.item_queues).into(),
            retry_delays: config.all_rungs(),
            publish_twice: config.amqp.publish_twice,
            answer_timeout: Duration::from_millis(config.amqp.answer_timeout_ms),
            heartbeat_s: config.amqp.heartbeat_s,
            epoch,
            ca_file: config.amqp.ca_file.clone(),
            rejections,
            health,
            missing: Mutex::default(),
            tasks: TaskTracker::new(),
        })
    }

    /// Connects to the next node in turn, or to the first one after it that answers, and declares the topology. So the
    /// connections of a process are spread over the nodes, and what a dead node held goes to all of the others.
    ///
    /// # Errors
    /// The last node's.
    pub async fn connect(&self, purpose: &str) -> Result<Link, BrokerError> {
        let mut last = BrokerError::Timeout;
        for url in in_turn(&self.urls, self.turn.fetch_add(1, Ordering::Relaxed)) {
            match timeout(self.answer_timeout, self.connect_to(url, purpose)).await {
                Ok(Ok(connection)) => return Ok(connection),
                Ok(Err(error)) => last = error,
                Err(_) => last = BrokerError::Timeout,
            }
        }
        Err(last)
    }

    async fn connect_to(&self, url: &SecretString, purpose: &str) -> Result<Link, BrokerError> {
        let mut uri: AMQPUri = url.expose_secret().parse().map_err(|_| BrokerError::Url)?;
        uri.query.heartbeat = Some(self.heartbeat_s);
        uri.query.connection_timeout = Some(CONNECT_TIMEOUT_MS);
        let authorities = authorities(self.ca_file.as_ref()).await.map_err(BrokerError::Authorities)?;
        let tls = OwnedTLSConfig { cert_chain: authorities, ..OwnedTLSConfig::default() };
        let properties =
            ConnectionProperties::default().with_connection_name(format!("{} {purpose}", self.name).into());
        let connection =
            Connection::connect_uri_with_config(uri, properties, tls, lapin::runtime::default_runtime()?).await?;
        let link = Link::new(connection, &self.tasks);
        if self.declare {
            self.declare_on(&link).await?;
        }
        Ok(link)
    }

    async fn declare_on(&self, link: &Link) -> Result<(), BrokerError> {
        let channel = link.channel().await?;
        topology::declare(&channel, &self.item_queues, &self.retry_delays).await?;
        channel.close(200, "declared".into()).await?;
        Ok(())
    }

    /// Declares the topology, whatever the configuration says of it: what `mailrun setup` does.
    ///
    /// # Errors
    /// The broker's, for instance when the user has no right to.
    pub async fn declare_topology(&self) -> Result<(), BrokerError> {
        let link = self.connect("setup").await?;
        if !self.declare {
            timeout(self.answer_timeout, self.declare_on(&link)).await.map_err(|_| BrokerError::Timeout)??;
        }
        link.close().await;
        Ok(())
    }

    /// Returns when all publishers have ended and all connections that are being closed are closed, or after `limit`: for the end
    /// of the process, after whatever holds a publisher or a connection has ended.
    pub async fn closed(&self, limit: Duration) {
        self.tasks.close();
        let _ = timeout(limit, self.tasks.wait()).await;
    }

    /// What the broker rejects at present.
    #[must_use]
    pub fn rejections(&self) -> &Rejections {
        &self.rejections
    }

    /// What keeps the process from its work.
    #[must_use]
    pub fn health(&self) -> &Health {
        &self.health
    }

    /// Every queue there is, by name.
    #[must_use]
    pub fn queue_names(&self) -> Vec<String> {
        topology::queues(&self.item_queues, &self.retry_delays)
            .into_iter()
            .map(|queue| queue.name.into_owned())
            .collect()
    }

    /// The queues that item messages are spread over.
    #[must_use]
    pub fn item_queues(&self) -> &[Cow<'static, str>] {
        &self.item_queues
    }

    /// How many item messages wait on their queues, asked on a connection of its own.
    ///
    /// # Errors
    /// The broker's.
    pub async fn waiting_items(&self) -> Result<u32, BrokerError> {
        self.waiting(&self.item_queues).await
    }

    /// How many messages with results wait to be counted, asked on a connection of its own.
    ///
    /// # Errors
    /// The broker's.
    pub async fn waiting_results(&self) -> Result<u32, BrokerError> {
        self.waiting(&[topology::RESULTS.into()]).await
    }

    async fn waiting(&self, queues: &[Cow<'static, str>]) -> Result<u32, BrokerError> {
        let link = self.connect("look").await?;
        let look = async {
            let mut channel = link.channel().await?;
            let mut waiting = 0;
            for queue in queues.iter().filter(|queue| !self.was_missing(queue)) {
                match depth(&channel, queue).await {
                    Ok(messages) => waiting += messages,
                    // Nothing waits on a queue that does not exist. The question has cost the channel.
                    Err(error) if is_not_found(&error) => {
                        self.missing().insert(queue.to_string(), Instant::now());
                        channel = link.channel().await?;
                    }
                    Err(error) => return Err(error),
                }
            }
            Ok::<_, lapin::Error>(waiting)
        };
        let waiting = timeout(self.answer_timeout, look).await;
        link.close().await;
        Ok(waiting.map_err(|_| BrokerError::Timeout)??)
    }

    /// What is known about the ledger's epoch: [`crate::lineage::keep`] keeps it.
    #[must_use]
    pub fn epoch(&self) -> &Epoch {
        &self.epoch
    }

    /// Whether connections declare exchanges and queues, or leave that to `mailrun setup`.
    #[must_use]
    pub fn declares_topology(&self) -> bool {
        self.declare
    }

    fn missing(&self) -> MutexGuard<'_, HashMap<String, Instant>> {
        self.missing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a queue was found missing just now: asking for it ends a channel, with an error in the AMQP library's log.
    fn was_missing(&self, queue: &str) -> bool {
        self.missing().get(queue).is_some_and(|at| at.elapsed() < ASK_AGAIN)
    }

    /// How long the broker may take to answer.
    #[must_use]
    pub fn answer_timeout(&self) -> Duration {
        self.answer_timeout
    }
}

/// All of `nodes`, from one of them on.
fn in_turn<T>(nodes: &[T], turn: usize) -> impl Iterator<Item = &T> {
    let (before, from) = nodes.split_at(turn % nodes.len().max(1));
    from.iter().chain(before)
}

/// Why a message in the outbox can't be published by this program.
#[derive(Debug, thiserror::Error)]
pub enum NotUnderstood {
    /// A later version's, or nobody's.
    #[error("its type is not known")]
    Kind,
    /// Not of the form that its type says.
    #[error(transparent)]
    Body(#[from] serde_json::Error),
}

/// A message to publish: persistent, mandatory, with an id.
#[derive(Clone, Debug)]
pub struct Outgoing {
    id: Uuid,
    queue: Cow<'static, str>,
    kind: Cow<'static, str>,
    body: Vec<u8>,
    headers: FieldTable,
    spread_by: Option<u64>,
}

impl Outgoing {
    /// `message` for the queue where it belongs.
    #[must_use]
    pub fn new<M: Message>(message: &M) -> Self {
        Self { spread_by: message.spread_by(), ..Self::raw(M::QUEUE, message.kind(), encode(message)) }
    }

    /// Reads a message out of the outbox, so that nothing is published that no worker could read.
    ///
    /// # Errors
    /// Why no worker could.
    pub fn read(kind: &str, message: serde_json::Value) -> Result<Self, NotUnderstood> {
        match kind {
            kind if RunMessage::TYPES.contains(&kind) => {
                let message: RunMessage = serde_json::from_value(message)?;
                Ok(Self::new(&message))
            }
            TestMessage::TYPE => Ok(Self::new(&serde_json::from_value::<TestMessage>(message)?)),
            _ => Err(NotUnderstood::Kind),
        }
    }

    /// A body that is not understood, as it came.
    #[must_use]
    pub fn raw(queue: impl Into<Cow<'static, str>>, kind: impl Into<Cow<'static, str>>, body: Vec<u8>) -> Self {
        Self {
            id: Uuid::new_v4(),
            queue: queue.into(),
            kind: kind.into(),
            body,
            headers: FieldTable::default(),
            spread_by: None,
        }
    }

    /// Results of a run, in as few messages as `batch` to a message allows; no results are no message.
    #[must_use]
    pub fn results(run_id: Uuid, results: &[ItemResult], batch: usize) -> Vec<Self> {
        let message = |results: &[ItemResult]| ResultsMessage { run_id: Some(run_id), results: results.to_vec() };
        results.chunks(batch).map(|results| Self::new(&message(results))).collect()
    }

    /// Results of any runs, each in a message of its run.
    #[must_use]
    pub fn results_by_run(results: impl IntoIterator<Item = (Uuid, ItemResult)>, batch: usize) -> Vec<Self> {
        let mut by_run: BTreeMap<Uuid, Vec<ItemResult>> = BTreeMap::new();
        for (run_id, result) in results {
            by_run.entry(run_id).or_default().push(result);
        }
        by_run.into_iter().flat_map(|(run_id, results)| Self::results(run_id, &results, batch)).collect()
    }

    /// Sends it to another queue: one that waits, or the dead letters.
    #[must_use]
    pub fn to(self, queue: impl Into<Cow<'static, str>>) -> Self {
        Self { queue: queue.into(), spread_by: None, ..self }
    }

    /// Turns it into a dead letter, with its reason where the management console shows it.
    #[must_use]
    pub fn dead(self, reason: DeadReason, error: &str) -> Self {
        let now_ms = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        // An error may quote what it is about, which may be a megabyte.
        let error: String = error.chars().take(MAX_ERROR_CHARS).collect();
        let mut this = self.to(topology::DEAD).header(REASON_HEADER, reason.as_str()).header(ERROR_HEADER, &error);
        let now_ms = i64::try_from(now_ms).unwrap_or(i64::MAX);
        this.headers.insert(DIED_AT_HEADER.into(), AMQPValue::LongLongInt(now_ms));
        this
    }

    /// Adds a text header.
    #[must_use]
    pub fn header(mut self, key: &'static str, value: &str) -> Self {
        self.headers.insert(key.into(), AMQPValue::LongString(value.into()));
        self
    }

    /// Says in which epoch of the ledger it was published; without that, it is published in the present one.
    #[must_use]
    pub fn in_epoch(mut self, epoch: i64) -> Self {
        self.headers.insert(EPOCH_HEADER.into(), AMQPValue::LongLongInt(epoch));
        self
    }

    /// Carries over headers of a delivery, as far as they do no harm: not those with which the broker counts its rounds,
    /// since a message that still has them can be dropped as a cycle; not those that name further queues, since the message
    /// would go round for ever; and no more than fit into a frame with ours.
    #[must_use]
    pub fn with_headers_of(mut self, properties: &BasicProperties) -> Self {
        const BROKERS_OWN: [&str; 5] =
            ["x-death", "x-first-death-", "x-last-death-", "x-delivery-count", "x-acquired-count"];
        const FURTHER_QUEUES: [&str; 2] = ["CC", "BCC"];
        const OURS: [&str; 4] = [REASON_HEADER, ERROR_HEADER, DIED_AT_HEADER, EPOCH_HEADER];
        let mut room = MAX_HEADERS_BYTES;
        let headers = properties.headers().iter().flat_map(FieldTable::inner);
        let (ours, others): (Vec<_>, Vec<_>) = headers.partition(|(key, _)| OURS.contains(&key.as_str()));
        for (key, value) in ours.into_iter().chain(others) {
            let key_is_brokers = BROKERS_OWN.iter().any(|prefix| key.as_str().starts_with(prefix));
            if key_is_brokers || FURTHER_QUEUES.contains(&key.as_str()) {
                continue;
            }
            if let Some(left) = room.checked_sub(key.as_str().len() + bytes_of(value)) {
                room = left;
                self.headers.insert(key.clone(), value.clone());
            }
        }
        self
    }

    /// Which message it is.
    #[must_use]
    pub fn id(&self) -> Uuid {
        self.id
    }

    /// The queue that it is for.
    #[must_use]
    pub fn queue(&self) -> &str {
        &self.queue
    }

    /// Its body.
    #[must_use]
    pub fn body(&self) -> &[u8] {
        &self.body
    }

    /// Its AMQP properties.
    #[must_use]
    pub fn properties(&self) -> BasicProperties {
        self.properties_with(self.headers.clone())
    }

    fn properties_with(&self, headers: FieldTable) -> BasicProperties {
        BasicProperties::default()
            .with_delivery_mode(PERSISTENT)
            .with_content_type("application/json".into())
            .with_message_id(ShortString::from(self.id.to_string()))
            .with_type(ShortString::from(self.kind.as_ref()))
            .with_headers(headers)
    }
}

/// How much of a frame a header's value takes, or a little less.
fn bytes_of(value: &AMQPValue) -> usize {
    8 + match value {
        AMQPValue::ShortString(text) => text.as_str().len(),
        AMQPValue::LongString(text) => text.as_bytes().len(),
        AMQPValue::ByteArray(bytes) => bytes.as_slice().len(),
        AMQPValue::FieldArray(list) => list.as_slice().iter().map(bytes_of).sum(),
        AMQPValue::FieldTable(table) => {
            table.inner().iter().map(|(key, value)| key.as_str().len() + bytes_of(value)).sum()
        }
        _ => 0,
    }
}

/// The header that says why a message is dead: `failed`, `unknown` or `poison`.
pub const REASON_HEADER: &str = "x-mailrun-reason";
/// The header with the error's text.
pub const ERROR_HEADER: &str = "x-mailrun-error";
/// The header with the moment of death, in milliseconds since 1970.
pub const DIED_AT_HEADER: &str = "x-mailrun-died-at";

/// The header with the ledger's epoch in which the message was published.
pub const EPOCH_HEADER: &str = "x-mailrun-epoch";

/// The epoch that a message carries. None: it was published by hand, or by a version before epochs.
#[must_use]
pub fn epoch_of(properties: &BasicProperties) -> Option<i64> {
    match properties.headers().as_ref()?.inner().get(EPOCH_HEADER)? {
        AMQPValue::LongLongInt(epoch) => Some(*epoch),
        AMQPValue::LongInt(epoch) => Some((*epoch).into()),
        _ => None,
    }
}

impl BrokerError {
    /// Whether the broker has said that there is no such queue.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Amqp(error) if is_not_found(error))
    }
}

fn is_not_found(error: &lapin::Error) -> bool {
    matches!(error.kind(), ErrorKind::ProtocolError(error)
        if *error.kind() == AMQPErrorKind::Soft(AMQPSoftError::NOTFOUND))
}

/// How many messages wait in `queue`, not counting those that are delivered and not acknowledged.
///
/// # Errors
/// The broker's; the channel is of no use after that.
pub async fn depth(channel: &Channel, queue: &str) -> lapin::Result<u32> {
    Ok(topology::look(channel, queue).await?.message_count())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_connection_begins_with_the_next_node_and_leaves_none_out() {
        let turns: Vec<Vec<_>> = (4..7).map(|turn| in_turn(&["a", "b", "c"], turn).copied().collect()).collect();
        assert_eq!(turns, [["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]);
        assert_eq!(in_turn::<&str>(&[], 7).count(), 0);
    }

    #[test]
    fn a_message_is_published_as_what_it_is() {
        let id = "00000000-0000-0000-0000-000000000007";
        let run = Outgoing::read("mailrun.run.v1", serde_json::json!({ "run_id": id })).unwrap();
        assert_eq!(run.properties().kind().as_ref().unwrap().as_str(), "mailrun.run.v1");
        let test = Outgoing::read("mailrun.test.v1", serde_json::json!({ "test_id": id })).unwrap();
        assert_eq!(test.properties().kind().as_ref().unwrap().as_str(), "mailrun.test.v1");
        assert!(Outgoing::read("mailrun.test.v1", serde_json::json!({ "run_id": id })).is_err());
        assert!(Outgoing::read("mailrun.run.v9", serde_json::json!({ "run_id": id })).is_err());
    }
}
