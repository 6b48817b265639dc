//! Faults of the processes of RabbitMQ and PostgreSQL.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use rand::{RngExt as _, rngs::StdRng};
use rustix::process::Signal;
use tokio::time::{Instant, sleep};

use super::{
    super::{
        signal::{children, send_signal},
        site::Site,
    },
    Fault, Reach, Recovery, some_seconds,
};
use mailrun_stack::Pids;

/// A killed server is running again within this time.
pub(super) const RESTART: Duration = Duration::from_secs(120);

/// One of the private servers.
#[derive(Clone, Copy)]
struct Server {
    name: &'static str,
    pid: fn(Pids) -> Option<u32>,
}

const RABBITMQ: Server = Server { name: "RabbitMQ", pid: |pids| pids.rabbitmq };
const POSTGRESQL: Server = Server { name: "PostgreSQL", pid: |pids| pids.postgres };

/// The faults of this file.
pub(super) const FAULTS: &[Fault] = &[
    Fault::new("kill-broker", "kill -9 RabbitMQ", |site, _, _| Box::pin(kill(site, RABBITMQ)))
        .heavy()
        .affects(Reach::Servers)
        .recovers(Recovery::Server),
    Fault::new("kill-database", "kill -9 PostgreSQL", |site, _, _| Box::pin(kill(site, POSTGRESQL)))
        .heavy()
        .affects(Reach::Servers)
        .recovers(Recovery::Server),
    Fault::new("kill-recovery", "kill -9 PostgreSQL, and again during its recovery", |site, rng, _| {
        Box::pin(kill_in_recovery(site, rng))
    })
    .heavy()
    .affects(Reach::Servers)
    .recovers(Recovery::Server),
    Fault::new("restart-broker", "Stop RabbitMQ cleanly, and start it again after some seconds", |site, rng, _| {
        Box::pin(restart_rabbitmq(site, some_seconds(rng)))
    })
    .heavy()
    .affects(Reach::Servers)
    .recovers(Recovery::Server),
    Fault::new("restart-database", "Stop PostgreSQL cleanly, and start it again after some seconds", |site, rng, _| {
        Box::pin(restart_postgres(site, some_seconds(rng)))
    })
    .heavy()
    .affects(Reach::Servers)
    .recovers(Recovery::Server),
];

/// Kills a server, and waits until its keeper has restarted it.
async fn kill(site: &Site<'_>, server: Server) -> Result<()> {
    let Server { name, pid: pid_of } = server;
    let pids = site.stack.pids().context("the stack has no state")?;
    let pid = pid_of(pids).with_context(|| format!("{name} is not running"))?;
    send_signal(pid, pids.keeper, Signal::KILL)?;
    restarted(site, server, pid).await
}

/// Waits until the keeper has restarted the server that had this process id.
async fn restarted(site: &Site<'_>, server: Server, pid: u32) -> Result<()> {
    let Server { name, pid: pid_of } = server;
    let end = Instant::now() + RESTART;
    while site.stack.pids().and_then(pid_of).is_none_or(|now| now == pid) {
        if Instant::now() > end {
            bail!("{name} is not running again after {} s", RESTART.as_secs());
        }
        sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

/// Kills PostgreSQL, and also its next process, as soon as it exists or a moment later.
async fn kill_in_recovery(site: &Site<'_>, rng: &mut StdRng) -> Result<()> {
    let pids = site.stack.pids().context("the stack has no state")?;
    let first = pids.postgres.context("PostgreSQL is not running")?;
    send_signal(first, pids.keeper, Signal::KILL)?;
    let end = Instant::now() + RESTART;
    let next = loop {
        if let Some(next) = children(pids.keeper, "postgres").into_iter().find(|pid| *pid != first) {
            break next;
        }
        if Instant::now() > end {
            bail!("PostgreSQL was not restarted after {} s", RESTART.as_secs());
        }
        sleep(Duration::from_millis(1)).await;
    };
    sleep(Duration::from_millis(rng.random_range(0..60))).await;
    send_signal(next, pids.keeper, Signal::KILL)?;
    restarted(site, POSTGRESQL, next).await
}

/// Stops RabbitMQ as an operator would, and starts it after this time.
async fn restart_rabbitmq(site: &Site<'_>, time: Duration) -> Result<()> {
    site.stack.stop_rabbitmq().await?;
    sleep(time).await;
    Ok(site.stack.start_rabbitmq().await?)
}

/// Stops PostgreSQL as an operator would, and starts it after this time.
async fn restart_postgres(site: &Site<'_>, time: Duration) -> Result<()> {
    site.stack.stop_postgres().await?;
    sleep(time).await;
    Ok(site.stack.start_postgres().await?)
}
