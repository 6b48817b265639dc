//! Takes as many deliveries as there are permits for, and defers what cannot be claimed now.

use std::{
    collections::{HashMap, hash_map::Entry},
    iter,
    sync::Arc,
    time::{Duration, Instant},
};

use mailrun_broker::consumer::{Consumer, Delivery};
use mailrun_core::{item::Key, message::ItemMessage};
use mailrun_ledger::Session;
use tokio::{
    task::yield_now,
    time::{sleep_until, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::{Request, Senders};
use crate::{gate::Gate, held::Held, poison, reporter::Reporter};

/// How long deliveries are gathered for a claim while more permits are free: a large claim costs little more than a small one. If
/// the remote side is slow, all permits are in use and nothing waits here.
const GATHER: Duration = Duration::from_millis(20);
/// The maximum number of deliveries in one claim.
const CLAIM_BATCH: usize = 200;
/// A delivery that has waited this long for a permit is deferred. Otherwise, with the longest attempt after it, it would be
/// held for longer than RabbitMQ's acknowledgement timeout.
const LONGEST_UNCLAIMED: Duration = Duration::from_secs(4 * 60);
/// How often this is checked while there is no permit.
const CHECK_OLD_EVERY: Duration = Duration::from_secs(10);

/// Messages that are claimed together.
#[derive(Default)]
struct Batch {
    /// Held until their send time was near.
    held: Vec<Request>,
    /// Newly delivered.
    fresh: Vec<Delivery>,
}

impl Batch {
    fn len(&self) -> usize {
        self.held.len() + self.fresh.len()
    }
}

impl Senders {
    /// Takes and claims deliveries until told to stop. Prefetched deliveries return to the queue when the consumer closes.
    pub(super) async fn take(self: Arc<Self>, mut consumer: Consumer, reporter: Reporter, stop: CancellationToken) {
        let mut session = Session::new(&self.context.pool);
        // Half of the prefetch: the other half is for runs without a limit.
        let mut held = Held::new(usize::from(self.prefetch) / 2);
        while let Some(Some(batch)) = stop.run_until_cancelled(self.gather(&mut consumer, &mut held)).await {
            if self.heartbeat.is_fresh() {
                let (keys, requests) = self.understand(batch).await;
                self.begin(keys, requests, &mut held, &mut session, &reporter).await;
            } else {
                // A claim would be given back unused, and still use up the attempt's number.
                self.defer(batch).await;
            }
        }
    }

    /// Waits for a permit and a message, then takes as many more of both as arrive within [`GATHER`].
    async fn gather(self: &Arc<Self>, consumer: &mut Consumer, held: &mut Held<Request>) -> Option<Batch> {
        loop {
            let has_room = timeout(CHECK_OLD_EVERY, self.permits.available()).await.is_ok();
            let old: Vec<Delivery> = iter::from_fn(|| consumer.next_older_than(LONGEST_UNCLAIMED)).collect();
            if !old.is_empty() {
                debug!(deliveries = old.len(), "no permit became free in time, deferring deliveries");
                self.defer(Batch { fresh: old, ..Batch::default() }).await;
            }
            if has_room {
                break;
            }
        }
        // Attempts that were claimed together end together. Let them, or most would wait for the next claim.
        yield_now().await;
        let mut batch = Batch::default();
        while batch.len() == 0 {
            let held_until = held.next_at();
            tokio::select! {
                biased;
                () = sleep_until(held_until.unwrap_or_else(Instant::now).into()), if held_until.is_some() => {
                    batch.held.extend(held.take_due(Instant::now()));
                }
                delivery = consumer.next() => batch.fresh.push(delivery?),
            }
        }
        let until = Instant::now() + GATHER;
        let most = if self.context.kinds.gate() == Gate::Trying { 1 } else { CLAIM_BATCH };
        while batch.len() < most.min(self.permits.room()) {
            if let Some(due) = held.take_due(Instant::now()) {
                batch.held.push(due);
            } else if let Ok(Some(delivery)) = timeout_at(until.into(), consumer.next()).await {
                batch.fresh.push(delivery);
            } else {
                break;
            }
        }
        Some(batch)
    }

    /// Defers a batch by the shortest retry delay without claiming it, so that no attempt number is used up.
    async fn defer(self: &Arc<Self>, batch: Batch) {
        let (_, requests) = self.understand(batch).await;
        self.park(requests.into_values().collect(), self.policy().shortest()).await;
    }

    /// Decodes messages, in order. Messages for the same attempt are merged. A message that can't be decoded becomes a dead letter.
    async fn understand(&self, batch: Batch) -> (Vec<Key>, HashMap<Key, Request>) {
        let mut keys = Vec::with_capacity(batch.len());
        let mut requests: HashMap<Key, Request> = HashMap::with_capacity(batch.len());
        let mut add = |item: ItemMessage, deliveries: Vec<Delivery>| match requests.entry(item.key()) {
            Entry::Occupied(mut same) => same.get_mut().deliveries.extend(deliveries),
            Entry::Vacant(place) => {
                keys.push(item.key());
                place.insert(Request { item, deliveries });
            }
        };
        for Request { item, deliveries } in batch.held {
            add(item, deliveries);
        }
        for delivery in batch.fresh {
            match poison::read::<ItemMessage>(&delivery) {
                Ok(item) => add(item, vec![delivery]),
                Err(refusal) => poison::refuse(&self.context.publisher, delivery, refusal).await,
            }
        }
        (keys, requests)
    }
}
