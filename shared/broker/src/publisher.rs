//! Publishing: bursts over publisher channels, and the handling of messages that the broker returns or rejects.
//!
//! A rejected message (its queue is missing or full) never blocks its channel. `offer` returns it to the caller; `publish` sets
//! it aside and publishes it again with growing delays, without holding up other messages.

use std::{
    borrow::Cow,
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::future::try_join_all;
use lapin::{Channel, Confirmation, options::ConfirmSelectOptions, types::AMQPValue};
use mailrun_core::queue;
use metrics::{counter, histogram};
use tokio::{
    sync::{Mutex, mpsc, oneshot},
    time::{sleep, sleep_until, timeout},
};
use tracing::{debug, warn};
use uuid::Uuid;

use super::{
    Broker, BrokerError, EPOCH_HEADER, Outgoing,
    link::Link,
    rejections::{NO_QUEUE, NO_ROOM, Rejections},
};
use mailrun_core::{metric, retry::Reconnect};

/// Messages per burst. All confirms of a burst are awaited together, so a returned message is always seen within its burst.
const BURST: usize = 1_536;
/// Publishes that are polled together, so that many frames share one system call.
const POLLED_TOGETHER: usize = 64;
/// The time limit for confirms while the caller holds a transaction open.
pub(super) const CONFIRMED_SOON: Duration = Duration::from_secs(10);
/// The number of batches that may wait for a publisher channel before `publish` applies backpressure.
const WAITING_BATCHES: usize = 64;
/// The first delay before a rejected message is published again. It doubles up to `LAST_AGAIN`.
const FIRST_AGAIN: Duration = Duration::from_millis(200);
const LAST_AGAIN: Duration = Duration::from_secs(10);
/// The shortest time between two replacements of a channel.
const RENEW_EVERY: Duration = Duration::from_secs(1);
/// The shortest time between two declarations of missing queues.
const DECLARE_EVERY: Duration = Duration::from_secs(1);

/// Messages whose confirms are awaited together.
#[derive(Debug)]
struct Batch {
    messages: Vec<Outgoing>,
    /// What to do with rejected messages.
    on_rejection: OnRejection,
    /// Receives the rejected messages.
    done: oneshot::Sender<Vec<Outgoing>>,
}

/// What to do with rejected messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OnRejection {
    /// Publish them again until they are accepted.
    Repeat,
    /// Return them to the caller.
    Return,
}

/// A batch of rejected messages that waits to be published again.
#[derive(Debug)]
struct Aside {
    batch: Batch,
    again_at: Instant,
    waits: Reconnect,
}

/// Publishes messages and awaits their confirms. Clones share the same publisher channels.
#[derive(Clone, Debug)]
pub struct Publisher {
    channels: mpsc::Sender<Batch>,
    channel_count: usize,
    item_queues: Arc<[Cow<'static, str>]>,
    rejections: Rejections,
}

impl Publisher {
    /// The queues that currently reject messages.
    #[must_use]
    pub fn rejections(&self) -> &Rejections {
        &self.rejections
    }

    /// Like [`Self::offer`], but fails after ten seconds or if a message is rejected. For callers that hold a transaction open.
    ///
    /// # Errors
    /// The publisher is closed, a message was rejected, or not all were confirmed in time.
    pub async fn publish_soon(&self, messages: Vec<Outgoing>) -> Result<(), BrokerError> {
        let rejected = timeout(CONFIRMED_SOON, self.offer(messages)).await.map_err(|_| BrokerError::Unconfirmed)??;
        match rejected.first() {
            Some(message) => Err(BrokerError::Rejected(message.queue.to_string())),
            None => Ok(()),
        }
    }

    /// Returns when the broker has confirmed every message. Publishes again after each interruption and rejection, for as long as
    /// it takes. Dropping the future abandons the messages that are not confirmed yet.
    ///
    /// # Errors
    /// Only if the publisher is closed.
    /// Only when the publisher is closed.
    pub async fn publish(&self, messages: Vec<Outgoing>) -> Result<(), BrokerError> {
        self.send(messages, OnRejection::Repeat).await.map(drop)
    }

