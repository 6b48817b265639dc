//! What the runs under way say: read once for each run, and not with every claim.

use std::{panic::resume_unwind, sync::Arc, time::Duration};

use mailrun_core::template::{Template, TemplateError};
use mailrun_ledger::{in_time, runs};
use moka::future::Cache;
use sqlx::PgPool;
use tokio::task::spawn_blocking;
use uuid::Uuid;

/// Runs that are sent at the same time, and a good many more.
const KEPT: u64 = 256;

/// The templates of the runs that this process sends.
pub struct Templates {
    pool: PgPool,
    answer_timeout: Duration,
    read: Cache<Uuid, Arc<Template>>,
}

/// Why there is none.
#[derive(Debug, thiserror::Error)]
pub enum TemplatesError {
    /// It can't be read now.
    #[error(transparent)]
    Ledger(sqlx::Error),
    /// It can't be used. The form checks it, so it is of an older version, or written by hand.
    #[error(transparent)]
    Template(#[from] TemplateError),
}

/// A run's template, or why there is none.
pub type Read = Result<Arc<Template>, Arc<TemplatesError>>;

impl Templates {
    /// None is read yet. The ledger may take `answer_timeout` to answer.
    #[must_use]
    pub fn new(pool: PgPool, answer_timeout: Duration) -> Self {
        Self { pool, answer_timeout, read: Cache::new(KEPT) }
    }

    /// The template of a run, which never changes.
    pub async fn of(&self, run_id: Uuid) -> Read {
        let read = async {
            let text = in_time(self.answer_timeout, runs::text(&self.pool, run_id)).await;
            let (subject, body) = text.map_err(TemplatesError::Ledger)?;
            // Reading a long text takes as long as writing some mails.
            match spawn_blocking(move || Template::new(&subject, &body)).await {
                Ok(template) => Ok(Arc::new(template?)),
                Err(error) if error.is_panic() => resume_unwind(error.into_panic()),
                Err(_) => Err(TemplatesError::Ledger(sqlx::Error::WorkerCrashed)),
            }
        };
        self.read.try_get_with(run_id, read).await
    }
}
