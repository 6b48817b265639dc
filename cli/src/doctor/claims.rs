//! Open invitations: claims of dead workers, missing messages, stalled runs. `--fix` immediately does what the sweeper would do
//! later.

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
    Target, are,
    queues::RabbitMq,
    report::{Finding, Report},
    unfinished,
};

pub(super) const CHECK: &str = "claims";
const RUNS_CHECK: &str = "runs";
/// How often to try for the sweeper's lock.
const LOCK_TRIES: usize = 100;
const LOCK_RETRY_INTERVAL: Duration = Duration::from_millis(100);
/// Results applied in one transaction.
const BATCH: usize = 1_000;

/// The state of the queues while a run's items are checked.
#[derive(Clone, Copy, Debug)]
struct QueueState {
    /// There are results that are not counted yet, perhaps of a dead worker.
    results: bool,
    /// There are messages on the item queues, or no sender can take them at present.
    items: bool,
    /// The run's counters have not changed for `sweep.stalled_after_ms`.
    stalled: bool,
}

pub(super) async fn examine(target: &Target, rabbitmq: Option<&RabbitMq>, report: &mut Report) -> Result<()> {
    let runs = unfinished(target).await?;
    let Some(rabbitmq) = rabbitmq else {
        report.remark(
            CHECK,
            format!(
                "{} not finished; missing messages cannot be detected without RabbitMQ",
                are(runs.len(), "run", "runs")
            ),
        );
        return Ok(());
    };
    let mut conn = target.pool.acquire().await?;
    let stalled = sweep::stalled_runs(&mut conn, target.stalled_after()).await?;
    let held_up = sweep::all_lanes_closed(&mut conn).await?;
    let has_command = rabbitmq.messages([RUNS, RUNS_WAIT, RUNS_PAUSED]) > 0;
    for run in stalled.iter().filter(|_| !has_command) {
        if let Some(command) = missing_command(run) {
            let message = RunMessage { run_id: run.run_id, command };
            let put_back = publish(rabbitmq.publisher.as_ref(), vec![Outgoing::new(&message)]);
            report.add(target.repair(stalled_run(run), put_back).await);
        }
    }
    for run in &runs {
        let queues = QueueState {
            results: rabbitmq.messages([RESULTS]) > 0,
            items: rabbitmq.items() > 0 || held_up,
            stalled: stalled.iter().any(|stalled| stalled.run_id == run.run_id),
        };
        let mut found = gather(target, &mut conn, run, queues).await?;
        if found.is_empty() {
            continue;
        }
        let finding = open(run.run_id, found.repairs);
        let repaired = async {
            // The sweeper must not bury the same claims: each would get two dead letters.
            let mut tx = target.pool.begin().await?;
            let mut tries = 0;
            while !sweep::try_lock(&mut tx).await? {
                tries += 1;
                anyhow::ensure!(tries < LOCK_TRIES, "the sweeper holds its lock");
                sleep(LOCK_RETRY_INTERVAL).await;
            }
            found = gather(target, &mut tx, run, queues).await?;
            publish(rabbitmq.publisher.as_ref(), std::mem::take(&mut found.messages)).await?;
            apply(target, run.run_id, &found.results).await?;
            anyhow::Ok(tx.commit().await?)
        };
        report.add(target.repair(finding, repaired).await);
    }
    if !report.has_found(CHECK) {
        report.fine(CHECK, "no claims of dead workers");
    }
    if !report.has_found(RUNS_CHECK) {
        let text = format!("{} unfinished; none is stalled or lacks messages", are(runs.len(), "run", "runs"));
        report.fine(RUNS_CHECK, text);
    }
    Ok(())
}

async fn publish(publisher: Option<&Publisher>, messages: Vec<Outgoing>) -> Result<()> {
    let publisher = publisher.context("RabbitMQ accepts no messages")?;
    Ok(publisher.publish_soon(messages).await?)
}

/// Applies results like a progress worker, by the same join, so concurrent application is harmless.
async fn apply(target: &Target, run_id: Uuid, results: &[ItemResult]) -> sqlx::Result<()> {
    let mut conn = target.pool.acquire().await?;
    let reports: Vec<Reported<'_>> = results.iter().map(|result| Reported { run_id: Some(run_id), result }).collect();
    for reports in reports.chunks(BATCH) {
        progress::apply(&mut conn, &target.kinds, reports).await?;
    }
    Ok(())
}

