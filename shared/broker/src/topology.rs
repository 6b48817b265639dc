//! The exchanges, queues and bindings: the same declarations on RabbitMQ 3.10 and 4.x.
//!
//! All queues are quorum queues, because a classic queue confirms a message before it is on disk. A queue's arguments are fixed
//! once it exists and take precedence over policies, so only arguments that the promises depend on are set here.

use std::{borrow::Cow, time::Duration};

use futures::future::try_join_all;
use lapin::{
    Channel, ExchangeKind,
    options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions},
    types::{AMQPValue, FieldTable},
};
use mailrun_core::queue::{
    DEAD, DEAD_EXCHANGE, EPOCH, EXCHANGE, ITEMS, ITEMS_WAIT, RESULTS, RESULTS_WAIT, RUNS, RUNS_PAUSED, RUNS_WAIT,
    retry_queue,
};

/// How long a run message waits before the fan-out handles it again.
const WAIT: Duration = Duration::from_millis(100);
/// The same for a paused run, and longer: each check costs a transaction, and many runs may stay paused for weeks.
const PAUSED: Duration = Duration::from_secs(1);
/// How long a message of a newer version waits before it is delivered again. An upgrade takes minutes.
const NEWER: Duration = Duration::from_secs(5);
/// A message that was returned this often has probably crashed that many workers.
const DELIVERY_LIMIT: i64 = 20;
/// RabbitMQ 4 drops messages beyond its default of 20, which would lose a dead letter that is inspected often.
const DEAD_DELIVERY_LIMIT: i64 = 1_000_000;

/// How long run messages stay in a wait queue.
#[must_use]
pub fn waiting_time(wait_queue: &str) -> Duration {
    if wait_queue == RUNS_PAUSED { PAUSED } else { WAIT }
}

/// A queue with its required arguments and bindings.
#[derive(Clone, Debug)]
pub struct Queue {
    /// Its name, which is also its routing key.
    pub name: Cow<'static, str>,
    arguments: FieldTable,
    /// Exchanges and routing keys.
    bindings: Vec<(&'static str, Cow<'static, str>)>,
}

impl Queue {
    fn new(name: impl Into<Cow<'static, str>>, arguments: FieldTable) -> Self {
        let name = name.into();
        let bindings = vec![(EXCHANGE, name.clone())];
        Self { name, arguments, bindings }
    }

    /// A wait queue: it has no consumers, and its messages move on to `target` after `ttl`.
    fn wait_queue(name: impl Into<Cow<'static, str>>, ttl: Duration, target: &str) -> Self {
        let mut arguments = quorum(DEAD_DELIVERY_LIMIT);
        dead_letter_to(&mut arguments, EXCHANGE, Some(target));
        let ttl = i64::try_from(ttl.as_millis()).unwrap_or(i64::MAX);
        arguments.insert("x-message-ttl".into(), AMQPValue::LongLongInt(ttl));
        Self::new(name, arguments)
    }

    /// Declares it: creates it, or confirms that it exists with these arguments.
    ///
    /// # Errors
    /// They close the channel: 406 if it exists with other arguments, 403 if the user may not configure it.
    pub async fn declare(&self, channel: &Channel) -> lapin::Result<lapin::Queue> {
        let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        channel.queue_declare(self.name.as_ref().into(), options, self.arguments.clone()).await
    }

    /// Declares it passively, so its arguments do not matter.
    ///
    /// # Errors
    /// They close the channel: 404 if it does not exist.
    pub async fn look(&self, channel: &Channel) -> lapin::Result<lapin::Queue> {
        look(channel, &self.name).await
    }

    /// Binds it to its exchanges.
    pub async fn bind(&self, channel: &Channel) -> lapin::Result<()> {
        for (exchange, key) in &self.bindings {
            let (queue, exchange, key) = (self.name.as_ref().into(), (*exchange).into(), key.as_ref().into());
            channel.queue_bind(queue, exchange, key, QueueBindOptions::default(), FieldTable::default()).await?;
        }
        Ok(())
    }
}

/// Declares the queue of this name passively, like [`Queue::look`].
///
/// # Errors
/// They close the channel: 404 if it does not exist.
pub async fn look(channel: &Channel, queue: &str) -> lapin::Result<lapin::Queue> {
    let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(queue.into(), options, FieldTable::default()).await
}

/// The number of ready messages in `queue`, without unacknowledged ones.
///
/// # Errors
/// They close the channel.
pub async fn depth(channel: &Channel, queue: &str) -> lapin::Result<u32> {
    Ok(look(channel, queue).await?.message_count())
}

