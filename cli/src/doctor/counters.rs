//! Compares the counters and the people's flags with the items.

use anyhow::Result;
use mailrun_ledger::audit::{self, Drift, Flags};

use super::{
    Target, grouped,
    report::{Finding, Report},
};

pub(super) const CHECK: &str = "counters";
const PEOPLE: &str = "people";

/// Checks both in one snapshot.
pub(super) async fn examine(target: &Target, report: &mut Report) -> Result<()> {
    let mut tx = audit::snapshot(&target.pool).await?;
    let drifted = audit::drift(&mut tx).await?;
    let flags = audit::flags(&mut tx).await?;
    tx.commit().await?;
    for run in &drifted {
        if run.missing() != 0 {
            report.add(missing(run));
        }
        if !run.wrong().is_empty() || run.ended_wrongly() {
            report.add(
                target
                    .repair(drift(run), async { audit::recount(&mut *target.pool.acquire().await?, run.run_id).await })
                    .await,
            );
        }
    }
    if drifted.is_empty() {
        report.fine(CHECK, "all counters match the items");
    }
    match flagged(flags) {
        Some(finding) => report.add(target.repair(finding, audit::correct_flags(&target.pool)).await),
        None => report.fine(PEOPLE, "exactly those whose invitation was sent are marked as emailed"),
    }
    Ok(())
}

fn drift(run: &Drift) -> Finding {
    let wrong = run.wrong().into_iter().map(|(name, shown, counted)| {
        format!("{name} is {}, but there are {}", mailrun_web::grouped(shown), mailrun_web::grouped(counted))
    });
    let mut what: Vec<String> = wrong.collect();
    if run.ended_wrongly() {
        what.push(if run.finished {
            "the run counts as finished, but has open items, which nothing else would repair".to_owned()
        } else {
            "the run does not count as finished, but has no open items".to_owned()
        });
    }
    let what = format!(
        "{}. The run's page shows wrong numbers, and fan-out may release too many items or none. No invitation is changed or \
        lost",
        what.join("; ")
    );
    let repair = "--fix recounts the run's items while results continue to be counted";
    Finding::new(CHECK, format!("run {} has wrong counters", run.run_id), what, repair)
}

fn missing(run: &Drift) -> Finding {
    let (subject, how) = if run.missing() > 0 { ("has lost items", "only") } else { ("has too many items", "now") };
    Finding::new(
        CHECK,
        format!("run {} {subject}", run.run_id),
        format!(
            "It was accepted with {} invitations, and there are {how} {}. Mailrun deletes no items of a run that it shows, so \
            they were changed manually or lost by a disk. Missing recipients receive nothing from this run",
            mailrun_web::grouped(run.accepted),
            mailrun_web::grouped(run.counted.total)
        ),
        "Restore a backup of PostgreSQL, or submit the list again: people who have an invitation are skipped",
    )
}

/// None: the flags are correct.
fn flagged(flags: Flags) -> Option<Finding> {
    let count = |count: i64| grouped(usize::try_from(count).unwrap_or_default());
    let mut what = Vec::new();
    if flags.missing > 0 {
        what.push(format!(
            "Invitations that were sent, but their people are not marked as emailed: {}. They count as invited until their run \
            is pruned; then they could be invited a second time",
            count(flags.missing)
        ));
    }
    if flags.wrong > 0 {
        what.push(format!(
            "People marked as emailed whose invitation was not sent: {}. Once their run is pruned, they could not be invited any \
            more",
            count(flags.wrong)
        ));
    }
    if what.is_empty() {
        return None;
    }
    let subject = format!(
        "{} wrongly marked",
        super::are(usize::try_from(flags.missing + flags.wrong).unwrap_or_default(), "person", "people",)
    );
    Some(Finding::new(PEOPLE, subject, what.join(". "), "--fix sets the marks according to the invitations"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use mailrun_core::{item::ItemState, run::Counters};
    use uuid::Uuid;

    #[test]
    fn a_wrong_counter_is_reported_with_both_numbers() {
        let counted = Counters::of_items(&[(ItemState::Pending, 1), (ItemState::Sent, 1999)]);
        let shown = Counters::of_items(&[(ItemState::Failed, 1), (ItemState::Sent, 1999)]);
        let run = Drift { run_id: Uuid::nil(), accepted: 2000, shown, counted, finished: true };
        let finding = drift(&run);
        assert!(
            finding
                .what
                .starts_with("pending is 0, but there are 1; failed is 1, but there are 0; the run counts as finished")
        );
        assert!(
            missing(&Drift { accepted: 2001, ..run }).what.contains("with 2,001 invitations, and there are only 2,000")
        );
    }

    #[test]
    fn correct_flags_are_not_a_finding() {
        assert_eq!(flagged(Flags::default()), None);
        assert_eq!(flagged(Flags { missing: 1, wrong: 0 }).unwrap().subject, "1 person is wrongly marked");
        assert_eq!(flagged(Flags { missing: 1, wrong: 2 }).unwrap().subject, "3 people are wrongly marked");
    }
}