    /// Returns when the broker has confirmed or rejected every message, with the rejected ones: their queue is missing or full.
    /// Publishes again after each interruption.
    ///
    /// # Errors
    /// Only if the publisher is closed.
    pub async fn offer(&self, messages: Vec<Outgoing>) -> Result<Vec<Outgoing>, BrokerError> {
        self.send(messages, OnRejection::Return).await
    }

    async fn send(&self, mut messages: Vec<Outgoing>, on_rejection: OnRejection) -> Result<Vec<Outgoing>, BrokerError> {
        if messages.is_empty() {
            return Ok(messages);
        }
        for message in &mut messages {
            message.spread_over(&self.item_queues);
        }
        // Split evenly over the channels, which publish and await confirms independently.
        let part = part(messages.len(), self.channel_count);
        let mut confirms = Vec::new();
        while !messages.is_empty() {
            let rest = messages.split_off(messages.len().min(part));
            let (done, confirmed) = oneshot::channel();
            confirms.push(confirmed);
            self.channels.send(Batch { messages, on_rejection, done }).await.map_err(|_| BrokerError::Closed)?;
            messages = rest;
        }
        let mut rejected = Vec::new();
        for confirmed in confirms {
            rejected.extend(confirmed.await.map_err(|_| BrokerError::Closed)?);
        }
        Ok(rejected)
    }
}

/// How many of `messages` go to one channel at a time. A few stay together; many are split so that all `channels` finish
/// together.
fn part(messages: usize, channels: usize) -> usize {
    if messages <= POLLED_TOGETHER {
        return messages;
    }
    messages.div_ceil(messages.div_ceil(BURST).next_multiple_of(channels))
}

/// The messages of one publishing task. They survive its connections.
#[derive(Debug, Default)]
struct InHand {
    /// To be published now.
    batches: Vec<Batch>,
    /// Rejected, to be published again.
    aside: Vec<Aside>,
}

impl InHand {
    /// Drops batches whose callers have stopped waiting.
    fn tidy(&mut self) {
        self.batches.retain(|batch| !batch.done.is_closed());
        self.aside.retain(|aside| !aside.batch.done.is_closed());
    }

    fn is_empty(&self) -> bool {
        self.batches.is_empty() && self.aside.is_empty()
    }

    /// Waits for something to publish. Returns false if the publisher is gone and everything is published.
    async fn fill(&mut self, receiver: &Mutex<mpsc::Receiver<Batch>>) -> bool {
        self.tidy();
        if self.batches.is_empty() {
            let again_at = self.aside.iter().map(|aside| aside.again_at).min();
            tokio::select! {
                biased;
                () = sleep_until(again_at.unwrap_or_else(Instant::now).into()), if again_at.is_some() => {}
                filled = fill(receiver, &mut self.batches) => if !filled {
                    return false;
                },
            }
        }
        true
    }

    /// Schedules a batch to be published again after its next delay.
    fn set_aside(&mut self, batch: Batch, mut waits: Reconnect) {
        self.aside.push(Aside { batch, again_at: Instant::now() + waits.next_wait(), waits });
    }

    /// Takes the rejected batches that are due. Each has a delay of its own.
    fn take_due(&mut self, now: Instant) -> Vec<Aside> {
        let (due, later) = std::mem::take(&mut self.aside).into_iter().partition(|aside| aside.again_at <= now);
        self.aside = later;
        due
    }
}

/// Waits for a batch, then takes all others that are ready, up to a burst. Returns false if the publisher is gone and everything
/// is published.
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

impl Broker {
    /// Starts a publisher with `count` publisher channels. It runs until every clone is dropped.
    #[must_use]
    pub fn publisher(self: &Arc<Self>, count: usize) -> Publisher {
        let (sender, receiver) = mpsc::channel(WAITING_BATCHES);
        let receiver = Arc::new(Mutex::new(receiver));
        metric::begin(metric::PUBLISHED, "queue", self.queue_names());
        metric::begin(metric::REJECTED, "reason", [NO_QUEUE, NO_ROOM].map(reason));
        for number in 1..=count {
            self.tasks.spawn(Arc::clone(self).publish_channel(number, Arc::clone(&receiver)));
        }
        Publisher {
            channels: sender,
            channel_count: count,
            item_queues: Arc::clone(&self.item_queues),
            rejections: self.rejections.clone(),
        }
    }

