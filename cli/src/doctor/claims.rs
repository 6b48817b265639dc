//! What open invitations wait for: claims of dead workers, messages that are missing, runs that nothing drives. With `--fix`
//! it does at once what the sweeper would do in its time.

use std::{collections::HashMap, time::Duration};

use anyhow::{Context as _, Result};
use mailrun_broker::{Outgoing, Publisher};
use mailrun_core::claim::Owner;
use mailrun_core::outcome::{Repair, repair};
use mailrun_core::queue::{RESULTS, RUNS, RUNS_PAUSED, RUNS_WAIT};
use mailrun_core::{
    message::{ItemResult, RunMessage},
    run::Wanted,
};
use mailrun_ledger::{
    audit::Unfinished,
    progress::{self, Report as Reported},
    sweep::{self, OpenItem, Repairs, Stalled},
    workers::{self, Worker},
};
use mailrun_worker::sweep::{Mending, missing_command};
use sqlx::PgConnection;
use tokio::time::sleep;
use uuid::Uuid;

use super::{
    Patient, are,
    queues::Conveyor,
    report::{Finding, Report},
    unfinished,
};

pub(super) const CHECK: &str = "claims";
const RUNS_CHECK: &str = "runs";
/// The sweeper is done with its turn by then.
const TURNS: usize = 100;
const BETWEEN_TURNS: Duration = Duration::from_millis(100);
/// Results applied in one transaction.
const BATCH: usize = 1_000;

/// What is known of the conveyor while a run's items are judged.
#[derive(Clone, Copy, Debug)]
struct Conveyed {
    /// Results that are not counted yet: a dead worker's may be among them.
    results: bool,
    /// Items on their queues, or nobody who takes them off at present.
    items: bool,
    /// Whether the run's counters have not moved for long.
    stalled: bool,
}

/// Looks at them.
///
/// # Errors
/// A server's.
pub(super) async fn examine(patient: &Patient, conveyor: Option<&Conveyor>, report: &mut Report) -> Result<()> {
    let runs = unfinished(patient).await?;
    let Some(conveyor) = conveyor else {
        report.remark(
            CHECK,
            format!("{} not over; what is missing can't be told without RabbitMQ", are(runs.len(), "run", "runs")),
        );
        return Ok(());
    };
    let mut conn = patient.pool.acquire().await?;
    let stalled = sweep::stalled_runs(&mut conn, patient.stalled_after()).await?;
    let held_up = sweep::all_lanes_closed(&mut conn).await?;
    let driven = conveyor.messages([RUNS, RUNS_WAIT, RUNS_PAUSED]) > 0;
    for run in stalled.iter().filter(|_| !driven) {
        if let Some(command) = missing_command(run) {
            let message = RunMessage { run_id: run.run_id, command };
            let put_back = publish(conveyor.publisher.as_ref(), vec![Outgoing::new(&message)]);
            report.add(patient.mend(not_driven(run), put_back).await);
        }
    }
    for run in &runs {
        let conveyed = Conveyed {
            results: conveyor.messages([RESULTS]) > 0,
            items: conveyor.items() > 0 || held_up,
            stalled: stalled.iter().any(|stalled| stalled.run_id == run.run_id),
        };
        let mut found = gather(patient, &mut conn, run, conveyed).await?;
        if found.is_empty() {
            continue;
        }
        let finding = open(run.run_id, found.repairs);
        let repaired = async {
            // Together with the sweeper each would be buried twice, and have two dead letters.
            let mut tx = patient.pool.begin().await?;
            let mut turns = 0;
            while !sweep::try_lock(&mut tx).await? {
                turns += 1;
                anyhow::ensure!(turns < TURNS, "the sweeper is at it all the time");
                sleep(BETWEEN_TURNS).await;
            }
            found = gather(patient, &mut tx, run, conveyed).await?;
            publish(conveyor.publisher.as_ref(), std::mem::take(&mut found.messages)).await?;
            apply(patient, run.run_id, &found.results).await?;
            anyhow::Ok(tx.commit().await?)
        };
        report.add(patient.mend(finding, repaired).await);
    }
    if !report.has_found(CHECK) {
        report.fine(CHECK, "no invitation waits for a worker that is dead");
    }
    if !report.has_found(RUNS_CHECK) {
        let text =
            format!("{} not over; each is driven, and none of its messages is missing", are(runs.len(), "run", "runs"));
        report.fine(RUNS_CHECK, text);
    }
    Ok(())
}

async fn publish(publisher: Option<&Publisher>, messages: Vec<Outgoing>) -> Result<()> {
    let publisher = publisher.context("RabbitMQ takes no messages")?;
    Ok(publisher.publish_soon(messages).await?)
}

/// As whoever counts would apply them, by the same join: so it does not matter who else does, or whether nobody does.
async fn apply(patient: &Patient, run_id: Uuid, results: &[ItemResult]) -> sqlx::Result<()> {
    let mut conn = patient.pool.acquire().await?;
    let reports: Vec<Reported<'_>> = results.iter().map(|result| Reported { run_id: Some(run_id), result }).collect();
    for reports in reports.chunks(BATCH) {
        progress::apply(&mut conn, &patient.config.suppressions, reports).await?;
    }
    Ok(())
}

