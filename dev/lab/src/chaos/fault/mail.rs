//! Faults of the mail server.

use std::time::Duration;

use anyhow::Result;
use tokio::time::sleep;

use super::super::{site::Site, smtp_faults::SmtpFault};

/// How many connections hang.
pub(super) const HANGING: u32 = 5;

/// Takes the mail server down for some time.
pub(super) async fn down(site: &Site<'_>, time: Duration) -> Result<()> {
    site.sink.set_down(true).await?;
    sleep(time).await;
    Ok(site.sink.set_down(false).await?)
}

/// Applies this fault for some time.
pub(super) async fn faulty(site: &Site<'_>, fault: SmtpFault, time: Duration) -> Result<()> {
    site.smtp_faults.apply(fault, time).await;
    Ok(())
}