    /// One publishing task: it owns a connection, its confirm channel and the unconfirmed messages.
    async fn publish_channel(self: Arc<Self>, number: usize, receiver: Arc<Mutex<mpsc::Receiver<Batch>>>) {
        let health_key = format!("publisher channel {number}");
        let mut reconnect = Reconnect::default();
        let mut in_hand = InHand::default();
        loop {
            // Connect before there is anything to publish, so that the first message does not wait for the connection.
            let error = match self.confirm_channel().await {
                Ok((link, channel)) => {
                    self.health.fine(&health_key);
                    let ended = self.publish_on(&link, channel, &receiver, &mut in_hand, &mut reconnect).await;
                    link.close().await;
                    match ended {
                        Ok(()) => return,
                        Err(error) => error,
                    }
                }
                Err(error) => error,
            };
            self.health.trouble(health_key.clone(), "is interrupted");
            // Warn once per interruption, not for each attempt to reconnect.
            if reconnect.is_under_way() {
                debug!(%error, "publishing is still interrupted");
            } else {
                warn!(%error, "publishing interrupted, reconnecting until it works");
            }
            let wait = reconnect.next_wait();
            sleep(wait).await;
            in_hand.tidy();
            if in_hand.is_empty() {
                // No caller is waiting.
                self.health.fine(&health_key);
            }
            // Reconnect only when there is something to publish.
            if !in_hand.fill(&receiver).await {
                return;
            }
        }
    }

    async fn confirm_channel(&self) -> Result<(Link, Channel), BrokerError> {
        let link = self.connect("publish").await?;
        let channel = self.confirm_on(&link).await?;
        Ok((link, channel))
    }

    async fn confirm_on(&self, link: &Link) -> Result<Channel, BrokerError> {
        let open = async {
            let channel = link.channel().await?;
            channel.confirm_select(ConfirmSelectOptions::default()).await?;
            Ok::<_, lapin::Error>(channel)
        };
        Ok(timeout(self.answer_timeout, open).await.map_err(|_| BrokerError::Timeout)??)
    }

    /// Replaces the channel after a full queue has rejected messages: RabbitMQ 3.10 keeps rejecting messages of the same channel
    /// even after the queue's limit is lifted.
    async fn renew(
        &self,
        link: &Link,
        channel: &mut Channel,
        rejected: &HashMap<Uuid, &'static str>,
        renewed: &mut Option<Instant>,
    ) -> Result<(), BrokerError> {
        let is_due = renewed.is_none_or(|at| at.elapsed() >= RENEW_EVERY);
        if is_due && rejected.values().any(|why| *why == NO_ROOM) {
            *renewed = Some(Instant::now());
            let old = std::mem::replace(channel, self.confirm_on(link).await?);
            timeout(self.answer_timeout, old.close(200, "renewed".into()))
                .await
                .map_err(|_| BrokerError::Timeout)??;
        }
        Ok(())
    }

    /// Publishes burst after burst, until the publisher is dropped (`Ok`) or an error occurs (`Err`).
    async fn publish_on(
        &self,
        link: &Link,
        mut channel: Channel,
        receiver: &Mutex<mpsc::Receiver<Batch>>,
        in_hand: &mut InHand,
        reconnect: &mut Reconnect,
    ) -> Result<(), BrokerError> {
        let (mut declared, mut renewed): (Option<Instant>, Option<Instant>) = (None, None);
        while in_hand.fill(receiver).await {
            if !in_hand.batches.is_empty() {
                let mut rejected = self.burst(&channel, &in_hand.batches).await?;
                reconnect.reset();
                if rejected.values().any(|why| *why == NO_QUEUE) {
                    in_hand.batches = self.settle(std::mem::take(&mut in_hand.batches), &rejected, OnRejection::Repeat);
                    if self.declare && declared.is_none_or(|at| at.elapsed() >= DECLARE_EVERY) {
                        declared = Some(Instant::now());
                        match timeout(self.answer_timeout, self.declare_on(link)).await {
                            Ok(Ok(())) => {}
                            Ok(Err(error)) => debug!(%error, "missing queues can't be declared"),
                            Err(_) => return Err(BrokerError::Timeout),
                        }
                    }
                    // The queue may exist now, and item messages have moved on to the next item queue.
                    rejected = self.burst(&channel, &in_hand.batches).await?;
                }
                let batches = std::mem::take(&mut in_hand.batches);
                for batch in self.settle(batches, &rejected, OnRejection::Return) {
                    in_hand.set_aside(batch, Reconnect::between(FIRST_AGAIN, LAST_AGAIN));
                }
                self.renew(link, &mut channel, &rejected, &mut renewed).await?;
            }
            let rejected = self.publish_aside(&channel, in_hand).await?;
            self.renew(link, &mut channel, &rejected, &mut renewed).await?;
        }
        Ok(())
    }

