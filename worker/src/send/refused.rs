//! Settles claims that were refused.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use mailrun_broker::{Outgoing, consumer::Delivery};
use mailrun_core::{
    claim::Found,
    item::{ItemState, Key},
    outcome::{self, Refused, after_cut_off, after_death, refused},
    queue::ITEMS_WAIT,
};
use mailrun_ledger::{attempts, in_time};
use tracing::{debug, warn};

use super::{Request, Senders};
use crate::{
    claims::Known,
    kinds::Kind,
    poison::{self, Refusal},
};

/// How often the depth of the results queue is read: each read uses a connection.
const READ_RESULTS_EVERY: Duration = Duration::from_secs(1);
/// The dead-letter reason of a message whose item is not in the ledger.
const NO_SUCH_ITEM: &str =
    "its run has no such item: the message belongs to another installation, or is newer than the ledger";

impl Senders {
    /// Finds out why claims were refused, and acts on it.
    pub(super) async fn settle_refused(self: &Arc<Self>, mut requests: HashMap<Key, Request>) {
        let found = match self.find(&requests).await {
            Ok(found) => found,
            Err(error) => {
                warn!(%error, "can't look up refused claims, trying again later");
                return self.park(requests.into_values().collect(), self.policy().shortest()).await;
            }
        };
        let me = self.heartbeat.worker_id();
        let judge = |key: &Key| refused(found.get(key).map(|(found, _)| found), me);
        let why: HashMap<Key, Refused> = requests.keys().map(|key| (*key, judge(key))).collect();
        // Results that a dead worker reported may still be waiting to be counted.
        let all_counted = !why.values().any(|why| *why == Refused::Orphaned) || self.all_results_counted().await;
        let mut follow_ups = Vec::new();
        let mut results = Vec::new();
        let mut done = Vec::new();
        let mut later = Vec::new();
        for (key, Request { item, deliveries }) in requests.drain() {
            let kind = found.get(&key).and_then(|(_, kind)| kind.as_deref());
            let job = kind.and_then(|kind| self.context.kinds.get(kind));
            let why = match why.get(&key).copied() {
                // The job belongs to another program: the item waits for a worker that has it.
                Some(Refused::InOtherHands | Refused::Orphaned | Refused::Withheld(_))
                    if kind.is_some() && job.is_none() =>
                {
                    Refused::Later
                }
                why => why.unwrap_or(Refused::InOtherHands),
            };
            debug!(item_id = key.item_id, attempt = key.attempt, ?why, "claim refused");
            match why {
                Refused::NoSuchItem => {
                    for delivery in deliveries {
                        poison::bury(&self.context.publisher, delivery, NO_SUCH_ITEM).await;
                    }
                    continue;
                }
                Refused::Later => {
                    for delivery in deliveries {
                        let refusal = Refusal::Newer { wait_queue: ITEMS_WAIT };
                        poison::refuse(&self.context.publisher, delivery, refusal).await;
                    }
                    continue;
                }
                Refused::Outdated => {}
                Refused::Paused { reopen } => {
                    if reopen {
                        results.push((key.run_id, item.result(ItemState::Pending, None)));
                    }
                }
                Refused::Accepted => results.push((key.run_id, item.result(ItemState::Sent, None))),
                Refused::Withheld(why) => {
                    let result = job.map_or_else(|| outcome::withheld(item, why, &[]), |job| job.withheld(item, why));
                    results.push((key.run_id, result));
                }
                Refused::Orphaned if !all_counted => {
                    later.push(Request { item, deliveries });
                    continue;
                }
                Refused::Orphaned => {
                    warn!(
                        item_id = key.item_id,
                        attempt = key.attempt,
                        "the worker died during the attempt, its outcome is unknown"
                    );
                    let next = after_death(item, job.map_or(self.policy(), Kind::policy));
                    follow_ups.extend(next.follow_up.map(Outgoing::from));
                    results.push((key.run_id, next.result));
                }
                Refused::Mine => {
                    for delivery in deliveries {
                        // Not in the match scrutinee, which would hold the lock until the end of the match.
                        let known = self.claims().redelivered(key, delivery);
                        match known {
                            Known::InProgress => {}
                            Known::Done(result, delivery) => {
                                results.push((key.run_id, result));
                                done.push(delivery);
                            }
                            Known::Uncertain(delivery) => {
                                let next = after_cut_off(item);
                                follow_ups.extend(next.follow_up.map(Outgoing::from));
                                self.claims().done(key, next.result.clone(), Instant::now());
                                results.push((key.run_id, next.result));
                                done.push(delivery);
                            }
                            Known::Forgotten(delivery) => later.push(Request { item, deliveries: vec![delivery] }),
                        }
                    }
                    continue;
                }
                Refused::InOtherHands => {
                    later.push(Request { item, deliveries });
                    continue;
                }
            }
            done.extend(deliveries);
        }
        self.park(later, self.policy().shortest()).await;
        let Ok(rejected) = self.context.publisher.offer(follow_ups).await else { return };
        let (this, is_taken) = (Arc::clone(self), rejected.is_empty());
        let report = async move {
            this.retry_rejected(rejected).await;
            if this.publish(this.results(results)).await {
                done.into_iter().for_each(Delivery::ack);
            }
        };
        if is_taken {
            report.await;
        } else {
            tokio::spawn(report);
        }
    }

    /// The standings of these attempts, and the kinds of their runs.
    async fn find(&self, requests: &HashMap<Key, Request>) -> sqlx::Result<HashMap<Key, (Found, Option<String>)>> {
        let keys: Vec<Key> = requests.keys().copied().collect();
        let find = async {
            let mut conn = self.context.pool.acquire().await?;
            attempts::find(&mut conn, &keys).await
        };
        let found = in_time(self.context.answer_timeout, find).await?;
        Ok(found.into_iter().map(|(found, kind)| (found.key, (found, kind))).collect())
    }

    /// Whether no result is waiting to be counted, according to a read within the last second.
    async fn all_results_counted(&self) -> bool {
        let mut newest = self.results_read.lock().await;
        if let Some((at, counted)) = *newest
            && at.elapsed() < READ_RESULTS_EVERY
        {
            return counted;
        }
        let counted = match self.context.broker.waiting_results().await {
            Ok(waiting) => waiting == 0,
            Err(error) => {
                debug!(%error, "can't read the depth of the results queue");
                false
            }
        };
        *newest = Some((Instant::now(), counted));
        counted
    }
}
