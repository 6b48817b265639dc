//! Takes deliveries in, as many as there are permits for, and puts off what cannot be claimed now.

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

use super::{Asked, Senders};
use crate::{gate::Gate, held::Held, poison, reporter::Reporter};

/// How long deliveries are gathered for a claim while there are permits for more: a claim of many costs little more than
/// one of few. With a slow remote side the permits are used up, and nothing waits here.
const GATHER: Duration = Duration::from_millis(20);
/// Deliveries that are claimed by one statement at most.
const CLAIM_BATCH: usize = 200;
/// A delivery that has waited for a permit for so long is put off. With the longest attempt after it, it would otherwise be held
/// for longer than RabbitMQ allows.
const LONGEST_UNCLAIMED: Duration = Duration::from_secs(4 * 60);
/// How often that is looked for while there is no permit.
const LOOK_FOR_OLD_EVERY: Duration = Duration::from_secs(10);
/// What is claimed together.
#[derive(Default)]
struct Batch {
    /// Messages that were held until their send time was near.
    held: Vec<Asked>,
    /// Messages that have just come.
    fresh: Vec<Delivery>,
}

impl Batch {
    fn len(&self) -> usize {
        self.held.len() + self.fresh.len()
    }
}

impl Senders {
    /// Takes deliveries in and claims them, until told to stop. Deliveries that were taken ahead by then go back to the queue when
    /// the consumer closes.
    pub(super) async fn take(self: Arc<Self>, mut consumer: Consumer, reporter: Reporter, stop: CancellationToken) {
        let mut session = Session::new(&self.context.pool);
        // Half of what the broker hands out: the other half is for runs without a limit.
        let mut held = Held::new(usize::from(self.prefetch) / 2);
        while let Some(Some(batch)) = stop.run_until_cancelled(self.gather(&mut consumer, &mut held)).await {
            if self.heartbeat.is_fresh() {
                let (keys, asked) = self.understand(batch).await;
                self.begin(keys, asked, &mut held, &mut session, &reporter).await;
            } else {
                // A claim would only be given up again, and use up the attempt's number.
                self.put_off(batch).await;
            }
        }
    }

    /// Waits for room and a message, then takes as many more of both as come within a moment.
    async fn gather(self: &Arc<Self>, consumer: &mut Consumer, held: &mut Held<Asked>) -> Option<Batch> {
        loop {
            let has_room = timeout(LOOK_FOR_OLD_EVERY, self.permits.some()).await.is_ok();
            let old: Vec<Delivery> = iter::from_fn(|| consumer.next_older_than(LONGEST_UNCLAIMED)).collect();
            if !old.is_empty() {
                debug!(deliveries = old.len(), "no permit became free in time, putting deliveries off");
                self.put_off(Batch { fresh: old, ..Batch::default() }).await;
            }
            if has_room {
                break;
            }
        }
        // Those that were claimed together end together: let them, or most would wait for the next claim.
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

    /// Claims nothing, so that no attempt is used up: what has come waits for the shortest retry delay.
    async fn put_off(self: &Arc<Self>, batch: Batch) {
        let (_, asked) = self.understand(batch).await;
        self.park(asked.into_values().collect(), self.policy().shortest()).await;
    }

    /// Reads messages, in their order. Two that ask for the same attempt become one. What is not understood is dead.
    async fn understand(&self, batch: Batch) -> (Vec<Key>, HashMap<Key, Asked>) {
        let mut keys = Vec::with_capacity(batch.len());
        let mut asked: HashMap<Key, Asked> = HashMap::with_capacity(batch.len());
        let mut add = |item: ItemMessage, deliveries: Vec<Delivery>| match asked.entry(item.key()) {
            Entry::Occupied(mut same) => same.get_mut().deliveries.extend(deliveries),
            Entry::Vacant(place) => {
                keys.push(item.key());
                place.insert(Asked { item, deliveries });
            }
        };
        for Asked { item, deliveries } in batch.held {
            add(item, deliveries);
        }
        for delivery in batch.fresh {
            match poison::read::<ItemMessage>(&delivery) {
                Ok(item) => add(item, vec![delivery]),
                Err(refusal) => poison::refuse(&self.context.publisher, delivery, refusal).await,
            }
        }
        (keys, asked)
    }
}
