//! Claims what is due, and starts an attempt for each claim that is granted.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

use mailrun_core::{
    claim::Withheld,
    item::Key,
    outcome::{self, Next},
};
use mailrun_ledger::{
    Session,
    attempts::{self, Limits, Paced},
    in_time,
    receipts::Receipt,
};
use sqlx::{Connection as _, PgConnection};
use tracing::warn;

use super::{Asked, Senders};
use crate::{
    attempt::Attempt,
    gate::Gate,
    held::Held,
    kinds::{Batch, Reasons},
    reporter::{Finished, Reporter},
};

/// Of limited runs, attempts are claimed whose send time lies within this: a connection that is free finds one waiting, and
/// few permits wait.
const AHEAD: Duration = Duration::from_millis(100);

/// What a claim came to.
#[derive(Default)]
struct Claimed {
    /// What was granted, loaded by its jobs.
    batches: Vec<Batch>,
    /// What was granted to no worker, and the reasons of its job.
    withheld: Vec<(Key, Withheld, Reasons)>,
    /// How long each of those that a rate limit holds for has to wait for its send time.
    slots: HashMap<Key, Duration>,
    /// What was not asked for, since no send time is near: how long until one will be.
    not_due: Vec<(Key, Duration)>,
}

impl Claimed {
    /// Everything that was granted, to this worker or to none.
    fn keys(&self) -> HashSet<Key> {
        let withheld = self.withheld.iter().map(|(key, ..)| *key);
        self.batches.iter().flat_map(Batch::keys).chain(withheld).collect()
    }
}

impl Senders {
    /// Claims what has come, starts what was granted, holds what is not due and settles what was refused.
    pub(super) async fn begin(
        self: &Arc<Self>,
        mut keys: Vec<Key>,
        mut asked: HashMap<Key, Asked>,
        held: &mut Held<Asked>,
        session: &mut Session,
        reporter: &Reporter,
    ) {
        if let Err(error) = self.put_off_closed(&mut keys, &mut asked).await {
            warn!(%error, "the kinds of runs can't be read, trying again later");
            return self.park(asked.into_values().collect(), self.policy().shortest()).await;
        }
        let lost_before = self.claims().asking(&keys);
        let claimed = match self.claim(session, &keys).await {
            Ok(claimed) => claimed,
            Err(error) => {
                warn!(%error, "claim failed, checking its result later");
                self.claims().answer_lost(asked.keys().copied());
                return self.park(asked.into_values().collect(), self.policy().shortest()).await;
            }
        };
        let claimed_at = Instant::now();
        let granted = claimed.keys();
        // Before anything is begun: there is room for each delivery, and at least one delivery for each claim.
        self.permits.begin(granted.len());
        // What was granted now had not been claimed.
        self.claims().answer_lost(lost_before.into_iter().filter(|key| !granted.contains(key)));
        for batch in claimed.batches {
            let mut attempts = HashMap::with_capacity(batch.items.len());
            for (key, position) in &batch.items {
                let Some(Asked { item, deliveries }) = asked.remove(key) else { continue };
                self.claims().begin(*key, deliveries);
                self.stopped.begin(key.run_id, 1);
                let slot = claimed.slots.get(key).map(|wait| (claimed_at + *wait).into());
                attempts.insert(*key, Attempt::new(item, *position, claimed_at.into(), slot, &self.checks));
            }
            batch.start(attempts, reporter);
        }
        for (key, why, reasons) in claimed.withheld {
            let Some(Asked { item, deliveries }) = asked.remove(&key) else { continue };
            self.claims().begin(key, deliveries);
            let next = Next { follow_up: None, result: outcome::withheld(item, why, reasons) };
            // The report outlives every sender of this channel.
            let _ = reporter.finished.send(Finished { key, next }).await;
        }
        self.hold(claimed.not_due, &mut asked, held).await;
        if !asked.is_empty() {
            self.settle_refused(asked).await;
        }
    }

