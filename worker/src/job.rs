//! A job: what the items of a run are, and how one is processed.
//!
//! The stages of the worker do the rest: claims, permits, retries, dead letters, counters, pause, cancel, rate limits and repairs.
//! `docs/your-own-job.md` adds a job; Mailrun's own are in `jobs`.

use std::{collections::HashMap, future::Future};

use serde::de::DeserializeOwned;
use sqlx::PgConnection;
use uuid::Uuid;

pub use mailrun_core::{
    claim::Withheld,
    outcome::{Outcome, RetryPolicy},
};
pub use mailrun_ledger::{attempts::Granted, progress::Settled};

pub use crate::{attempt::Attempt, gate::Gate};

/// One kind of run.
///
/// A job is called by several worker processes at the same time, with many items in parallel. At most one attempt at an item is in
/// progress, as long as [`Attempt::may_proceed`] is called before the attempt has an effect.
pub trait Job: Send + Sync + 'static {
    /// The kind, stored with each run. Never change it.
    const KIND: &'static str;
    /// The reasons for which [`Job::items`] withholds items, by code. A skipped item shows its reason. 1 to 9 are reserved.
    const WITHHELD: &'static [(u8, &'static str)] = &[];
    /// Whether the runs are hidden: in no list, count or metric, without dead letters, and deleted after a day. They are submitted
    /// with [`NewRun::hidden`](mailrun_ledger::submit::NewRun::hidden).
    const HIDDEN: bool = false;

    /// What all items of a run share.
    type Run: Send + Sync + 'static;
    /// What one item needs.
    type Item: Send + Sync + 'static;

    /// Loads what all items of a run share. Called once for each run and process, and then cached.
    fn run(&self, ledger: &mut PgConnection, run_id: Uuid) -> impl Future<Output = Result<Self::Run, JobError>> + Send;

    /// Loads claimed items: one query for the batch, if any. An item that is not returned fails, because it was deleted.
    fn items(
        &self,
        ledger: &mut PgConnection,
        granted: &[Granted],
    ) -> impl Future<Output = sqlx::Result<Items<Self::Item>>> + Send;

    /// Makes one attempt. [`Outcome::Retry`], [`Outcome::Later`] and [`Outcome::Failed`] mean that it certainly had no effect.
    /// If that cannot be known, return [`Outcome::Unknown`], and a person decides.
    fn process(&self, attempt: &Attempt, run: &Self::Run, item: &Self::Item) -> impl Future<Output = Outcome> + Send;

    /// Changes the ledger when items are settled: called once for each batch, in the transaction that counts them.
    fn settled(
        &self,
        _ledger: &mut PgConnection,
        _settled: &[Settled],
    ) -> impl Future<Output = sqlx::Result<()>> + Send {
        async { Ok(()) }
    }

    /// Whether the remote side accepts work at present. While the gate is closed nothing is claimed.
    fn gate(&self) -> Gate {
        Gate::Open
    }

    /// The retry policy of this job. `installation` is the configured policy; its delays always apply.
    fn retry(&self, installation: &RetryPolicy) -> RetryPolicy {
        installation.clone()
    }
}

/// Claimed items, by id.
pub type Items<T> = HashMap<i64, Loaded<T>>;

/// A claimed item.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Loaded<T> {
    /// To be processed.
    Item(T),
    /// No attempt at it is made; it is skipped with this reason of [`Job::WITHHELD`], or fails as deleted.
    Withheld(Withheld),
    /// Its data cannot be used: it fails with this reason.
    Unusable(String),
}

/// Items whose data is all that the job needs, as it was submitted with [`Data`](mailrun_ledger::submit::Data).
#[must_use]
pub fn from_data<T: DeserializeOwned>(granted: &[Granted]) -> Items<T> {
    let loaded = |granted: &Granted| {
        Some(match T::deserialize(granted.data.as_ref()?) {
            Ok(item) => Loaded::Item(item),
            Err(error) => Loaded::Unusable(format!("the item's data is not usable: {error}")),
        })
    };
    granted.iter().filter_map(|granted| Some((granted.key.item_id, loaded(granted)?))).collect()
}

/// Why the shared part of a run could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    /// The ledger did not answer: the items are claimed again later.
    #[error(transparent)]
    Ledger(#[from] sqlx::Error),
    /// It is not usable: the items fail with this reason.
    #[error("{0}")]
    Unusable(String),
}
