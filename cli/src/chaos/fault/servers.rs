//! Faults of the servers' processes, RabbitMQ's and PostgreSQL's alike.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use rustix::process::Signal;
use tokio::time::{Instant, sleep};

use super::{super::site::Site, send_signal};
use crate::stack::Pids;

/// A server that was killed is up again within this time.
const RESTART: Duration = Duration::from_secs(120);

/// One of the private servers.
#[derive(Clone, Copy)]
pub(super) struct Server {
    name: &'static str,
    pid: fn(Pids) -> Option<u32>,
}

pub(super) const RABBITMQ: Server = Server { name: "RabbitMQ", pid: |pids| pids.rabbitmq };
pub(super) const POSTGRESQL: Server = Server { name: "PostgreSQL", pid: |pids| pids.postgres };

/// Kills a server, and waits until its keeper has it up again.
pub(super) async fn kill(site: &Site<'_>, server: Server) -> Result<()> {
    let Server { name, pid: pid_of } = server;
    let pids = site.stack.pids().context("the stack has no state")?;
    let pid = pid_of(pids).with_context(|| format!("{name} is not up"))?;
    send_signal(pid, pids.keeper, Signal::KILL)?;
    let end = Instant::now() + RESTART;
    while site.stack.pids().and_then(pid_of).is_none_or(|now| now == pid) {
        if Instant::now() > end {
            bail!("{name} is not up again after {} s", RESTART.as_secs());
        }
        sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}
