//! The rate limits of the runs that this process sends: read from the ledger, and what of their send times went unused.

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

/// A limit that is changed holds within this time.
const READ_EVERY: Duration = Duration::from_millis(500);
/// Runs that are sent at the same time, and a good many more.
const KEPT: u64 = 4_096;

/// The rate limits of a process.
#[derive(Debug)]
pub struct Pace {
    pool: PgPool,
    answer_timeout: Duration,
    installation: Option<Rate>,
    burst: Duration,
    runs: Cache<Uuid, Option<Rate>>,
    /// Send times that were reserved and not used, by run.
    unused: Mutex<HashMap<Uuid, i32>>,
}

impl Pace {
    /// Nothing is read yet.
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

    /// How late a send may be.
    pub fn burst(&self) -> Duration {
        self.burst
    }

    /// The limits of these runs; none: nothing limits any of them.
    ///
    /// # Errors
    /// The database's.
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
                // A message may name a run that does not exist.
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

    /// Send times of a run's attempt that went unused: its next claim gives them back.
    pub fn add_unused(&self, run_id: Uuid, slots: i32) {
        if slots > 0 {
            *self.unused().entry(run_id).or_default() += slots;
        }
    }

    /// What a claim for these limits has to give back.
    pub fn take_unused(&self, limits: &mut Limits) {
        let mut unused = self.unused();
        limits.unused = if limits.installation.is_some() {
            mem::take(&mut *unused)
        } else {
            limits.runs.keys().filter_map(|run_id| unused.remove_entry(run_id)).collect()
        };
    }

    /// Reserves a send time for an attempt of a run that is claimed already.
    ///
    /// # Errors
    /// How long to wait before it is asked for again: there is none within `longest`, or PostgreSQL does not answer.
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
                warn!(%error, %run_id, "no send time can be reserved, trying again later");
                Err(longest)
            }
        }
    }

    fn unused(&self) -> MutexGuard<'_, HashMap<Uuid, i32>> {
        self.unused.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
