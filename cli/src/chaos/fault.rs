//! The faults: their names, what each does, and how it is undone where it does not pass by itself.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;
use lapin::options::{QueueDeleteOptions, QueuePurgeOptions};
use mailrun_shared::topology;
use rand::{RngExt as _, rngs::StdRng};
use rustix::process::{Pid, Signal};
use tokio::time::{Instant, sleep};

use super::{
    site::{DEAD_AFTER, RUNGS_MS, Site},
    weather::Trouble,
};
use crate::stack::Pids;

/// A server that was killed is up again within this time.
const RESTART: Duration = Duration::from_secs(120);
/// Sessions are ended so often while they are.
const BETWEEN_TERMINATIONS: Duration = Duration::from_millis(250);
/// So many connections hang when some do.
const HANGING: u32 = 5;

/// What can go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Fault {
    /// kill -9 of a sender
    KillSend,
    /// kill -9 of the fan-out
    KillFanOut,
    /// kill -9 of the process that counts
    KillProgress,
    /// kill -9 of the pages, once while the form is being sent
    KillWeb,
    /// SIGTERM to a sender
    TermSend,
    /// A sender stands still for longer than its heartbeat allows, and goes on
    StopSend,
    /// kill -9 of RabbitMQ
    KillBroker,
    /// kill -9 of PostgreSQL
    KillDatabase,
    /// All sessions of PostgreSQL are ended, again and again for some seconds
    TerminateBackends,
    /// All senders are killed, and mailrun.items is purged, again and again for some seconds
    PurgeItems,
    /// The queues of the retry schedule are purged, as long
    PurgeRetry,
    /// The process that counts is killed, and mailrun.results is purged, as long
    PurgeResults,
    /// mailrun.runs and mailrun.runs.wait are purged, as long
    PurgeRuns,
    /// mailrun.items is deleted
    DeleteQueue,
    /// The mail server is down for some seconds
    MailDown,
    /// The mail server takes in 1 % of the messages and drops the connection before it says so
    MailDrops,
    /// The mail server asks everybody to come back later (421), for some seconds
    MailRefusesEveryone,
    /// The mail server falls silent on some connections
    MailHangs,
    /// A transaction holds an old snapshot, and a lock on the counters, for some seconds
    OpenTransaction,
    /// Every message is published twice
    DuplicateMessages,
    /// RabbitMQ runs out of memory and blocks its publishers for some seconds
    BrokerAlarm,
}

/// How often a fault can strike within one run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Weight {
    /// Often.
    Light,
    /// A few times, since a server needs some seconds to be up again.
    Heavy,
    /// It is there from the beginning to the end.
    Whole,
}

impl Fault {
    /// Its name on the command line and in the report.
    pub(super) fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    /// How often it can strike within one run.
    pub(super) fn weight(self) -> Weight {
        match self {
            Self::KillBroker | Self::KillDatabase => Weight::Heavy,
            Self::DuplicateMessages => Weight::Whole,
            _ => Weight::Light,
        }
    }

    /// Makes it happen, and returns when it is over: from then on everything has to recover by itself.
    ///
    /// # Errors
    /// When it could not be made to happen, mostly because another one has just struck.
    pub(super) async fn strike(self, site: &Site<'_>, rng: &mut StdRng) -> Result<()> {
        match self {
            Self::KillSend => site.signal(&a_sender(rng), Signal::KILL),
            Self::KillFanOut => site.signal("fan-out", Signal::KILL),
            Self::KillProgress => site.signal("progress", Signal::KILL),
            Self::KillWeb => site.signal("web", Signal::KILL),
            Self::TermSend => site.signal(&a_sender(rng), Signal::TERM),
            Self::StopSend => {
                let sender = a_sender(rng);
                let pid = site.pid(&sender)?;
                send_signal(pid, std::process::id(), Signal::STOP)?;
                sleep(DEAD_AFTER + some_seconds(rng)).await;
                // It may have been killed meanwhile.
                send_signal(pid, std::process::id(), Signal::CONT).or_else(|_| Ok(()))
            }
            Self::KillBroker => kill_server(site, "RabbitMQ", |pids| pids.rabbitmq).await,
            Self::KillDatabase => kill_server(site, "PostgreSQL", |pids| pids.postgres).await,
            Self::TerminateBackends => terminate_backends(site, some_seconds(rng)).await,
            // What a worker has in hand is not on its queue: it dies first, so that the broker puts that back.
            Self::PurgeItems => {
                for number in 1..=crate::local::SENDERS {
                    site.signal(&format!("send-{number}"), Signal::KILL)?;
                }
                purge(site, vec![topology::ITEMS.to_owned()], some_seconds(rng)).await
            }
            Self::PurgeRetry => {
                let rungs = RUNGS_MS.map(|ms| topology::retry_queue(Duration::from_millis(ms)));
                purge(site, rungs.to_vec(), some_seconds(rng)).await
            }
            Self::PurgeResults => {
                site.signal("progress", Signal::KILL)?;
                purge(site, vec![topology::RESULTS.to_owned()], some_seconds(rng)).await
            }
            Self::PurgeRuns => {
                purge(site, vec![topology::RUNS.to_owned(), topology::RUNS_WAIT.to_owned()], some_seconds(rng)).await
            }
            Self::DeleteQueue => {
                let (connection, channel) = site.channel().await?;
                channel.queue_delete(topology::ITEMS.into(), QueueDeleteOptions::default()).await?;
                Ok(connection.close(200, "done".into()).await?)
            }
            Self::MailDown => {
                site.sink.set_down(true).await?;
                sleep(some_seconds(rng)).await;
                Ok(site.sink.set_down(false).await?)
            }
            Self::MailDrops => {
                site.weather.bad(Trouble::Drops, some_seconds(rng)).await;
                Ok(())
            }
            Self::MailRefusesEveryone => {
                site.weather.bad(Trouble::Busy, some_seconds(rng)).await;
                Ok(())
            }
            Self::MailHangs => {
                site.weather.hang(HANGING);
                Ok(())
            }
            Self::OpenTransaction => open_transaction(site, some_seconds(rng)).await,
            // It is a setting of the whole run.
            Self::DuplicateMessages => Ok(()),
            Self::BrokerAlarm => {
                site.stack.control_rabbitmq(&["set_vm_memory_high_watermark", "0"]).await?;
                sleep(some_seconds(rng)).await;
                Ok(site.stack.control_rabbitmq(&["set_vm_memory_high_watermark", "absolute", "1GiB"]).await?)
            }
        }
    }
}

