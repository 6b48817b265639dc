//! The sweeper: republishes messages that are missing from the broker.
//!
//! It checks runs whose counters have not moved for a while. A purged queue, a lost broker, or a dead worker's claims each leave
//! a trace in the ledger, from which the missing message is published again. The fence and the join absorb what is republished
//! by mistake, so the sweeper may be wrong. It must not flood the queues, though: after each sweep that did not get a run
//! moving, the wait before the next one doubles.

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

/// The longest wait before the next sweep of the same run.
const LONGEST_BACKOFF: Duration = Duration::from_secs(600);

/// Items that are republished in one batch.
pub const BATCH: i64 = 1_000;

/// Why a sweep failed. The next one starts over.
#[derive(Debug, thiserror::Error)]
enum SweepError {
    #[error(transparent)]
    Ledger(#[from] sqlx::Error),
    #[error(transparent)]
    Broker(#[from] BrokerError),
}

/// When to sweep a stalled run again.
#[derive(Clone, Copy, Debug)]
struct Backoff {
    until: Instant,
    length: Duration,
}

/// The sweeper of one process. Only one process sweeps at a time.
#[derive(Debug)]
pub struct Sweeper {
    context: Context,
    settings: SweepConfig,
    backoffs: HashMap<Uuid, Backoff>,
    /// Runs whose last sweep failed, and was logged.
    failing: HashSet<Uuid>,
}

impl Sweeper {
    #[must_use]
    pub(crate) fn new(context: Context, settings: SweepConfig) -> Self {
        Self { context, settings, backoffs: HashMap::new(), failing: HashSet::new() }
    }

    /// Sweeps until `stop`.
    pub async fn run(mut self, stop: CancellationToken) {
        metric::begin(metric::SWEEPS, "end", ["done", "broken_off"]);
        metric::begin(metric::REPAIRS, "repair", Repairs::default().by_name().map(|(name, _)| name));
        let interval = self.settings.interval;
        let mut failed = false;
        while stop.run_until_cancelled(sleep(interval)).await.is_some() {
            match stop.run_until_cancelled(self.sweep()).await {
                Some(Err(error)) => {
                    counter!(metric::SWEEPS, "end" => "broken_off").increment(1);
                    // Logged once, not for each retry.
                    if !failed {
                        warn!(%error, "sweep failed, trying again");
                    }
                    failed = true;
                }
                Some(Ok(())) => {
                    counter!(metric::SWEEPS, "end" => "done").increment(1);
                    failed = false;
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
        self.backoffs.retain(|run_id, _| stalled.iter().any(|run| run.run_id == *run_id));
        let now = Instant::now();
        let due: Vec<Stalled> = stalled
            .into_iter()
            .filter(|run| self.backoffs.get(&run.run_id).is_none_or(|backoff| backoff.until <= now))
            .collect();
        if due.is_empty() {
            return Ok(());
        }
        let may_repair = self.queues_are_empty().await? && !in_time(limit, sweep::all_lanes_closed(&mut tx)).await?;
        self.failing.retain(|run_id| due.iter().any(|run| run.run_id == *run_id));
        for run in due {
            match self.sweep_run(&mut tx, &run, may_repair).await {
                Ok(()) => {
                    self.failing.remove(&run.run_id);
                }
                // Other runs must not wait for it.
                Err(error) => {
                    if self.failing.insert(run.run_id) {
                        warn!(run_id = %run.run_id, %error, "a run can't be swept, trying again later");
                    }
                    continue;
                }
            }
            if !may_repair {
                continue;
            }
            let length = self
                .backoffs
                .get(&run.run_id)
                .map_or(self.stalled_after(), |backoff| (backoff.length * 2).min(LONGEST_BACKOFF));
            self.backoffs.insert(run.run_id, Backoff { until: Instant::now() + length, length });
        }
        in_time(limit, tx.commit()).await?;
        Ok(())
    }

    /// Sweeps one run, in a savepoint: an error of the ledger does not spoil the sweep's transaction.
    async fn sweep_run(&self, conn: &mut PgConnection, run: &Stalled, may_repair: bool) -> Result<(), SweepError> {
        let limit = self.context.answer_timeout;
        let mut point = in_time(limit, conn.begin()).await?;
        let mut repairs = Repairs { driven: self.drive(run).await?, ..Repairs::default() };
        // Items of a job that this program does not have are left to a program that does.
        if let Some(job) = self.context.kinds.get(&run.kind).filter(|_| may_repair) {
            self.repair_items(&mut point, run, job, &mut repairs).await?;
        }
        in_time(limit, sweep::record(&mut point, run.run_id, repairs)).await?;
        in_time(limit, point.commit()).await?;
        for (repair, times) in repairs.by_name() {
            counter!(metric::REPAIRS, "repair" => repair).increment(times.unsigned_abs());
        }
        Ok(())
    }

    /// Whether no item or result is waiting. Items on the queue are not missing: the senders are busy, or there are none. And
    /// as long as results wait to be counted, an attempt of a dead worker may still turn out to be reported.
    async fn queues_are_empty(&self) -> Result<bool, SweepError> {
        Ok(self.context.broker.waiting_items().await? == 0 && self.context.broker.waiting_results().await? == 0)
    }

    /// Republishes the run message of the current pass if none was seen lately. Returns how many messages it published.
    async fn drive(&self, run: &Stalled) -> Result<i64, SweepError> {
        let (run_id, Some(command)) = (run.run_id, missing_command(run)) else { return Ok(0) };
        info!(%run_id, ?command, "run stalled, republishing its command");
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
                // Senders drop items of a paused run. They are republished when it is resumed.
                if run.wanted != Wanted::Paused || item.owner.is_some() {
                    mending.add(item, job);
                }
            }
            let Mending { repairs, messages, results } = mending;
            if repairs != Repairs::default() {
                let Repairs { put_back, buried, told_again, .. } = repairs;
                info!(%run_id, put_back, buried, told_again, "stalled run repaired");
            }
            *all += repairs;
            self.context.publisher.publish_soon(messages).await?;
            self.context.publisher.publish_soon(Outgoing::results(run_id, &results, self.context.result_batch)).await?;
        }
    }
}

/// The command to republish for a stalled run. `None`: its message exists, or none is needed.
#[must_use]
pub fn missing_command(run: &Stalled) -> Option<Command> {
    match run.wanted {
        Wanted::Cancelled if !run.cancel_begun => Some(Command::Cancel { command_id: Uuid::new_v4() }),
        _ if run.driven => None,
        _ => Some(Command::Release(Step::default())),
    }
}

/// The repairs of overdue open items.
#[derive(Debug, Default)]
pub struct Mending {
    /// The number of repairs of each kind.
    pub repairs: Repairs,
    /// To publish first, and confirm.
    pub messages: Vec<Outgoing>,
    /// To report after that.
    pub results: Vec<ItemResult>,
}

impl Mending {
    /// Adds the repair that this item needs, if any.
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

    /// Whether there is nothing to repair.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.repairs == Repairs::default()
    }
}
