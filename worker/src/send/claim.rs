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
use uuid::Uuid;

use super::{Request, Senders};
use crate::{
    attempt::Attempt,
    gate::Gate,
    held::Held,
    kinds::{Batch, KindOfRun, Reasons},
    reporter::{Finished, Reporter},
};

/// Items of a rate-limited run are claimed up to this long before their send time. That keeps free connections busy without
/// occupying many permits.
const AHEAD: Duration = Duration::from_millis(100);

/// The result of a claim.
#[derive(Default)]
struct Claimed {
    /// Granted to this worker, loaded by their jobs.
    batches: Vec<Batch>,
    /// Withheld, with the reasons of the job.
    withheld: Vec<(Key, Withheld, Reasons)>,
    /// For items under a rate limit: the wait until their send time.
    slots: HashMap<Key, Duration>,
    /// Not claimed because no send time is near: the wait until one is.
    not_due: Vec<(Key, Duration)>,
}

impl Claimed {
    /// All granted claims, including withheld ones.
    fn keys(&self) -> impl Iterator<Item = Key> {
        let withheld = self.withheld.iter().map(|(key, ..)| *key);
        self.batches.iter().flat_map(Batch::keys).chain(withheld)
    }
}

impl Senders {
    /// Claims a batch. Starts what was granted, holds what is not due, and settles what was refused.
    pub(super) async fn begin(
        self: &Arc<Self>,
        mut keys: Vec<Key>,
        mut requests: HashMap<Key, Request>,
        held: &mut Held<Request>,
        session: &mut Session,
        reporter: &Reporter,
    ) {
        if let Err(error) = self.defer_closed(&mut keys, &mut requests).await {
            warn!(%error, "can't read the kinds of runs, trying again later");
            return self.park(requests.into_values().collect(), self.policy().shortest()).await;
        }
        let lost_before = self.claims().requesting(&keys);
        let claimed = match self.claim(session, &keys).await {
            Ok(claimed) => claimed,
            Err(error) => {
                warn!(%error, "claim failed, checking its result later");
                self.claims().answer_lost(requests.keys().copied());
                return self.park(requests.into_values().collect(), self.policy().shortest()).await;
            }
        };
        let claimed_at = Instant::now();
        // Before any attempt is started. There is room for each delivery, and each claim has at least one delivery.
        self.permits.begin(claimed.keys().count());
        if !lost_before.is_empty() {
            // Claims granted now were not granted before.
            let granted: HashSet<Key> = claimed.keys().collect();
            self.claims().answer_lost(lost_before.into_iter().filter(|key| !granted.contains(key)));
        }
        for batch in claimed.batches {
            let mut attempts = Vec::with_capacity(batch.items.len());
            for (key, position) in &batch.items {
                attempts.push(requests.remove(key).map(|Request { item, deliveries }| {
                    self.claims().begin(*key, deliveries);
                    self.stopped.begin(key.run_id, 1);
                    let slot = claimed.slots.get(key).map(|wait| (claimed_at + *wait).into());
                    Attempt::new(item, *position, claimed_at.into(), slot, &self.checks)
                }));
            }
            batch.start(attempts, reporter);
        }
        for (key, why, reasons) in claimed.withheld {
            let Some(Request { item, deliveries }) = requests.remove(&key) else { continue };
            self.claims().begin(key, deliveries);
            let next = Next { follow_up: None, result: outcome::withheld(item, why, reasons) };
            // The report task outlives all senders of this channel, so this cannot fail.
            let _ = reporter.finished.send(Finished { key, next }).await;
        }
        self.hold(claimed.not_due, &mut requests, held).await;
        if !requests.is_empty() {
            self.settle_refused(requests).await;
        }
    }

