//! Remembers the results of this process and repeats them until they are seen in the ledger.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use mailrun_core::{item::Key, message::ItemResult, retry::Reconnect};
use mailrun_ledger::{attempts, in_time, receipts};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};
use uuid::Uuid;

use super::Senders;

/// How often remembered outcomes are compared with the ledger, and how many at a time.
const REMEMBER_INTERVAL: Duration = Duration::from_millis(500);
const REMEMBER_BATCH: usize = 2_000;

impl Senders {
    /// Compares remembered outcomes with the ledger: forgets what is applied, repeats what is not.
    pub(super) async fn remember(self: Arc<Self>, stop: CancellationToken) {
        let mut first_receipt = 0;
        let mut backoff = Reconnect::default();
        let mut wait = REMEMBER_INTERVAL;
        while stop.run_until_cancelled(sleep(wait)).await.is_some() {
            wait = match self.look_up(&mut first_receipt).await {
                // A full batch: continue without a pause.
                Ok(REMEMBER_BATCH) => Duration::ZERO,
                Ok(_) => {
                    backoff.reset();
                    REMEMBER_INTERVAL
                }
                Err(error) => {
                    debug!(%error, "can't compare outcomes with the ledger");
                    backoff.next_wait()
                }
            };
        }
    }

    /// `first_receipt`: earlier receipts are already deleted.
    async fn look_up(&self, first_receipt: &mut i64) -> sqlx::Result<usize> {
        let keys = self.claims().to_check(Instant::now(), REMEMBER_BATCH);
        if keys.is_empty() {
            return Ok(0);
        }
        let ids: Vec<i64> = keys.iter().map(|key| key.item_id).collect();
        let look = async { attempts::standings(&mut *self.context.pool.acquire().await?, &ids).await };
        let standings = in_time(self.context.answer_timeout, look).await?;
        let standings: HashMap<_, _> = standings.into_iter().collect();
        let now = Instant::now();
        let repeats: Vec<(Uuid, ItemResult)> = {
            let mut claims = self.claims();
            let mut repeat = |key: &Key| match standings.get(&key.item_id) {
                // The result waits for a process of a later version, so it stays remembered.
                Some(None) => {
                    claims.check_later(*key, now);
                    None
                }
                found => claims.checked(*key, found.copied().flatten(), now),
            };
            keys.iter().filter_map(|key| Some((key.run_id, repeat(key)?))).collect()
        };
        self.publish(self.results(repeats)).await;
        self.delete_receipts(first_receipt).await?;
        Ok(keys.len())
    }

    async fn delete_receipts(&self, first: &mut i64) -> sqlx::Result<()> {
        let until = self.claims().first_needed_receipt();
        if until > *first {
            let delete = async {
                let mut conn = self.context.pool.acquire().await?;
                receipts::delete(&mut conn, self.heartbeat.worker_id(), *first, until).await
            };
            in_time(self.context.answer_timeout, delete).await?;
            *first = until;
        }
        Ok(())
    }

    /// Stores a receipt for sent items that were not seen counted: after the worker has ended, nothing repeats their results.
    pub(super) async fn last_receipt(&self) {
        let receipt = {
            let mut claims = self.claims();
            let keys = claims.without_receipt();
            claims.receipt(&keys)
        };
        let write = async {
            receipts::write(&mut *self.context.pool.acquire().await?, self.heartbeat.worker_id(), &receipt).await
        };
        if let Err(error) = in_time(self.context.answer_timeout, write).await {
            warn!(%error, sent = receipt.item_ids.len(), "can't write the last receipt");
        }
    }
}
