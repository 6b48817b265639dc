//! The workers: whether somebody is there for what has to be done, reads the queues, and gets rid of the mail.

use std::time::{Duration, Instant};

use anyhow::Result;
use mailrun_core::observer::Observer;
use mailrun_core::queue::{RESULTS, RUNS, TESTS};
use mailrun_core::run::Wanted;
use mailrun_ledger::{
    audit::Unfinished,
    workers::{self, Worker},
};
use mailrun_worker::Role;
use tokio::time::{sleep, timeout};

use super::{
    Patient, are,
    queues::{Conveyor, Depth},
    report::{Finding, Report},
    unfinished,
};

pub(super) const CHECK: &str = "workers";
const ROLES: [Role; 3] = [Role::FanOut, Role::Send, Role::Progress];
/// A worker that has lost its connection is back by then, or something is wrong.
const LOOKS: usize = 3;
const BETWEEN_LOOKS: Duration = Duration::from_secs(1);
/// RabbitMQ has noticed by then that the connection of a worker that has ended is gone.
const LINGERING: Duration = Duration::from_secs(5);

/// What is wrong with the workers, apart from the queues that they read.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Trouble {
    /// There is work for this role, and nobody does it.
    Nobody(Role),
    /// No sender gets rid of its mail, for the reason that one of them gives.
    AllLanesClosed(String),
}

