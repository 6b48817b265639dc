//! `mailrun doctor`: compares ledger, counters, claims, workers and queues, says what is wrong and what that means for the
//! recipients, and repairs it if asked to.
//!
//! It may be run at any moment, beside workers that work: what it reads together it reads in one snapshot, what may just be
//! on its way gets its time, and what it writes is written as the pipeline itself writes it. So there is nothing to stop
//! before, and nothing to fear from running it twice.

mod claims;
mod counters;
mod database;
mod durability;
mod letters;
mod lineage;
mod outbox;
mod progress;
mod queues;
mod report;
mod workers;

use std::time::Duration;

use anyhow::{Result, bail};
use clap::Args;
use mailrun_app::config::Config;
use mailrun_ledger::audit;
use sqlx::PgPool;

use self::report::{Finding, Report};
use crate::ledger::Ledger;

/// What `doctor` can be asked for.
#[derive(Args, Clone, Copy, Debug)]
pub struct Options {
    /// Repair what can be repaired.
    #[arg(long)]
    fix: bool,
    /// Print one JSON object on standard output, and nothing else.
    #[arg(long)]
    json: bool,
}

/// The Mailrun that is looked at.
struct Patient {
    /// Its settings, with the addresses of its servers.
    config: Config,
    pool: PgPool,
    /// Whether to repair.
    fix: bool,
}

impl Patient {
    fn dead_after(&self) -> Duration {
        self.config.heartbeat.dead_after
    }

    fn stalled_after(&self) -> Duration {
        self.config.sweep.stalled_after
    }

    /// `finding`, repaired if that is wanted.
    async fn mend<E: std::fmt::Display>(
        &self,
        finding: Finding,
        repair: impl Future<Output = Result<(), E>>,
    ) -> Finding {
        if self.fix { finding.mended(repair.await) } else { finding }
    }
}

/// Looks at everything, and prints what it finds.
///
/// # Errors
/// When something is wrong and was not repaired, or no Mailrun is configured or runs here.
pub async fn run(config: &Config, options: &Options) -> Result<()> {
    let ledger = Ledger::reach(config)?;
    let patient = Patient { config: config.clone(), pool: ledger.pool.clone(), fix: options.fix };
    let report = Box::pin(examine(&patient)).await;
    if options.json {
        println!("{}", report.json()?);
    } else {
        print!("{report}");
    }
    match report.remaining() {
        0 => Ok(()),
        1 if options.fix => bail!("one finding could not be repaired"),
        left if options.fix => bail!("{left} findings could not be repaired"),
        1 => bail!("one finding; --fix repairs what can be repaired"),
        left => bail!("{left} findings; --fix repairs what can be repaired"),
    }
}

/// The servers first, since a repair of what follows needs them; then in the order of the data.
async fn examine(patient: &Patient) -> Report {
    let mut report = Report::default();
    let readable = database::examine(patient, &mut report).await;
    let conveyor = queues::examine(patient, &mut report).await;
    if !readable {
        if let Some(conveyor) = &conveyor {
            workers::look_for_consumers(conveyor, None, &mut report).await;
        }
        return report;
    }
    let conveyor = conveyor.as_ref();
    let ended = lineage::examine(patient, conveyor, &mut report).await;
    report.note(lineage::CHECK, ended);
    // Whatever would be repaired may have been done since the backup.
    if conveyor.is_some_and(|conveyor| conveyor.broker.epoch().is_behind()) {
        return report;
    }
    let ended = counters::examine(patient, &mut report).await;
    report.note(counters::CHECK, ended);
    let ended = outbox::examine(patient, conveyor, &mut report).await;
    report.note(outbox::CHECK, ended);
    let ended = workers::examine(patient, conveyor, &mut report).await;
    report.note(workers::CHECK, ended);
    let ended = claims::examine(patient, conveyor, &mut report).await;
    report.note(claims::CHECK, ended);
    let ended = letters::examine(patient, conveyor, &mut report).await;
    report.note(letters::CHECK, ended);
    let ended = progress::examine(patient, &mut report).await;
    report.note(progress::CHECK, ended);
    report
}

/// The runs of which something is still open.
async fn unfinished(patient: &Patient) -> Result<Vec<audit::Unfinished>> {
    Ok(audit::unfinished(&mut *patient.pool.acquire().await?).await?)
}

/// So many of them, in words: "1 run is", "3 runs are".
fn are(count: usize, one: &str, many: &str) -> String {
    if count == 1 { format!("1 {one} is") } else { format!("{} {many} are", grouped(count)) }
}

/// A number as the pages write it.
fn grouped(count: usize) -> String {
    mailrun_web::grouped(i64::try_from(count).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_told_in_words() {
        assert_eq!(are(1, "run", "runs"), "1 run is");
        assert_eq!(are(1200, "run", "runs"), "1,200 runs are");
    }
}
