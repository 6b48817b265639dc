//! What the runs under way say: read once for each run, and not with every claim.

use std::sync::Arc;

use mailrun_shared::{
    store::runs,
    template::{Template, TemplateError},
};
use moka::future::Cache;
use sqlx::PgPool;
use uuid::Uuid;

/// Runs that are sent at the same time, and a good many more.
const KEPT: u64 = 256;

/// The templates of the runs that this process sends.
pub struct Templates {
    pool: PgPool,
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
    /// None is read yet.
    #[must_use]
    pub fn new(pool: PgPool) -> Self {
        Self { pool, read: Cache::new(KEPT) }
    }

    /// The template of a run, which never changes.
    pub async fn of(&self, run_id: Uuid) -> Read {
        let read = async {
            let (subject, body) = runs::text(&self.pool, run_id).await.map_err(TemplatesError::Ledger)?;
            Ok(Arc::new(Template::new(&subject, &body)?))
        };
        self.read.try_get_with(run_id, read).await
    }
}
