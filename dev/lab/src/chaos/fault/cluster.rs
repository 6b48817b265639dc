//! Faults of a cluster: which RabbitMQ nodes die, and when they count as recovered.

use std::{cmp::Reverse, time::Duration};

use anyhow::{Context as _, Result, ensure};
use mailrun_core::queue::ITEMS;
use rand::{RngExt as _, rngs::StdRng, seq::IndexedRandom as _};
use rustix::process::Signal;
use tokio::time::{Instant, sleep};

use super::{
    super::{signal::send_signal, site::Site},
    Fault, Reach, Recovery,
    servers::RESTART,
};
use mailrun_stack::Queue;

/// How often the cluster is polled.
const POLL: Duration = Duration::from_millis(100);
/// Each node reports its queues every five seconds.
const REPORTED: Duration = Duration::from_secs(30);
/// Long enough for the other nodes to elect another leader, and shorter than the connections' heartbeat timeout.
const STOPPED_MS: std::ops::Range<u64> = 6_000..12_000;

/// The faults of this file.
pub(super) const FAULTS: &[Fault] = &[
    Fault::new(
        "kill-node",
        "kill -9 one of three RabbitMQ nodes, and another one after its recovery",
        |site, rng, _| Box::pin(kill_node(site, rng)),
    )
    .heavy()
    .affects(Reach::Cluster)
    .recovers(Recovery::Server),
    Fault::new("kill-leader", "kill -9 the node that leads mailrun.items, then the new leader", |site, _, _| {
        Box::pin(kill_leader(site))
    })
    .heavy()
    .affects(Reach::Cluster)
    .recovers(Recovery::Server),
    Fault::new(
        "kill-majority",
        "kill -9 two of three nodes at once: the queues are unavailable until one of them is back",
        |site, rng, _| Box::pin(kill_majority(site, rng)),
    )
    .heavy()
    .affects(Reach::Cluster)
    .recovers(Recovery::Server),
    Fault::new(
        "stop-leader",
        "SIGSTOP the node that leads mailrun.items for some seconds, with its connections open, then continue it",
        |site, rng, _| Box::pin(stop_leader(site, rng)),
    )
    .heavy()
    .affects(Reach::Cluster)
    .recovers(Recovery::Server),
];

/// Kills a node, but not the one that died before.
async fn kill_node(site: &Site<'_>, rng: &mut StdRng) -> Result<()> {
    let mut members = site.stack.members().await?;
    members.sort_by_key(|member| Reverse(member.uptime));
    members.pop();
    let node = members.choose(rng).context("no cluster")?;
    kill(site, &[&node.name]).await
}

/// Kills the node that leads the busiest queue.
async fn kill_leader(site: &Site<'_>) -> Result<()> {
    kill(site, &[&leader(site).await?]).await
}

/// Kills two nodes.
async fn kill_majority(site: &Site<'_>, rng: &mut StdRng) -> Result<()> {
    let nodes = site.stack.nodes();
    let two: Vec<&str> = nodes.sample(rng, 2).map(String::as_str).collect();
    kill(site, &two).await
}

/// Stops the node that leads the busiest queue (SIGSTOP): its connections stay open, and nothing answers.
async fn stop_leader(site: &Site<'_>, rng: &mut StdRng) -> Result<()> {
    let leader = leader(site).await?;
    let (keeper, pids) = processes(site, &[&leader])?;
    let time = Duration::from_millis(rng.random_range(STOPPED_MS));
    eprintln!("  {leader} stopped for {:.1} s", time.as_secs_f64());
    for pid in &pids {
        send_signal(pid.context("the node is not running")?, keeper, Signal::STOP)?;
    }
    sleep(time).await;
    for pid in pids.into_iter().flatten() {
        send_signal(pid, keeper, Signal::CONT)?;
    }
    until_back(async || Ok(site.stack.can_lose_a_node().await)).await
}

/// Kills these nodes, and waits until the keeper has restarted them and no queue depends on a single node.
async fn kill(site: &Site<'_>, names: &[&str]) -> Result<()> {
    replicated(site).await?;
    let (keeper, before) = processes(site, names)?;
    eprintln!("  kill -9 of {}", names.join(" and "));
    for pid in &before {
        send_signal(pid.context("the node is not running")?, keeper, Signal::KILL)?;
    }
    until_back(async || {
        let (_, now) = processes(site, names)?;
        let restarted = now.iter().zip(&before).all(|(now, before)| now.is_some() && now != before);
        Ok(restarted && site.stack.can_lose_a_node().await)
    })
    .await
}

async fn until_back(back: impl AsyncFn() -> Result<bool>) -> Result<()> {
    let began = Instant::now();
    while !back().await? {
        ensure!(began.elapsed() < RESTART, "the cluster has not recovered after {} s", RESTART.as_secs());
        sleep(POLL).await;
    }
    eprintln!("  recovered after {:.1} s", began.elapsed().as_secs_f64());
    Ok(())
}

/// The keeper, and the processes of these nodes.
fn processes(site: &Site<'_>, names: &[&str]) -> Result<(u32, Vec<Option<u32>>)> {
    let pids = site.stack.pids().context("the stack has no state")?;
    let nodes = site.stack.nodes();
    let of = |name: &&str| {
        let place = nodes.iter().position(|node| node == name)?;
        [pids.rabbitmq].into_iter().chain(pids.peers).nth(place)?
    };
    Ok((pids.keeper, names.iter().map(of).collect()))
}

/// The node that leads the busiest queue.
async fn leader(site: &Site<'_>) -> Result<String> {
    let queues = replicated(site).await?;
    let items = queues.into_iter().find(|queue| queue.name == ITEMS);
    Ok(items.context("there is no item queue")?.leader)
}

/// The queues, each with a member on every node: otherwise a node's death would prove nothing.
async fn replicated(site: &Site<'_>) -> Result<Vec<Queue>> {
    let nodes = site.stack.nodes().len();
    let end = Instant::now() + REPORTED;
    loop {
        let queues = site.stack.queues(site.name()).await;
        match queues {
            Ok(queues) if !queues.is_empty() && queues.iter().all(|queue| queue.members.len() == nodes) => {
                return Ok(queues);
            }
            seen => ensure!(Instant::now() < end, "not every queue has a member on each of {nodes} nodes: {seen:?}"),
        }
        sleep(POLL).await;
    }
}
