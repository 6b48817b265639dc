//! The exchanges and queues, and who is bound to whom: the same declarations on RabbitMQ 3.10 and 4.x.
//!
//! Every queue is a quorum queue, because a classic queue confirms a message before it is on disk. Arguments can't be
//! changed once a queue exists and win over policies, so the ones here are those that the promises depend on.

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

/// How long a run waits before the pump looks at it again.
const WAIT: Duration = Duration::from_millis(100);
/// The same for a paused run. Each look costs a transaction, there may be many such runs, and they may stay for weeks.
const PAUSED: Duration = Duration::from_secs(1);
/// Before a message of a newer version is looked at again: an upgrade takes minutes.
const NEWER: Duration = Duration::from_secs(5);
/// A message that was given back so often has killed that many workers.
const DELIVERY_LIMIT: i64 = 20;
/// RabbitMQ 4 defaults to 20 and drops the message beyond it, which would lose a dead letter that is often looked at.
const DEAD_DELIVERY_LIMIT: i64 = 1_000_000;

/// How long messages stay in a waiting room of runs.
#[must_use]
pub fn waiting_time(waiting_room: &str) -> Duration {
    if waiting_room == RUNS_PAUSED { PAUSED } else { WAIT }
}

/// A queue as it has to be.
#[derive(Clone, Debug)]
pub struct Queue {
    /// Its name, which is its routing key as well.
    pub name: Cow<'static, str>,
    arguments: FieldTable,
    /// Exchanges, and the routing keys there.
    bindings: Vec<(&'static str, Cow<'static, str>)>,
}

impl Queue {
    fn new(name: impl Into<Cow<'static, str>>, arguments: FieldTable) -> Self {
        let name = name.into();
        let bindings = vec![(EXCHANGE, name.clone())];
        Self { name, arguments, bindings }
    }

    /// A queue without consumers, whose messages move on to `target` after `ttl`.
    fn waiting_room(name: impl Into<Cow<'static, str>>, ttl: Duration, target: &str) -> Self {
        let mut arguments = quorum(DEAD_DELIVERY_LIMIT);
        dead_letter_to(&mut arguments, EXCHANGE, Some(target));
        let ttl = i64::try_from(ttl.as_millis()).unwrap_or(i64::MAX);
        arguments.insert("x-message-ttl".into(), AMQPValue::LongLongInt(ttl));
        Self::new(name, arguments)
    }

    /// Declares it: creates it, or says that it exists in this form.
    ///
    /// # Errors
    /// The broker's, and then the channel is of no use any more: 406 if it exists with other arguments, 403 if the user may
    /// not configure.
    pub async fn declare(&self, channel: &Channel) -> lapin::Result<lapin::Queue> {
        let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        channel.queue_declare(self.name.as_ref().into(), options, self.arguments.clone()).await
    }

    /// Looks at it as it is, whatever its arguments.
    ///
    /// # Errors
    /// The broker's, and then the channel is of no use any more: 404 if it does not exist.
    pub async fn look(&self, channel: &Channel) -> lapin::Result<lapin::Queue> {
        look(channel, &self.name).await
    }

    /// Binds it to its exchanges.
    ///
    /// # Errors
    /// The broker's.
    pub async fn bind(&self, channel: &Channel) -> lapin::Result<()> {
        for (exchange, key) in &self.bindings {
            let (queue, exchange, key) = (self.name.as_ref().into(), (*exchange).into(), key.as_ref().into());
            channel.queue_bind(queue, exchange, key, QueueBindOptions::default(), FieldTable::default()).await?;
        }
        Ok(())
    }
}

/// Looks at the queue of this name as it is, as [`Queue::look`] does.
///
/// # Errors
/// The broker's, and then the channel is of no use any more: 404 if it does not exist.
pub async fn look(channel: &Channel, queue: &str) -> lapin::Result<lapin::Queue> {
    let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(queue.into(), options, FieldTable::default()).await
}

/// How many messages wait in `queue`, not counting those that are delivered and not acknowledged.
///
/// # Errors
/// The broker's; the channel is of no use after that.
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
    let rungs = retry_delays.iter().map(|delay| Queue::waiting_room(retry_queue(*delay), *delay, ITEMS));
    let runs = [(RUNS_WAIT, WAIT), (RUNS_PAUSED, PAUSED)].map(|(name, ttl)| Queue::waiting_room(name, ttl, RUNS));
    let newer =
        [(ITEMS_WAIT, ITEMS), (RESULTS_WAIT, RESULTS)].map(|(name, target)| Queue::waiting_room(name, NEWER, target));
    let mut newest = quorum(DEAD_DELIVERY_LIMIT);
    newest.insert("x-max-length".into(), AMQPValue::LongLongInt(1));
    let epoch = Queue::new(EPOCH, newest);
    [dead, epoch].into_iter().chain(worked_on).chain(runs).chain(newer).chain(rungs).collect()
}

/// The exchanges. The dead letters' is a fanout: one arrives whatever routing key it had.
const EXCHANGES: [(&str, ExchangeKind); 2] = [(EXCHANGE, ExchangeKind::Direct), (DEAD_EXCHANGE, ExchangeKind::Fanout)];

/// Declares the exchanges.
///
/// # Errors
/// The broker's, as for a [`Queue`].
pub async fn declare_exchanges(channel: &Channel) -> lapin::Result<()> {
    for (name, kind) in EXCHANGES {
        let options = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
        channel.exchange_declare(name.into(), kind, options, FieldTable::default()).await?;
    }
    Ok(())
}

/// Looks at the exchanges as they are.
///
/// # Errors
/// The broker's: 404 if one does not exist.
pub async fn look_at_exchanges(channel: &Channel) -> lapin::Result<()> {
    for (name, kind) in EXCHANGES {
        let options = ExchangeDeclareOptions { passive: true, ..ExchangeDeclareOptions::default() };
        channel.exchange_declare(name.into(), kind, options, FieldTable::default()).await?;
    }
    Ok(())
}

/// Declares everything. Repeating it changes nothing.
///
/// # Errors
/// The broker's, for instance when a queue exists with other arguments, or the user may not configure.
pub async fn declare(
    channel: &Channel,
    item_queues: &[Cow<'static, str>],
    retry_delays: &[Duration],
) -> lapin::Result<()> {
    declare_exchanges(channel).await?;
    // The broker answers in order: so all of them take little longer than one.
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

/// At-least-once dead-lettering; without `reject-publish` the broker silently falls back to at-most-once.
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
