//! The jobs of this program, by kind. A job is typed; the stages see a batch of its items as one [`Batch`], so that nothing is
//! dispatched dynamically for an item.

use std::{
    collections::{BTreeMap, HashMap, hash_map::Entry},
    fmt,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use mailrun_core::{
    claim::Withheld,
    item::{ItemState, Key},
    message::{ItemMessage, ItemResult},
    metric,
    outcome::{self, Next, Outcome, RetryPolicy, after_send},
    retry::in_process,
};
use mailrun_ledger::{
    attempts::Granted,
    invitations,
    progress::{OnSettled, Settled},
    runs, test_mails,
};
use metrics::{Counter, Histogram, counter, histogram};
use moka::sync::Cache;
use sqlx::PgConnection;
use tokio::time::sleep;
use tracing::{debug, error};
use uuid::Uuid;

use crate::{
    attempt::Attempt,
    gate::Gate,
    job::{Job, JobError, Loaded},
    reporter::Reporter,
};

/// Cached shared parts of runs, for each kind: more than the runs processed at the same time.
const CACHED_RUNS: u64 = 256;
/// Cached kinds of runs.
const CACHED_KINDS: u64 = 16_384;
/// Repetitions within one attempt, if the remote side accepts an immediate retry.
const REPETITIONS: u32 = 1;
/// The codes of withheld items up to this one are Mailrun's own.
const RESERVED: u8 = 9;
/// The wait before the first repetition. It doubles.
const FIRST_REPETITION: Duration = Duration::from_millis(20);

/// The job of a run. `None`: this program has no such job.
pub(crate) type KindOfRun = Option<Arc<dyn Kind>>;

type MakeKind = Box<dyn FnOnce(&RetryPolicy) -> Arc<dyn Kind> + Send>;

/// Jobs that a program adds to Mailrun's own.
#[derive(Default)]
pub struct Jobs(Vec<MakeKind>);

impl Jobs {
    /// No jobs.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a job.
    ///
    /// # Panics
    /// If its kind is taken, or a reason has a reserved code: both would be mixed up with Mailrun's own in the ledger.
    #[must_use]
    pub fn with<J: Job>(self, job: J) -> Self {
        assert!(![invitations::KIND, test_mails::KIND].contains(&J::KIND), "the kind {} is Mailrun's own", J::KIND);
        assert!(J::WITHHELD.iter().all(|(code, _)| *code > RESERVED), "a job's own codes are 10 to 255");
        self.with_own(job)
    }

    /// With one of Mailrun's own.
    pub(crate) fn with_own<J: Job>(mut self, job: J) -> Self {
        self.0.push(Box::new(|installation| Arc::new(Typed::new(job, installation))));
        self
    }
}

impl fmt::Debug for Jobs {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_tuple("Jobs").field(&self.0.len()).finish()
    }
}

/// The jobs of a process, by kind.
pub struct Kinds {
    by_name: BTreeMap<&'static str, Arc<dyn Kind>>,
    names: Vec<String>,
    /// The configured retry policy.
    installation: RetryPolicy,
    /// The kinds of runs, which never change.
    of_runs: Cache<Uuid, KindOfRun>,
}

impl Kinds {
    /// These jobs, with the configured retry policy.
    #[must_use]
    pub fn new(jobs: Jobs, installation: RetryPolicy) -> Self {
        let kinds = jobs.0.into_iter().map(|make| make(&installation));
        let by_name: BTreeMap<_, _> = kinds.map(|kind| (kind.name(), kind)).collect();
        let names = by_name.keys().map(|name| (*name).to_owned()).collect();
        Self { by_name, names, installation, of_runs: Cache::new(CACHED_KINDS) }
    }

    /// Their names, in alphabetical order.
    pub(crate) fn names(&self) -> &[String] {
        &self.names
    }