/// What puts a run's open items right.
async fn gather(
    patient: &Patient,
    conn: &mut PgConnection,
    run: &Unfinished,
    conveyed: Conveyed,
) -> sqlx::Result<Mending> {
    let run_id = run.run_id;
    let workers: HashMap<i64, Worker> =
        workers::all(&mut *conn).await?.into_iter().map(|worker| (worker.id, worker)).collect();
    let stopped_long_ago = |worker: &Worker| worker.stopped && worker.silent_s > patient.dead_after().as_secs_f64();
    // A worker without a row is dead: its row is pruned, or was deleted.
    let silent = |owner| match owner {
        Some(Owner::Worker { id, .. }) => workers.get(&id).is_none_or(|worker| worker.dead || stopped_long_ago(worker)),
        _ => false,
    };
    let mut mending = Mending::default();
    // A claim of a dead worker is told at once; what is missing, when it would have come if it were only slow.
    for (overdue, of_dead) in [(Duration::ZERO, true), (patient.stalled_after(), false)] {
        let mut after = 0;
        loop {
            let items: Vec<OpenItem> =
                sweep::open_items(conn, run_id, overdue, after, mailrun_worker::sweep::BATCH).await?;
            let Some(last) = items.last() else { break };
            after = last.position;
            for item in &items {
                let what = repair(item.owner);
                // Senders drop what belongs to a paused run; it is put back when the run goes on.
                if what == Repair::PutBack && run.wanted == Wanted::Paused {
                    continue;
                }
                if matches!(what, Repair::Bury | Repair::Confirm) == of_dead
                    && is_due(what, silent(item.owner), conveyed)
                {
                    mending.add(item, patient.config.send.on_unknown);
                }
            }
        }
    }
    Ok(mending)
}

/// Whether an open item's repair is due. `silent`: its worker has not been heard of for long enough to be dead, even if it
/// has ended in good order and its last result is only just being counted.
fn is_due(repair: Repair, silent: bool, conveyed: Conveyed) -> bool {
    match repair {
        Repair::Leave => false,
        Repair::Bury | Repair::Confirm => silent && !conveyed.results,
        Repair::PutBack | Repair::Withhold(_) => conveyed.stalled && !conveyed.items && !conveyed.results,
    }
}

fn not_driven(run: &Stalled) -> Finding {
    Finding::new(
        RUNS_CHECK,
        format!("nothing drives run {}", run.run_id),
        "Its message is on no queue, so nothing more of it is released, or, if it was cancelled, settled. Its recipients are in \
         the ledger and wait",
        "--fix publishes the message again, as the sweeper of a fan-out worker does after sweep.stalled_after_ms",
    )
}

fn open(run_id: Uuid, found: Repairs) -> Finding {
    let counts = [found.put_back, found.buried, found.told_again];
    let [put_back, buried, told_again] = counts.map(|count| usize::try_from(count).unwrap_or_default());
    let check = if buried > 0 { CHECK } else { RUNS_CHECK };
    let (mut what, mut repair) = (Vec::new(), Vec::new());
    if buried > 0 {
        what.push(format!(
            "{} claimed by a worker that died: nobody can know whether the mail went out",
            are(buried, "invitation", "invitations")
        ));
        repair.push(
            "--fix notes what a worker that meets their messages, or the sweeper, would: unknown, with a dead letter, for \
             a person to decide (or the next attempt, with send.on_unknown = \"resend\")",
        );
    }
    if put_back > 0 {
        what.push(format!(
            "{} released and on no queue: purged, or lost with the broker. They certainly got nothing since",
            are(put_back, "invitation", "invitations")
        ));
        repair.push("--fix puts their messages back, as the sweeper does");
    }
    if told_again > 0 {
        what.push(format!(
            "{} not to be sent, or sent by a worker that died before it could say so, and still counted as open",
            are(told_again, "invitation", "invitations")
        ));
        repair.push("--fix settles them");
    }
    let total = put_back + buried + told_again;
    let wait = if total == 1 { "invitation waits" } else { "invitations wait" };
    let subject = format!("run {run_id}: {} {wait} in vain", super::grouped(total));
    Finding::new(check, subject, what.join(". "), repair.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use mailrun_core::claim::Withheld;

    const QUIET: Conveyed = Conveyed { results: false, items: false, stalled: true };

    #[test]
    fn a_dead_workers_claim_is_due_when_its_result_is_nowhere() {
        assert!(is_due(Repair::Bury, true, QUIET));
        assert!(
            is_due(Repair::Bury, true, Conveyed { items: true, stalled: false, ..QUIET }),
            "it need not be stalled"
        );
        assert!(!is_due(Repair::Bury, true, Conveyed { results: true, ..QUIET }), "its result may be among them");
        assert!(!is_due(Repair::Bury, false, QUIET), "it has ended just now");
        assert!(!is_due(Repair::Leave, true, QUIET));
    }

    #[test]
    fn what_may_only_be_slow_is_not_missing() {
        for repair in [Repair::PutBack, Repair::Withhold(Withheld::Suppressed)] {
            assert!(is_due(repair, false, QUIET));
            assert!(!is_due(repair, false, Conveyed { stalled: false, ..QUIET }));
            assert!(!is_due(repair, false, Conveyed { items: true, ..QUIET }));
            assert!(!is_due(repair, false, Conveyed { results: true, ..QUIET }));
        }
    }

    #[test]
    fn each_kind_is_told_with_its_repair() {
        let found = Repairs { buried: 1, put_back: 2000, ..Repairs::default() };
        let finding = open(Uuid::nil(), found);
        assert!(finding.subject.ends_with(": 2,001 invitations wait in vain"), "{}", finding.subject);
        assert!(finding.what.starts_with("1 invitation is claimed by a worker that died"), "{}", finding.what);
        assert!(finding.what.contains("2,000 invitations are released and on no queue"), "{}", finding.what);
        assert_eq!(finding.check, CHECK);
        assert_eq!(open(Uuid::nil(), Repairs { put_back: 1, ..Repairs::default() }).check, RUNS_CHECK);
    }
}
