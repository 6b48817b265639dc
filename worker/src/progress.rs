//! The progress consumer: applies result messages to the ledger in batches and acknowledges what is committed.

use std::{collections::HashMap, sync::Arc, time::Duration};

use mailrun_broker::{
    Outgoing,
    consumer::{Consumer, Delivery},
};
use mailrun_core::queue;
use mailrun_core::{
    item::ItemState,
    message::{DeadReason, ItemResult, ResultsMessage},
    metric,
    retry::Reconnect,
};
use mailrun_ledger::{
    Session, is_about_data,
    progress::{self, Applied, Report},
};
use metrics::counter;
use sqlx::PgConnection;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, warn};
use uuid::Uuid;

use crate::{
    context::Context,
    kinds::{Kind, Kinds},
    poison,
};

/// How long results are gathered: too short to be visible on a progress bar.
const GATHER: Duration = Duration::from_millis(15);

/// The dead-letter reason of a result whose item is not in the ledger.
const NO_SUCH_ITEM: &str =
    "its run has no such item: the result belongs to another installation, or is newer than the ledger";

/// A delivery and its message.
struct Received {
    delivery: Delivery,
    message: ResultsMessage,
}

impl Received {
    fn reports(&self) -> impl Iterator<Item = Report<'_>> {
        self.message.results.iter().map(|result| Report { run_id: self.message.run_id, result })
    }
}

fn is_sent(result: &ItemResult) -> bool {
    result.state == ItemState::Sent
}

/// The possible effects of a result.
const EFFECTS: [&str; 4] = ["changed", "absorbed", "strange", "later"];

/// Exports the counts of a batch.
fn measure(applied: &Applied, kinds: &Kinds) {
    for (state, items) in kinds.visible(&applied.entered) {
        counter!(metric::ITEMS, "state" => state.name()).increment(items);
    }
    let results = [applied.changed, applied.absorbed, applied.strange.len(), applied.later.len()];
    for (effect, results) in EFFECTS.into_iter().zip(results) {
        counter!(metric::RESULTS, "effect" => effect).increment(results as u64);
    }
}

/// The progress consumer of one process.
#[derive(Debug)]
pub struct Progress {
    session: Session,
    context: Context,
    /// The maximum number of messages in one transaction.
    batch: usize,
}

impl Progress {
    #[must_use]
    pub fn new(context: Context, batch: usize) -> Self {
        metric::begin(metric::ITEMS, "state", ItemState::ALL.map(ItemState::name));
        metric::begin(metric::RESULTS, "effect", EFFECTS);
        Self { session: Session::new(&context.pool), context, batch }
    }

    /// Counts until the consumer stops. Messages not counted by then stay on the queue.
    pub async fn run(mut self, mut consumer: Consumer, stop: CancellationToken) {
        while let Some(Some(first)) = stop.run_until_cancelled(consumer.next()).await {
            // More arrive in the meantime, and a large transaction costs little more than a small one.
            sleep(GATHER).await;
            let mut received = Vec::new();
            let mut delivery = Some(first);
            while let Some(next) = delivery.take() {
                match poison::understand::<ResultsMessage>(&next) {
                    // A sent mail stays sent, whatever state the ledger was restored to.
                    Ok(message) if next.is_stale && !message.results.iter().all(is_sent) => {
                        self.take_stale(next, message, &mut received).await;
                    }
                    Ok(message) => received.push(Received { delivery: next, message }),
                    Err(refusal) => poison::refuse(&self.context.publisher, next, refusal).await,
                }
                if received.len() < self.batch {
                    delivery = consumer.next_now();
                }
            }
            if let Some(received) = self.without_other_jobs(received, &stop).await {
                self.count(received, &stop).await;
            }
        }
    }

    /// Sets aside the results of jobs that this program does not have: their jobs must take part in counting them. `None`: stopped
    /// before that.
    async fn without_other_jobs(&mut self, received: Vec<Received>, stop: &CancellationToken) -> Option<Vec<Received>> {
        let run_ids: Vec<Uuid> = received.iter().filter_map(|received| received.message.run_id).collect();
        let kinds = self.kinds_of(&run_ids, stop).await?;
        let mut known = Vec::with_capacity(received.len());
        for received in received {
            let Received { delivery, message } = &received;
            match message.run_id.and_then(|run_id| kinds.get(&run_id)) {
                Some(None) => {
                    if self.set_aside(delivery, message.run_id, message.results.clone()).await {
                        received.delivery.ack();
                    }
                }
                _ => known.push(received),
            }
        }
        Some(known)
    }

    async fn kinds_of(
        &mut self,
        run_ids: &[Uuid],
        stop: &CancellationToken,
    ) -> Option<HashMap<Uuid, Option<Arc<dyn Kind>>>> {
        let mut backoff = Reconnect::default();
        loop {
            let kinds = &self.context.kinds;
            let read = async |conn: &mut PgConnection| kinds.of_runs(conn, run_ids.iter().copied()).await;
            match self.session.run(self.context.answer_timeout, read).await {
                Ok(kinds) => return Some(kinds),
                Err(error) => {
                    let wait = backoff.next_wait();
                    warn!(%error, wait_ms = wait.as_millis(), "can't read the kinds of runs, trying again");
                    stop.run_until_cancelled(sleep(wait)).await?;
                }
            }
        }
    }

