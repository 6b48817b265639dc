//! PostgreSQL: whether it is reachable, has this program's schema, and agrees about the time.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use mailrun_ledger::{
    durability::{self as store_durability, Durability},
    schema::{self, Difference},
};
use sqlx::{Connection as _, PgConnection};
use tokio::time::timeout;

use super::{
    Target, durability,
    report::{Finding, Report},
};

const CHECK: &str = "PostgreSQL";
const TIMEOUT: Duration = Duration::from_secs(10);
/// Clocks may differ by this much.
const TOLERANCE: TimeDelta = TimeDelta::seconds(5);

/// Checks it. False: the ledger cannot be read.
pub(super) async fn examine(target: &Target, report: &mut Report) -> bool {
    match timeout(TIMEOUT, inspect(target)).await {
        Ok(Ok((difference, apart, durability))) => {
            durability::examine(&durability, report);
            report_difference(&difference, apart, report)
        }
        Ok(Err(error)) => does_not_answer(&error.to_string(), report),
        Err(_) => does_not_answer("it does not respond", report),
    }
}

/// Uses its own connection: the pool would wait for a missing server and then not give the reason.
async fn inspect(target: &Target) -> sqlx::Result<(Difference, TimeDelta, Durability)> {
    let mut conn = PgConnection::connect_with(&target.pool.connect_options()).await?;
    let difference = schema::difference(&mut conn).await?;
    let before = Utc::now();
    let theirs = schema::now(&mut conn).await?;
    let apart = apart(before, theirs, Utc::now());
    let durability = store_durability::read(&mut conn).await?;
    conn.close().await?;
    Ok((difference, apart, durability))
}

/// The minimum difference between their clock and ours: theirs was read between our two readings.
fn apart(before: DateTime<Utc>, theirs: DateTime<Utc>, after: DateTime<Utc>) -> TimeDelta {
    (before - theirs).max(theirs - after).max(TimeDelta::zero())
}

fn does_not_answer(error: &str, report: &mut Report) -> bool {
    report.add(Finding::new(
        CHECK,
        "PostgreSQL is unavailable",
        format!(
            "{error}. Until it is available, no list is accepted and nothing is sent or counted. Accepted runs are safe and \
            continue automatically; they could not be checked now"
        ),
        "Start PostgreSQL, or correct database.url or DATABASE_URL",
    ));
    false
}

fn report_difference(difference: &Difference, apart: TimeDelta, report: &mut Report) -> bool {
    let Difference { missing, unknown, altered } = difference;
    let named = |versions: &[i64]| versions.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    if !missing.is_empty() {
        report.add(Finding::new(
            CHECK,
            "the schema is older than this program",
            format!(
                "Migrations are missing: {}. Processes of this version cannot use it, so their sends wait. The rest of the \
                ledger cannot be checked",
                named(missing)
            ),
            "Run mailrun setup",
        ));
    }
    if !unknown.is_empty() {
        report.add(Finding::new(
            CHECK,
            "the schema is newer than this program",
            format!("Migrations unknown to this version: {}. It may misread data of newer versions", named(unknown)),
            "Use the version of Mailrun that ran mailrun setup last",
        ));
    }
    if !altered.is_empty() {
        report.add(Finding::new(
            CHECK,
            "the schema was created by other migrations",
            format!(
                "Migrations that differ or are incomplete: {}. mailrun setup will refuse this database",
                named(altered)
            ),
            "Find out which program created this schema, or restore a backup",
        ));
    }
    if apart > TOLERANCE {
        report.add(Finding::new(
            CHECK,
            "the clocks differ",
            format!(
                "This machine and PostgreSQL differ by {} s. Worker deaths and due times use only PostgreSQL's clock, so nothing is \
                sent twice. But dead letters have the time of the worker's machine, and a replay leaves those on the queue that \
                appear to be newer than itself",
                apart.num_seconds()
            ),
            "Synchronise the clocks, for example with NTP",
        ));
    }
    if !report.has_found(CHECK) {
        report.fine(CHECK, "available; the schema is up to date, and the clocks agree");
    }
    missing.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_answer_is_not_a_clock_difference() {
        let at = |seconds| DateTime::UNIX_EPOCH + TimeDelta::seconds(seconds);
        assert_eq!(apart(at(10), at(12), at(19)), TimeDelta::zero());
        assert_eq!(apart(at(10), at(4), at(11)), TimeDelta::seconds(6));
        assert_eq!(apart(at(10), at(20), at(11)), TimeDelta::seconds(9));
    }

    #[test]
    fn without_a_migration_the_ledger_is_not_read() {
        let reported = |difference: &Difference, apart| {
            let mut report = Report::default();
            (report_difference(difference, apart, &mut report), report.remaining())
        };
        let same = Difference::default();
        assert_eq!(reported(&same, TimeDelta::seconds(1)), (true, 0));
        assert_eq!(reported(&same, TimeDelta::seconds(60)), (true, 1));
        assert_eq!(reported(&Difference { unknown: vec![9], ..same.clone() }, TimeDelta::zero()), (true, 1));
        assert_eq!(reported(&Difference { missing: vec![8], ..same }, TimeDelta::zero()), (false, 1));
    }
}
