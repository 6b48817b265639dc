//! The faults of a cluster: which nodes of RabbitMQ die, and when they count as back.

use std::{cmp::Reverse, time::Duration};

use anyhow::{Context as _, Result, ensure};
use mailrun_shared::topology::ITEMS;
use rand::{rngs::StdRng, seq::IndexedRandom as _};
use rustix::process::Signal;
use tokio::time::{Instant, sleep};

use super::{super::site::Site, send_signal, servers::RESTART};
use crate::stack::Queue;

/// How often the cluster is looked at.
const POLL: Duration = Duration::from_millis(100);
/// Each node tells of its queues every five seconds.
const TOLD: Duration = Duration::from_secs(30);

/// Kills a node, but not the one that died before.
pub(super) async fn kill_node(site: &Site<'_>, rng: &mut StdRng) -> Result<()> {
    let mut members = site.stack.members().await?;
    members.sort_by_key(|member| Reverse(member.uptime));
    members.pop();
    let node = members.choose(rng).context("there is no cluster")?;
    kill(site, &[&node.name]).await
}

/// Kills the node with the leader of the queue that carries most.
pub(super) async fn kill_leader(site: &Site<'_>) -> Result<()> {
    let queues = replicated(site).await?;
    let items = queues.iter().find(|queue| queue.name == ITEMS).context("there is no queue of items")?;
    kill(site, &[&items.leader]).await
}

/// Kills two nodes.
pub(super) async fn kill_majority(site: &Site<'_>, rng: &mut StdRng) -> Result<()> {
    let nodes = site.stack.nodes();
    let two: Vec<&str> = nodes.sample(rng, 2).map(String::as_str).collect();
    kill(site, &two).await
}

/// Kills these nodes, and waits until the keeper has them up again and every queue could spare any node.
async fn kill(site: &Site<'_>, names: &[&str]) -> Result<()> {
    replicated(site).await?;
    let nodes = site.stack.nodes();
    let pids = |names: &[&str]| {
        let pids = site.stack.pids().context("the stack has no state")?;
        let of = |name: &&str| {
            let place = nodes.iter().position(|node| node == name)?;
            [pids.rabbitmq].into_iter().chain(pids.peers).nth(place)?
        };
        anyhow::Ok((pids.keeper, names.iter().map(of).collect::<Vec<_>>()))
    };
    let (keeper, before) = pids(names)?;
    eprintln!("  kill -9 of {}", names.join(" and "));
    for pid in &before {
        send_signal(pid.context("the node is not up")?, keeper, Signal::KILL)?;
    }
    let killed_at = Instant::now();
    let back = async || {
        let (_, now) = pids(names)?;
        let restarted = now.iter().zip(&before).all(|(now, before)| now.is_some() && now != before);
        anyhow::Ok(restarted && site.stack.can_lose_a_node().await)
    };
    while !back().await? {
        ensure!(killed_at.elapsed() < RESTART, "{} not back after {} s", names.join(" and "), RESTART.as_secs());
        sleep(POLL).await;
    }
    eprintln!("  back after {:.1} s", killed_at.elapsed().as_secs_f64());
    Ok(())
}

/// The queues, each of which has a member on every node: otherwise a node's death would prove nothing.
async fn replicated(site: &Site<'_>) -> Result<Vec<Queue>> {
    let nodes = site.stack.nodes().len();
    let end = Instant::now() + TOLD;
    loop {
        let queues = site.stack.queues(&site.name).await;
        match queues {
            Ok(queues) if !queues.is_empty() && queues.iter().all(|queue| queue.members.len() == nodes) => {
                return Ok(queues);
            }
            seen => ensure!(Instant::now() < end, "not every queue has a member on each of {nodes} nodes: {seen:?}"),
        }
        sleep(POLL).await;
    }
}