    /// Puts off the items of jobs whose gate is closed, without claiming them.
    async fn put_off_closed(
        self: &Arc<Self>,
        keys: &mut Vec<Key>,
        asked: &mut HashMap<Key, Asked>,
    ) -> sqlx::Result<()> {
        let kinds = &self.context.kinds;
        if matches!(kinds.gate(), Gate::Open | Gate::Trying) {
            return Ok(());
        }
        let read =
            async { kinds.of_runs(&mut *self.context.pool.acquire().await?, keys.iter().map(|key| key.run_id)).await };
        let of_runs = in_time(self.context.answer_timeout, read).await?;
        let closed_until = |key: &Key| match of_runs.get(&key.run_id)?.as_ref()?.gate() {
            Gate::Closed { until, .. } => Some(until),
            Gate::Open | Gate::Trying => None,
        };
        let mut closed: BTreeMap<Duration, Vec<Asked>> = BTreeMap::new();
        keys.retain(|key| {
            let Some(until) = closed_until(key) else { return true };
            let wait = self.policy().delay_within(until.saturating_duration_since(Instant::now()));
            closed.entry(wait).or_default().extend(asked.remove(key));
            false
        });
        for (wait, asked) in closed {
            self.park(asked, wait).await;
        }
        Ok(())
    }

    /// Keeps messages whose send time is not near until it is. What has to wait longer, or has no room, waits on a retry queue.
    async fn hold(
        self: &Arc<Self>,
        not_due: Vec<(Key, Duration)>,
        asked: &mut HashMap<Key, Asked>,
        held: &mut Held<Asked>,
    ) {
        let now = Instant::now();
        let mut beyond: BTreeMap<Duration, Vec<Asked>> = BTreeMap::new();
        for (key, wait) in not_due {
            let Some(asked) = asked.remove(&key) else { continue };
            if let Err(asked) = held.put(asked, now + wait.saturating_sub(AHEAD / 2), now) {
                beyond.entry(self.policy().delay_within(wait)).or_default().push(asked);
            }
        }
        for (wait, asked) in beyond {
            self.park(asked, wait).await;
        }
    }

    /// Claims what is due, and writes down what the remote side has accepted since the last claim.
    async fn claim(&self, session: &mut Session, keys: &[Key]) -> sqlx::Result<Claimed> {
        if keys.is_empty() {
            return Ok(Claimed::default());
        }
        let mut limits = self.pace.limits(keys.iter().map(|key| key.run_id)).await?;
        if let Some(limits) = &mut limits {
            self.pace.take_unused(limits);
        }
        let accepted = self.permits.receipt();
        let receipt = self.claims().receipt(&accepted);
        let claim =
            async |conn: &mut PgConnection| self.claim_in_transaction(conn, keys, &receipt, limits.as_ref()).await;
        let begun = Instant::now();
        let claimed = session.run(self.context.answer_timeout, claim).await;
        self.claim_seconds.record(begun.elapsed());
        match &claimed {
            Ok(_) => {
                self.claims().receipt_written(receipt.number, &accepted);
                self.permits.receipt_written(&accepted);
            }
            Err(_) => {
                self.claims().receipt_lost(receipt.number);
                for (run_id, slots) in limits.into_iter().flat_map(|limits| limits.unused) {
                    self.pace.add_unused(run_id, slots);
                }
            }
        }
        claimed
    }

    /// Claims, lets the jobs load what was granted and withhold some of it, and reserves send times for the rest.
    async fn claim_in_transaction(
        &self,
        conn: &mut PgConnection,
        keys: &[Key],
        receipt: &Receipt,
        limits: Option<&Limits>,
    ) -> sqlx::Result<Claimed> {
        let kinds = &self.context.kinds;
        let mut tx = conn.begin().await?;
        let paced = match limits {
            Some(limits) => Some(Paced::lock(&mut tx, keys, limits, AHEAD).await?),
            None => None,
        };
        let due = paced.as_ref().map_or(keys, |paced| &paced.due);
        let granted = attempts::claim(&mut tx, self.heartbeat.worker_id(), Some(kinds.names()), due, receipt).await?;
        let mut claimed = Claimed::default();
        let mut mine = Vec::with_capacity(granted.len());
        for granted in granted {
            match granted.withheld {
                Some(why) => claimed.withheld.push((granted.key, why, &[])),
                None => mine.push(granted),
            }
        }
        claimed.batches = kinds.load(&mut tx, mine).await?;
        let mut by_jobs = Vec::new();
        for batch in &mut claimed.batches {
            by_jobs.extend_from_slice(&batch.withheld);
            claimed.withheld.extend(batch.withheld.drain(..).map(|(key, why)| (key, why, batch.reasons)));
        }
        if !by_jobs.is_empty() {
            attempts::withhold(&mut tx, &by_jobs).await?;
        }
        if let Some(paced) = paced {
            let granted = claimed.batches.iter().flat_map(Batch::keys).collect();
            (claimed.slots, claimed.not_due) = paced.reserve(&mut tx, &granted).await?;
        }
        tx.commit().await?;
        Ok(claimed)
    }
}