fn some_seconds(rng: &mut StdRng) -> Duration {
    Duration::from_millis(rng.random_range(1_000..3_500))
}

fn a_sender(rng: &mut StdRng) -> String {
    format!("send-{}", rng.random_range(1..=crate::local::SENDERS))
}

/// Sends a signal to a process that `parent` has started, and to no other: an id may be a stranger's by now.
pub(super) fn send_signal(pid: u32, parent: u32, signal: Signal) -> Result<()> {
    if parent_of(pid)? != parent {
        bail!("process {pid} has ended");
    }
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).context("no process has this id")?;
    Ok(rustix::process::kill_process(pid, signal)?)
}

fn parent_of(pid: u32) -> Result<u32> {
    let stat =
        std::fs::read_to_string(format!("/proc/{pid}/stat")).with_context(|| format!("process {pid} has ended"))?;
    // The name of the program stands in parentheses and may contain anything; the state follows, then the parent.
    let parent = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1)?.parse().ok());
    parent.context("/proc is not as on Linux")
}

/// Kills one of the private servers, and waits until its keeper has it up again.
async fn kill_server(site: &Site<'_>, name: &str, pid_of: impl Fn(Pids) -> Option<u32>) -> Result<()> {
    let pids = site.stack.pids().context("the stack has no state")?;
    let pid = pid_of(pids).with_context(|| format!("{name} is not up"))?;
    send_signal(pid, pids.keeper, Signal::KILL)?;
    let end = Instant::now() + RESTART;
    while site.stack.pids().and_then(&pid_of).is_none_or(|now| now == pid) {
        if Instant::now() > end {
            bail!("{name} is not up again after {} s", RESTART.as_secs());
        }
        sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

async fn terminate_backends(site: &Site<'_>, time: Duration) -> Result<()> {
    let end = Instant::now() + time;
    while Instant::now() < end {
        sqlx::query(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
             WHERE datname = current_database() AND application_name <> current_setting('application_name')",
        )
        .execute(&site.pool)
        .await?;
        sleep(BETWEEN_TERMINATIONS).await;
    }
    Ok(())
}

/// Purges for some time, again and again: what is on these queues mostly stays there for a moment only.
async fn purge(site: &Site<'_>, queues: Vec<String>, time: Duration) -> Result<()> {
    let (connection, channel) = site.channel().await?;
    let end = Instant::now() + time;
    let mut purged = 0;
    while Instant::now() < end {
        for queue in &queues {
            purged += channel.queue_purge(queue.as_str().into(), QueuePurgeOptions::default()).await?;
        }
    }
    eprintln!("  {purged} messages purged from {}", queues.join(", "));
    Ok(connection.close(200, "done".into()).await?)
}

async fn open_transaction(site: &Site<'_>, time: Duration) -> Result<()> {
    let mut tx = site.pool.begin().await?;
    sqlx::query("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ").execute(&mut *tx).await?;
    sqlx::query("SELECT count(*) FROM run_items").execute(&mut *tx).await?;
    sleep(time).await;
    // The snapshot is old by now, so a row can be locked by another transaction alone.
    let mut other = site.pool.begin().await?;
    sqlx::query("SELECT 1 FROM run_progress FOR UPDATE").execute(&mut *other).await?;
    sleep(time).await;
    other.rollback().await?;
    Ok(tx.rollback().await?)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn only_a_child_of_the_named_parent_gets_a_signal() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        assert!(send_signal(child.id(), 1, Signal::KILL).is_err());
        assert!(child.try_wait().unwrap().is_none());
        send_signal(child.id(), std::process::id(), Signal::KILL).unwrap();
        assert!(!child.wait().unwrap().success());
        assert!(send_signal(child.id(), std::process::id(), Signal::KILL).is_err());
    }
}
