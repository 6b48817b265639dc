//! PostgreSQL: whether it answers, holds the schema of this program, and agrees about the time.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use mailrun_ledger::{
    durability::{self as store_durability, Durability},
    schema::{self, Difference},
};
use sqlx::{Connection as _, PgConnection};
use tokio::time::timeout;

use super::{
    Patient, durability,
    report::{Finding, Report},
};

const CHECK: &str = "PostgreSQL";
/// It answers within this time, or not at all.
const PATIENCE: Duration = Duration::from_secs(10);
/// Clocks that differ by less do no harm.
const TOLERANCE: TimeDelta = TimeDelta::seconds(5);

/// Looks at it. False: the ledger can't be read.
pub(super) async fn examine(patient: &Patient, report: &mut Report) -> bool {
    match timeout(PATIENCE, look(patient)).await {
        Ok(Ok((difference, apart, durability))) => {
            durability::tell(&durability, report);
            tell(&difference, apart, report)
        }
        Ok(Err(error)) => does_not_answer(&error.to_string(), report),
        Err(_) => does_not_answer("it is silent", report),
    }
}

/// On a connection of its own: the pool would wait for a server that is not there, and then not say why.
async fn look(patient: &Patient) -> sqlx::Result<(Difference, TimeDelta, Durability)> {
    let mut conn = PgConnection::connect_with(&patient.pool.connect_options()).await?;
    let difference = schema::difference(&mut conn).await?;
    let before = Utc::now();
    let theirs = schema::now(&mut conn).await?;
    let apart = apart(before, theirs, Utc::now());
    let durability = store_durability::read(&mut conn).await?;
    conn.close().await?;
    Ok((difference, apart, durability))
}

/// How far their clock is from ours, at least: when they looked at it is known to lie between two looks at ours.
fn apart(before: DateTime<Utc>, theirs: DateTime<Utc>, after: DateTime<Utc>) -> TimeDelta {
    (before - theirs).max(theirs - after).max(TimeDelta::zero())
}

fn does_not_answer(error: &str, report: &mut Report) -> bool {
    report.add(Finding::new(
        CHECK,
        "PostgreSQL can't be used",
        format!(
            "{error}. While that lasts no list is accepted and nothing is sent or counted. What was accepted before is \
             safe, and goes on by itself afterwards; it could not be looked at now"
        ),
        "Start PostgreSQL, or mend its address in database.url or DATABASE_URL",
    ));
    false
}

fn tell(difference: &Difference, apart: TimeDelta, report: &mut Report) -> bool {
    let Difference { missing, unknown, altered } = difference;
    let named = |versions: &[i64]| versions.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    if !missing.is_empty() {
        report.add(Finding::new(
            CHECK,
            "the schema is older than this program",
            format!(
                "Migrations are missing: {}. Processes of this version can't work with it, so what they were to send \
                 waits. The rest of the ledger can't be looked at",
                named(missing)
            ),
            "Run mailrun setup",
        ));
    }
    if !unknown.is_empty() {
        report.add(Finding::new(
            CHECK,
            "the schema is newer than this program",
            format!(
                "Migrations that this version does not know: {}. It may misread what newer ones write",
                named(unknown)
            ),
            "Use the version of Mailrun that ran mailrun setup last",
        ));
    }
    if !altered.is_empty() {
        report.add(Finding::new(
            CHECK,
            "the schema was made by other migrations",
            format!(
                "Migrations that were different ones, or broken off: {}. mailrun setup will refuse this database",
                named(altered)
            ),
            "Find out which program made this schema, or restore a backup",
        ));
    }
    if apart > TOLERANCE {
        report.add(Finding::new(
            CHECK,
            "the clocks differ",
            format!(
                "This machine and PostgreSQL are {} s apart. Who is dead and what is due is judged by PostgreSQL's clock \
                 alone, so nobody is written to twice for it; but dead letters bear the time of the worker's machine, and \
                 a replay leaves those on the queue that seem to be younger than itself",
                apart.num_seconds()
            ),
            "Set the clocks, for instance by NTP",
        ));
    }
    if !report.has_found(CHECK) {
        report.fine(CHECK, "answers; the schema is up to date, and the clocks agree");
    }
    missing.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_answer_is_no_difference() {
        let at = |seconds| DateTime::UNIX_EPOCH + TimeDelta::seconds(seconds);
        assert_eq!(apart(at(10), at(12), at(19)), TimeDelta::zero());
        assert_eq!(apart(at(10), at(4), at(11)), TimeDelta::seconds(6));
        assert_eq!(apart(at(10), at(20), at(11)), TimeDelta::seconds(9));
    }

    #[test]
    fn without_a_migration_the_ledger_is_not_read() {
        let told = |difference: &Difference, apart| {
            let mut report = Report::default();
            (tell(difference, apart, &mut report), report.remaining())
        };
        let same = Difference::default();
        assert_eq!(told(&same, TimeDelta::seconds(1)), (true, 0));
        assert_eq!(told(&same, TimeDelta::seconds(60)), (true, 1));
        assert_eq!(told(&Difference { unknown: vec![9], ..same.clone() }, TimeDelta::zero()), (true, 1));
        assert_eq!(told(&Difference { missing: vec![8], ..same }, TimeDelta::zero()), (false, 1));
    }
}
