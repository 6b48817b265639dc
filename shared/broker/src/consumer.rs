//! Consumes queues. This is the only file that acknowledges their messages.
//!
//! Each queue is consumed over its own connection, which is rebuilt after any error; the broker then redelivers what was
//! unacknowledged. Acking consumes the [`Delivery`]. One that is dropped without an ack is redelivered when the channel closes.

use std::{
    borrow::Cow,
    collections::BTreeSet,
    iter, mem,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use crate::{Broker, BrokerError, Link, epoch::Epoch, epoch_of};
use futures::{StreamExt, future::try_join_all};
use lapin::{
    BasicProperties, Channel,
    options::{BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicQosOptions},
    types::FieldTable,
};
use mailrun_core::{epoch::Admission, metric, retry::Reconnect};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{info, warn};

use crate::watchdog::{Tally, Watchdog};

const CONSUMER_TAG: &str = "mailrun";
const BEHIND: &str = "the ledger is older than a message";
const CANCELLED: &str = "RabbitMQ cancelled the consumer, for instance because its queue was deleted";
/// How long acks are collected, unless a quarter of the prefetch is ready before: sends end in any order, and meanwhile the
/// gaps close. Each ack frame costs a quorum queue an entry in its log.
const GATHER_ACKS: Duration = Duration::from_millis(5);

/// A delivered message that has to be acknowledged.
#[derive(Debug)]
pub struct Delivery {
    /// Its AMQP properties.
    pub properties: BasicProperties,
    /// Its body.
    pub body: Vec<u8>,
    /// Whether it was published before the ledger was last restored from a backup.
    pub is_stale: bool,
    tag: u64,
    acks: mpsc::UnboundedSender<u64>,
    received_at: Instant,
}

impl Delivery {
    /// Acknowledges the message. Call it only when all its effects are on disk. If the channel is closed this does nothing, and the
    /// message is redelivered.
    pub fn ack(self) {
        let _ = self.acks.send(self.tag);
    }

    /// Whether its channel is closed, so that the message will be redelivered.
    fn is_outdated(&self) -> bool {
        self.acks.is_closed()
    }

    /// The AMQP `type`, if it has one.
    pub fn kind(&self) -> Option<&str> {
        self.properties.kind().as_ref().map(lapin::types::ShortString::as_str)
    }
}

/// Receives the deliveries of one queue, or of several equivalent ones.
#[derive(Debug)]
pub struct Consumer {
    deliveries: mpsc::Receiver<Delivery>,
    /// Received by `next_older_than`, and not handed out yet.
    ahead: Option<Delivery>,
}

impl Consumer {
    /// Consumes `queues` until `stop`, each over its own connection; then accepts no more deliveries, waits until each one is acked
    /// or dropped, and closes. `prefetch` applies to each queue.
    pub fn start(
        broker: &Arc<Broker>,
        queues: &[Cow<'static, str>],
        prefetch: u16,
        watchdog: &Arc<Watchdog>,
        stop: &CancellationToken,
        tasks: &TaskTracker,
    ) -> Self {
        let (sender, receiver) = mpsc::channel(usize::from(prefetch) * queues.len());
        metric::begin(metric::REBUILDS, "queue", queues.iter().cloned());
        for queue in queues {
            let (broker, watchdog) = (Arc::clone(broker), Arc::clone(watchdog));
            // Before the task is spawned, so that the process is never ready before it consumes.
            broker.health().trouble(queue.clone(), "not consumed yet");
            tasks.spawn(supervise(broker, queue.clone(), prefetch, sender.clone(), watchdog, stop.clone()));
        }
        Self { deliveries: receiver, ahead: None }
    }

    /// The next delivery. None: the consumer has stopped.
    pub async fn next(&mut self) -> Option<Delivery> {
        loop {
            let delivery = match self.ahead.take() {
                Some(delivery) => delivery,
                None => self.deliveries.recv().await?,
            };
            if !delivery.is_outdated() {
                return Some(delivery);
            }
        }
    }

    /// The next delivery, if one has already arrived.
    pub fn next_now(&mut self) -> Option<Delivery> {
        let ahead = self.ahead.take();
        ahead
            .into_iter()
            .chain(iter::from_fn(|| self.deliveries.try_recv().ok()))
            .find(|delivery| !delivery.is_outdated())
    }

    /// The next delivery, if it arrived at least `age` ago.
    pub fn next_older_than(&mut self, age: Duration) -> Option<Delivery> {
        let delivery = self.next_now()?;
        if delivery.received_at.elapsed() < age {
            self.ahead = Some(delivery);
            return None;
        }
        Some(delivery)
    }
}

async fn supervise(
    broker: Arc<Broker>,
    queue: Cow<'static, str>,
    prefetch: u16,
    deliveries: mpsc::Sender<Delivery>,
    watchdog: Arc<Watchdog>,
    stop: CancellationToken,
) {
    let mut reconnect = Reconnect::default();
    let mut watch = watchdog.begin();
    let health = broker.health();
    // A ledger that is older than the messages must not act on them: they stay on the queue until it is current.
    while stop.run_until_cancelled(broker.epoch().current()).await.is_some() {
        let ended = async {
            // Dropping a lapin consumer cancels it, which fails while its connection is closing. So it lives until the close.
            let (link, channel, mut consumer) = open(&broker, &queue, prefetch).await?;
            info!(%queue, "consuming");
            health.fine(&queue);
            reconnect.reset();
            let tally = Tally::default();
            let broken = watchdog.watch(&mut watch, &queue, prefetch, &tally, || deliveries.capacity());
            let ended = tokio::select! {
                ended = serve(&channel, prefetch, &mut consumer, &deliveries, &tally, &stop, &broker) => ended,
                () = broker.epoch().behind() => Err(BrokerError::Useless(BEHIND)),
                // While stopping, deliveries are not expected any more.
                Some(why) = stop.run_until_cancelled(broken) => Err(BrokerError::Useless(why)),
            };
            link.close().await;
            ended
        };
        let Err(error) = ended.await else { return };
        health.trouble(queue.clone(), "its consumer is interrupted");
        let wait = reconnect.next_wait();
        warn!(%queue, %error, wait_ms = wait.as_millis(), "consuming interrupted, reconnecting");
        tokio::select! {
            () = sleep(wait) => {}
            () = stop.cancelled() => {}
        }
    }
}

async fn open(broker: &Broker, queue: &str, prefetch: u16) -> Result<(Link, Channel, lapin::Consumer), BrokerError> {
    let link = broker.connect(&format!("consume {queue}")).await?;
    let open = async {
        let channel = link.channel().await?;
        channel.basic_qos(prefetch, BasicQosOptions::default()).await?;
        let consumer = channel
            .basic_consume(queue.into(), CONSUMER_TAG.into(), BasicConsumeOptions::default(), FieldTable::default())
            .await?;
        Ok::<_, lapin::Error>((channel, consumer))
    };
    let (channel, consumer) = timeout(broker.answer_timeout(), open).await.map_err(|_| BrokerError::Timeout)??;
    Ok((link, channel, consumer))
}

/// Hands out deliveries and sends their acks, until `stop` and all of them are acked or dropped (`Ok`), or until the channel
/// can't be used any more (`Err`).
async fn serve(
    channel: &Channel,
    prefetch: u16,
    consumer: &mut lapin::Consumer,
    deliveries: &mpsc::Sender<Delivery>,
    tally: &Tally,
    stop: &CancellationToken,
    broker: &Broker,
) -> Result<(), BrokerError> {
    let limit = broker.answer_timeout();
    let (acks, mut acked) = mpsc::unbounded_channel();
    let few = usize::from(prefetch) / 4;
    let mut watermark = Watermark::new(2 * few);
    let (mut finished, mut flush_at) = (Vec::new(), Instant::now());
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => break,
            Some(tag) = acked.recv() => {
                if finished.is_empty() {
                    flush_at = Instant::now() + GATHER_ACKS;
                }
                finished.push(tag);
                tally.finished.fetch_add(1, Ordering::Relaxed);
                if finished.len() > few {
                    acknowledge(channel, watermark.pass(mem::take(&mut finished)), limit).await?;
                    tally.acknowledged.store(watermark.acknowledged(), Ordering::Relaxed);
                }
            }
            () = sleep_until(flush_at), if !finished.is_empty() => {
                acknowledge(channel, watermark.pass(mem::take(&mut finished)), limit).await?;
                tally.acknowledged.store(watermark.acknowledged(), Ordering::Relaxed);
            }
            delivery = consumer.next() => {
                // The stream ends silently when the broker cancels the consumer.
                let delivery = delivery.ok_or(BrokerError::Useless(CANCELLED))??;
                tally.delivered.fetch_add(1, Ordering::Relaxed);
                let is_stale = is_stale(broker.epoch(), epoch_of(&delivery.properties)).await?;
                let delivery = Delivery {
                    is_stale,
                    tag: delivery.delivery_tag,
                    properties: delivery.properties,
                    body: delivery.data,
                    acks: acks.clone(),
                    received_at: Instant::now(),
                };
                // This never waits: the buffer has space for the whole prefetch.
                if deliveries.send(delivery).await.is_err() {
                    break;
                }
            }
        }
    }
    drop(acks);
    timeout(limit, channel.basic_cancel(CONSUMER_TAG.into(), BasicCancelOptions::default()))
        .await
        .map_err(|_| BrokerError::Timeout)??;
    // Ends when the last delivery is acked or dropped.
    while acked.recv_many(&mut finished, usize::from(prefetch)).await > 0 {
        acknowledge(channel, watermark.pass(mem::take(&mut finished)), limit).await?;
    }
    acknowledge(channel, watermark.pass(finished), limit).await?;
    acknowledge(channel, watermark.rest(), limit).await
}