    /// Publishes the due batches of rejected messages, in a burst of their own. Returns the messages that were rejected again.
    async fn publish_aside(
        &self,
        channel: &Channel,
        in_hand: &mut InHand,
    ) -> Result<HashMap<Uuid, &'static str>, BrokerError> {
        let due = in_hand.take_due(Instant::now());
        if due.is_empty() {
            return Ok(HashMap::new());
        }
        let (batches, waits): (Vec<Batch>, Vec<Reconnect>) =
            due.into_iter().map(|aside| (aside.batch, aside.waits)).unzip();
        match self.burst(channel, &batches).await {
            Ok(rejected) => {
                for (batch, waits) in batches.into_iter().zip(waits) {
                    if let Some(batch) = self.settle(vec![batch], &rejected, OnRejection::Return).pop() {
                        in_hand.set_aside(batch, waits);
                    }
                }
                Ok(rejected)
            }
            Err(error) => {
                batches.into_iter().zip(waits).for_each(|(batch, waits)| in_hand.set_aside(batch, waits));
                Err(error)
            }
        }
    }

    async fn burst(&self, channel: &Channel, batches: &[Batch]) -> Result<HashMap<Uuid, &'static str>, BrokerError> {
        let begun = Instant::now();
        let rejected = timeout(self.answer_timeout, burst(channel, batches, self.epoch.present()))
            .await
            .map_err(|_| BrokerError::Timeout)??;
        histogram!(metric::CONFIRM_SECONDS).record(begun.elapsed());
        count(batches, &rejected);
        Ok(rejected)
    }

    /// Completes the batches whose messages were all confirmed, and, at `OnRejection::Return`, those whose callers want the rejected
    /// messages back. Returns the rest of the other batches.
    fn settle(
        &self,
        batches: Vec<Batch>,
        rejected: &HashMap<Uuid, &'static str>,
        on_rejection: OnRejection,
    ) -> Vec<Batch> {
        let mut left = Vec::new();
        for mut batch in batches {
            if !rejected.is_empty() || self.rejections.any() {
                self.note(&batch.messages, rejected);
            }
            batch.messages.retain(|message| rejected.contains_key(&message.id));
            for message in &mut batch.messages {
                message.try_another(&self.item_queues);
            }
            let return_rejected = (batch.on_rejection, on_rejection) == (OnRejection::Return, OnRejection::Return);
            if batch.messages.is_empty() || return_rejected {
                // This fails only if the caller has stopped waiting.
                let _ = batch.done.send(batch.messages);
            } else {
                left.push(batch);
            }
        }
        left
    }

    fn note(&self, messages: &[Outgoing], rejected: &HashMap<Uuid, &'static str>) {
        let now = Instant::now();
        for message in messages {
            match rejected.get(&message.id) {
                Some(why) => self.rejections.add(&message.queue, why, now),
                None if self.rejections.any() => self.rejections.end(&message.queue),
                None => {}
            }
        }
    }
}

/// Counts published and rejected messages.
fn count(batches: &[Batch], rejected: &HashMap<Uuid, &'static str>) {
    let mut taken: HashMap<&str, u64> = HashMap::new();
    for message in batches.iter().flat_map(|batch| &batch.messages) {
        match rejected.get(&message.id) {
            Some(why) => counter!(metric::REJECTED, "reason" => reason(why)).increment(1),
            None => *taken.entry(&message.queue).or_default() += 1,
        }
    }
    for (queue, messages) in taken {
        counter!(metric::PUBLISHED, "queue" => queue.to_owned()).increment(messages);
    }
}

