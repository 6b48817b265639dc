//! The rate limits of the runs that this process sends, read from the ledger, and reserved send times that went unused.

use std::{
    collections::{HashMap, HashSet},
    mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use mailrun_app::config::FanOutConfig;
use mailrun_core::pacing::Rate;
use mailrun_ledger::{
    attempts::{self, Limits},
    in_time, pacing,
};
use moka::future::Cache;
use sqlx::PgPool;
use tokio::time::Instant;
use tracing::warn;
use uuid::Uuid;

/// A changed limit takes effect within this time.
const READ_EVERY: Duration = Duration::from_millis(500);
/// Cached runs: many more than are sent at the same time.
const KEPT: u64 = 4_096;

/// The rate limits of a process.
#[derive(Debug)]
pub struct Pace {
    pool: PgPool,
    answer_timeout: Duration,
    installation: Option<Rate>,
    burst: Duration,
    runs: Cache<Uuid, Option<Rate>>,
    /// Reserved send times that were not used, by run.
    unused: Mutex<HashMap<Uuid, i32>>,
}

impl Pace {
    pub fn new(config: &FanOutConfig, pool: PgPool, answer_timeout: Duration) -> Arc<Self> {
        Arc::new(Self {
            pool,
            answer_timeout,
            installation: config.sends_per_second.map(Rate::new),
            burst: config.rate_burst,
            runs: Cache::builder().max_capacity(KEPT).time_to_live(READ_EVERY).build(),
            unused: Mutex::default(),
        })
    }

    /// How long after its send time an attempt may still be made.
    pub fn burst(&self) -> Duration {
        self.burst
    }

    /// The limits of these runs. `None`: none of them is limited.
    pub async fn limits(&self, run_ids: impl IntoIterator<Item = Uuid>) -> sqlx::Result<Option<Limits>> {
        let run_ids: HashSet<Uuid> = run_ids.into_iter().collect();
        let mut limits = Limits { installation: self.installation, ..Limits::default() };
        let mut unread = Vec::new();
        for run_id in run_ids {
            match self.runs.get(&run_id).await {
                Some(rate) => self.add(&mut limits, run_id, rate),
                None => unread.push(run_id),
            }
        }
        if !unread.is_empty() {
            let read = async { pacing::rates(&mut *self.pool.acquire().await?, &unread).await };
            let rates = in_time(self.answer_timeout, read).await?;
            for run_id in unread {
                // The run may not exist: messages can name any run.
                let rate = rates.get(&run_id).copied().flatten();
                self.runs.insert(run_id, rate).await;
                self.add(&mut limits, run_id, rate);
            }
        }
        Ok((limits.installation.is_some() || !limits.runs.is_empty()).then_some(limits))
    }

    fn add(&self, limits: &mut Limits, run_id: Uuid, rate: Option<Rate>) {
        if rate.is_some() || self.installation.is_some() {
            limits.runs.insert(run_id, rate);
        }
    }

    /// Records send times of a run that went unused. The next claim for the run returns them.
    pub fn add_unused(&self, run_id: Uuid, slots: i32) {
        if slots > 0 {
            *self.unused().entry(run_id).or_default() += slots;
        }
    }

    /// Moves the unused send times to `limits`, for a claim to return.
    pub fn take_unused(&self, limits: &mut Limits) {
        let mut unused = self.unused();
        limits.unused = if limits.installation.is_some() {
            mem::take(&mut *unused)
        } else {
            limits.runs.keys().filter_map(|run_id| unused.remove_entry(run_id)).collect()
        };
    }

    /// Reserves a send time for an attempt that is claimed already.
    ///
    /// # Errors
    /// How long to wait before the next try: there is no send time within `longest`, or PostgreSQL does not answer.
    pub async fn reserve(&self, run_id: Uuid, longest: Duration) -> Result<Instant, Duration> {
        let reserve = async {
            let Some(mut limits) = self.limits([run_id]).await? else { return Ok(Some(Duration::ZERO)) };
            self.take_unused(&mut limits);
            let mut conn = self.pool.acquire().await?;
            attempts::reserve(&mut conn, run_id, &limits, longest).await
        };
        match in_time(self.answer_timeout, reserve).await {
            Ok(Some(wait)) => Ok(Instant::now() + wait),
            Ok(None) => Err(longest),
            Err(error) => {
                warn!(%error, %run_id, "can't reserve a send time, trying again later");
                Err(longest)
            }
        }
    }

    fn unused(&self) -> MutexGuard<'_, HashMap<Uuid, i32>> {
        self.unused.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
