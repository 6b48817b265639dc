//! The counters and the people's flags: whether they say what the items say.

use anyhow::Result;
use mailrun_ledger::audit::{self, Drift, Flags};

use super::{
    Patient, grouped,
    report::{Finding, Report},
};

pub(super) const CHECK: &str = "counters";
const PEOPLE: &str = "people";

/// Looks at them, in one snapshot.
///
/// # Errors
/// The database's.
pub(super) async fn examine(patient: &Patient, report: &mut Report) -> Result<()> {
    let mut tx = audit::snapshot(&patient.pool).await?;
    let drifted = audit::drift(&mut tx).await?;
    let flags = audit::flags(&mut tx).await?;
    tx.commit().await?;
    for run in &drifted {
        if run.missing() != 0 {
            report.add(missing(run));
        }
        if !run.wrong().is_empty() || run.ended_wrongly() {
            report.add(
                patient
                    .mend(drift(run), async { audit::recount(&mut *patient.pool.acquire().await?, run.run_id).await })
                    .await,
            );
        }
    }
    if drifted.is_empty() {
        report.fine(CHECK, "each equals the number of the items that it counts");
    }
    match flagged(flags) {
        Some(finding) => report.add(patient.mend(finding, audit::correct_flags(&patient.pool)).await),
        None => report.fine(PEOPLE, "whose invitation was sent is marked as emailed, and nobody else"),
    }
    Ok(())
}

fn drift(run: &Drift) -> Finding {
    let wrong = run.wrong().into_iter().map(|(name, shown, counted)| {
        format!("{name} is {}, and there are {}", mailrun_web::grouped(shown), mailrun_web::grouped(counted))
    });
    let mut what: Vec<String> = wrong.collect();
    if run.ended_wrongly() {
        what.push(if run.finished {
            "the run is taken for finished, and something is still open, which nothing would repair".to_owned()
        } else {
            "the run is not taken for finished, and nothing is open".to_owned()
        });
    }
    let what = format!(
        "{}. The run's page shows wrong numbers, and the pump may release too much or nothing more. No invitation is changed \
         or lost by that",
        what.join("; ")
    );
    let repair = "--fix counts the run's items anew, while results go on being counted";
    Finding::new(CHECK, format!("run {} has wrong counters", run.run_id), what, repair)
}

fn missing(run: &Drift) -> Finding {
    let (subject, how) = if run.missing() > 0 { ("has lost items", "only") } else { ("has too many items", "now") };
    Finding::new(
        CHECK,
        format!("run {} {subject}", run.run_id),
        format!(
            "It was accepted with {} invitations, and there are {how} {}. Mailrun deletes none of a run that it shows, so \
             this was done by hand, or a disk has lost it. Who is not there any more is not written to by this run",
            mailrun_web::grouped(run.accepted),
            mailrun_web::grouped(run.counted.total)
        ),
        "Restore a backup of PostgreSQL, or send the list once more: who has an invitation is left out",
    )
}

/// None: they are right.
fn flagged(flags: Flags) -> Option<Finding> {
    let count = |count: i64| grouped(usize::try_from(count).unwrap_or_default());
    let mut what = Vec::new();
    if flags.missing > 0 {
        what.push(format!(
            "Invitations that were sent, and whose people are not marked as emailed: {}. They count as invited for as long as \
             their run is kept; once it is pruned, they could be invited a second time",
            count(flags.missing)
        ));
    }
    if flags.wrong > 0 {
        what.push(format!(
            "People marked as emailed whose invitation was not sent: {}. Once their run is pruned, nobody could invite them \
             any more",
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
    Some(Finding::new(PEOPLE, subject, what.join(". "), "--fix makes the mark say what became of the invitation"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use mailrun_core::{item::ItemState, run::Counters};
    use uuid::Uuid;

    #[test]
    fn a_wrong_counter_is_named_with_both_numbers() {
        let counted = Counters::of_items(&[(ItemState::Pending, 1), (ItemState::Sent, 1999)]);
        let shown = Counters::of_items(&[(ItemState::Failed, 1), (ItemState::Sent, 1999)]);
        let run = Drift { run_id: Uuid::nil(), accepted: 2000, shown, counted, finished: true };
        let finding = drift(&run);
        assert!(
            finding
                .what
                .starts_with("pending is 0, and there are 1; failed is 1, and there are 0; the run is taken for")
        );
        assert!(
            missing(&Drift { accepted: 2001, ..run }).what.contains("with 2,001 invitations, and there are only 2,000")
        );
    }

    #[test]
    fn right_flags_are_no_finding() {
        assert_eq!(flagged(Flags::default()), None);
        assert_eq!(flagged(Flags { missing: 1, wrong: 0 }).unwrap().subject, "1 person is wrongly marked");
        assert_eq!(flagged(Flags { missing: 1, wrong: 2 }).unwrap().subject, "3 people are wrongly marked");
    }
}