/// Whether a message of this epoch was published before the last restore.
async fn is_stale(ledger: &Epoch, epoch: Option<i64>) -> Result<bool, BrokerError> {
    match ledger.admit(epoch).await {
        Admission::Current => Ok(false),
        Admission::Stale => Ok(true),
        Admission::Behind => Err(BrokerError::Useless(BEHIND)),
    }
}

async fn acknowledge(channel: &Channel, acks: Vec<Ack>, limit: Duration) -> Result<(), BrokerError> {
    let acks = acks.into_iter().map(|Ack { tag, multiple }| channel.basic_ack(tag, BasicAckOptions { multiple }));
    timeout(limit, try_join_all(acks)).await.map_err(|_| BrokerError::Timeout)??;
    Ok(())
}

/// An ack of one delivery, or of all up to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ack {
    tag: u64,
    multiple: bool,
}

/// Combines finished deliveries into few acks: one covers all that are finished without a gap. Those beyond a gap wait until it
/// closes. If too many wait, each gets its own ack, so that one slow send does not block the prefetch of the others.
#[derive(Debug)]
struct Watermark {
    /// All deliveries up to this tag are acked. Tags start at 1.
    level: u64,
    /// Acked beyond `level`.
    beyond: BTreeSet<u64>,
    /// Finished beyond `level`, and not acked yet.
    waiting: BTreeSet<u64>,
    /// How many may wait.
    max_waiting: usize,
}