/// Collects the repairs of a run's open items.
async fn gather(
    target: &Target,
    conn: &mut PgConnection,
    run: &Unfinished,
    queues: QueueState,
) -> sqlx::Result<Mending> {
    let run_id = run.run_id;
    // Items of another program's job are left to that program.
    let Some(job) = target.kinds.get(&run.kind) else { return Ok(Mending::default()) };
    let workers: HashMap<i64, Worker> =
        workers::all(&mut *conn).await?.into_iter().map(|worker| (worker.id, worker)).collect();
    let stopped_long_ago = |worker: &Worker| worker.stopped && worker.silent_s > target.dead_after().as_secs_f64();
    // A worker without a row is dead: the row was pruned or deleted.
    let silent = |owner| match owner {
        Some(Owner::Worker { id, .. }) => workers.get(&id).is_none_or(|worker| worker.dead || stopped_long_ago(worker)),
        _ => false,
    };
    let mut mending = Mending::default();
    // A dead worker's claim is due at once; a missing message only when it cannot be merely slow.
    for (overdue, of_dead) in [(Duration::ZERO, true), (target.stalled_after(), false)] {
        let mut after = 0;
        loop {
            let items: Vec<OpenItem> =
                sweep::open_items(conn, run_id, overdue, after, mailrun_worker::sweep::BATCH).await?;
            let Some(last) = items.last() else { break };
            after = last.position;
            for item in &items {
                let what = repair(item.owner);
                // Senders drop the messages of a paused run; resuming republishes them.
                if what == Repair::PutBack && run.wanted == Wanted::Paused {
                    continue;
                }
                if matches!(what, Repair::Bury | Repair::Confirm) == of_dead && is_due(what, silent(item.owner), queues)
                {
                    mending.add(item, job);
                }
            }
        }
    }
    Ok(mending)
}

/// Whether the repair of an open item is due. `silent`: its worker has been silent long enough to be dead, even if it stopped
/// normally and its last result is still being counted.
fn is_due(repair: Repair, silent: bool, queues: QueueState) -> bool {
    match repair {
        Repair::Leave => false,
        Repair::Bury | Repair::Confirm => silent && !queues.results,
        Repair::PutBack | Repair::Withhold(_) => queues.stalled && !queues.items && !queues.results,
    }
}

fn stalled_run(run: &Stalled) -> Finding {
    Finding::new(
        RUNS_CHECK,
        format!("run {} is stalled", run.run_id),
        "Its command is on no queue, so no more items are released, and a cancelled run is not settled. The invitations are in \
        the ledger",
        "--fix republishes the command, as the sweeper of a fan-out worker does after sweep.stalled_after_ms",
    )
}

fn open(run_id: Uuid, found: Repairs) -> Finding {
    let counts = [found.put_back, found.buried, found.told_again];
    let [put_back, buried, told_again] = counts.map(|count| usize::try_from(count).unwrap_or_default());
    let check = if buried > 0 { CHECK } else { RUNS_CHECK };
    let (mut what, mut repair) = (Vec::new(), Vec::new());
    if buried > 0 {
        what.push(format!(
            "{} claimed by a dead worker: it is unknown whether the mail was sent",
            are(buried, "invitation", "invitations")
        ));
        repair.push(
            "--fix settles them as unknown, with a dead letter, for a person to decide, or makes the next attempt with \
            send.on_unknown = \"resend\". The sweeper and workers that receive their messages do the same",
        );
    }
    if put_back > 0 {
        what.push(format!(
            "{} released and on no queue: purged, or lost with the broker. No mail was sent for them",
            are(put_back, "invitation", "invitations")
        ));
        repair.push("--fix republishes their messages, as the sweeper does");
    }
    if told_again > 0 {
        what.push(format!(
            "{} withheld, or sent by a worker that died before it reported the result, and still counted as open",
            are(told_again, "invitation", "invitations")
        ));
        repair.push("--fix settles them");
    }
    let total = put_back + buried + told_again;
    let wait = if total == 1 { "invitation is stuck" } else { "invitations are stuck" };
    let subject = format!("run {run_id}: {} {wait}", super::grouped(total));
    Finding::new(check, subject, what.join(". "), repair.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use mailrun_core::claim::Withheld;

    const QUIET: QueueState = QueueState { results: false, items: false, stalled: true };

    #[test]
    fn a_dead_workers_claim_is_due_when_it_has_no_result() {
        assert!(is_due(Repair::Bury, true, QUIET));
        assert!(
            is_due(Repair::Bury, true, QueueState { items: true, stalled: false, ..QUIET }),
            "the run need not be stalled"
        );
        assert!(!is_due(Repair::Bury, true, QueueState { results: true, ..QUIET }), "its result may be among them");
        assert!(!is_due(Repair::Bury, false, QUIET), "the worker has just stopped");
        assert!(!is_due(Repair::Leave, true, QUIET));
    }

    #[test]
    fn a_message_that_may_be_slow_is_not_missing() {
        for repair in [Repair::PutBack, Repair::Withhold(Withheld::ByJob(1))] {
            assert!(is_due(repair, false, QUIET));
            assert!(!is_due(repair, false, QueueState { stalled: false, ..QUIET }));
            assert!(!is_due(repair, false, QueueState { items: true, ..QUIET }));
            assert!(!is_due(repair, false, QueueState { results: true, ..QUIET }));
        }
    }

    #[test]
    fn reports_each_kind_with_its_repair() {
        let found = Repairs { buried: 1, put_back: 2000, ..Repairs::default() };
        let finding = open(Uuid::nil(), found);
        assert!(finding.subject.ends_with(": 2,001 invitations are stuck"), "{}", finding.subject);
        assert!(finding.what.starts_with("1 invitation is claimed by a dead worker"), "{}", finding.what);
        assert!(finding.what.contains("2,000 invitations are released and on no queue"), "{}", finding.what);
        assert_eq!(finding.check, CHECK);
        assert_eq!(open(Uuid::nil(), Repairs { put_back: 1, ..Repairs::default() }).check, RUNS_CHECK);
    }
}
