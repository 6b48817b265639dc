//! Queue depths: RabbitMQ must not hold more of a run than its window.

use std::{convert::Infallible, time::Duration};

use anyhow::{Context as _, Result};
use lapin::{Channel, Connection};
use mailrun_broker::depth;
use mailrun_core::queue::{ITEMS, RESULTS};
use serde::Serialize;
use tokio::time::sleep;

use super::place::Place;

/// Each check costs the broker almost nothing; more frequent ones would affect the measurement.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// Ready messages on a queue, without those delivered and unacknowledged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Depths {
    pub(super) items: u32,
    pub(super) results: u32,
}

impl Depths {
    /// The maximum of both, for each queue.
    pub(super) fn max(self, other: Self) -> Self {
        Self { items: self.items.max(other.items), results: self.results.max(other.results) }
    }
}

/// Measures the queues of a place.
pub(super) struct DepthProbe {
    channel: Channel,
    _connection: Connection,
    /// The maximum so far.
    pub(super) deepest: Depths,
}

impl DepthProbe {
    pub(super) async fn connect(place: &Place<'_>) -> Result<Self> {
        let (connection, channel) = place.channel().await?;
        Ok(Self { channel, _connection: connection, deepest: Depths::default() })
    }

    /// Polls until `work` is done.
    pub(super) async fn during<T>(&mut self, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::select! {
            done = work => done,
            Err(error) = self.poll() => Err(error),
        }
    }

    async fn poll(&mut self) -> Result<Infallible> {
        loop {
            let (items, results) = (depth(&self.channel, ITEMS).await, depth(&self.channel, RESULTS).await);
            let lost = "RabbitMQ does not report the depth of a queue";
            let now = Depths { items: items.context(lost)?, results: results.context(lost)? };
            self.deepest = self.deepest.max(now);
            sleep(POLL_INTERVAL).await;
        }
    }
}
