//! Faults within RabbitMQ.

use std::time::Duration;

use anyhow::{Result, bail};
use futures::future::join_all;
use lapin::options::QueuePurgeOptions;
use mailrun_core::queue::{DEAD, ITEMS, RESULTS, RUNS, RUNS_PAUSED, RUNS_WAIT};
use rustix::process::Signal;
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::{
    super::{
        signal::send_signal,
        site::{Site, retry_queues, senders},
    },
    Fault, Reach, some_seconds,
};

/// How long the consumers of a full queue are stopped, which is shorter than the heartbeat timeout.
const FULL: Duration = Duration::from_secs(2);
/// A stopped service is started again within this time.
const NEXT_START: Duration = Duration::from_secs(20);

/// The faults of this file.
pub(super) const FAULTS: &[Fault] = &[
    // The worker dies first, so that the broker requeues its unacknowledged messages.
    Fault::new(
        "purge-items",
        "Kill all senders and purge mailrun.items, repeatedly for some seconds",
        |site, rng, _| {
            Box::pin(async move {
                for sender in senders() {
                    site.signal(&sender, Signal::KILL)?;
                }
                purge(site, vec![ITEMS.to_owned()], some_seconds(rng)).await
            })
        },
    ),
    Fault::new("purge-retry", "Purge the retry queues, repeatedly for some seconds", |site, rng, _| {
        Box::pin(purge(site, retry_queues(), some_seconds(rng)))
    }),
    Fault::new(
        "purge-results",
        "Kill the progress worker and purge mailrun.results, repeatedly for some seconds",
        |site, rng, _| {
            Box::pin(async move {
                site.signal("progress", Signal::KILL)?;
                purge(site, vec![RESULTS.to_owned()], some_seconds(rng)).await
            })
        },
    ),
    Fault::new("purge-runs", "Purge mailrun.runs and its wait queues, repeatedly for some seconds", |site, rng, _| {
        Box::pin(purge(site, [RUNS, RUNS_WAIT, RUNS_PAUSED].map(str::to_owned).to_vec(), some_seconds(rng)))
    }),
    Fault::new("purge-dead", "Purge mailrun.dead, repeatedly for some seconds", |site, rng, _| {
        Box::pin(purge(site, vec![DEAD.to_owned()], some_seconds(rng)))
    }),
    Fault::new("broker-alarm", "RabbitMQ's memory alarm blocks publishers for some seconds", |site, rng, _| {
        Box::pin(memory_alarm(site, some_seconds(rng)))
    })
    .affects(Reach::Servers),
    Fault::new("disk-alarm", "RabbitMQ's disk alarm blocks publishers for some seconds", |site, rng, _| {
        Box::pin(disk_alarm(site, some_seconds(rng)))
    })
    .affects(Reach::Servers),
    Fault::new(
        "full-items",
        "mailrun.items holds one message only, while all senders restart and are stopped for two seconds",
        |site, _, _| Box::pin(async move { full(site, ITEMS, &senders().collect::<Vec<_>>(), FULL).await }),
    ),
    Fault::new(
        "full-results",
        "mailrun.results holds one message only, while the progress worker restarts and is stopped for two seconds",
        |site, _, _| Box::pin(async move { full(site, RESULTS, &["progress".to_owned()], FULL).await }),
    ),
];

/// Purges queues repeatedly for `time`, because most messages stay on them only for a moment.
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

/// Makes RabbitMQ believe for `time` that its memory is exhausted, which blocks publishers.
async fn memory_alarm(site: &Site<'_>, time: Duration) -> Result<()> {
    site.stack.control_rabbitmq(&["set_vm_memory_high_watermark", "0"]).await?;
    sleep(time).await;
    undo(site, &["set_vm_memory_high_watermark", "absolute", "1GiB"]).await
}

/// A restarted server answers again within this time.
const UNDONE: Duration = Duration::from_secs(60);

/// Makes RabbitMQ believe the same about its disk.
async fn disk_alarm(site: &Site<'_>, time: Duration) -> Result<()> {
    site.stack.control_rabbitmq(&["set_disk_free_limit", "1000000GB"]).await?;
    sleep(time).await;
    undo(site, &["set_disk_free_limit", "200MB"]).await
}

/// Limits a queue to one message, so that further publishes are refused. Unacknowledged messages do not count, so its consumers are
/// restarted, and stopped for some time before they consume anything.
async fn full(site: &Site<'_>, queue: &str, readers: &[String], time: Duration) -> Result<()> {
    let (vhost, pattern) = (site.name(), format!("^{}$", queue.replace('.', "\\.")));
    let policy = format!("{queue} {}", Uuid::new_v4());
    let definition = r#"{"max-length":1,"overflow":"reject-publish"}"#;
    let control = async |args: &[&str]| site.stack.control_rabbitmq(args).await;
    control(&["set_policy", "-p", vhost, &policy, &pattern, definition, "--apply-to", "queues"]).await?;
    let stopped = join_all(readers.iter().map(|reader| stop_at_start(site, reader))).await;
    sleep(time).await;
    for pid in stopped.into_iter().flatten() {
        // It may have been killed meanwhile.
        let _ = send_signal(pid, std::process::id(), Signal::CONT);
    }
    undo(site, &["clear_policy", "-p", vhost, &policy]).await
}

/// Undoes a fault, retrying because another fault may have affected RabbitMQ meanwhile.
async fn undo(site: &Site<'_>, command: &[&str]) -> Result<()> {
    let end = Instant::now() + UNDONE;
    loop {
        match site.stack.control_rabbitmq(command).await {
            Ok(()) => return Ok(()),
            Err(error) if Instant::now() > end => return Err(error.into()),
            Err(_) => sleep(Duration::from_millis(500)).await,
        }
    }
}

/// Sends SIGTERM to a service, and SIGSTOP to the process that replaces it.
async fn stop_at_start(site: &Site<'_>, service: &str) -> Result<u32> {
    let old = site.pid(service)?;
    send_signal(old, std::process::id(), Signal::TERM)?;
    let end = Instant::now() + NEXT_START;
    loop {
        match site.pid(service)? {
            pid if pid != old => return send_signal(pid, std::process::id(), Signal::STOP).map(|()| pid),
            _ if Instant::now() > end => bail!("{service} was not started again"),
            _ => sleep(Duration::from_millis(1)).await,
        }
    }
}