    /// The job of this kind. `None`: this program has no such job.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&dyn Kind> {
        self.by_name.get(name).map(AsRef::as_ref)
    }

    /// The configured retry policy.
    pub(crate) fn installation(&self) -> &RetryPolicy {
        &self.installation
    }

    /// The gate to show: closed before trying before open.
    pub(crate) fn gate(&self) -> Gate {
        let mut shown = Gate::Open;
        for gate in self.by_name.values().map(|kind| kind.gate()) {
            match gate {
                Gate::Closed { .. } => return gate,
                Gate::Trying => shown = gate,
                Gate::Open => {}
            }
        }
        shown
    }

    /// The jobs of these runs. Runs that do not exist are missing from the result.
    pub(crate) async fn of_runs(
        &self,
        conn: &mut PgConnection,
        run_ids: impl IntoIterator<Item = Uuid>,
    ) -> sqlx::Result<HashMap<Uuid, KindOfRun>> {
        let mut found = HashMap::new();
        let mut unread = Vec::new();
        for run_id in run_ids {
            match self.of_runs.get(&run_id) {
                _ if found.contains_key(&run_id) => {}
                Some(kind) => {
                    found.insert(run_id, kind);
                }
                None => unread.push(run_id),
            }
        }
        if !unread.is_empty() {
            for (run_id, name) in runs::kinds(conn, &unread).await? {
                let kind = self.by_name.get(name.as_str()).cloned();
                self.of_runs.insert(run_id, kind.clone());
                found.insert(run_id, kind);
            }
        }
        Ok(found)
    }

    /// Loads granted items, one batch for each kind.
    pub(crate) async fn load(&self, conn: &mut PgConnection, granted: Vec<Granted>) -> sqlx::Result<Vec<Batch>> {
        let kinds = self.of_runs(conn, granted.iter().map(|granted| granted.key.run_id)).await?;
        let mut batches = Vec::new();
        for (kind, granted) in by_kind(&kinds, granted, |granted| granted.key.run_id) {
            // Claims are granted for these kinds only.
            if let Some(kind) = kind {
                batches.push(kind.load(conn, granted).await?);
            }
        }
        Ok(batches)
    }

    /// How many items of visible runs have entered each state.
    pub(crate) fn visible(&self, entered: &BTreeMap<(Uuid, ItemState), u64>) -> BTreeMap<ItemState, u64> {
        let mut visible = BTreeMap::new();
        for ((run_id, state), items) in entered {
            if !self.of_runs.get(run_id).flatten().is_some_and(|kind| kind.is_hidden()) {
                *visible.entry(*state).or_default() += items;
            }
        }
        visible
    }
}

impl fmt::Debug for Kinds {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_tuple("Kinds").field(&self.names()).finish()
    }
}

impl OnSettled for Kinds {
    async fn on_settled(&self, conn: &mut PgConnection, settled: Vec<Settled>) -> sqlx::Result<()> {
        let kinds = self.of_runs(conn, settled.iter().map(|item| item.run_id)).await?;
        for (kind, settled) in by_kind(&kinds, settled, |item| item.run_id) {
            match kind {
                Some(kind) => kind.settled(conn, &settled).await?,
                None => error!(items = settled.len(), "unknown job, its items are counted without it"),
            }
        }
        Ok(())
    }
}

/// Groups items by the jobs of their runs. Usually all items of a batch belong to one run.
fn by_kind<T>(
    kinds: &HashMap<Uuid, KindOfRun>,
    items: Vec<T>,
    run_of: impl Fn(&T) -> Uuid,
) -> Vec<(KindOfRun, Vec<T>)> {
    let mut groups: Vec<(KindOfRun, Vec<T>)> = Vec::new();
    for item in items {
        let kind = kinds.get(&run_of(&item)).and_then(Option::as_ref);
        let name = |kind: Option<&Arc<dyn Kind>>| kind.map(|kind| kind.name());
        match groups.iter_mut().find(|(of, _)| name(of.as_ref()) == name(kind)) {
            Some((_, group)) => group.push(item),
            None => groups.push((kind.cloned(), vec![item])),
        }
    }
    groups
}

