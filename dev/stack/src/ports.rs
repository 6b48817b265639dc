//! Chooses the stack's loopback ports: the remembered ones, else the preferred ones, else any free ones.

use std::{
    fs::{self, File},
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::Path,
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::{
    folder::write_private,
    lease,
    nodes::{Nodes, PEERS},
};

/// How many ports from the preferred one on are tried before any free one.
const SPAN: u16 = 40;

/// The ports of one stack, all on 127.0.0.1.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Ports {
    pub(crate) postgres: u16,
    /// RabbitMQ: AMQP 0-9-1.
    pub(crate) amqp: u16,
    /// RabbitMQ: management page and API.
    pub(crate) management: u16,
    /// RabbitMQ: metrics.
    pub(crate) prometheus: u16,
    /// RabbitMQ: Erlang distribution, used by its command-line tools.
    pub(crate) distribution: u16,
    /// This stack's own Erlang port mapper.
    pub(crate) epmd: u16,
    /// The other nodes of a cluster.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) peers: Option<[NodePorts; PEERS]>,
}

/// The ports of a further RabbitMQ node, like those of the first.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct NodePorts {
    amqp: u16,
    management: u16,
    prometheus: u16,
    distribution: u16,
}

impl Ports {
    /// The ports to use now: those in `file`, except for occupied ones, which are replaced. Writes the file. The ports stay reserved
    /// against other stacks as long as the second value exists.
    pub(crate) fn choose(file: &Path, nodes: Nodes) -> io::Result<(Self, Reserved)> {
        // An unreadable file is no loss: the ports are chosen again.
        let remembered: Self =
            fs::read(file).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
        let mut reserved = Reserved::default();
        let mut next = |before: u16, preferred: u16| pick(before, preferred, &mut reserved);
        let ports = Self {
            postgres: next(remembered.postgres, 5433)?,
            amqp: next(remembered.amqp, 5673)?,
            management: next(remembered.management, 15673)?,
            prometheus: next(remembered.prometheus, 15733)?,
            distribution: next(remembered.distribution, 25673)?,
            epmd: next(remembered.epmd, 4370)?,
            peers: match nodes {
                Nodes::One => None,
                Nodes::Three => {
                    let mut peers = remembered.peers.unwrap_or_default();
                    for peer in &mut peers {
                        *peer = NodePorts {
                            amqp: next(peer.amqp, 5673)?,
                            management: next(peer.management, 15673)?,
                            prometheus: next(peer.prometheus, 15733)?,
                            distribution: next(peer.distribution, 25673)?,
                        };
                    }
                    Some(peers)
                }
            },
        };
        write_private(file, &serde_json::to_vec_pretty(&ports)?)?;
        Ok((ports, reserved))
    }

    /// The ports RabbitMQ listens on.
    pub(crate) fn rabbitmq(&self) -> [u16; 4] {
        [self.amqp, self.management, self.prometheus, self.distribution]
    }

    /// The ports of each node, with the node's own in place of the first node's.
    pub(crate) fn of_nodes(&self) -> Vec<Self> {
        let mut nodes = vec![*self];
        for NodePorts { amqp, management, prometheus, distribution } in self.peers.into_iter().flatten() {
            nodes.push(Self { amqp, management, prometheus, distribution, ..*self });
        }
        nodes
    }
}

/// Ports that no other stack on this machine chooses: seconds pass between choosing a port and listening on it.
#[derive(Debug, Default)]
pub(crate) struct Reserved {
    taken: Vec<u16>,
    locks: Vec<File>,
}

impl Reserved {
    /// Reserves a port, if it is free and not reserved.
    fn take(&mut self, port: u16) -> bool {
        if self.taken.contains(&port) || !is_free(port) {
            return false;
        }
        // Without a lock file the port is used anyway; if that fails, the keeper chooses again.
        if let Some(file) = lease::open_shared_by_users(&format!("mailrun-port-{port}.lock")) {
            if file.try_lock().is_err() {
                return false;
            }
            self.locks.push(file);
        }
        self.taken.push(port);
        true
    }
}

fn pick(remembered: u16, preferred: u16, reserved: &mut Reserved) -> io::Result<u16> {
    let first = (remembered != 0).then_some(remembered);
    if let Some(port) = first.into_iter().chain(preferred..preferred + SPAN).find(|port| reserved.take(*port)) {
        return Ok(port);
    }
    loop {
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
        if reserved.take(port) {
            return Ok(port);
        }
    }
}

/// Whether a loopback port is free. Another process may take it a moment later; the keeper then chooses again.
pub(crate) fn is_free(port: u16) -> bool {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    // Where a specific address can be bound beside a listener on all addresses, only connecting shows that listener.
    TcpListener::bind(address).is_ok() && TcpStream::connect_timeout(&address, Duration::from_millis(200)).is_err()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn occupied_ports_are_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("ports.json");
        let (first, reserved) = Ports::choose(&file, Nodes::One).unwrap();
        let (other, _reserved) = Ports::choose(&dir.path().join("other.json"), Nodes::One).unwrap();
        assert_ne!(other.postgres, first.postgres, "a reserved port is not chosen again");
        drop(reserved);
        let stranger = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let taken = stranger.local_addr().unwrap().port();
        write_private(&file, &serde_json::to_vec(&Ports { amqp: taken, ..first }).unwrap()).unwrap();
        let (second, _reserved) = Ports::choose(&file, Nodes::One).unwrap();
        assert_ne!(second.amqp, taken);
    }

    #[test]
    fn a_free_remembered_port_takes_precedence() {
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
        assert_eq!(pick(free, 47_101, &mut Reserved::default()).unwrap(), free);
    }

    #[test]
    fn no_port_is_assigned_twice() {
        let mut reserved = Reserved::default();
        let first = pick(0, 47_001, &mut reserved).unwrap();
        assert_ne!(pick(first, first, &mut reserved).unwrap(), first);
    }
}