    /// Keeps the `sent` results of a message from before the last restore. Its other results become a dead letter.
    async fn take_stale(&self, delivery: Delivery, message: ResultsMessage, received: &mut Vec<Received>) {
        let ResultsMessage { run_id, results } = message;
        let (sent, others): (Vec<ItemResult>, Vec<ItemResult>) = results.into_iter().partition(is_sent);
        warn!(results = others.len(), reason = poison::STALE, "results moved to the dead letters");
        let dead = Outgoing::new(&ResultsMessage { run_id, results: others })
            .with_headers_of(&delivery.properties)
            .dead(DeadReason::Poison, poison::STALE);
        // Otherwise the process is stopping and the message is redelivered.
        if self.context.publisher.publish(vec![dead]).await.is_ok() {
            received.push(Received { delivery, message: ResultsMessage { run_id, results: sent } });
        }
    }

    /// Applies a batch and acknowledges its messages. If the ledger permanently refuses the batch, each result is applied
    /// alone, so that a bad result affects only itself.
    async fn count(&mut self, received: Vec<Received>, stop: &CancellationToken) {
        let reports: Vec<Report<'_>> = received.iter().flat_map(Received::reports).collect();
        let counted = match self.apply(&reports, stop).await {
            Some(Ok(applied)) => {
                debug!(?applied, messages = received.len(), "counted");
                let strange: Vec<(Report<'_>, &str)> =
                    applied.strange.iter().map(|index| (reports[*index], NO_SUCH_ITEM)).collect();
                self.bury(&strange, stop).await.map(|()| applied.later)
            }
            Some(Err(_)) => self.count_each(&reports, stop).await,
            None => None,
        };
        // Otherwise the process is stopping and the messages are redelivered.
        let Some(later) = counted else { return };
        let mut later = later.into_iter().peekable();
        let mut end = 0;
        for Received { delivery, message: ResultsMessage { run_id, results } } in received {
            end += results.len();
            let begin = end - results.len();
            let own: Vec<ItemResult> = std::iter::from_fn(|| later.next_if(|index| *index < end))
                .map(|index| results[index - begin].clone())
                .collect();
            if own.is_empty() || self.set_aside(&delivery, run_id, own).await {
                delivery.ack();
            }
        }
    }

    /// Moves results of items in a state of a later version to the wait queue of processes of that version. False: the queue is
    /// missing, and the message is redelivered when the consumer reconnects.
    async fn set_aside(&self, delivery: &Delivery, run_id: Option<Uuid>, results: Vec<ItemResult>) -> bool {
        let message = Outgoing::new(&ResultsMessage { run_id, results })
            .to(queue::RESULTS_WAIT)
            .with_headers_of(&delivery.properties);
        poison::set_aside(&self.context.publisher, vec![message]).await
    }

    /// Applies each result alone. Returns the indices of those to set aside. `None`: stopped before all were counted.
    async fn count_each(&mut self, reports: &[Report<'_>], stop: &CancellationToken) -> Option<Vec<usize>> {
        let mut later = Vec::new();
        for (index, report) in reports.iter().enumerate() {
            let reason = match self.apply(&[*report], stop).await? {
                Ok(applied) if !applied.later.is_empty() => {
                    later.push(index);
                    continue;
                }
                Ok(applied) if applied.strange.is_empty() => continue,
                Ok(_) => NO_SUCH_ITEM.to_owned(),
                Err(error) => format!("the ledger rejected it: {error}"),
            };
            self.bury(&[(*report, reason.as_str())], stop).await?;
        }
        Some(later)
    }

    /// Moves each result to the dead-letter queue as its own message, only once: its sender repeats it. `None`: stopped before
    /// that.
    async fn bury(&mut self, reports: &[(Report<'_>, &str)], stop: &CancellationToken) -> Option<()> {
        let limit = self.context.answer_timeout;
        for (report, reason) in reports {
            let is_buried = self.session.run(limit, async |conn| progress::is_buried(conn, *report).await).await;
            if is_buried.unwrap_or(false) {
                continue;
            }
            let (item_id, attempt) = (report.result.item_id, report.result.attempt);
            error!(item_id, attempt, reason, "can't count a result, moving it to the dead letters");
            let message = ResultsMessage { run_id: report.run_id, results: vec![report.result.clone()] };
            let dead = Outgoing::new(&message).dead(DeadReason::Poison, reason);
            let rejected = stop.run_until_cancelled(self.context.publisher.offer(vec![dead])).await?.ok()?;
            if !rejected.is_empty() {
                // The dead-letter queue is missing at present. The sender repeats the result, which is then buried.
                continue;
            }
            let noted = self.session.run(limit, async |conn| progress::note_buried(conn, *report, reason).await).await;
            if let Err(error) = noted {
                warn!(%error, item_id, "can't record a buried result, it is buried again if it is repeated");
            }
        }
        Some(())
    }

    /// Retries until the batch is applied, is permanently refused, or the process stops (`None`).
    async fn apply(&mut self, reports: &[Report<'_>], stop: &CancellationToken) -> Option<sqlx::Result<Applied>> {
        let mut backoff = Reconnect::default();
        loop {
            let limit = self.context.answer_timeout;
            let kinds = &self.context.kinds;
            match self.session.run(limit, async |conn| progress::apply(conn, &**kinds, reports).await).await {
                Err(error) if !is_about_data(&error) => {
                    let wait = backoff.next_wait();
                    warn!(%error, wait_ms = wait.as_millis(), "can't count results, trying again");
                    stop.run_until_cancelled(sleep(wait)).await?;
                }
                result => {
                    if let Ok(applied) = &result {
                        measure(applied, &self.context.kinds);
                    }
                    return Some(result);
                }
            }
        }
    }
}
