//! The workers: whether all needed roles are present, all queues have consumers, and mail can be sent.

use std::time::{Duration, Instant};

use anyhow::Result;
use mailrun_core::observer::Observer;
use mailrun_core::queue::{RESULTS, RUNS};
use mailrun_core::run::Wanted;
use mailrun_ledger::{
    audit::Unfinished,
    workers::{self, Worker},
};
use mailrun_worker::Role;
use tokio::time::{sleep, timeout};

use super::{
    Target, are,
    queues::{Depth, RabbitMq},
    report::{Finding, Report},
    unfinished,
};

pub(super) const CHECK: &str = "workers";
const ROLES: [Role; 3] = [Role::FanOut, Role::Send, Role::Progress];
/// How often a queue is checked. A worker that lost its connection has reconnected by then.
const CHECKS: usize = 3;
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// RabbitMQ has noticed by then that the connection of a stopped worker is closed.
const DISCONNECT_TIME: Duration = Duration::from_secs(5);

/// A fault of the workers, except for their queues.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Fault {
    /// There is work for this role and no worker with it.
    NoWorker(Role),
    /// The gates of all senders are closed, for the reason that one of them gives.
    AllGatesClosed(String),
}

pub(super) async fn examine(target: &Target, rabbitmq: Option<&RabbitMq>, report: &mut Report) -> Result<()> {
    watch_silent_workers(target).await?;
    let workers = workers::all(&mut *target.pool.acquire().await?).await?;
    let runs = unfinished(target).await?;
    let alive: Vec<&Worker> = workers.iter().filter(|worker| is_alive(worker)).collect();
    let waits = |role| rabbitmq.is_some_and(|rabbitmq| rabbitmq.messages(queues(rabbitmq, role)) > 0);
    for fault in faults(&alive, &runs, waits) {
        report.add(finding(&fault));
    }
    for worker in &alive {
        if let Some(rejected) = &worker.rejected {
            report.add(rejection(worker, rejected));
        }
    }
    if let Some(rabbitmq) = rabbitmq {
        check_consumers(rabbitmq, Some(&alive), report).await;
    }
    if !report.has_found(CHECK) {
        report.fine(CHECK, present(&alive));
    }
    for remark in remarks(&workers, &alive, &runs) {
        report.remark(CHECK, remark);
    }
    Ok(())
}

fn is_alive(worker: &Worker) -> bool {
    !worker.stopped && !worker.dead
}

/// Watches workers that seem silent until they send a heartbeat, or long enough to declare them dead. Usually other workers have
/// done so, but all of them may be gone.
async fn watch_silent_workers(target: &Target) -> Result<()> {
    let heartbeat = &target.config.heartbeat;
    let (interval, dead_after) = (heartbeat.interval, target.dead_after());
    let seems_silent = |worker: &Worker| {
        // By PostgreSQL's clock, which may have been adjusted: this is only a reason to watch.
        is_alive(worker) && !(0.0..2.0 * interval.as_secs_f64()).contains(&worker.silent_s)
    };
    let mut conn = target.pool.acquire().await?;
    let silent = workers::all(&mut conn).await?.iter().filter(|worker| seems_silent(worker)).count();
    if silent == 0 {
        return Ok(());
    }
    eprintln!("Watching {} for {} s…", grouped_workers(silent), dead_after.as_secs());
    let mut observer = Observer::new(interval, dead_after);
    let (begun, mut looked_at) = (Instant::now(), Instant::now());
    while begun.elapsed() < 2 * dead_after {
        let dead = observer.look(&workers::beats(&mut conn).await?, looked_at.elapsed());
        looked_at = Instant::now();
        if !dead.is_empty() {
            workers::declare_dead(&mut conn, &dead).await?;
            break;
        }
        if !workers::all(&mut conn).await?.iter().any(seems_silent) {
            break;
        }
        sleep(interval).await;
    }
    Ok(())
}

fn grouped_workers(count: usize) -> String {
    if count == 1 { "a worker that seems silent".to_owned() } else { format!("{count} workers that seem silent") }
}

fn has_role(worker: &Worker, role: Role) -> bool {
    worker.roles.split(',').any(|one| one == role.to_string())
}

/// The queues that a role consumes.
fn queues(rabbitmq: &RabbitMq, role: Role) -> Vec<&str> {
    match role {
        Role::FanOut => vec![RUNS],
        Role::Send => rabbitmq.broker.item_queues().iter().map(AsRef::as_ref).collect(),
        Role::Progress => vec![RESULTS],
    }
}