/// A job as the stages see it.
#[async_trait]
pub trait Kind: Send + Sync {
    /// [`Job::KIND`].
    fn name(&self) -> &'static str;
    /// [`Job::HIDDEN`].
    fn is_hidden(&self) -> bool;
    /// [`Job::retry`].
    fn policy(&self) -> &RetryPolicy;
    /// [`Job::gate`].
    fn gate(&self) -> Gate;
    /// The result of an attempt at a withheld item.
    fn withheld(&self, item: ItemMessage, why: Withheld) -> ItemResult;
    /// [`Job::run`] and [`Job::items`].
    async fn load(self: Arc<Self>, conn: &mut PgConnection, granted: Vec<Granted>) -> sqlx::Result<Batch>;
    /// [`Job::settled`].
    async fn settled(&self, conn: &mut PgConnection, settled: &[Settled]) -> sqlx::Result<()>;
}

/// Why a job withholds items, by code.
pub(crate) type Reasons = &'static [(u8, &'static str)];

/// Claimed items of one kind, loaded.
pub struct Batch {
    /// The withheld items.
    pub(crate) withheld: Vec<(Key, Withheld)>,
    /// The job's reasons for withholding.
    pub(crate) reasons: Reasons,
    /// The items to process, with their positions in their runs.
    pub(crate) items: Vec<(Key, i32)>,
    start: Start,
}

type Start = Box<dyn FnOnce(Vec<Option<Attempt>>, &Reporter) + Send>;

impl Batch {
    /// The items to process.
    pub(crate) fn keys(&self) -> impl Iterator<Item = Key> {
        self.items.iter().map(|(key, _)| *key)
    }

    /// Starts a task for each of these attempts at the items, and reports the results.
    pub(crate) fn start(self, attempts: Vec<Option<Attempt>>, reporter: &Reporter) {
        (self.start)(attempts, reporter);
    }
}

/// The metrics of each attempt, resolved once because a lookup costs more than counting.
struct Measures {
    seconds: Histogram,
    attempts: [Counter; Outcome::NAMES.len()],
}

impl Measures {
    fn new() -> Self {
        Self {
            seconds: histogram!(metric::SEND_SECONDS),
            attempts: Outcome::NAMES.map(|outcome| counter!(metric::ATTEMPTS, "outcome" => outcome)),
        }
    }
}

struct Typed<J: Job> {
    job: J,
    policy: RetryPolicy,
    runs: Cache<Uuid, Shared<J>>,
    /// Registered with the first attempt, since only senders make any.
    measures: OnceLock<Measures>,
}

/// The shared part of a run, or why it is not usable.
type Shared<J> = Result<Arc<<J as Job>::Run>, Arc<str>>;

impl<J: Job> Typed<J> {
    fn new(job: J, installation: &RetryPolicy) -> Self {
        let policy = job.retry(installation);
        let dead_letters = policy.dead_letters && !J::HIDDEN;
        Self {
            policy: RetryPolicy { delays: installation.delays.clone(), dead_letters, ..policy },
            runs: Cache::new(CACHED_RUNS),
            measures: OnceLock::new(),
            job,
        }
    }

    async fn shared(&self, conn: &mut PgConnection, run_id: Uuid) -> sqlx::Result<Shared<J>> {
        if let Some(known) = self.runs.get(&run_id) {
            return Ok(known);
        }
        let shared = match self.job.run(conn, run_id).await {
            Ok(run) => Ok(Arc::new(run)),
            Err(JobError::Unusable(reason)) => Err(reason.into()),
            Err(JobError::Ledger(error)) => return Err(error),
        };
        self.runs.insert(run_id, shared.clone());
        Ok(shared)
    }

