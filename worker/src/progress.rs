//! The progress consumer: takes result messages, applies them to the ledger in batches, and acknowledges what is committed.

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

/// How long results are gathered: far less than what a person sees of the bar.
const GATHER: Duration = Duration::from_millis(15);

/// Why a result is dead whose item is not in the ledger.
const NO_SUCH_ITEM: &str =
    "its run has no such item: the result belongs to another installation, or is newer than the ledger";

/// A message and what it says.
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

/// What a result did.
const EFFECTS: [&str; 4] = ["changed", "absorbed", "strange", "later"];

/// Shows what was counted.
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
    /// Messages that are counted in one transaction at most.
    batch: usize,
}

impl Progress {
    /// The progress consumer of this process.
    #[must_use]
    pub fn new(context: Context, batch: usize) -> Self {
        metric::begin(metric::ITEMS, "state", ItemState::ALL.map(ItemState::name));
        metric::begin(metric::RESULTS, "effect", EFFECTS);
        Self { session: Session::new(&context.pool), context, batch }
    }

    /// Counts until the consumer stops. What is not counted by then is still on the queue.
    pub async fn run(mut self, mut consumer: Consumer, stop: CancellationToken) {
        while let Some(Some(first)) = stop.run_until_cancelled(consumer.next()).await {
            // More arrive meanwhile, and a transaction for many costs little more than one for few.
            sleep(GATHER).await;
            let mut received = Vec::new();
            let mut delivery = Some(first);
            while let Some(next) = delivery.take() {
                match poison::understand::<ResultsMessage>(&next) {
                    // A mail that was sent stays sent, whatever the ledger was restored to.
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

    /// Sets aside the results of jobs that this program does not have: their jobs must see them counted. None: told to stop before
    /// that.
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
        let mut trouble = Reconnect::default();
        loop {
            let kinds = &self.context.kinds;
            let read = async |conn: &mut PgConnection| kinds.of_runs(conn, run_ids.iter().copied()).await;
            match self.session.run(self.context.answer_timeout, read).await {
                Ok(kinds) => return Some(kinds),
                Err(error) => {
                    let wait = trouble.next_wait();
                    warn!(%error, wait_ms = wait.as_millis(), "the kinds of runs can't be read, trying again");
                    stop.run_until_cancelled(sleep(wait)).await?;
                }
            }
        }
    }

    /// Takes what was sent out of a message of before the last restore. Its other results are dead.
    async fn take_stale(&self, delivery: Delivery, message: ResultsMessage, received: &mut Vec<Received>) {
        let ResultsMessage { run_id, results } = message;
        let (sent, others): (Vec<ItemResult>, Vec<ItemResult>) = results.into_iter().partition(is_sent);
        warn!(results = others.len(), reason = poison::STALE, "results moved to the dead letters");
        let dead = Outgoing::new(&ResultsMessage { run_id, results: others })
            .with_headers_of(&delivery.properties)
            .dead(DeadReason::Poison, poison::STALE);
        // Otherwise it is stopping: the message comes again.
        if self.context.publisher.publish(vec![dead]).await.is_ok() {
            received.push(Received { delivery, message: ResultsMessage { run_id, results: sent } });
        }
    }

    /// Applies a batch, and acknowledges its messages. If the ledger refuses it for good, each result is applied by itself, so
    /// that one that can't be applied spoils nothing but itself.
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
        // Otherwise it is stopping: the messages come again.
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

    /// Puts results of items in a state of a later version where a process of that version finds them. False: there is no such
    /// place; their message comes again when the consumer connects anew.
    async fn set_aside(&self, delivery: &Delivery, run_id: Option<Uuid>, results: Vec<ItemResult>) -> bool {
        let message = Outgoing::new(&ResultsMessage { run_id, results })
            .to(queue::RESULTS_WAIT)
            .with_headers_of(&delivery.properties);
        poison::set_aside(&self.context.publisher, vec![message]).await
    }

    /// Returns the results that are to be set aside, by their place. None: told to stop before all were counted.
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
                Err(error) => format!("the ledger refuses it: {error}"),
            };
            self.bury(&[(*report, reason.as_str())], stop).await?;
        }
        Some(later)
    }

    /// Puts results on the dead-letter queue, each alone, and once: their senders repeat them. None: told to stop before that.
    async fn bury(&mut self, reports: &[(Report<'_>, &str)], stop: &CancellationToken) -> Option<()> {
        let limit = self.context.answer_timeout;
        for (report, reason) in reports {
            let is_buried = self.session.run(limit, async |conn| progress::is_buried(conn, *report).await).await;
            if is_buried.unwrap_or(false) {
                continue;
            }
            let (item_id, attempt) = (report.result.item_id, report.result.attempt);
            error!(item_id, attempt, reason, "a result can't be counted; it goes to the dead letters");
            let message = ResultsMessage { run_id: report.run_id, results: vec![report.result.clone()] };
            let dead = Outgoing::new(&message).dead(DeadReason::Poison, reason);
            let rejected = stop.run_until_cancelled(self.context.publisher.offer(vec![dead])).await?.ok()?;
            if !rejected.is_empty() {
                // There is no dead-letter queue at present: the sender repeats the result, which is buried then.
                continue;
            }
            let noted = self.session.run(limit, async |conn| progress::note_buried(conn, *report, reason).await).await;
            if let Err(error) = noted {
                warn!(%error, item_id, "a buried result can't be noted; if it is repeated, it is buried again");
            }
        }
        Some(())
    }

    /// Applies until it is done, is refused for good, or is told to stop (`None`).
    async fn apply(&mut self, reports: &[Report<'_>], stop: &CancellationToken) -> Option<sqlx::Result<Applied>> {
        let mut trouble = Reconnect::default();
        loop {
            let limit = self.context.answer_timeout;
            let kinds = &self.context.kinds;
            match self.session.run(limit, async |conn| progress::apply(conn, &**kinds, reports).await).await {
                Err(error) if !is_about_data(&error) => {
                    let wait = trouble.next_wait();
                    warn!(%error, wait_ms = wait.as_millis(), "results can't be counted; trying again");
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