/// The faults. A run paused by a person needs no workers. `waits`: whether messages wait for a role.
fn faults(alive: &[&Worker], runs: &[Unfinished], waits: impl Fn(Role) -> bool) -> Vec<Fault> {
    let moving = runs.iter().any(|run| run.wanted != Wanted::Paused);
    let present = |role| alive.iter().any(|worker| has_role(worker, role));
    let mut faults: Vec<Fault> =
        ROLES.into_iter().filter(|role| !present(*role) && (moving || waits(*role))).map(Fault::NoWorker).collect();
    let mut gates = alive.iter().filter(|worker| has_role(worker, Role::Send)).map(|worker| worker.closed.as_deref());
    if moving
        && let Some(Some(reason)) = gates.next()
        && gates.all(|closed| closed.is_some())
    {
        faults.push(Fault::AllGatesClosed(reason.to_owned()));
    }
    faults
}

fn finding(fault: &Fault) -> Finding {
    match fault {
        Fault::NoWorker(role) => {
            let what = match role {
                Role::FanOut => "Runs do not start or continue, and are not swept",
                Role::Send => "Nothing is sent",
                Role::Progress => "Sent invitations are not counted, so the pages show no progress",
            };
            Finding::new(
                CHECK,
                format!("no live worker for {role}"),
                format!("{what}. All work waits, and nothing is lost or sent twice"),
                format!(
                    "Start one: mailrun worker --roles {role}. If there is a process already, it hangs or has lost PostgreSQL: see its \
                    log. After it is killed, mailrun up starts another one"
                ),
            )
        }
        Fault::AllGatesClosed(reason) => Finding::new(
            CHECK,
            "no relay is accepting mail",
            format!(
                "No sender can send: {}. Invitations wait without using a try, and sending resumes automatically when a relay is \
                available",
                if reason.is_empty() { "no reason is given" } else { reason.trim_end_matches('.') }
            ),
            "Check the relay and mailer.smtp; test them with mailrun test-send ADDRESS",
        ),
    }
}

fn rejection(worker: &Worker, rejected: &str) -> Finding {
    Finding::new(
        CHECK,
        format!("RabbitMQ rejects messages of worker {}", worker.id),
        format!(
            "{rejected}. Other messages continue, and nothing is lost: rejected messages are published again, and the sweeper \
            republishes any that stay missing. Until then their recipients wait"
        ),
        "mailrun setup or mailrun doctor --fix declares a missing queue. For a full one, see the policies of the virtual host \
        and rabbitmq-diagnostics alarms",
    )
}

/// Finds queues with messages and no consumer, and live workers that do not consume their queue. `alive` is None if the workers
/// are unknown.
pub(super) async fn check_consumers(rabbitmq: &RabbitMq, alive: Option<&[&Worker]>, report: &mut Report) {
    for role in ROLES {
        let present = alive.map(|alive| alive.iter().any(|worker| has_role(worker, role)));
        for queue in queues(rabbitmq, role) {
            // A role without workers is reported above, or is not needed. A live worker may still not consume.
            let unread = |depth: Depth| match present {
                Some(false) => false,
                Some(true) => depth.consumers == 0,
                None => depth.consumers == 0 && depth.messages > 0,
            };
            let mut depth = rabbitmq.depth(queue);
            for _ in 0..CHECKS {
                if !unread(depth) {
                    break;
                }
                sleep(CHECK_INTERVAL).await;
                if let Ok(Ok(now)) = timeout(CHECK_INTERVAL, rabbitmq.depth_now(queue)).await {
                    depth = now;
                }
            }
            let living = alive.map_or(usize::MAX, |alive| alive.iter().filter(|worker| has_role(worker, role)).count());
            let unregistered = depth.consumers as usize > living && {
                // A worker that has just stopped may still be counted as a consumer.
                sleep(DISCONNECT_TIME).await;
                let now = timeout(CHECK_INTERVAL, rabbitmq.depth_now(queue)).await;
                matches!(now, Ok(Ok(now)) if now.consumers as usize > living)
            };
            if unregistered {
                report.add(Finding::new(
                    CHECK,
                    format!("{queue} has a consumer that is not a live worker"),
                    "It receives messages but cannot process them: its row in the table workers is missing or marked dead, or it \
                    belongs to another installation",
                    format!(
                        "It stops by itself when it detects that. Otherwise, stop it: the management console shows the connections \
                        that consume {queue}, each with its worker's number, host and process"
                    ),
                ));
            }
            if unread(depth) {
                report.add(Finding::new(
                    CHECK,
                    format!("{queue} has no consumer"),
                    format!(
                        "{} on it. Workers for {role} {}, but none consumes it",
                        are(depth.messages as usize, "message", "messages"),
                        if present == Some(true) { "are alive" } else { "may be alive" }
                    ),
                    format!(
                        "See the workers' logs: they may use another RabbitMQ or virtual host, or lack the right to read. If there is \
                        no worker, start one: mailrun worker --roles {role}"
                    ),
                ));
            }
        }
    }
}