    /// Makes an attempt, and decides what follows.
    async fn process(&self, attempt: &Attempt, run: &J::Run, item: &J::Item) -> Next {
        let repetitions = if self.policy.repeats_at_once && !attempt.is_limited() { REPETITIONS } else { 0 };
        let mut waits = in_process(FIRST_REPETITION, repetitions);
        loop {
            let begun = Instant::now();
            let outcome = self.job.process(attempt, run, item).await;
            if !J::HIDDEN {
                let measures = self.measures.get_or_init(Measures::new);
                measures.seconds.record(begun.elapsed());
                measures.attempts[outcome.place()].increment(1);
            }
            if let Outcome::Withdrawn(why) = &outcome {
                debug!(item_id = attempt.key().item_id, attempt = attempt.key().attempt, ?why, "attempt withdrawn");
            }
            match (&outcome, waits.next()) {
                (Outcome::Retry(_), Some(wait)) => sleep(wait).await,
                _ => {
                    let closed_for =
                        if matches!(outcome, Outcome::Later(_)) { self.closed_for() } else { Duration::ZERO };
                    break after_send(attempt.item(), outcome, closed_for, &self.policy);
                }
            }
        }
    }

    /// The expected time until the gate opens.
    fn closed_for(&self) -> Duration {
        match self.job.gate() {
            Gate::Closed { until, .. } => until.saturating_duration_since(Instant::now()),
            Gate::Open | Gate::Trying => Duration::ZERO,
        }
    }
}

#[async_trait]
impl<J: Job> Kind for Typed<J> {
    fn name(&self) -> &'static str {
        J::KIND
    }

    fn is_hidden(&self) -> bool {
        J::HIDDEN
    }

    fn policy(&self) -> &RetryPolicy {
        &self.policy
    }

    fn gate(&self) -> Gate {
        self.job.gate()
    }

    fn withheld(&self, item: ItemMessage, why: Withheld) -> ItemResult {
        outcome::withheld(item, why, J::WITHHELD)
    }

    async fn load(self: Arc<Self>, conn: &mut PgConnection, granted: Vec<Granted>) -> sqlx::Result<Batch> {
        let mut shared: HashMap<Uuid, Shared<J>> = HashMap::new();
        for Granted { key, .. } in &granted {
            if let Entry::Vacant(vacant) = shared.entry(key.run_id) {
                vacant.insert(self.shared(conn, key.run_id).await?);
            }
        }
        let mut loaded = self.job.items(conn, &granted).await?;
        let (mut withheld, mut items, mut to_start) = (Vec::new(), Vec::new(), Vec::new());
        for Granted { key, position, .. } in granted {
            let item = match loaded.remove(&key.item_id).unwrap_or(Loaded::Withheld(Withheld::Deleted)) {
                Loaded::Withheld(why) => {
                    withheld.push((key, why));
                    continue;
                }
                Loaded::Item(item) => shared[&key.run_id].clone().map(|run| (run, item)),
                Loaded::Unusable(reason) => Err(reason.into()),
            };
            items.push((key, position));
            to_start.push(item);
        }
        let start: Start = Box::new(move |attempts, reporter| {
            for (item, attempt) in to_start.into_iter().zip(attempts) {
                let Some(attempt) = attempt else { continue };
                let (this, reporter) = (Arc::clone(&self), reporter.clone());
                tokio::spawn(async move {
                    let next = match item {
                        Ok((run, item)) => this.process(&attempt, &run, &item).await,
                        Err(reason) => {
                            after_send(attempt.item(), Outcome::failed(&*reason), Duration::ZERO, &this.policy)
                        }
                    };
                    reporter.finish(&attempt, next).await;
                });
            }
        });
        Ok(Batch { withheld, reasons: J::WITHHELD, items, start })
    }

    async fn settled(&self, conn: &mut PgConnection, settled: &[Settled]) -> sqlx::Result<()> {
        self.job.settled(conn, settled).await
    }
}
