//! What all stages share.

use std::{sync::Arc, time::Duration};

use mailrun_broker::{Broker, Publisher};
use sqlx::PgPool;

use crate::kinds::Kinds;

/// The ledger, the broker and the jobs. Each stage also has its own settings.
#[derive(Clone, Debug)]
pub(crate) struct Context {
    pub(crate) pool: PgPool,
    pub(crate) broker: Arc<Broker>,
    pub(crate) publisher: Publisher,
    pub(crate) kinds: Arc<Kinds>,
    /// How long the ledger may take to answer.
    pub(crate) answer_timeout: Duration,
    /// The maximum number of results in one message.
    pub(crate) result_batch: usize,
}
