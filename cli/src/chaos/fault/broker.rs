//! Faults within RabbitMQ.

use std::time::Duration;

use anyhow::Result;
use lapin::options::QueuePurgeOptions;
use rustix::process::Signal;
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::{super::site::Site, send_signal};

/// Purges for some time, again and again: what is on these queues mostly stays there for a moment only.
pub(super) async fn purge(site: &Site<'_>, queues: Vec<String>, time: Duration) -> Result<()> {
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

/// Lets RabbitMQ believe for some time that its memory is used up: it blocks its publishers.
pub(super) async fn memory_alarm(site: &Site<'_>, time: Duration) -> Result<()> {
    site.stack.control_rabbitmq(&["set_vm_memory_high_watermark", "0"]).await?;
    sleep(time).await;
    Ok(site.stack.control_rabbitmq(&["set_vm_memory_high_watermark", "absolute", "1GiB"]).await?)
}

/// Lets RabbitMQ believe the same of its disk.
pub(super) async fn disk_alarm(site: &Site<'_>, time: Duration) -> Result<()> {
    site.stack.control_rabbitmq(&["set_disk_free_limit", "1000000GB"]).await?;
    sleep(time).await;
    Ok(site.stack.control_rabbitmq(&["set_disk_free_limit", "200MB"]).await?)
}

/// Gives a queue room for one message only, and lets those who read it stand still for some time: what is published beyond
/// that is refused.
pub(super) async fn full(site: &Site<'_>, queue: &str, readers: &[String], time: Duration) -> Result<()> {
    let (vhost, pattern) = (site.name(), format!("^{}$", queue.replace('.', "\\.")));
    let policy = format!("{queue} {}", Uuid::new_v4());
    let definition = r#"{"max-length":1,"overflow":"reject-publish"}"#;
    let control = async |args: &[&str]| site.stack.control_rabbitmq(args).await;
    control(&["set_policy", "-p", vhost, &policy, &pattern, definition, "--apply-to", "queues"]).await?;
    let mut stopped = Vec::new();
    for reader in readers {
        // One may have been killed meanwhile, here and below.
        if let Ok(pid) = site.pid(reader)
            && send_signal(pid, std::process::id(), Signal::STOP).is_ok()
        {
            stopped.push(pid);
        }
    }
    sleep(time).await;
    for pid in stopped {
        let _ = send_signal(pid, std::process::id(), Signal::CONT);
    }
    Ok(control(&["clear_policy", "-p", vhost, &policy]).await?)
}
