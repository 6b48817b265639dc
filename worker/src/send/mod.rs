//! The senders: permit → claim → attempt → outcome → publish → acknowledge.
//!
//! A permit comes before a claim and is given back when the outcome is on disk, so a worker that is killed leaves at most as many
//! attempts unknown as it has permits. What was sent is on disk with the next claim already, which takes a receipt along: so a slow
//! remote side never waits for RabbitMQ. Claims, follow-ups and results travel in batches that form by themselves: each takes what
//! has gathered while the one before was in progress.
//!
//! `intake` takes deliveries, `claim` claims and starts attempts, `report` publishes what follows from them, `refused` settles
//! claims that were refused, and `memory` repeats results until they are seen to be counted.

mod claim;
mod intake;
mod memory;
mod refused;
mod report;

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use mailrun_broker::{
    Outgoing,
    consumer::{Consumer, Delivery},
};
use mailrun_core::{
    message::{ItemMessage, ItemResult},
    metric,
    outcome::RetryPolicy,
    queue::retry_queue,
};
use metrics::{Histogram, histogram};
use tokio::{sync::mpsc, time::timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    attempt::Checks, claims::Claims, context::Context, heartbeat::Heartbeat, pace::Pace, permits::Permits,
    reporter::Reporter, stopped_runs::StoppedRuns,
};

/// Messages that the broker rejects are published again for so long, before the sweeper is left to replace them. Their items keep
/// their permits meanwhile, and a deployment or a full queue may pass within it.
const INSIST: Duration = Duration::from_secs(10);

/// The senders of a process.
pub(crate) struct Senders {
    context: Context,
    heartbeat: Arc<Heartbeat>,
    claims: Mutex<Claims>,
    permits: Arc<Permits>,
    pace: Arc<Pace>,
    stopped: Arc<StoppedRuns>,
    checks: Arc<Checks>,
    /// When the results queue was last looked at, and whether it was empty.
    results_look: tokio::sync::Mutex<Option<(Instant, bool)>>,
    /// Deliveries that the broker hands out ahead.
    prefetch: u16,
    claim_seconds: Histogram,
}

/// A message with all the deliveries that ask for the same attempt.
struct Asked {
    item: ItemMessage,
    deliveries: Vec<Delivery>,
}

impl Senders {
    /// The senders of this process.
    pub(crate) fn new(
        context: Context,
        heartbeat: Arc<Heartbeat>,
        permits: Arc<Permits>,
        pace: Arc<Pace>,
        prefetch: u16,
    ) -> Arc<Self> {
        let stopped = StoppedRuns::new(context.pool.clone(), context.answer_timeout);
        let checks = Checks {
            heartbeat: Arc::clone(&heartbeat),
            broker: Arc::clone(&context.broker),
            stopped: Arc::clone(&stopped),
            pace: Arc::clone(&pace),
        };
        Arc::new(Self {
            context,
            heartbeat,
            claims: Mutex::default(),
            permits,
            pace,
            stopped,
            checks: Arc::new(checks),
            results_look: tokio::sync::Mutex::default(),
            prefetch,
            claim_seconds: histogram!(metric::CLAIM_SECONDS),
        })
    }

    /// Works until the consumer stops, then finishes what is in flight.
    pub(crate) async fn run(self: Arc<Self>, consumer: Consumer, stop: CancellationToken) {
        let (finished, outcomes) = mpsc::channel(self.permits.all());
        let reporter = Reporter {
            stopped: Arc::clone(&self.stopped),
            pace: Arc::clone(&self.pace),
            permits: Arc::clone(&self.permits),
            finished,
        };
        let intake = tokio::spawn(Arc::clone(&self).take(consumer, reporter, stop));
        let ending = CancellationToken::new();
        let remember = tokio::spawn(Arc::clone(&self).remember(ending.clone()));
        let watch = tokio::spawn(Arc::clone(&self.stopped).watch(ending.clone()));
        // Ends when the intake and the last attempt have dropped their end.
        Arc::clone(&self).report(outcomes).await;
        ending.cancel();
        let _ = (intake.await, remember.await, watch.await);
        self.last_receipt().await;
    }

    /// Sends messages round by a retry queue, to be looked at again later: a delivery is never held through a wait.
    async fn park(self: &Arc<Self>, asked: Vec<Asked>, wait: Duration) {
        let queue = retry_queue(wait);
        let messages: Vec<Outgoing> =
            asked.iter().map(|Asked { item, .. }| Outgoing::new(item).to(queue.clone())).collect();
        let ids: Vec<Uuid> = messages.iter().map(Outgoing::id).collect();
        let Ok(rejected) = self.context.publisher.offer(messages).await else { return };
        let held: HashSet<Uuid> = rejected.iter().map(Outgoing::id).collect();
        let (held, taken): (Vec<_>, Vec<_>) = ids.into_iter().zip(asked).partition(|(id, _)| held.contains(id));
        let ack = |asked: Vec<(Uuid, Asked)>| {
            asked.into_iter().flat_map(|(_, asked)| asked.deliveries).for_each(Delivery::ack);
        };
        ack(taken);
        if !held.is_empty() {
            let this = Arc::clone(self);
            tokio::spawn(async move {
                this.insist(rejected).await;
                ack(held);
            });
        }
    }

    /// Publishes messages that the broker has rejected, for a while. If that fails, the sweeper finds their items and republishes
    /// them; a missing dead letter is no loss.
    async fn insist(&self, rejected: Vec<Outgoing>) {
        let _ = timeout(INSIST, self.context.publisher.publish(rejected)).await;
    }

    /// What the settings say of retries.
    fn policy(&self) -> &RetryPolicy {
        self.context.kinds.installation()
    }

    fn results(&self, results: Vec<(Uuid, ItemResult)>) -> Vec<Outgoing> {
        Outgoing::results_by_run(results, self.context.result_batch)
    }

    /// False: the process is ending; what is not confirmed stays unacknowledged.
    async fn publish(&self, messages: Vec<Outgoing>) -> bool {
        self.context.publisher.publish(messages).await.is_ok()
    }

    fn claims(&self) -> MutexGuard<'_, Claims> {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
