//! RabbitMQ: connections over a list of nodes, and a publisher that returns when the broker has the message on disk.
//!
//! Supervision is our own, not lapin's: any error, timeout or refused message tears the connection down and builds a new
//! one, because a channel error would otherwise leave its users waiting for ever. Publishing has its own connections,
//! since a broker that blocks a publisher stops everything else on that connection too, acks and heartbeats included.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashSet},
    ops::Deref,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use futures::future::try_join_all;
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties,
    options::{BasicPublishOptions, ConfirmSelectOptions},
    tcp::OwnedTLSConfig,
    types::{AMQPValue, FieldTable, ShortString},
    uri::AMQPUri,
};
use secrecy::{ExposeSecret, SecretString};
use tokio::{
    runtime::Handle,
    sync::{Mutex, mpsc, oneshot},
    time::{sleep, timeout},
};
use tracing::{debug, warn};
use uuid::Uuid;

use crate::{
    config::{Config, authorities},
    epoch::Epoch,
    message::{DeadReason, ItemResult, Message, ResultsMessage, RunMessage, TestMessage, encode},
    retry::Reconnect,
    telemetry, topology,
};

const CONNECT_TIMEOUT_MS: u64 = 5_000;
const PERSISTENT: u8 = 2;
/// A broker that does not answer to the end of a connection is not waited for.
const HANG_UP: Duration = Duration::from_secs(1);
/// A burst is published, then all of its confirms are awaited: so a returned message is always told within its burst.
const BURST: usize = 1_536;
/// Publishes polled together: one system call for many frames.
const POLLED_TOGETHER: usize = 64;
/// How long those wait for a confirm who hold a transaction open meanwhile.
const CONFIRMED_SOON: Duration = Duration::from_secs(10);
/// Headers go in one frame, of 128 KB at most: a message whose headers are larger can never be published. So much of others'
/// headers is kept.
const MAX_HEADERS_BYTES: usize = 64 * 1024;
/// So much of an error is kept in the header of a dead letter.
const MAX_ERROR_CHARS: usize = 1_000;
/// Batches that may wait for a lane before `publish` makes its callers wait.
const WAITING_BATCHES: usize = 64;

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
    /// The broker did not take a message.
    #[error("RabbitMQ did not take a message for {0}: {1}")]
    Refused(String, &'static str),
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
    epoch: Epoch,
    ca_file: Option<PathBuf>,
}

