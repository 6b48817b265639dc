//! What the stages share.

use std::{sync::Arc, time::Duration};

use mailrun_broker::{Broker, Publisher};
use sqlx::PgPool;

use crate::kinds::Kinds;

/// What the stages share: the ledger, the broker and the jobs. Each stage has its own settings beside it.
#[derive(Clone, Debug)]
pub(crate) struct Context {
    pub(crate) pool: PgPool,
    pub(crate) broker: Arc<Broker>,
    pub(crate) publisher: Publisher,
    pub(crate) kinds: Arc<Kinds>,
    /// How long the ledger may take to answer.
    pub(crate) answer_timeout: Duration,
    /// Results in one message at most.
    pub(crate) result_batch: usize,
}
