//! Faults within RabbitMQ.

use std::time::Duration;

use anyhow::Result;
use lapin::options::{QueueDeleteOptions, QueuePurgeOptions};
use tokio::time::{Instant, sleep};

use super::super::site::Site;

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

/// Deletes a queue with all that is on it.
pub(super) async fn delete_queue(site: &Site<'_>, queue: &str) -> Result<()> {
    let (connection, channel) = site.channel().await?;
    channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await?;
    Ok(connection.close(200, "done".into()).await?)
}

/// Lets RabbitMQ believe for some time that its memory is used up: it blocks its publishers.
pub(super) async fn memory_alarm(site: &Site<'_>, time: Duration) -> Result<()> {
    site.stack.control_rabbitmq(&["set_vm_memory_high_watermark", "0"]).await?;
    sleep(time).await;
    Ok(site.stack.control_rabbitmq(&["set_vm_memory_high_watermark", "absolute", "1GiB"]).await?)
}