impl Broker {
    /// `name` is what the management console shows the connections as.
    #[must_use]
    pub fn new(config: &Config, name: impl Into<String>) -> Arc<Self> {
        Arc::new(Self {
            urls: config.amqp.urls.clone(),
            // By chance, so that processes that start together don't all begin with the same node.
            turn: AtomicUsize::new(rand::random_range(0..config.amqp.urls.len().max(1))),
            name: name.into(),
            declare: config.amqp.declare_topology,
            item_queues: topology::item_queues(config.amqp.item_queues).into(),
            retry_delays: config.rungs(),
            publish_twice: config.amqp.publish_twice,
            answer_timeout: Duration::from_millis(config.amqp.answer_timeout_ms),
            heartbeat_s: config.amqp.heartbeat_s,
            epoch: Epoch::default(),
            ca_file: config.amqp.ca_file.clone(),
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
        let connection = Link(Arc::new(
            Connection::connect_uri_with_config(uri, properties, tls, lapin::runtime::default_runtime()?).await?,
        ));
        if self.declare {
            self.declare_on(&connection).await?;
        }
        Ok(connection)
    }

    async fn declare_on(&self, connection: &Connection) -> Result<(), BrokerError> {
        let channel = connection.create_channel().await?;
        topology::declare(&channel, &self.item_queues, &self.retry_delays).await?;
        channel.close(200, "declared".into()).await?;
        Ok(())
    }

    /// Declares the topology, whatever the configuration says of it: what `mailrun setup` does.
    ///
    /// # Errors
    /// The broker's, for instance when the user has no right to.
    pub async fn declare_topology(&self) -> Result<(), BrokerError> {
        let connection = self.connect("setup").await?;
        if !self.declare {
            timeout(self.answer_timeout, self.declare_on(&connection)).await.map_err(|_| BrokerError::Timeout)??;
        }
        hang_up(&connection).await;
        Ok(())
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
        let connection = self.connect("look").await?;
        let look = async {
            let channel = connection.create_channel().await?;
            let mut waiting = 0;
            for queue in queues {
                waiting += depth(&channel, queue).await?;
            }
            Ok::<_, lapin::Error>(waiting)
        };
        let waiting = timeout(self.answer_timeout, look).await;
        hang_up(&connection).await;
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

    /// How long the broker may take to answer.
    #[must_use]
    pub fn answer_timeout(&self) -> Duration {
        self.answer_timeout
    }

    /// Starts a publisher with `lanes` connections. It lives until every clone of it is dropped.
    #[must_use]
    pub fn publisher(self: &Arc<Self>, lanes: usize) -> Publisher {
        let (sender, receiver) = mpsc::channel(WAITING_BATCHES);
        let receiver = Arc::new(Mutex::new(receiver));
        for _ in 0..lanes {
            tokio::spawn(Arc::clone(self).publish_lane(Arc::clone(&receiver)));
        }
        Publisher {
            lanes: sender,
            lane_count: lanes,
            item_queues: Arc::clone(&self.item_queues),
            twice: self.publish_twice,
        }
    }

    /// One publishing task: its connection, its confirm channel, and what it has not got a confirm for yet.
    async fn publish_lane(self: Arc<Self>, receiver: Arc<Mutex<mpsc::Receiver<Batch>>>) {
        let mut reconnect = Reconnect::default();
        let mut batches = Vec::new();
        loop {
            // At first before there is anything to say, so that the first message need not wait.
            let error = match self.confirm_channel().await {
                Ok((connection, channel)) => {
                    let ended = self.publish_on(&channel, &receiver, &mut batches, &mut reconnect).await;
                    hang_up(&connection).await;
                    match ended {
                        Ok(()) => return,
                        Err(error) => error,
                    }
                }
                Err(error) => error,
            };
            // Told once, not with each of the tries that follow.
            if reconnect.is_under_way() {
                debug!(%error, "publishing is still interrupted");
            } else {
                warn!(%error, "publishing is interrupted; it is tried again until it works");
            }
            let wait = reconnect.next_wait();
            sleep(wait).await;
            batches.retain(|batch: &Batch| !batch.done.is_closed());
            // Again only for something to say.
            if batches.is_empty() && !fill(&receiver, &mut batches).await {
                return;
            }
        }
    }

    async fn confirm_channel(&self) -> Result<(Link, Channel), BrokerError> {
        let connection = self.connect("publish").await?;
        let open = async {
            let channel = connection.create_channel().await?;
            channel.confirm_select(ConfirmSelectOptions::default()).await?;
            Ok::<_, lapin::Error>(channel)
        };
        let channel = timeout(self.answer_timeout, open).await.map_err(|_| BrokerError::Timeout)??;
        Ok((connection, channel))
    }

    /// Publishes burst after burst, until the publisher is dropped (`Ok`) or something goes wrong (`Err`).
    async fn publish_on(
        &self,
        channel: &Channel,
        receiver: &Mutex<mpsc::Receiver<Batch>>,
        batches: &mut Vec<Batch>,
        reconnect: &mut Reconnect,
    ) -> Result<(), BrokerError> {
        loop {
            if batches.is_empty() && !fill(receiver, batches).await {
                return Ok(());
            }
            timeout(self.answer_timeout, burst(channel, batches, &self.epoch))
                .await
                .map_err(|_| BrokerError::Timeout)??;
            reconnect.reset();
        }
    }
}

/// All of `nodes`, from one of them on.
fn in_turn<T>(nodes: &[T], turn: usize) -> impl Iterator<Item = &T> {
    let (before, from) = nodes.split_at(turn % nodes.len().max(1));
    from.iter().chain(before)
}

/// Waits for a batch, then takes what else is there, up to a burst. False: the publisher is gone, and all is published.
async fn fill(receiver: &Mutex<mpsc::Receiver<Batch>>, batches: &mut Vec<Batch>) -> bool {
    let mut receiver = receiver.lock().await;
    let Some(first) = receiver.recv().await else {
        return false;
    };
    let mut messages = first.messages.len();
    batches.push(first);
    while messages < BURST
        && let Ok(next) = receiver.try_recv()
    {
        messages += next.messages.len();
        batches.push(next);
    }
    true
}

/// Publishes all messages of `batches` and awaits their confirms. What is confirmed leaves `batches`; what is not stays,
/// to be published again: a message too many is absorbed by the fence and the join, one too few would be lost.
async fn burst(channel: &Channel, batches: &mut Vec<Batch>, epoch: &Epoch) -> Result<(), BrokerError> {
    let epoch = epoch.present();
    let mut confirms = Vec::new();
    let messages: Vec<&Outgoing> = batches.iter().flat_map(|batch| &batch.messages).collect();
    for together in messages.chunks(POLLED_TOGETHER) {
        confirms.extend(try_join_all(together.iter().map(|message| message.publish(channel, epoch))).await?);
    }
    let mut refused: HashSet<Uuid> = HashSet::new();
    let mut refusal = None;
    for (message, confirm) in messages.into_iter().zip(confirms) {
        let (taken, returned) = match confirm.await? {
            Confirmation::Ack(returned) => (true, returned),
            Confirmation::Nack(returned) => (false, returned),
            Confirmation::NotRequested => (false, None),
        };
        if !taken {
            refused.insert(message.id);
            refusal = Some((message.queue.to_string(), "it is full, or its disk or memory is"));
        }
        // The broker returns a message before it confirms it, so lapin may attach it to a neighbour's confirm.
        let returned = returned.and_then(|returned| {
            let id = returned.properties.message_id().as_ref()?.as_str().parse().ok()?;
            Some((id, returned.routing_key.to_string()))
        });
        if let Some((id, queue)) = returned {
            refused.insert(id);
            refusal = Some((queue, "there is no such queue"));
        }
    }
    let waiting = std::mem::take(batches);
    for mut batch in waiting {
        batch.messages.retain(|message| refused.contains(&message.id));
        if batch.messages.is_empty() {
            // Nobody waits any more if this fails.
            let _ = batch.done.send(());
        } else {
            batches.push(batch);
        }
    }
    refusal.map_or(Ok(()), |(queue, why)| Err(BrokerError::Refused(queue, why)))
}

/// How many of `messages` go to a lane at a time: few stay together, many end at the same moment on all `lanes`.
fn part(messages: usize, lanes: usize) -> usize {
    if messages <= POLLED_TOGETHER {
        return messages;
    }
    messages.div_ceil(messages.div_ceil(BURST).next_multiple_of(lanes))
}

/// Messages that are confirmed together.
#[derive(Debug)]
struct Batch {
    messages: Vec<Outgoing>,
    done: oneshot::Sender<()>,
}

/// Publishes messages and waits for the broker's confirms. Clones share the same lanes.
#[derive(Clone, Debug)]
pub struct Publisher {
    lanes: mpsc::Sender<Batch>,
    lane_count: usize,
    item_queues: Arc<[Cow<'static, str>]>,
    twice: bool,
}

impl Publisher {
    /// As [`Self::publish`], but gives up after ten seconds: for callers that hold a transaction open meanwhile.
    ///
    /// # Errors
    /// When the publisher is closed, or nothing was confirmed in time.
    pub async fn publish_soon(&self, messages: Vec<Outgoing>) -> Result<(), BrokerError> {
        timeout(CONFIRMED_SOON, self.publish(messages)).await.map_err(|_| BrokerError::Unconfirmed)?
    }

    /// Returns when the broker has every message on disk: publishes again after every interruption, for as long as it
    /// takes. Dropping the future gives up on what is not confirmed yet.
    ///
    /// # Errors
    /// Only when the publisher is closed.
    pub async fn publish(&self, mut messages: Vec<Outgoing>) -> Result<(), BrokerError> {
        if messages.is_empty() {
            return Ok(());
        }
        for message in &mut messages {
            message.spread_over(&self.item_queues);
        }
        if self.twice {
            messages.extend(messages.clone());
        }
        // Spread evenly over the lanes: each publishes and awaits its confirms for itself.
        let part = part(messages.len(), self.lane_count);
        let mut confirms = Vec::new();
        while !messages.is_empty() {
            let rest = messages.split_off(messages.len().min(part));
            let (done, confirmed) = oneshot::channel();
            confirms.push(confirmed);
            self.lanes.send(Batch { messages, done }).await.map_err(|_| BrokerError::Closed)?;
            messages = rest;
        }
        for confirmed in confirms {
            confirmed.await.map_err(|_| BrokerError::Closed)?;
        }
        Ok(())
    }
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
                Ok(Self::new(&message).of_run(message.run_id))
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
        results.chunks(batch).map(|results| Self::new(&message(results)).of_run(run_id)).collect()
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

    /// Joins the message to its run's trace.
    #[must_use]
    pub fn of_run(self, run_id: Uuid) -> Self {
        self.header("traceparent", &telemetry::traceparent(run_id))
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

    /// Chooses one of several queues, evenly and always the same, if it is to be spread.
    fn spread_over(&mut self, queues: &[Cow<'static, str>]) {
        if let Some(key) = self.spread_by {
            // Less than their number.
            self.queue = queues[(key % queues.len() as u64) as usize].clone();
        }
    }

    /// A message that does not carry an epoch gets `epoch`.
    async fn publish(&self, channel: &Channel, epoch: Option<i64>) -> lapin::Result<lapin::PublisherConfirm> {
        let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let mut headers = self.headers.clone();
        if let Some(epoch) = epoch.filter(|_| !headers.contains_key(EPOCH_HEADER)) {
            headers.insert(EPOCH_HEADER.into(), AMQPValue::LongLongInt(epoch));
        }
        channel
            .basic_publish(
                topology::EXCHANGE.into(),
                self.queue.as_ref().into(),
                options,
                &self.body,
                self.properties().with_headers(headers),
            )
            .await
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
        BasicProperties::default()
            .with_delivery_mode(PERSISTENT)
            .with_content_type("application/json".into())
            .with_message_id(ShortString::from(self.id.to_string()))
            .with_type(ShortString::from(self.kind.as_ref()))
            .with_headers(self.headers.clone())
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

/// A connection that is closed when it is dropped, whatever became of what it was for.
///
/// lapin's own outlives everybody who has it if an answer is due on one of its channels: a consumer that the broker sets up
/// after our patience has ended would be given messages, and hold them until the broker's patience ends, half an hour later.
/// Whoever can wait for the end says so with [`hang_up`].
#[derive(Debug)]
pub struct Link(Arc<Connection>);

impl Deref for Link {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        &self.0
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if self.status().connected()
            && let Ok(runtime) = Handle::try_current()
        {
            let connection = Arc::clone(&self.0);
            runtime.spawn(async move { hang_up(&connection).await });
        }
    }
}

/// Closes a connection of which nothing more is needed. It may be in any state by now, and whatever matters is confirmed or
/// acknowledged before: so this is a courtesy to the broker, and how it ends is of no importance.
pub async fn hang_up(connection: &Connection) {
    let _ = timeout(HANG_UP, connection.close(200, "done".into())).await;
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
    fn many_messages_are_spread_evenly_over_the_lanes() {
        assert_eq!(part(64, 2), 64);
        assert_eq!(part(2_501, 2), 1_251);
        assert_eq!(part(2_501, 1), 1_251);
        assert_eq!(part(10_000, 3), 1_112);
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