/// All queues, in the order in which they are declared.
#[must_use]
pub fn queues(item_queues: &[Cow<'static, str>], retry_delays: &[Duration]) -> Vec<Queue> {
    let mut arguments = quorum(DEAD_DELIVERY_LIMIT);
    set(&mut arguments, "x-overflow", "reject-publish");
    let mut dead = Queue::new(DEAD, arguments);
    dead.bindings.push((DEAD_EXCHANGE, "".into()));
    let worked_on = [RUNS, RESULTS].map(Cow::Borrowed).into_iter().chain(item_queues.iter().cloned());
    let worked_on = worked_on.map(|name| {
        let mut arguments = quorum(DELIVERY_LIMIT);
        dead_letter_to(&mut arguments, DEAD_EXCHANGE, None);
        Queue::new(name, arguments)
    });
    let retries = retry_delays.iter().map(|delay| Queue::wait_queue(retry_queue(*delay), *delay, ITEMS));
    let runs = [(RUNS_WAIT, WAIT), (RUNS_PAUSED, PAUSED)].map(|(name, ttl)| Queue::wait_queue(name, ttl, RUNS));
    let newer =
        [(ITEMS_WAIT, ITEMS), (RESULTS_WAIT, RESULTS)].map(|(name, target)| Queue::wait_queue(name, NEWER, target));
    let mut newest = quorum(DEAD_DELIVERY_LIMIT);
    newest.insert("x-max-length".into(), AMQPValue::LongLongInt(1));
    let epoch = Queue::new(EPOCH, newest);
    [dead, epoch].into_iter().chain(worked_on).chain(runs).chain(newer).chain(retries).collect()
}

/// The exchanges. That of the dead letters is a fanout exchange, so that it accepts any routing key.
const EXCHANGES: [(&str, ExchangeKind); 2] = [(EXCHANGE, ExchangeKind::Direct), (DEAD_EXCHANGE, ExchangeKind::Fanout)];

/// Declares the exchanges.
///
/// # Errors
/// As for [`Queue::declare`].
pub async fn declare_exchanges(channel: &Channel) -> lapin::Result<()> {
    for (name, kind) in EXCHANGES {
        let options = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
        channel.exchange_declare(name.into(), kind, options, FieldTable::default()).await?;
    }
    Ok(())
}

/// Declares the exchanges passively.
///
/// # Errors
/// 404 if one does not exist.
pub async fn look_at_exchanges(channel: &Channel) -> lapin::Result<()> {
    for (name, kind) in EXCHANGES {
        let options = ExchangeDeclareOptions { passive: true, ..ExchangeDeclareOptions::default() };
        channel.exchange_declare(name.into(), kind, options, FieldTable::default()).await?;
    }
    Ok(())
}

/// Declares everything. Idempotent.
///
/// # Errors
/// For instance, a queue exists with other arguments, or the user may not configure it.
pub async fn declare(
    channel: &Channel,
    item_queues: &[Cow<'static, str>],
    retry_delays: &[Duration],
) -> lapin::Result<()> {
    declare_exchanges(channel).await?;
    // The requests are pipelined, so all of them take little longer than one.
    let queues = queues(item_queues, retry_delays);
    try_join_all(queues.iter().map(|queue| queue.declare(channel))).await?;
    try_join_all(queues.iter().map(|queue| queue.bind(channel))).await?;
    Ok(())
}

fn quorum(delivery_limit: i64) -> FieldTable {
    let mut arguments = FieldTable::default();
    set(&mut arguments, "x-queue-type", "quorum");
    arguments.insert("x-delivery-limit".into(), AMQPValue::LongLongInt(delivery_limit));
    arguments
}

/// At-least-once dead-lettering. Without `reject-publish`, the broker silently falls back to at-most-once.
fn dead_letter_to(arguments: &mut FieldTable, exchange: &str, routing_key: Option<&str>) {
    set(arguments, "x-dead-letter-exchange", exchange);
    set(arguments, "x-dead-letter-strategy", "at-least-once");
    set(arguments, "x-overflow", "reject-publish");
    if let Some(key) = routing_key {
        set(arguments, "x-dead-letter-routing-key", key);
    }
}

fn set(arguments: &mut FieldTable, key: &'static str, value: &str) {
    arguments.insert(key.into(), AMQPValue::LongString(value.into()));
}
