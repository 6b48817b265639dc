//! A real RabbitMQ cluster of three nodes: it replicates each queue three times, and a run survives the deaths of single nodes.

use std::{
    collections::BTreeSet,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use mailrun_stack::{Nodes, Queue, Stack, Stopped};
use rustix::process::{Pid, Signal};
use serde_json::Value;

const MAILRUN: &str = env!("CARGO_BIN_EXE_mailrun-dev");

async fn start(home: &Path) -> Stack {
    let tell = |line: &str| eprintln!("{line}");
    Stack::start_nodes(home, Path::new(MAILRUN), Duration::ZERO, Nodes::Three, tell).await.unwrap()
}

/// The queues, once each has a member on every node.
async fn replicated(stack: &Stack) -> Vec<Queue> {
    let nodes: BTreeSet<String> = stack.nodes().into_iter().collect();
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let queues = stack.queues("mailrun").await;
        if let Ok(queues) = &queues
            && !queues.is_empty()
            && queues.iter().all(|queue| queue.members.iter().cloned().collect::<BTreeSet<_>>() == nodes)
        {
            return queues.clone();
        }
        assert!(Instant::now() < end, "not within a minute: {queues:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test]
async fn queues_have_a_member_on_each_node_and_survive_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let stack = start(dir.path()).await;
    assert_eq!(stack.members().await.unwrap().iter().filter(|member| member.running).count(), 3);
    let mut setup = Command::new(MAILRUN);
    setup
        .arg("setup")
        .env("DATABASE_URL", stack.database_url("mailrun"))
        .env("AMQP_URL", stack.amqp_urls("mailrun").join(","));
    assert!(setup.status().unwrap().success());

    let queues = replicated(&stack).await;
    assert!(queues.iter().any(|queue| queue.name == "mailrun.items"), "{queues:?}");
    let leaders: BTreeSet<&str> = queues.iter().map(|queue| queue.leader.as_str()).collect();
    assert_eq!(leaders.len(), 3, "one connection declared all, but their leaders are spread: {queues:?}");
    assert!(stack.can_lose_a_node().await);

    virtual_hosts_are_created_while_a_node_starts(&stack).await;

    assert_eq!(stack.stop().await.unwrap(), Stopped::Ended);
    let stack = start(dir.path()).await;
    assert_eq!(replicated(&stack).await.len(), queues.len());
    assert_eq!(stack.stop().await.unwrap(), Stopped::Ended);
}

/// Creates them one after another, so that some fall between the moment when a node counts as running and when it is ready: RabbitMQ
/// does not start those on that node.
async fn virtual_hosts_are_created_while_a_node_starts(stack: &Stack) {
    let killed = stack.pids().unwrap().peers[1].unwrap();
    rustix::process::kill_process(Pid::from_raw(killed.cast_signed()).unwrap(), Signal::KILL).unwrap();
    let is_back = || stack.pids().is_some_and(|pids| pids.peers[1].is_some_and(|pid| pid != killed));
    let end = Instant::now() + Duration::from_secs(120);
    let mut created = Vec::new();
    loop {
        // One more when the node is back.
        let last = is_back();
        let name = format!("vhost-{}", created.len());
        stack.create_vhost(&name).await.unwrap();
        created.push(name);
        if last {
            break;
        }
        assert!(Instant::now() < end, "the node is not back within two minutes");
    }
    for name in created {
        stack.drop_vhost(&name).await.unwrap();
    }
}

#[test]
fn a_run_survives_the_nodes_deaths() {
    let faults = ["kill-node", "kill-leader"];
    let mut chaos = Command::new(MAILRUN);
    chaos.args(["chaos", "--recipients", "400", "--fault", &faults.join(","), "--seed", "1", "--json"]);
    let output = chaos.stderr(Stdio::inherit()).output().unwrap();
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{stdout}");
    let figures: Value = serde_json::from_str(&stdout).unwrap();
    for fault in faults {
        let one = &figures["by_fault"][fault];
        for broken in ["lost", "doubled", "untold", "drift", "left", "stuck"] {
            assert_eq!(one[broken], 0, "{fault}: {figures}");
        }
        // A fault counts when its node was killed, was back, and all queues had three members again.
        assert!(one["faults"].as_u64().is_some_and(|faults| faults >= 1), "{fault}: {figures}");
        let told: u64 = ["sent", "failed", "unknown"].iter().filter_map(|state| one[state].as_u64()).sum();
        assert_eq!(told, 400, "{fault}: {figures}");
    }
}
