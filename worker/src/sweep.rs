//! The sweeper: puts back what is missing from the conveyor, and only that.
//!
//! It looks at runs whose counters have not moved for long. A purged queue, a lost broker, a dead worker's claims: each
//! leaves a trace in the ledger by which the missing message is written again. What it puts back by mistake is absorbed by
//! the fence and the join, so it may be wrong, but it must not be noisy: each run is left alone for twice as long after
//! each sweep that did not get it moving.

use std::{
    collections::{HashMap, HashSet},
    time::{Duration, Instant},
};

use mailrun_app::config::SweepConfig;
use mailrun_broker::{BrokerError, Outgoing};
use mailrun_core::{
    item::ItemState,
    message::{Command, ItemResult, RunMessage, Step},
    metric,
    run::Wanted,
};
use mailrun_ledger::{
    in_time,
    sweep::{self, OpenItem, Repairs, Stalled},
};
use metrics::counter;
use sqlx::{Connection as _, PgConnection};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use uuid::Uuid;

use crate::{context::Context, kinds::Kind};
use mailrun_core::outcome::{Repair, after_death, repair};

/// A run is looked at again after at most this time, however often it was in vain.
const LONGEST_REST: Duration = Duration::from_secs(600);

/// Items that are put back in one go.
pub const BATCH: i64 = 1_000;