    /// Defers items of jobs with a closed gate, without claiming them.
    async fn defer_closed(
        self: &Arc<Self>,
        keys: &mut Vec<Key>,
        requests: &mut HashMap<Key, Request>,
    ) -> sqlx::Result<()> {
        let kinds = &self.context.kinds;
        if matches!(kinds.gate(), Gate::Open | Gate::Trying) {
            return Ok(());
        }
        let read =
            async { kinds.of_runs(&mut *self.context.pool.acquire().await?, keys.iter().map(|key| key.run_id)).await };
        let of_runs = in_time(self.context.answer_timeout, read).await?;
        let closed_until = |(run_id, kind): (Uuid, KindOfRun)| match kind?.gate() {
            Gate::Closed { until, .. } => Some((run_id, until)),
            Gate::Open | Gate::Trying => None,
        };
        let closed_until: HashMap<Uuid, Instant> = of_runs.into_iter().filter_map(closed_until).collect();
        let mut closed: BTreeMap<Duration, Vec<Request>> = BTreeMap::new();
        keys.retain(|key| {
            let Some(until) = closed_until.get(&key.run_id) else { return true };
            let wait = self.policy().delay_within(until.saturating_duration_since(Instant::now()));
            closed.entry(wait).or_default().extend(requests.remove(key));
            false
        });
        for (wait, requests) in closed {
            self.park(requests, wait).await;
        }
        Ok(())
    }

    /// Holds messages until their send time is near. Those that must wait longer, or that do not fit, go to a retry queue.
    async fn hold(
        self: &Arc<Self>,
        not_due: Vec<(Key, Duration)>,
        requests: &mut HashMap<Key, Request>,
        held: &mut Held<Request>,
    ) {
        let now = Instant::now();
        let mut beyond: BTreeMap<Duration, Vec<Request>> = BTreeMap::new();
        for (key, wait) in not_due {
            let Some(request) = requests.remove(&key) else { continue };
            if let Err(request) = held.put(request, now + wait.saturating_sub(AHEAD / 2), now) {
                beyond.entry(self.policy().delay_within(wait)).or_default().push(request);
            }
        }
        for (wait, requests) in beyond {
            self.park(requests, wait).await;
        }
    }

    /// Claims what is due, and stores the receipt for what was accepted since the last claim.
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
        let claim = async |conn: &mut PgConnection| match limits.as_ref() {
            Some(limits) => self.claim_paced(conn, keys, &receipt, limits).await,
            None => self.claim_due(conn, keys, &receipt).await,
        };
        let begun = Instant::now();
        let claimed = session.run(self.context.answer_timeout, claim).await;
        self.claim_seconds.record(begun.elapsed());
        match &claimed {
            Ok(_) => {
                self.claims().receipt_written(receipt.number, &accepted);
                self.permits.receipt_written(&accepted);
                self.permits.claimed(begun.elapsed());
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

    /// Claims, and reserves send times for what was granted.
    async fn claim_paced(
        &self,
        conn: &mut PgConnection,
        keys: &[Key],
        receipt: &Receipt,
        limits: &Limits,
    ) -> sqlx::Result<Claimed> {
        let mut tx = conn.begin().await?;
        let paced = Paced::lock(&mut tx, keys, limits, AHEAD).await?;
        let mut claimed = self.claim_due(&mut tx, &paced.due, receipt).await?;
        let granted = claimed.batches.iter().flat_map(Batch::keys).collect();
        (claimed.slots, claimed.not_due) = paced.reserve(&mut tx, &granted).await?;
        tx.commit().await?;
        Ok(claimed)
    }

    /// Claims, and lets the jobs load or withhold what was granted. Without a transaction around the statements, which would take
    /// two more round trips: if a later one fails, the claims are ours, no attempt was started, and they are given back.
    async fn claim_due(&self, conn: &mut PgConnection, due: &[Key], receipt: &Receipt) -> sqlx::Result<Claimed> {
        let kinds = &self.context.kinds;
        let granted = attempts::claim(conn, self.heartbeat.worker_id(), Some(kinds.names()), due, receipt).await?;
        let mut claimed = Claimed::default();
        let mut mine = Vec::with_capacity(granted.len());
        for granted in granted {
            match granted.withheld {
                Some(why) => claimed.withheld.push((granted.key, why, &[])),
                None => mine.push(granted),
            }
        }
        claimed.batches = kinds.load(conn, mine).await?;
        let mut by_jobs = Vec::new();
        for batch in &mut claimed.batches {
            by_jobs.extend_from_slice(&batch.withheld);
            claimed.withheld.extend(batch.withheld.drain(..).map(|(key, why)| (key, why, batch.reasons)));
        }
        if !by_jobs.is_empty() {
            attempts::withhold(conn, &by_jobs).await?;
        }
        Ok(claimed)
    }
}
