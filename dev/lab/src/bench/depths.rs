//! How deep the queues get: RabbitMQ is to hold no more of a run than its window.

use std::{convert::Infallible, time::Duration};

use anyhow::{Context as _, Result};
use lapin::{Channel, Connection};
use mailrun_broker::depth;
use mailrun_core::queue::{ITEMS, RESULTS};
use serde::Serialize;
use tokio::time::sleep;

use super::place::Place;

/// Each look costs the broker next to nothing; more of them would cost the measurement something.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Messages that waited on a queue, not counting those that somebody had in hand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Depths {
    pub(super) items: u32,
    pub(super) results: u32,
}

impl Depths {
    /// The greater of both, queue by queue.
    pub(super) fn max(self, other: Self) -> Self {
        Self { items: self.items.max(other.items), results: self.results.max(other.results) }
    }
}

/// Looks at the queues of a place.
pub(super) struct Lead {
    channel: Channel,
    _connection: Connection,
    /// The most that was seen.
    pub(super) deepest: Depths,
}

impl Lead {
    /// # Errors
    /// The broker's.
    pub(super) async fn connect(place: &Place<'_>) -> Result<Self> {
        let (connection, channel) = place.channel().await?;
        Ok(Self { channel, _connection: connection, deepest: Depths::default() })
    }

    /// Looks again and again until `work` is done.
    ///
    /// # Errors
    /// Those of `work`, and the broker's.
    pub(super) async fn during<T>(&mut self, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::select! {
            done = work => done,
            Err(error) = self.look_on() => Err(error),
        }
    }

    async fn look_on(&mut self) -> Result<Infallible> {
        loop {
            let (items, results) = (depth(&self.channel, ITEMS).await, depth(&self.channel, RESULTS).await);
            let lost = "RabbitMQ does not tell how deep a queue is";
            let now = Depths { items: items.context(lost)?, results: results.context(lost)? };
            self.deepest = self.deepest.max(now);
            sleep(LOOK_EVERY).await;
        }
    }
}
