//! Connections to a list of nodes. We supervise them ourselves instead of relying on lapin's recovery: any error or timeout
//! closes the connection and opens a new one, because after a channel error lapin may leave its users waiting for ever.

use std::{
    borrow::Cow,
    collections::HashMap,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicI32, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use lapin::{Connection, ConnectionProperties, options::QueueDeleteOptions, tcp::OwnedTLSConfig, uri::AMQPUri};
use mailrun_core::queue;
use mailrun_core::{epoch::BEHIND, health::Health};
use secrecy::{ExposeSecret, SecretString};
use tokio::time::timeout;
use tokio_util::task::TaskTracker;
use tracing::debug;

use crate::{
    BrokerError, Link, Rejections,
    epoch::Epoch,
    error::is_not_found,
    settings::{AmqpConfig, authorities},
    topology::{self, depth},
};

const CONNECT_TIMEOUT_MS: u64 = 5_000;
/// How long a queue that was not found is assumed to be missing before it is checked again.
const CHECK_MISSING_AGAIN: Duration = Duration::from_secs(10);

/// How to reach RabbitMQ.
#[derive(Debug)]
pub struct Broker {
    urls: Vec<SecretString>,
    /// The index of the node that the next connection tries first.
    turn: AtomicUsize,
    name: String,
    pub(crate) declare: bool,
    pub(crate) item_queues: Arc<[Cow<'static, str>]>,
    retry_delays: Vec<Duration>,
    pub(crate) answer_timeout: Duration,
    heartbeat: Duration,
    pub(crate) epoch: Arc<Epoch>,
    ca_file: Option<PathBuf>,
    pub(crate) rejections: Rejections,
    rebuilds: AtomicI32,
    pub(crate) health: Health,
    /// Queues that were found missing, and when.
    missing: Mutex<HashMap<String, Instant>>,
    /// The publishing tasks, and the connections that are being closed.
    pub(crate) tasks: TaskTracker,
}

impl Broker {
    /// `retry_delays` must list every delay that any process may use, since each has a queue. `name` is the connection name in
    /// the management console.
    #[must_use]
    pub fn new(settings: &AmqpConfig, retry_delays: Vec<Duration>, name: impl Into<String>) -> Arc<Self> {
        Self::with_health(settings, retry_delays, name, Health::default())
    }

    /// The same, for a process that exposes its health: problems with RabbitMQ are reported to `health`.
    #[must_use]
    pub fn with_health(
        settings: &AmqpConfig,
        retry_delays: Vec<Duration>,
        name: impl Into<String>,
        health: Health,
    ) -> Arc<Self> {
        let (rejections, epoch) = (Rejections::default(), Arc::new(Epoch::default()));
        let rejected = rejections.clone();
        health.ask(move || rejected.words().map(|words| format!("RabbitMQ rejects messages: {words}")));
        let ledger = Arc::clone(&epoch);
        health.ask(move || match ledger.present() {
            None => Some("the ledger has not been compared with RabbitMQ yet".to_owned()),
            Some(_) => ledger.is_behind().then(|| BEHIND.to_owned()),
        });
        Arc::new(Self {
            urls: settings.urls.clone(),
            // Random, so that processes that start together do not all begin with the same node.
            turn: AtomicUsize::new(rand::random_range(0..settings.urls.len().max(1))),
            name: name.into(),
            declare: settings.declare_topology,
            item_queues: queue::item_queues(settings.item_queues).into(),
            retry_delays,
            answer_timeout: settings.answer_timeout,
            heartbeat: settings.heartbeat,
            epoch,
            ca_file: settings.ca_file.clone(),
            rejections,
            rebuilds: AtomicI32::new(0),
            health,
            missing: Mutex::default(),
            tasks: TaskTracker::new(),
        })
    }

    /// Connects to the next node in turn, or to the first one after it that answers, and declares the topology. This spreads a
    /// process's connections over the nodes, and the connections of a dead node over the remaining ones.
    ///
    /// # Errors
    /// That of the last node tried.
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
        uri.query.heartbeat = Some(u16::try_from(self.heartbeat.as_secs()).unwrap_or(u16::MAX));
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

    pub(crate) async fn declare_on(&self, link: &Link) -> Result<(), BrokerError> {
        let channel = link.channel().await?;
        topology::declare(&channel, &self.item_queues, &self.retry_delays).await?;
        channel.close(200, "declared".into()).await?;
        Ok(())
    }

    /// Declares the topology even if `amqp.declare_topology` is false. `mailrun setup` uses it.
    ///
    /// # Errors
    /// For instance, the user may not configure resources.
    pub async fn declare_topology(&self) -> Result<(), BrokerError> {
        let link = self.connect("setup").await?;
        if !self.declare {
            timeout(self.answer_timeout, self.declare_on(&link)).await.map_err(|_| BrokerError::Timeout)??;
        }
        link.close().await;
        Ok(())
    }

    /// Deletes the queues of earlier versions that no consumer uses any more. Best effort: a queue that is left does no harm.
    ///
    /// # Errors
    /// When no node answers.
    pub async fn delete_former_queues(&self) -> Result<(), BrokerError> {
        let link = self.connect("setup").await?;
        for queue in queue::FORMER {
            let delete = async {
                let channel = link.channel().await?;
                let options = QueueDeleteOptions { if_unused: true, ..QueueDeleteOptions::default() };
                channel.queue_delete(queue.into(), options).await?;
                channel.close(200, "deleted".into()).await
            };
            if let Ok(Err(error)) = timeout(self.answer_timeout, delete).await {
                debug!(queue, %error, "a queue of an earlier version is left");
            }
        }
        link.close().await;
        Ok(())
    }

    /// Returns when all publishers have stopped and all closing connections are closed, or after `limit`. Call it when the process
    /// ends, after everything that holds a publisher or a connection has ended.
    pub async fn closed(&self, limit: Duration) {
        self.tasks.close();
        let _ = timeout(limit, self.tasks.wait()).await;
    }

    /// The queues that currently reject messages.
    #[must_use]
    pub fn rejections(&self) -> &Rejections {
        &self.rejections
    }

    /// What currently keeps the process from working.
    #[must_use]
    pub fn health(&self) -> &Health {
        &self.health
    }

    /// The names of all queues.
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

    /// The number of ready messages on the item queues. Opens its own connection.
    pub async fn waiting_items(&self) -> Result<u32, BrokerError> {
        self.waiting(&self.item_queues).await
    }

    /// The number of ready messages on the results queue. Opens its own connection.
    pub async fn waiting_results(&self) -> Result<u32, BrokerError> {
        self.waiting(&[queue::RESULTS.into()]).await
    }

    async fn waiting(&self, queues: &[Cow<'static, str>]) -> Result<u32, BrokerError> {
        let link = self.connect("look").await?;
        let look = async {
            let mut channel = link.channel().await?;
            let mut waiting = 0;
            for queue in queues.iter().filter(|queue| !self.was_missing(queue)) {
                match depth(&channel, queue).await {
                    Ok(messages) => waiting += messages,
                    // A missing queue has no messages. The error has closed the channel.
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

    /// The ledger's epoch as this process knows it. `lineage` in the crate `mailrun-app` updates it.
    #[must_use]
    pub fn epoch(&self) -> &Epoch {
        &self.epoch
    }

    /// Whether connections declare the exchanges and queues; otherwise `mailrun setup` does.
    #[must_use]
    pub fn declares_topology(&self) -> bool {
        self.declare
    }

    fn missing(&self) -> MutexGuard<'_, HashMap<String, Instant>> {
        self.missing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the queue was recently found missing. Asking again would close a channel and make lapin log an error.
    fn was_missing(&self, queue: &str) -> bool {
        self.missing().get(queue).is_some_and(|at| at.elapsed() < CHECK_MISSING_AGAIN)
    }

    /// Counts a consumer whose connection the watchdog has replaced.
    pub(crate) fn add_rebuild(&self) {
        self.rebuilds.fetch_add(1, Ordering::Relaxed);
    }

    /// How often the watchdog has replaced a consumer's connection.
    #[must_use]
    pub fn rebuilds(&self) -> i32 {
        self.rebuilds.load(Ordering::Relaxed)
    }

    /// The time limit for each reply of the broker.
    #[must_use]
    pub fn answer_timeout(&self) -> Duration {
        self.answer_timeout
    }
}

/// All of `nodes`, starting at index `turn` (modulo their number).
fn in_turn<T>(nodes: &[T], turn: usize) -> impl Iterator<Item = &T> {
    let (before, from) = nodes.split_at(turn % nodes.len().max(1));
    from.iter().chain(before)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_connection_starts_at_the_next_node_and_tries_all() {
        let turns: Vec<Vec<_>> = (4..7).map(|turn| in_turn(&["a", "b", "c"], turn).copied().collect()).collect();
        assert_eq!(turns, [["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]);
        assert_eq!(in_turn::<&str>(&[], 7).count(), 0);
    }
}
