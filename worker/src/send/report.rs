//! Publishes the follow-ups and results of attempts, then acknowledges.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

use mailrun_broker::{Outgoing, consumer::Delivery};
use mailrun_core::item::Key;
use tokio::{sync::mpsc, time::timeout_at};
use tokio_util::task::TaskTracker;

use super::Senders;
use crate::reporter::Finished;

/// How long outcomes are gathered for a report. This hardly delays anything: the next claim releases the permits.
const GATHER_OUTCOMES: Duration = Duration::from_millis(20);

impl Senders {
    /// Publishes follow-ups, then results, then acknowledges, in batches.
    pub(super) async fn report(self: Arc<Self>, mut outcomes: mpsc::Receiver<Finished>) {
        let mut batch = Vec::new();
        let late = TaskTracker::new();
        while outcomes.recv_many(&mut batch, self.context.result_batch).await > 0 {
            let until = Instant::now() + GATHER_OUTCOMES;
            while batch.len() < self.context.result_batch
                && let Ok(Some(finished)) = timeout_at(until.into(), outcomes.recv()).await
            {
                batch.push(finished);
            }
            let mut follow_ups = Vec::new();
            let mut of_follow_up = HashMap::new();
            for finished in &mut batch {
                if let Some(follow_up) = finished.next.follow_up.take().map(Outgoing::from) {
                    of_follow_up.insert(follow_up.id(), finished.key);
                    follow_ups.push(follow_up);
                }
            }
            let Ok(rejected) = self.context.publisher.offer(follow_ups).await else { return };
            let held: HashSet<Key> =
                rejected.iter().filter_map(|message| of_follow_up.get(&message.id())).copied().collect();
            let (held, batch): (Vec<Finished>, Vec<Finished>) =
                batch.drain(..).partition(|finished| held.contains(&finished.key));
            if !held.is_empty() {
                let this = Arc::clone(&self);
                late.spawn(async move {
                    this.retry_rejected(rejected).await;
                    this.settle(held).await;
                });
            }
            if !self.settle(batch).await {
                return;
            }
        }
        late.close();
        late.wait().await;
    }

    /// Publishes results, releases the permits and acknowledges. False: the process is stopping.
    async fn settle(&self, batch: Vec<Finished>) -> bool {
        let results = batch.iter().map(|finished| (finished.key.run_id, finished.next.result.clone())).collect();
        if !self.publish(self.results(results)).await {
            return false;
        }
        // All permits at once, so that the next claim is as large as this report.
        self.permits.confirmed(batch.iter().map(|Finished { key, next }| (*key, next.result.state)));
        let now = Instant::now();
        let mut claims = self.claims();
        for Finished { key, next } in batch {
            claims.done(key, next.result, now).into_iter().for_each(Delivery::ack);
        }
        true
    }
}
