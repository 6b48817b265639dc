//! `mailrun prune`: deletes old runs.

use anyhow::Result;
use indicatif::ProgressBar;
use mailrun_app::config::Config;
use mailrun_core::setting::DAY;

use crate::ledger::Ledger;

/// Deletes the runs that finished more than `days` ago, by default `retention.keep_days`.
pub async fn run(config: &Config, ledger: &Ledger, days: Option<u32>) -> Result<()> {
    let keep = match days {
        Some(days) => DAY * days,
        None => config.retention.keep().ok_or_else(|| {
            anyhow::anyhow!("runs are kept forever: use --older-than-days N, or set retention.keep_days")
        })?,
    };
    let spinner = ProgressBar::new_spinner();
    let pruned = mailrun_worker::prune::prune(&ledger.pool, Some(keep), config.database.answer_timeout, |so_far| {
        spinner.set_message(format!("{} runs, {} invitations deleted", so_far.runs, so_far.items));
        spinner.tick();
    })
    .await?;
    spinner.finish_and_clear();
    println!("Deleted {} runs and {} invitations. Who was emailed stays recorded.", pruned.runs, pruned.items);
    Ok(())
}
