//! The exchanges and queues, and who is bound to whom: the same declarations on RabbitMQ 3.10 and 4.x.
//!
//! Every queue is a quorum queue, because a classic queue confirms a message before it is on disk. Arguments can't be
//! changed once a queue exists and win over policies, so the ones here are those that the promises depend on.

use std::{borrow::Cow, iter, time::Duration};

use lapin::{
    Channel, ExchangeKind,
    options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions},
    types::{AMQPValue, FieldTable, ShortString},
};

/// The direct exchange that every message is published to; its routing keys are the queues' names.
pub const EXCHANGE: &str = "mailrun";
/// Where the broker puts what was delivered too often.
pub const DEAD_EXCHANGE: &str = "mailrun.dead";
/// Run messages: the pump's work.
pub const RUNS: &str = "mailrun.runs";
/// Runs that wait for room in their window.
pub const RUNS_WAIT: &str = "mailrun.runs.wait";
/// Item messages, one for each email: the first queue of them, and the one that waiting and moved messages come to.
pub const ITEMS: &str = "mailrun.items";
/// Results on their way to the counters.
pub const RESULTS: &str = "mailrun.results";
/// Single mails that somebody sends to look at an invitation.
pub const TESTS: &str = "mailrun.tests";
/// The dead letters.
pub const DEAD: &str = "mailrun.dead";

/// How long a run waits before the pump looks at it again.
const WAIT: Duration = Duration::from_millis(100);
/// A message that was given back so often has killed that many workers.
const DELIVERY_LIMIT: i64 = 20;
/// RabbitMQ 4 defaults to 20 and drops the message beyond it, which would lose a dead letter that is often looked at.
const DEAD_DELIVERY_LIMIT: i64 = 1_000_000;

/// The name of the queue where an item waits for `delay`: one queue for each delay, since a message expires only at the
/// head of its queue.
#[must_use]
pub fn retry_queue(delay: Duration) -> String {
    let ms = delay.as_millis();
    if ms.is_multiple_of(1000) { format!("mailrun.retry.{}s", ms / 1000) } else { format!("mailrun.retry.{ms}ms") }
}

/// The queues that item messages are spread over: a queue is one core's work in the broker. Any message may be on any of
/// them, so what comes back from a rung or is moved by hand needs no more than the first.
#[must_use]
pub fn item_queues(count: u16) -> Vec<Cow<'static, str>> {
    let others = (2..=count).map(|number| Cow::Owned(format!("{ITEMS}.{number}")));
    iter::once(Cow::Borrowed(ITEMS)).chain(others).collect()
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
    exchange(channel, EXCHANGE, ExchangeKind::Direct).await?;
    // Fanout: a dead letter arrives whatever routing key it had.
    exchange(channel, DEAD_EXCHANGE, ExchangeKind::Fanout).await?;

    let mut dead = quorum(DEAD_DELIVERY_LIMIT);
    set(&mut dead, "x-overflow", "reject-publish");
    queue(channel, DEAD, dead).await?;
    bind(channel, DEAD, DEAD_EXCHANGE, "").await?;
    bind(channel, DEAD, EXCHANGE, DEAD).await?;

    for name in [RUNS, RESULTS, TESTS].into_iter().chain(item_queues.iter().map(AsRef::as_ref)) {
        let mut arguments = quorum(DELIVERY_LIMIT);
        dead_letter_to(&mut arguments, DEAD_EXCHANGE, None);
        queue(channel, name, arguments).await?;
        bind(channel, name, EXCHANGE, name).await?;
    }
    waiting_room(channel, RUNS_WAIT, WAIT, RUNS).await?;
    for delay in retry_delays {
        waiting_room(channel, &retry_queue(*delay), *delay, ITEMS).await?;
    }
    Ok(())
}

/// A queue without consumers, whose messages move on to `target` after `ttl`.
async fn waiting_room(channel: &Channel, name: &str, ttl: Duration, target: &str) -> lapin::Result<()> {
    let mut arguments = quorum(DEAD_DELIVERY_LIMIT);
    dead_letter_to(&mut arguments, EXCHANGE, Some(target));
    let ttl = i64::try_from(ttl.as_millis()).unwrap_or(i64::MAX);
    arguments.insert("x-message-ttl".into(), AMQPValue::LongLongInt(ttl));
    queue(channel, name, arguments).await?;
    bind(channel, name, EXCHANGE, name).await
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

async fn exchange(channel: &Channel, name: &'static str, kind: ExchangeKind) -> lapin::Result<()> {
    let options = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
    channel.exchange_declare(name.into(), kind, options, FieldTable::default()).await
}

async fn queue(channel: &Channel, name: &str, arguments: FieldTable) -> lapin::Result<()> {
    let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(ShortString::from(name), options, arguments).await?;
    Ok(())
}

async fn bind(channel: &Channel, queue: &str, exchange: &str, key: &str) -> lapin::Result<()> {
    channel
        .queue_bind(queue.into(), exchange.into(), key.into(), QueueBindOptions::default(), FieldTable::default())
        .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_item_queue_has_the_plain_name() {
        assert_eq!(item_queues(1), ["mailrun.items"]);
        assert_eq!(item_queues(3), ["mailrun.items", "mailrun.items.2", "mailrun.items.3"]);
    }

    #[test]
    fn retry_queues_are_named_by_their_delay() {
        assert_eq!(retry_queue(Duration::from_millis(250)), "mailrun.retry.250ms");
        assert_eq!(retry_queue(Duration::from_secs(5)), "mailrun.retry.5s");
    }
}