impl Watermark {
    fn new(max_waiting: usize) -> Self {
        Self { level: 0, beyond: BTreeSet::new(), waiting: BTreeSet::new(), max_waiting }
    }

    /// Marks these tags as finished, and returns the acks to send now.
    fn pass(&mut self, tags: impl IntoIterator<Item = u64>) -> Vec<Ack> {
        self.waiting.extend(tags);
        // The broker closes the channel if it does not expect the tag, so a multiple ack names the highest tag not acked before.
        let mut many = None;
        loop {
            let next = self.level + 1;
            if self.waiting.remove(&next) {
                many = Some(Ack { tag: next, multiple: true });
            } else if !self.beyond.remove(&next) {
                break;
            }
            self.level = next;
        }
        let singles = if self.waiting.len() > self.max_waiting { self.rest() } else { Vec::new() };
        many.into_iter().chain(singles).collect()
    }

    /// The number of acked deliveries.
    fn acknowledged(&self) -> u64 {
        self.level + self.beyond.len() as u64
    }

    /// Acks for all deliveries that wait.
    fn rest(&mut self) -> Vec<Ack> {
        let waiting = mem::take(&mut self.waiting);
        self.beyond.extend(&waiting);
        waiting.into_iter().map(|tag| Ack { tag, multiple: false }).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ack(tag: u64, multiple: bool) -> Ack {
        Ack { tag, multiple }
    }

    #[test]
    fn finished_deliveries_without_a_gap_share_one_ack() {
        let mut watermark = Watermark::new(9);
        assert_eq!(watermark.pass([2, 1, 3]), [ack(3, true)]);
        assert_eq!(watermark.pass([4]), [ack(4, true)]);
        assert_eq!(watermark.pass([7, 6]), []);
        assert_eq!(watermark.pass([5]), [ack(7, true)]);
    }

    #[test]
    fn a_slow_delivery_delays_only_a_few_acks() {
        let mut watermark = Watermark::new(1);
        assert_eq!(watermark.pass([2]), []);
        assert_eq!(watermark.pass([4]), [ack(2, false), ack(4, false)]);
        // 2 is acked already, so the multiple ack names 3, and covers 1.
        assert_eq!(watermark.pass([1, 3]), [ack(3, true)]);
        // The level rises to 8, but 8 itself is acked already.
        assert_eq!(watermark.pass([6, 8]), [ack(6, false), ack(8, false)]);
        assert_eq!(watermark.pass([5, 7]), [ack(7, true)]);
        assert_eq!(watermark.pass([9]), [ack(9, true)]);
    }

    #[tokio::test]
    async fn only_a_delivery_that_has_waited_is_taken_early() {
        let (sender, deliveries) = mpsc::channel(2);
        let (acks, _acked) = mpsc::unbounded_channel();
        for tag in [1, 2] {
            let delivery = Delivery {
                is_stale: false,
                properties: BasicProperties::default(),
                body: Vec::new(),
                tag,
                acks: acks.clone(),
                received_at: Instant::now(),
            };
            sender.send(delivery).await.unwrap();
        }
        let mut consumer = Consumer { deliveries, ahead: None };
        let hour = Duration::from_secs(3_600);
        assert!(consumer.next_older_than(hour).is_none());
        assert_eq!(consumer.next_older_than(Duration::ZERO).map(|delivery| delivery.tag), Some(1));
        assert!(consumer.next_older_than(hour).is_none());
        assert_eq!(consumer.next().await.map(|delivery| delivery.tag), Some(2));
    }

    #[test]
    fn the_rest_is_acked_one_by_one() {
        let mut watermark = Watermark::new(9);
        assert_eq!(watermark.pass([2, 4]), []);
        assert_eq!(watermark.rest(), [ack(2, false), ack(4, false)]);
        assert_eq!(watermark.pass([1]), [ack(1, true)]);
    }
}
