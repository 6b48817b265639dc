//! Faults of the mail server.

use std::time::Duration;

use anyhow::Result;
use tokio::time::sleep;

use super::super::{site::Site, weather::Trouble};

/// So many connections hang when some do.
pub(super) const HANGING: u32 = 5;

/// Is down for some time.
pub(super) async fn down(site: &Site<'_>, time: Duration) -> Result<()> {
    site.sink.set_down(true).await?;
    sleep(time).await;
    Ok(site.sink.set_down(false).await?)
}

/// Has this trouble for some time.
pub(super) async fn trouble(site: &Site<'_>, trouble: Trouble, time: Duration) -> Result<()> {
    site.weather.bad(trouble, time).await;
    Ok(())
}
