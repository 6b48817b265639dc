//! Runs that do not progress although no other check has found a fault.

use anyhow::Result;
use mailrun_ledger::audit::{self, NoProgress};

use super::{
    Target,
    report::{Finding, Report},
};

pub(super) const CHECK: &str = "progress";
/// By then the sweeper has republished anything missing.
const SWEEPS: u32 = 4;

/// Skipped if other checks have findings: these explain a run that does not progress.
pub(super) async fn examine(target: &Target, report: &mut Report) -> Result<()> {
    if report.remaining() > 0 {
        return Ok(());
    }
    let (after, limit) = (SWEEPS * target.stalled_after(), target.config.fan_out.sends_per_second);
    let found = audit::without_progress(&mut *target.pool.acquire().await?, after, limit).await?;
    if found.is_empty() {
        report.fine(CHECK, "all runs that are neither paused nor limited progress");
    }
    for NoProgress { run_id, for_s } in found {
        report.add(Finding::new(
            CHECK,
            format!("run {run_id} does not progress"),
            format!(
                "no item was settled for {for_s:.0} s. The run is not paused, no relay is stopped, its rate limit allows more, \
                and its messages are on their queues"
            ),
            "Restart the workers. If that does not help, report a bug with the logs",
        ));
    }
    Ok(())
}
