//! Runs that do not progress, and nothing above says why.

use anyhow::Result;
use mailrun_ledger::audit::{self, NoProgress};

use super::{
    Patient,
    report::{Finding, Report},
};

pub(super) const CHECK: &str = "progress";
/// The sweeper has put back by then whatever was missing.
const SWEEPS: u32 = 4;

/// Looks for them. Findings of the other checks explain a run that does not progress, so it is not named again.
///
/// # Errors
/// The database's.
pub(super) async fn examine(patient: &Patient, report: &mut Report) -> Result<()> {
    if report.remaining() > 0 {
        return Ok(());
    }
    let (after, limit) = (SWEEPS * patient.stalled_after(), patient.config.fan_out.sends_per_second);
    let found = audit::without_progress(&mut *patient.pool.acquire().await?, after, limit).await?;
    if found.is_empty() {
        report.fine(CHECK, "every run that is neither paused nor limited progresses");
    }
    for NoProgress { run_id, for_s } in found {
        report.add(Finding::new(
            CHECK,
            format!("run {run_id} does not progress"),
            format!(
                "no item of it was settled for {for_s:.0} s. It is not paused, no relay is closed, its rate limit allows more, \
                 and its messages are where they belong"
            ),
            "Restart the workers; if that does not help, this is a fault of Mailrun: keep the log",
        ));
    }
    Ok(())
}
