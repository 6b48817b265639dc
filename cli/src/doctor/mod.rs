//! `mailrun doctor`: compares ledger, counters, claims, workers and queues, reports faults and what they mean for the recipients,
//! and repairs them if asked to.
//!
//! It can run at any time beside working processes: related data is read in one snapshot, messages in progress get time to
//! arrive, and repairs are written the way the pipeline writes. It is therefore safe to run it repeatedly and concurrently.

mod claims;
mod counters;
mod database;
mod dead_letters;
mod durability;
mod lineage;
mod outbox;
mod progress;
mod queues;
mod report;
mod workers;

use std::{collections::BTreeSet, time::Duration};

use anyhow::{Result, bail};
use clap::Args;
use mailrun_app::config::Config;
use mailrun_ledger::audit;
use mailrun_worker::{Jobs, Kinds};
use sqlx::PgPool;

use self::report::{Finding, Report};
use crate::ledger::Ledger;

/// Options of `mailrun doctor`.
#[derive(Args, Clone, Copy, Debug)]
pub struct Options {
    /// Repair what can be repaired
    #[arg(long)]
    fix: bool,
    /// Print one JSON object on standard output, and nothing else
    #[arg(long)]
    json: bool,
}

/// The installation that is checked.
struct Target {
    config: Config,
    kinds: Kinds,
    pool: PgPool,
    fix: bool,
}

impl Target {
    fn dead_after(&self) -> Duration {
        self.config.heartbeat.dead_after
    }

    fn stalled_after(&self) -> Duration {
        self.config.sweep.stalled_after
    }

    /// Returns `finding`, after carrying out `repair` if `--fix` is given.
    async fn repair<E: std::fmt::Display>(
        &self,
        finding: Finding,
        repair: impl Future<Output = Result<(), E>>,
    ) -> Finding {
        if self.fix { finding.with_repair(repair.await) } else { finding }
    }
}

/// Runs all checks and prints the report. Fails if a finding remains, or if no servers are configured.
pub async fn run(config: &Config, jobs: Jobs, options: &Options) -> Result<()> {
    let ledger = Ledger::open(config)?;
    let (kinds, _) = mailrun_worker::kinds(config, jobs, &BTreeSet::new())?;
    let target = Target { config: config.clone(), kinds, pool: ledger.pool.clone(), fix: options.fix };
    let report = Box::pin(examine(&target)).await;
    if options.json {
        println!("{}", report.json()?);
    } else {
        print!("{report}");
    }
    match report.remaining() {
        0 => Ok(()),
        1 if options.fix => bail!("1 finding could not be repaired"),
        left if options.fix => bail!("{left} findings could not be repaired"),
        1 => bail!("1 finding; --fix repairs what can be repaired"),
        left => bail!("{left} findings; --fix repairs what can be repaired"),
    }
}

/// The servers first, because later repairs need them; then in the order of the data.
async fn examine(target: &Target) -> Report {
    let mut report = Report::default();
    let readable = database::examine(target, &mut report).await;
    let rabbitmq = queues::examine(target, &mut report).await;
    if !readable {
        if let Some(rabbitmq) = &rabbitmq {
            workers::check_consumers(rabbitmq, None, &mut report).await;
        }
        return report;
    }
    let rabbitmq = rabbitmq.as_ref();
    let result = lineage::examine(target, rabbitmq, &mut report).await;
    report.note(lineage::CHECK, result);
    // A repair may repeat what was done after the backup.
    if rabbitmq.is_some_and(|rabbitmq| rabbitmq.broker.epoch().is_behind()) {
        return report;
    }
    let result = counters::examine(target, &mut report).await;
    report.note(counters::CHECK, result);
    let result = outbox::examine(target, rabbitmq, &mut report).await;
    report.note(outbox::CHECK, result);
    let result = workers::examine(target, rabbitmq, &mut report).await;
    report.note(workers::CHECK, result);
    let result = claims::examine(target, rabbitmq, &mut report).await;
    report.note(claims::CHECK, result);
    let result = dead_letters::examine(target, rabbitmq, &mut report).await;
    report.note(dead_letters::CHECK, result);
    let result = progress::examine(target, &mut report).await;
    report.note(progress::CHECK, result);
    report
}

/// The runs with open items.
async fn unfinished(target: &Target) -> Result<Vec<audit::Unfinished>> {
    Ok(audit::unfinished(&mut *target.pool.acquire().await?).await?)
}

/// A count in words: "1 run is", "3 runs are".
fn are(count: usize, one: &str, many: &str) -> String {
    if count == 1 { format!("1 {one} is") } else { format!("{} {many} are", grouped(count)) }
}

/// A number formatted as on the pages.
fn grouped(count: usize) -> String {
    mailrun_web::grouped(i64::try_from(count).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_counts() {
        assert_eq!(are(1, "run", "runs"), "1 run is");
        assert_eq!(are(1200, "run", "runs"), "1,200 runs are");
    }
}
