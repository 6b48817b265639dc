//! Faults of the network between our processes and one server.

use std::time::Duration;

use anyhow::Result;
use rand::{RngExt as _, rngs::StdRng};
use tokio::time::{Instant, sleep};

use super::super::{
    proxy::Proxy,
    site::{ANSWER, HEARTBEAT},
};

/// Cuts all connections, repeatedly for some time.
pub(super) async fn cut(proxy: &Proxy, time: Duration, rng: &mut StdRng) -> Result<()> {
    let end = Instant::now() + time;
    while Instant::now() < end {
        proxy.cut();
        sleep(Duration::from_millis(rng.random_range(100..800))).await;
    }
    Ok(())
}

/// Delays traffic for some time.
pub(super) async fn delay(proxy: &Proxy, time: Duration, rng: &mut StdRng) -> Result<()> {
    proxy.slow(Duration::from_millis(rng.random_range(200..500)), time).await;
    Ok(())
}

/// Drops all traffic, for `more` than the longest timeout.
pub(super) async fn hole(proxy: &Proxy, more: Duration) -> Result<()> {
    proxy.hole(ANSWER.max(2 * HEARTBEAT) + more).await;
    Ok(())
}
