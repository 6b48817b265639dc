//! The three processes of one stack, started and ended together.

use tokio::{sync::watch, task::JoinHandle};

use super::{
    error::StackError,
    folder::Folder,
    ports::{Ports, is_free},
    postgres::Postgres,
    rabbitmq::{Epmd, Programs, RabbitMq},
    server::{self, Server, Wanted},
    state::{Login, ServerStatus, State},
};

/// One server, kept by a loop of its own.
pub(crate) struct Kept {
    wanted: watch::Sender<Wanted>,
    status: watch::Receiver<ServerStatus>,
    kept: JoinHandle<()>,
}

impl Kept {
    fn start(server: impl Server) -> Self {
        let (wanted, wanted_now) = watch::channel(Wanted::Running);
        let (status_now, status) = watch::channel(ServerStatus::Starting);
        Self { wanted, status, kept: tokio::spawn(server::keep(server, wanted_now, status_now)) }
    }

    /// Says what is wanted of the server from now on.
    pub(crate) fn want(&self, wanted: Wanted) {
        self.wanted.send_if_modified(|now| {
            let changed = *now != wanted;
            *now = wanted;
            changed
        });
    }

    async fn end(self) {
        self.want(Wanted::Ended);
        if let Err(error) = self.kept.await {
            eprintln!("A server's loop ended badly: {error}");
        }
    }
}

/// The servers of one stack.
pub(crate) struct Servers {
    /// The database.
    pub(crate) postgres: Kept,
    /// The broker.
    pub(crate) rabbitmq: Kept,
    epmd: Kept,
}

impl Servers {
    /// Starts all of them; none need answer yet when this returns.
    pub(crate) async fn start(folder: &Folder, login: &Login, ports: Ports) -> Result<Self, StackError> {
        let programs =
            Programs::find().ok_or_else(|| StackError::NotStarted("RabbitMQ's programs were not found.".to_owned()))?;
        let rabbitmq = RabbitMq::prepare(folder, &programs, login, ports)?;
        let mut epmd = Kept::start(Epmd::prepare(folder, &programs, ports));
        // RabbitMQ's node would start a port mapper itself, one that nobody stops, if it found none.
        let _ = epmd.status.wait_for(|status| *status != ServerStatus::Starting).await;
        let rabbitmq = Kept::start(rabbitmq);
        // The first time this takes seconds, in which RabbitMQ starts already.
        let (own_folder, own_login) = (folder.clone(), login.clone());
        let prepared =
            tokio::task::spawn_blocking(move || Postgres::prepare(&own_folder, &own_login, ports.postgres)).await;
        let error = match prepared {
            Ok(Ok(postgres)) => {
                return Ok(Self { postgres: Kept::start(postgres), rabbitmq, epmd });
            }
            Ok(Err(error)) => error,
            Err(error) => StackError::NotStarted(format!("Preparing PostgreSQL ended badly: {error}")),
        };
        rabbitmq.end().await;
        epmd.end().await;
        Err(error)
    }

    /// Writes how they are into the state.
    pub(crate) fn report(&self, state: &mut State) {
        state.postgres = self.postgres.status.borrow().clone();
        state.rabbitmq = self.rabbitmq.status.borrow().clone();
        state.epmd = self.epmd.status.borrow().clone();
    }

    /// Whether one of the failed servers finds its port taken by a stranger, as it doesn't listen itself any more.
    pub(crate) fn port_taken(&self, state: &State) -> bool {
        let failed = |status: &ServerStatus| matches!(status, ServerStatus::Failed { .. });
        (failed(&state.postgres) && !is_free(state.ports.postgres))
            || (failed(&state.epmd) && !is_free(state.ports.epmd))
            || (failed(&state.rabbitmq) && state.ports.rabbitmq().into_iter().any(|port| !is_free(port)))
    }

    /// Stops all of them, the broker first: what it delivers ends in the database.
    pub(crate) async fn end(self) {
        self.rabbitmq.end().await;
        self.epmd.end().await;
        self.postgres.end().await;
    }
}
