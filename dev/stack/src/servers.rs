//! The processes of one stack, started and stopped together.

use futures::future::join_all;
use tokio::{sync::watch, task::JoinHandle};

use super::{
    cluster::Node,
    error::StackError,
    folder::Folder,
    ports::{Ports, is_free},
    postgres::Postgres,
    rabbitmq::{Epmd, Programs, RabbitMq},
    server::{self, Server},
    state::{Login, ServerStatus, State},
};

/// One server, run by its own task.
pub(crate) struct Supervised {
    /// Dropping it stops the server for good.
    wanted: watch::Sender<bool>,
    status: watch::Receiver<ServerStatus>,
    kept: JoinHandle<()>,
}

impl Supervised {
    fn start(server: impl Server) -> Self {
        let (wanted, wanted_now) = watch::channel(true);
        let (status_now, status) = watch::channel(ServerStatus::Starting);
        Self { wanted, status, kept: tokio::spawn(server::keep(server, wanted_now, status_now)) }
    }

    /// Starts or stops it.
    pub(crate) fn want(&self, wanted: bool) {
        self.wanted.send_if_modified(|now| {
            let changed = *now != wanted;
            *now = wanted;
            changed
        });
    }

    async fn end(self) {
        drop(self.wanted);
        if let Err(error) = self.kept.await {
            eprintln!("The task of a server failed: {error}");
        }
    }
}

/// The servers of one stack.
pub(crate) struct Servers {
    /// The database.
    pub(crate) postgres: Supervised,
    /// The broker's nodes.
    pub(crate) rabbitmq: Vec<Supervised>,
    epmd: Supervised,
}

impl Servers {
    /// Starts all of them without waiting until they answer.
    pub(crate) async fn start(folder: &Folder, login: &Login, ports: Ports) -> Result<Self, StackError> {
        let programs =
            Programs::find().ok_or_else(|| StackError::NotStarted("RabbitMQ's programs not found.".to_owned()))?;
        let rabbitmq =
            Node::all(login, ports).into_iter().map(|node| RabbitMq::prepare(folder, &programs, login, node));
        let rabbitmq = rabbitmq.collect::<Result<Vec<_>, _>>()?;
        let mut epmd = Supervised::start(Epmd::prepare(folder, &programs, ports));
        // Without a port mapper, RabbitMQ's node would start its own, which nothing stops.
        let _ = epmd.status.wait_for(|status| *status != ServerStatus::Starting).await;
        let rabbitmq: Vec<Supervised> = rabbitmq.into_iter().map(Supervised::start).collect();
        // The first time this takes seconds, during which RabbitMQ already starts.
        let (own_folder, own_login) = (folder.clone(), login.clone());
        let prepared =
            tokio::task::spawn_blocking(move || Postgres::prepare(&own_folder, &own_login, ports.postgres)).await;
        let error = match prepared {
            Ok(Ok(postgres)) => {
                return Ok(Self { postgres: Supervised::start(postgres), rabbitmq, epmd });
            }
            Ok(Err(error)) => error,
            Err(error) => StackError::NotStarted(format!("Preparing PostgreSQL failed: {error}")),
        };
        end(rabbitmq).await;
        epmd.end().await;
        Err(error)
    }

    /// Writes their state into `state`.
    pub(crate) fn report(&self, state: &mut State) {
        state.postgres = self.postgres.status.borrow().clone();
        let mut nodes = self.rabbitmq.iter().map(|node| node.status.borrow().clone());
        state.rabbitmq = nodes.next().unwrap_or_default();
        state.peers = nodes.collect();
        state.epmd = self.epmd.status.borrow().clone();
    }

    /// Whether another process listens on the port of a failed server.
    pub(crate) fn port_taken(&self, state: &State) -> bool {
        let failed = |status: &ServerStatus| matches!(status, ServerStatus::Failed { .. });
        (failed(&state.postgres) && !is_free(state.ports.postgres))
            || (failed(&state.epmd) && !is_free(state.ports.epmd))
            || (state.nodes().zip(state.ports.of_nodes()))
                .any(|(node, ports)| failed(node) && ports.rabbitmq().into_iter().any(|port| !is_free(port)))
    }

    /// Stops all of them, the broker first: its deliveries end in the database.
    pub(crate) async fn end(self) {
        end(self.rabbitmq).await;
        self.epmd.end().await;
        self.postgres.end().await;
    }
}

/// Stops all nodes at once: otherwise, the last one of a cluster would wait for the others if it starts first.
async fn end(nodes: Vec<Supervised>) {
    join_all(nodes.into_iter().map(Supervised::end)).await;
}
