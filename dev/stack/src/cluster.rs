//! The nodes of the private RabbitMQ: one, or a cluster of three; and what a cluster reports about its queues.
//!
//! A cluster's nodes have their own folders and names, beside those of the single node, so that a stack can be started with one node
//! today and with three tomorrow. The other broker's messages are at most work that the ledger has done meanwhile.

use serde::{Deserialize, de::DeserializeOwned};

use super::{Stack, error::StackError, management::Management, ports::Ports, state::Login};

/// A RabbitMQ node: its folder and name.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    /// The name of its folder, and the prefix of its logs.
    pub(crate) folder: String,
    /// RabbitMQ's name for it.
    pub(crate) name: String,
    /// The stack's ports, with this node's own.
    pub(crate) ports: Ports,
    /// The names of all nodes of its cluster; empty for a single node.
    members: Vec<String>,
}

impl Node {
    /// The nodes that these ports are for.
    pub(crate) fn all(login: &Login, ports: Ports) -> Vec<Self> {
        if ports.peers.is_none() {
            let (folder, name) = ("rabbitmq".to_owned(), login.node_name.clone());
            return vec![Self { folder, name, ports, members: Vec::new() }];
        }
        let name = |number: usize| match login.node_name.split_once('@') {
            Some((name, host)) => format!("{name}-{number}@{host}"),
            None => format!("{}-{number}", login.node_name),
        };
        let nodes = (1..).zip(ports.of_nodes());
        let members: Vec<String> = nodes.clone().map(|(number, _)| name(number)).collect();
        let node = |(number, ports)| {
            let folder = format!("rabbitmq-{number}");
            Self { folder, name: name(number), ports, members: members.clone() }
        };
        nodes.map(node).collect()
    }

    /// Whether there are other nodes.
    pub(crate) fn is_in_cluster(&self) -> bool {
        !self.members.is_empty()
    }

    /// The additional configuration of a cluster member.
    ///
    /// On their first start, one node at a time looks for the others, under a lock: the first finds none to join and forms the cluster
    /// after some tries. Later starts look for no others.
    pub(crate) fn cluster_configuration(&self) -> String {
        if !self.is_in_cluster() {
            return String::new();
        }
        let mut text = "\ncluster_formation.peer_discovery_backend = classic_config\n".to_owned();
        for (number, name) in (1..).zip(&self.members) {
            text += &format!("cluster_formation.classic_config.nodes.{number} = {name}\n");
        }
        text + "cluster_formation.discovery_retry_limit = 4
cluster_formation.discovery_retry_interval = 500
# As RabbitMQ's documentation recommends for a cluster.
cluster_partition_handling = pause_minority
queue_leader_locator = balanced
"
    }
}

/// Whether all nodes have joined the cluster.
pub(crate) async fn is_whole(login: &Login, ports: Ports) -> bool {
    let nodes = ports.of_nodes();
    if nodes.len() == 1 {
        return true;
    }
    for node in &nodes {
        let management = Management::new(node.management, &login.password);
        let members: Result<Vec<Member>, _> = management.get(&["nodes"]).await;
        let running = |members: Vec<Member>| members.iter().filter(|member| member.running).count();
        if !members.is_ok_and(|members| running(members) == nodes.len()) {
            return false;
        }
    }
    true
}

/// A node, as the cluster reports it.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
pub struct Member {
    /// RabbitMQ's name for it.
    pub name: String,
    /// Whether it is running.
    pub running: bool,
    /// Its uptime in milliseconds; 0 while it is not running.
    #[serde(default)]
    pub uptime: u64,
}

/// A quorum queue, as the cluster reports it.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
pub struct Queue {
    /// Its name.
    pub name: String,
    /// The leader's node.
    pub leader: String,
    /// The nodes of its members.
    pub members: Vec<String>,
}

impl Stack {
    /// The names of RabbitMQ's nodes, in the order of their addresses.
    pub fn nodes(&self) -> Vec<String> {
        Node::all(&self.login, self.ports).into_iter().map(|node| node.name).collect()
    }

    /// The cluster's members.
    ///
    /// # Errors
    /// No node answers.
    pub async fn members(&self) -> Result<Vec<Member>, StackError> {
        self.ask(&["nodes"]).await
    }

    /// The queues of a virtual host.
    ///
    /// # Errors
    /// No node answers, or a queue is so new that it has no statistics yet.
    pub async fn queues(&self, vhost: &str) -> Result<Vec<Queue>, StackError> {
        self.ask(&["queues", vhost]).await
    }

    /// Queries the first node that answers.
    async fn ask<T: DeserializeOwned>(&self, path: &[&str]) -> Result<T, StackError> {
        let mut last = String::new();
        for management in self.managements() {
            match management.get(path).await {
                Ok(answer) => return Ok(answer),
                Err(answer) => last = answer,
            }
        }
        Err(StackError::Management { what: format!("report {}", path.join("/")), answer: last })
    }

    /// Whether all nodes are up, and none is needed for a queue's majority.
    pub async fn can_lose_a_node(&self) -> bool {
        for management in self.managements() {
            if !management.holds("node-is-quorum-critical").await {
                return false;
            }
        }
        true
    }

    fn managements(&self) -> impl Iterator<Item = Management> {
        self.ports.of_nodes().into_iter().map(|node| Management::new(node.management, &self.login.password))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{nodes::PEERS, ports::NodePorts};

    #[test]
    fn a_cluster_has_other_folders_than_the_single_node() {
        let login =
            Login { password: "secret".to_owned(), node_name: "n@localhost".to_owned(), cookie: "c".to_owned() };
        let one = Node::all(&login, Ports::default());
        assert_eq!((one.len(), one[0].folder.as_str(), one[0].name.as_str()), (1, "rabbitmq", "n@localhost"));
        assert_eq!(one[0].cluster_configuration(), "");

        let three = Node::all(&login, Ports { peers: Some([NodePorts::default(); PEERS]), ..Ports::default() });
        let names: Vec<_> = three.iter().map(|node| (node.folder.as_str(), node.name.as_str())).collect();
        let expected =
            [("rabbitmq-1", "n-1@localhost"), ("rabbitmq-2", "n-2@localhost"), ("rabbitmq-3", "n-3@localhost")];
        assert_eq!(names, expected);
        assert!(three[2].cluster_configuration().contains("nodes.2 = n-2@localhost\n"));
    }
}