/// Why a sweep was broken off. The next one does it all again.
#[derive(Debug, thiserror::Error)]
enum SweepError {
    #[error(transparent)]
    Ledger(#[from] sqlx::Error),
    #[error(transparent)]
    Broker(#[from] BrokerError),
}

/// A stalled run that was swept: until when to leave it alone.
#[derive(Clone, Copy, Debug)]
struct Rest {
    until: Instant,
    length: Duration,
}

/// The sweeper of one process. Of several, one sweeps at a time.
#[derive(Debug)]
pub struct Sweeper {
    context: Context,
    settings: SweepConfig,
    resting: HashMap<Uuid, Rest>,
    /// Runs that could not be swept the last time, of which that is logged already.
    failing: HashSet<Uuid>,
}

impl Sweeper {
    /// The sweeper of this process.
    #[must_use]
    pub(crate) fn new(context: Context, settings: SweepConfig) -> Self {
        Self { context, settings, resting: HashMap::new(), failing: HashSet::new() }
    }

    /// Sweeps until `stop`.
    pub async fn run(mut self, stop: CancellationToken) {
        metric::begin(metric::SWEEPS, "end", ["done", "broken_off"]);
        metric::begin(metric::REPAIRS, "repair", Repairs::default().by_name().map(|(name, _)| name));
        let interval = self.settings.interval;
        let mut broken = false;
        while stop.run_until_cancelled(sleep(interval)).await.is_some() {
            match stop.run_until_cancelled(self.sweep()).await {
                Some(Err(error)) => {
                    counter!(metric::SWEEPS, "end" => "broken_off").increment(1);
                    // Once, not with each of the tries that follow.
                    if !broken {
                        warn!(%error, "the sweep was broken off; it is tried again");
                    }
                    broken = true;
                }
                Some(Ok(())) => {
                    counter!(metric::SWEEPS, "end" => "done").increment(1);
                    broken = false;
                }
                None => return,
            }
        }
    }

    fn stalled_after(&self) -> Duration {
        self.settings.stalled_after
    }

    async fn sweep(&mut self) -> Result<(), SweepError> {
        if !self.context.broker.epoch().is_current() {
            return Ok(());
        }
        let limit = self.context.answer_timeout;
        let mut tx = in_time(limit, self.context.pool.begin()).await?;
        if !in_time(limit, sweep::try_lock(&mut tx)).await? {
            return Ok(());
        }
        let stalled = in_time(limit, sweep::stalled_runs(&mut tx, self.stalled_after())).await?;
        self.resting.retain(|run_id, _| stalled.iter().any(|run| run.run_id == *run_id));
        let now = Instant::now();
        let due: Vec<Stalled> = stalled
            .into_iter()
            .filter(|run| self.resting.get(&run.run_id).is_none_or(|rest| rest.until <= now))
            .collect();
        if due.is_empty() {
            return Ok(());
        }
        let taken = self.queues_are_empty().await? && !in_time(limit, sweep::all_lanes_closed(&mut tx)).await?;
        self.failing.retain(|run_id| due.iter().any(|run| run.run_id == *run_id));
        for run in due {
            match self.sweep_run(&mut tx, &run, taken).await {
                Ok(()) => {
                    self.failing.remove(&run.run_id);
                }
                // The others must not wait for it.
                Err(error) => {
                    if self.failing.insert(run.run_id) {
                        warn!(run_id = %run.run_id, %error, "a run can't be swept; trying again later");
                    }
                    continue;
                }
            }
            if !taken {
                continue;
            }
            let length =
                self.resting.get(&run.run_id).map_or(self.stalled_after(), |rest| (rest.length * 2).min(LONGEST_REST));
            self.resting.insert(run.run_id, Rest { until: Instant::now() + length, length });
        }
        in_time(limit, tx.commit()).await?;
        Ok(())
    }

    /// Sweeps one run. What goes wrong with it in the ledger is undone, and does not spoil the sweep's transaction.
    async fn sweep_run(&self, conn: &mut PgConnection, run: &Stalled, taken: bool) -> Result<(), SweepError> {
        let limit = self.context.answer_timeout;
        let mut point = in_time(limit, conn.begin()).await?;
        let mut repairs = Repairs { driven: self.drive(run).await?, ..Repairs::default() };
        // Items of a job that this program does not have are left to one that does.
        if let Some(job) = self.context.kinds.get(&run.kind).filter(|_| taken) {
            self.repair_items(&mut point, run, job, &mut repairs).await?;
        }
        in_time(limit, sweep::record(&mut point, run.run_id, repairs)).await?;
        in_time(limit, point.commit()).await?;
        for (repair, times) in repairs.by_name() {
            counter!(metric::REPAIRS, "repair" => repair).increment(times.unsigned_abs());
        }
        Ok(())
    }

    /// Items that wait on the queue are not missing: the senders are busy, or there are none. Nor is a result missing that waits
    /// to be counted: what a worker has reported before it died is not unknown.
    async fn queues_are_empty(&self) -> Result<bool, SweepError> {
        Ok(self.context.broker.waiting_items().await? == 0 && self.context.broker.waiting_results().await? == 0)
    }

    /// Puts the message back that drives the run's present pass, if none was seen lately; returns how many it put back.
    async fn drive(&self, run: &Stalled) -> Result<i64, SweepError> {
        let (run_id, Some(command)) = (run.run_id, missing_command(run)) else { return Ok(0) };
        info!(%run_id, ?command, "nothing drives this run any more: its message is put back");
        self.context.publisher.publish_soon(vec![Outgoing::new(&RunMessage { run_id, command })]).await?;
        Ok(1)
    }

    async fn repair_items(
        &self,
        conn: &mut PgConnection,
        run: &Stalled,
        job: &dyn Kind,
        all: &mut Repairs,
    ) -> Result<(), SweepError> {
        let run_id = run.run_id;
        let batch = BATCH;
        let mut after = 0;
        loop {
            let items = sweep::open_items(conn, run_id, self.stalled_after(), after, batch);
            let items = in_time(self.context.answer_timeout, items).await?;
            let Some(last) = items.last() else { return Ok(()) };
            after = last.position;
            let mut mending = Mending::default();
            for item in &items {
                // Senders drop what belongs to a paused run; it is put back when the run goes on.
                if run.wanted != Wanted::Paused || item.owner.is_some() {
                    mending.add(item, job);
                }
            }
            let Mending { repairs, messages, results } = mending;
            if repairs != Repairs::default() {
                let Repairs { put_back, buried, told_again, .. } = repairs;
                info!(%run_id, put_back, buried, told_again, "items were missing from the conveyor");
            }
            *all += repairs;
            self.context.publisher.publish_soon(messages).await?;
            self.context.publisher.publish_soon(Outgoing::results(run_id, &results, self.context.result_batch)).await?;
        }
    }
}

/// The command whose message no longer drives a stalled run. None: one does, or none is needed.
#[must_use]
pub fn missing_command(run: &Stalled) -> Option<Command> {
    match run.wanted {
        Wanted::Cancelled if !run.cancel_begun => Some(Command::Cancel { command_id: Uuid::new_v4() }),
        _ if run.driven => None,
        _ => Some(Command::Release(Step::default())),
    }
}

/// What puts open items right that are overdue.
#[derive(Debug, Default)]
pub struct Mending {
    /// How many of them need what.
    pub repairs: Repairs,
    /// To be published first, and confirmed.
    pub messages: Vec<Outgoing>,
    /// To be applied after that.
    pub results: Vec<ItemResult>,
}

impl Mending {
    /// Adds what this item of the job needs, if anything.
    pub fn add(&mut self, item: &OpenItem, job: &dyn Kind) {
        match repair(item.owner) {
            Repair::Leave => {}
            Repair::PutBack => {
                self.repairs.put_back += 1;
                self.messages.push(Outgoing::new(&item.next));
            }
            Repair::Withhold(why) => {
                self.repairs.told_again += 1;
                self.results.push(job.withheld(item.next, why));
            }
            Repair::Confirm => {
                self.repairs.told_again += 1;
                self.results.push(item.next.result(ItemState::Sent, None));
            }
            Repair::Bury => {
                self.repairs.buried += 1;
                let next = after_death(item.next, job.policy());
                self.messages.extend(next.follow_up.map(Outgoing::from));
                self.results.push(next.result);
            }
        }
    }

    /// Whether nothing is to be done.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.repairs == Repairs::default()
    }
}