fn present(alive: &[&Worker]) -> String {
    let counts = ROLES.map(|role| format!("{role} {}", alive.iter().filter(|worker| has_role(worker, role)).count()));
    format!("alive: {}", counts.join(", "))
}

/// Remarks that are not faults.
fn remarks(workers: &[Worker], alive: &[&Worker], runs: &[Unfinished]) -> Vec<String> {
    let mut remarks = Vec::new();
    let paused = runs.iter().filter(|run| run.wanted == Wanted::Paused).count();
    if paused > 0 {
        remarks.push(format!("{} paused by a person and not resumed", are(paused, "run", "runs")));
    }
    if runs.is_empty() && alive.is_empty() {
        remarks.push("no worker is alive; there is no work at present".to_owned());
    }
    let dead: Vec<String> = workers
        .iter()
        .filter(|worker| worker.dead)
        .map(|worker| format!("{} ({}, process {} on {})", worker.id, worker.roles, worker.pid, worker.host))
        .collect();
    if !dead.is_empty() {
        let (before, newest) = dead.split_at(dead.len().saturating_sub(3));
        let others = if before.is_empty() { String::new() } else { format!(", and {} earlier", before.len()) };
        remarks.push(format!("died recently without stopping normally: {}{others}", newest.join(", ")));
    }
    let closed: Vec<&str> = alive.iter().filter_map(|worker| worker.closed.as_deref()).collect();
    if let Some(reason) = closed.first() {
        remarks.push(format!("{} waiting for the relay: {reason}", are(closed.len(), "sender", "senders")));
    }
    remarks
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    fn worker(roles: &str, closed: Option<&str>) -> Worker {
        Worker {
            id: 1,
            roles: roles.into(),
            host: "here".into(),
            pid: 7,
            stopped: false,
            dead: false,
            silent_s: 0.5,
            closed: closed.map(Into::into),
            rejected: None,
        }
    }

    fn run(wanted: Wanted) -> Unfinished {
        Unfinished { run_id: Uuid::nil(), kind: "invitations".into(), wanted }
    }

    #[test]
    fn reports_a_missing_role_when_there_is_work_for_it() {
        let (all, fan_out) = (worker("fan-out,send,progress", None), worker("fan-out", None));
        let (running, paused) = ([run(Wanted::Running)], [run(Wanted::Paused)]);
        assert_eq!(faults(&[&all], &running, |_| true), []);
        assert_eq!(faults(&[], &[], |_| false), []);
        assert_eq!(faults(&[], &paused, |_| false), [], "a paused run needs no workers");
        let missing = [Fault::NoWorker(Role::Send), Fault::NoWorker(Role::Progress)];
        assert_eq!(faults(&[&fan_out], &running, |_| false), missing);
        assert_eq!(faults(&[&fan_out], &paused, |role| role == Role::Progress), missing[1..]);
    }

    #[test]
    fn reports_an_outage_when_all_gates_are_closed() {
        let (closed, open) = (worker("send", Some("refused")), worker("send", None));
        let others = worker("fan-out,progress", None);
        let running = [run(Wanted::Running)];
        let outage = [Fault::AllGatesClosed("refused".into())];
        assert_eq!(faults(&[&others, &closed, &closed], &running, |_| false), outage);
        assert_eq!(faults(&[&others, &closed, &open], &running, |_| false), []);
        assert_eq!(faults(&[&others, &closed], &[], |_| false), [], "there is no work");
    }

    #[test]
    fn names_the_most_recent_dead_workers() {
        let dead = |id| Worker { id, dead: true, silent_s: 60.0, ..worker("send", None) };
        let stopped = Worker { stopped: true, dead: false, ..dead(6) };
        let workers: Vec<Worker> = (1..=5).map(dead).chain([stopped]).collect();
        let remarks = remarks(&workers, &[], &[]);
        assert!(remarks[1].ends_with("5 (send, process 7 on here), and 2 earlier"), "{remarks:?}");
    }
}