/// Looks at them.
///
/// # Errors
/// The database's.
pub(super) async fn examine(patient: &Patient, conveyor: Option<&Conveyor>, report: &mut Report) -> Result<()> {
    watch_silent_workers(patient).await?;
    let workers = workers::all(&mut *patient.pool.acquire().await?).await?;
    let runs = unfinished(patient).await?;
    let alive: Vec<&Worker> = workers.iter().filter(|worker| is_alive(worker)).collect();
    let waits = |role| conveyor.is_some_and(|conveyor| conveyor.messages(queues(conveyor, role)) > 0);
    for trouble in troubles(&alive, &runs, waits) {
        report.add(finding(&trouble));
    }
    for worker in &alive {
        if let Some(rejected) = &worker.rejected {
            report.add(rejection(worker, rejected));
        }
    }
    if let Some(conveyor) = conveyor {
        look_for_consumers(conveyor, Some(&alive), report).await;
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

/// Watches workers that seem silent until they are heard of, or for as long as it takes to declare them dead. Usually other
/// workers have done so; these may all be gone.
async fn watch_silent_workers(patient: &Patient) -> Result<()> {
    let heartbeat = &patient.config.heartbeat;
    let (interval, dead_after) = (heartbeat.interval, patient.dead_after());
    let seems_silent = |worker: &Worker| {
        // By PostgreSQL's clock, which may have been set: so this is no more than a reason to look.
        is_alive(worker) && !(0.0..2.0 * interval.as_secs_f64()).contains(&worker.silent_s)
    };
    let mut conn = patient.pool.acquire().await?;
    let silent = workers::all(&mut conn).await?.iter().filter(|worker| seems_silent(worker)).count();
    if silent == 0 {
        return Ok(());
    }
    eprintln!("Watching {} for {} s …", grouped_workers(silent), dead_after.as_secs());
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

fn plays(worker: &Worker, role: Role) -> bool {
    worker.roles.split(',').any(|one| one == role.to_string())
}

/// The queues that a role reads.
fn queues(conveyor: &Conveyor, role: Role) -> Vec<&str> {
    match role {
        Role::FanOut => vec![RUNS],
        Role::Send => conveyor.broker.item_queues().iter().map(AsRef::as_ref).chain([TESTS]).collect(),
        Role::Progress => vec![RESULTS],
    }
}

/// What is wrong. A run that a person has paused needs nobody. `waits`: whether messages wait for a role.
fn troubles(alive: &[&Worker], runs: &[Unfinished], waits: impl Fn(Role) -> bool) -> Vec<Trouble> {
    let moving = runs.iter().any(|run| run.wanted != Wanted::Paused);
    let played = |role| alive.iter().any(|worker| plays(worker, role));
    let mut troubles: Vec<Trouble> =
        ROLES.into_iter().filter(|role| !played(*role) && (moving || waits(*role))).map(Trouble::Nobody).collect();
    let mut lanes = alive.iter().filter(|worker| plays(worker, Role::Send)).map(|worker| worker.closed.as_deref());
    if moving
        && let Some(Some(reason)) = lanes.next()
        && lanes.all(|closed| closed.is_some())
    {
        troubles.push(Trouble::AllLanesClosed(reason.to_owned()));
    }
    troubles
}

fn finding(trouble: &Trouble) -> Finding {
    match trouble {
        Trouble::Nobody(role) => {
            let what = match role {
                Role::FanOut => "Runs are not begun, go no further, and are not swept",
                Role::Send => "Nothing is sent",
                Role::Progress => "What is sent is not counted: the bars stand still",
            };
            Finding::new(
                CHECK,
                format!("no worker for {role} lives"),
                format!("{what}. All of it waits, and nothing is lost or doubled by that"),
                format!(
                    "Start one: mailrun worker --roles {role}. If there is a process already, it hangs or is cut off from \
                     PostgreSQL: its log says why, and mailrun up starts another one when it is ended"
                ),
            )
        }
        Trouble::AllLanesClosed(reason) => Finding::new(
            CHECK,
            "the mail server takes nothing",
            format!(
                "No sender can get rid of its mail: {}. Invitations wait, and no try is used up; sending goes on by itself \
                 when the mail server is back",
                if reason.is_empty() { "no reason is given" } else { reason.trim_end_matches('.') }
            ),
            "Look after the mail server, or after mailer.smtp; mailrun test-send ADDRESS tries it",
        ),
    }
}

fn rejection(worker: &Worker, rejected: &str) -> Finding {
    Finding::new(
        CHECK,
        format!("RabbitMQ rejects messages of worker {}", worker.id),
        format!(
            "{rejected}. Other messages go on, and nothing is lost: these are published again, and what is missing for long the \
             sweeper puts back. Until then their recipients wait"
        ),
        "A missing queue is declared by mailrun setup or mailrun doctor --fix; for a full one, see the policies of the virtual \
         host, and rabbitmq-diagnostics alarms",
    )
}

/// Finds queues with messages that nobody reads, and workers that live and don't read their queue. `alive`: None: nobody
/// knows who lives.
pub(super) async fn look_for_consumers(conveyor: &Conveyor, alive: Option<&[&Worker]>, report: &mut Report) {
    for role in ROLES {
        let played = alive.map(|alive| alive.iter().any(|worker| plays(worker, role)));
        for queue in queues(conveyor, role) {
            // A role without workers is reported above, or is no fault. A worker may be alive and not consume.
            let unread = |depth: Depth| match played {
                Some(false) => false,
                Some(true) => depth.consumers == 0,
                None => depth.consumers == 0 && depth.messages > 0,
            };
            let mut depth = conveyor.depth(queue);
            for _ in 0..LOOKS {
                if !unread(depth) {
                    break;
                }
                sleep(BETWEEN_LOOKS).await;
                if let Ok(Ok(now)) = timeout(BETWEEN_LOOKS, conveyor.depth_now(queue)).await {
                    depth = now;
                }
            }
            let living = alive.map_or(usize::MAX, |alive| alive.iter().filter(|worker| plays(worker, role)).count());
            let unregistered = depth.consumers as usize > living && {
                // A worker that has just ended may still be counted as a consumer.
                sleep(LINGERING).await;
                let now = timeout(BETWEEN_LOOKS, conveyor.depth_now(queue)).await;
                matches!(now, Ok(Ok(now)) if now.consumers as usize > living)
            };
            if unregistered {
                report.add(Finding::new(
                    CHECK,
                    format!("a process reads {queue} that is no living worker"),
                    "It takes messages and can't do anything with them: its row in the table workers is gone, or declares it \
                     dead, or it belongs to another installation",
                    format!(
                        "It ends by itself when it finds that out. If it does not, end it: the management console shows the \
                         connections that read {queue}, each with its worker's number, host and process"
                    ),
                ));
            }
            if unread(depth) {
                report.add(Finding::new(
                    CHECK,
                    format!("nobody reads {queue}"),
                    format!(
                        "{} on it. Workers for {role} {}, but none has it open",
                        are(depth.messages as usize, "message", "messages"),
                        if played == Some(true) { "live" } else { "may live" }
                    ),
                    format!(
                        "Look into the workers' logs: they may use another RabbitMQ or virtual host, or have no right to read. \
                         If there is none, start one: mailrun worker --roles {role}"
                    ),
                ));
            }
        }
    }
}

fn present(alive: &[&Worker]) -> String {
    let counts = ROLES.map(|role| format!("{role} {}", alive.iter().filter(|worker| plays(worker, role)).count()));
    format!("alive: {}", counts.join(", "))
}

/// What is no fault.
fn remarks(workers: &[Worker], alive: &[&Worker], runs: &[Unfinished]) -> Vec<String> {
    let mut remarks = Vec::new();
    let paused = runs.iter().filter(|run| run.wanted == Wanted::Paused).count();
    if paused > 0 {
        remarks.push(format!("{} paused by a person, and waits to be resumed", are(paused, "run", "runs")));
    }
    if runs.is_empty() && alive.is_empty() {
        remarks.push("no worker lives; there is nothing to do at the moment".to_owned());
    }
    let dead: Vec<String> = workers
        .iter()
        .filter(|worker| worker.dead)
        .map(|worker| format!("{} ({}, process {} on {})", worker.id, worker.roles, worker.pid, worker.host))
        .collect();
    if !dead.is_empty() {
        let (before, newest) = dead.split_at(dead.len().saturating_sub(3));
        let others = if before.is_empty() { String::new() } else { format!(", and {} before", before.len()) };
        remarks.push(format!("died lately without an end in good order: {}{others}", newest.join(", ")));
    }
    let closed: Vec<&str> = alive.iter().filter_map(|worker| worker.closed.as_deref()).collect();
    if let Some(reason) = closed.first() {
        remarks.push(format!("{} waiting for the mail server: {reason}", are(closed.len(), "sender", "senders")));
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
        Unfinished { run_id: Uuid::nil(), wanted }
    }

    #[test]
    fn a_role_is_missed_when_there_is_work_for_it() {
        let (all, pump) = (worker("fan-out,send,progress", None), worker("fan-out", None));
        let (running, paused) = ([run(Wanted::Running)], [run(Wanted::Paused)]);
        assert_eq!(troubles(&[&all], &running, |_| true), []);
        assert_eq!(troubles(&[], &[], |_| false), []);
        assert_eq!(troubles(&[], &paused, |_| false), [], "a paused run needs nobody");
        let missed = [Trouble::Nobody(Role::Send), Trouble::Nobody(Role::Progress)];
        assert_eq!(troubles(&[&pump], &running, |_| false), missed);
        assert_eq!(troubles(&[&pump], &paused, |role| role == Role::Progress), missed[1..]);
    }

    #[test]
    fn a_mail_server_is_away_when_every_lane_is_closed() {
        let (closed, open) = (worker("send", Some("refused")), worker("send", None));
        let others = worker("fan-out,progress", None);
        let running = [run(Wanted::Running)];
        let away = [Trouble::AllLanesClosed("refused".into())];
        assert_eq!(troubles(&[&others, &closed, &closed], &running, |_| false), away);
        assert_eq!(troubles(&[&others, &closed, &open], &running, |_| false), []);
        assert_eq!(troubles(&[&others, &closed], &[], |_| false), [], "nothing waits for it");
    }

    #[test]
    fn the_newest_dead_are_named() {
        let dead = |id| Worker { id, dead: true, silent_s: 60.0, ..worker("send", None) };
        let stopped = Worker { stopped: true, dead: false, ..dead(6) };
        let workers: Vec<Worker> = (1..=5).map(dead).chain([stopped]).collect();
        let remarks = remarks(&workers, &[], &[]);
        assert!(remarks[1].ends_with("5 (send, process 7 on here), and 2 before"), "{remarks:?}");
    }
}
