//! The senders: permit → claim → attempt → outcome → publish → acknowledge.
//!
//! A permit is taken before the claim and released when the outcome is on disk, so a killed worker leaves at most as many attempts
//! unknown as it has permits. The next claim stores a receipt for what was sent, so a slow remote side never waits for RabbitMQ.
//! Claims, follow-ups and results form batches on their own: each takes what has gathered while the previous one was in progress.
//!
//! `intake` takes deliveries, `claim` claims and starts attempts, `report` publishes what follows from them, `refused` settles
//! refused claims, and `memory` repeats results until they are seen counted.

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

/// How long rejected messages are published again, before they are left to the sweeper. Their items keep their permits in the
/// meantime, and a deployment or a full queue may be over within it.
const RETRY_FOR: Duration = Duration::from_secs(10);

/// The senders of a process.
pub(crate) struct Senders {
    context: Context,
    heartbeat: Arc<Heartbeat>,
    claims: Mutex<Claims>,
    permits: Arc<Permits>,
    pace: Arc<Pace>,
    stopped: Arc<StoppedRuns>,
    checks: Arc<Checks>,
    /// When the depth of the results queue was last read, and whether it was 0.
    results_read: tokio::sync::Mutex<Option<(Instant, bool)>>,
    /// Prefetch of the consumer.
    prefetch: u16,
    claim_seconds: Histogram,
}

/// A message with all deliveries that request the same attempt.
struct Request {
    item: ItemMessage,
    deliveries: Vec<Delivery>,
}

impl Senders {
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
            results_read: tokio::sync::Mutex::default(),
            prefetch,
            claim_seconds: histogram!(metric::CLAIM_SECONDS),
        })
    }

    /// Works until the consumer stops, then finishes the work in progress.
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
        // Ends when the intake and the last attempt have dropped their senders.
        Arc::clone(&self).report(outcomes).await;
        ending.cancel();
        let _ = (intake.await, remember.await, watch.await);
        self.last_receipt().await;
    }

    /// Moves messages to a retry queue, to be tried again later: no delivery is held during a wait.
    async fn park(self: &Arc<Self>, requests: Vec<Request>, wait: Duration) {
        let queue = retry_queue(wait);
        let messages: Vec<Outgoing> =
            requests.iter().map(|Request { item, .. }| Outgoing::new(item).to(queue.clone())).collect();
        let ids: Vec<Uuid> = messages.iter().map(Outgoing::id).collect();
        let Ok(rejected) = self.context.publisher.offer(messages).await else { return };
        let held: HashSet<Uuid> = rejected.iter().map(Outgoing::id).collect();
        let (held, taken): (Vec<_>, Vec<_>) = ids.into_iter().zip(requests).partition(|(id, _)| held.contains(id));
        let ack = |requests: Vec<(Uuid, Request)>| {
            requests.into_iter().flat_map(|(_, request)| request.deliveries).for_each(Delivery::ack);
        };
        ack(taken);
        if !held.is_empty() {
            let this = Arc::clone(self);
            tokio::spawn(async move {
                this.retry_rejected(rejected).await;
                ack(held);
            });
        }
    }

    /// Publishes rejected messages again for up to [`RETRY_FOR`]. If that fails, the sweeper republishes their items; a missing
    /// dead letter does no harm.
    async fn retry_rejected(&self, rejected: Vec<Outgoing>) {
        let _ = timeout(RETRY_FOR, self.context.publisher.publish(rejected)).await;
    }

    /// The installation's retry policy.
    fn policy(&self) -> &RetryPolicy {
        self.context.kinds.installation()
    }

    fn results(&self, results: Vec<(Uuid, ItemResult)>) -> Vec<Outgoing> {
        Outgoing::results_by_run(results, self.context.result_batch)
    }

    /// False: the process is stopping; unconfirmed messages stay unacknowledged.
    async fn publish(&self, messages: Vec<Outgoing>) -> bool {
        self.context.publisher.publish(messages).await.is_ok()
    }

    fn claims(&self) -> MutexGuard<'_, Claims> {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