/// The metric label for why a message was rejected.
fn reason(why: &str) -> &'static str {
    if why == NO_QUEUE { "no_queue" } else { "no_room" }
}

/// Publishes all messages of `batches` and awaits their confirms. Returns the rejected messages and why. After an error the state of
/// each message is uncertain, so all are published again: the fence and the join absorb a duplicate, but a missing message would
/// be lost.
async fn burst(
    channel: &Channel,
    batches: &[Batch],
    epoch: Option<i64>,
) -> Result<HashMap<Uuid, &'static str>, BrokerError> {
    let mut confirms = Vec::new();
    let messages: Vec<&Outgoing> = batches.iter().flat_map(|batch| &batch.messages).collect();
    for together in messages.chunks(POLLED_TOGETHER) {
        confirms.extend(try_join_all(together.iter().map(|message| message.publish(channel, epoch))).await?);
    }
    let mut rejected = HashMap::new();
    for (message, confirm) in messages.into_iter().zip(confirms) {
        let (taken, returned) = match confirm.await? {
            Confirmation::Ack(returned) => (true, returned),
            Confirmation::Nack(returned) => (false, returned),
            Confirmation::NotRequested => (false, None),
        };
        if !taken {
            rejected.insert(message.id, NO_ROOM);
        }
        // The broker returns a message before it confirms it, so lapin may attach the return to the confirm of another message.
        if let Some(id) = returned.and_then(|returned| returned.properties.message_id().as_ref()?.as_str().parse().ok())
        {
            rejected.insert(id, NO_QUEUE);
        }
    }
    Ok(rejected)
}

impl Outgoing {
    /// If the message is to be spread, chooses its queue by its key: evenly, and always the same queue for the same key.
    fn spread_over(&mut self, queues: &[Cow<'static, str>]) {
        if let Some(key) = self.spread_by {
            // The remainder is a valid index.
            self.queue = queues[(key % queues.len() as u64) as usize].clone();
        }
    }

    /// After a rejection, moves an item message on to the next item queue.
    fn try_another(&mut self, queues: &[Cow<'static, str>]) {
        if self.spread_by.is_some()
            && let Some(place) = queues.iter().position(|queue| *queue == self.queue)
        {
            self.queue = queues[(place + 1) % queues.len()].clone();
        }
    }

    /// `epoch` applies if the message does not carry one.
    async fn publish(&self, channel: &Channel, epoch: Option<i64>) -> lapin::Result<lapin::PublisherConfirm> {
        let options = lapin::options::BasicPublishOptions { mandatory: true, ..Default::default() };
        let mut headers = self.headers.clone();
        if let Some(epoch) = epoch.filter(|_| !headers.contains_key(EPOCH_HEADER)) {
            headers.insert(EPOCH_HEADER.into(), AMQPValue::LongLongInt(epoch));
        }
        channel
            .basic_publish(
                queue::EXCHANGE.into(),
                self.queue.as_ref().into(),
                options,
                &self.body,
                self.properties_with(headers),
            )
            .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_messages_are_split_evenly_over_the_channels() {
        assert_eq!(part(64, 2), 64);
        assert_eq!(part(2_501, 2), 1_251);
        assert_eq!(part(2_501, 1), 1_251);
        assert_eq!(part(10_000, 3), 1_112);
    }

    #[test]
    fn a_rejected_item_message_moves_to_the_next_item_queue() {
        let queues = queue::item_queues(3);
        let mut message = Outgoing { spread_by: Some(1), ..Outgoing::raw("", "", Vec::new()) };
        message.spread_over(&queues);
        let mut went = Vec::new();
        for _ in 0..3 {
            went.push(message.queue.to_string());
            message.try_another(&queues);
        }
        assert_eq!(went, ["mailrun.items.2", "mailrun.items.3", "mailrun.items"]);
        let mut other = Outgoing::raw("mailrun.dead", "", Vec::new());
        other.try_another(&queues);
        assert_eq!(other.queue, "mailrun.dead");
    }
}
