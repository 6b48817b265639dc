//! The local stack: a private RabbitMQ and a private PostgreSQL in a folder of the checkout, for `up`, `demo` and tests.
//!
//! A *keeper* process runs both servers; each process that uses them holds a shared lock, the *lease*, on a file of the folder. When
//! the lease is free, the keeper stops the servers and ends, so a killed client leaves nothing behind. The system's own servers are
//! never touched.

mod client;
mod cluster;
mod database;
mod error;
mod folder;
mod keeper;
mod lease;
mod management;
mod nodes;
mod packages;
mod ports;
mod postgres;
pub mod proc;
mod processes;
mod rabbitmq;
mod release;
mod server;
mod servers;
mod state;
pub mod supervise;
mod tree;
mod up_lock;

use std::{
    env, fs,
    path::{Path, PathBuf},
    time::Duration,
};

pub use self::folder::open_log;
use self::{
    client::KeeperCommand,
    cluster::Node,
    error::io_error,
    folder::Folder,
    keeper::{END_REQUEST, LEASE, POSTGRES_STOPPED, RABBITMQ_STOPPED},
    lease::Lock,
    management::Management,
    nodes::PEERS,
    ports::Ports,
    rabbitmq::Programs,
    state::{Login, ServerStatus, State, USER},
};
pub use self::{
    cluster::{Member, Queue},
    error::StackError,
    keeper::run as keep,
    nodes::Nodes,
    packages::{CHROMIUM, FAKETIME, Package, ensure_packages, faketime_library},
    postgres::POSTGRESQL,
    rabbitmq::RABBITMQ,
    release::Release,
    up_lock::{Running, UpLock, UpLockRefused, running},
};

/// RabbitMQ's management console.
#[derive(Clone)]
pub struct Console {
    /// The URL.
    pub url: String,
    /// The user to log in as.
    pub user: String,
    /// The password to log in with.
    pub password: String,
}

/// The result of [`Stack::stop`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stopped {
    /// Its servers have stopped.
    Ended,
    /// Other processes use it, so it stays up.
    StillUsed,
}

/// The present processes of the servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pids {
    /// The keeper.
    pub keeper: u32,
    /// PostgreSQL, unless it is stopped or restarting.
    pub postgres: Option<u32>,
    /// RabbitMQ, or its first node, unless it is stopped or restarting.
    pub rabbitmq: Option<u32>,
    /// The other nodes of a cluster.
    pub peers: [Option<u32>; PEERS],
    /// RabbitMQ's port mapper.
    pub epmd: Option<u32>,
}

/// A running private stack. It stays up as long as this value exists, and for the keeper's linger time after that.
pub struct Stack {
    folder: Folder,
    ports: Ports,
    login: Login,
    console: Console,
    management: Management,
    lease: Lock,
}

impl Stack {
    /// Starts or joins the private stack of `home`, installing missing programs. `report` gets one line per step.
    ///
    /// `keeper_exe` is the mailrun program; `linger` (whole seconds) is how long a newly started keeper stays up without users.
    pub async fn start(
        home: &Path,
        keeper_exe: &Path,
        linger: Duration,
        report: impl Fn(&str),
    ) -> Result<Self, StackError> {
        Self::start_nodes(home, keeper_exe, linger, Nodes::One, report).await
    }

    /// Like [`Stack::start`], with this number of RabbitMQ nodes.
    pub async fn start_nodes(
        home: &Path,
        keeper_exe: &Path,
        linger: Duration,
        nodes: Nodes,
        report: impl Fn(&str),
    ) -> Result<Self, StackError> {
        ensure_servers(&report).await?;
        let folder = Folder::open(home)?;
        let lease_path = folder.path(LEASE);
        let lease =
            lease::shared_within(&lease_path, client::TIMEOUT).await.map_err(io_error("Locking", &lease_path))?;
        let lease = lease.ok_or_else(|| client::Deadline::new("Stopping the earlier stack").passed(&folder))?;
        let state = client::join(&folder, &KeeperCommand { program: keeper_exe, linger, nodes }, &report).await?;
        let login = Login::load(&folder)?;
        let ports = state.ports;
        let console = Console {
            url: format!("http://127.0.0.1:{}/", ports.management),
            user: USER.to_owned(),
            password: login.password.clone(),
        };
        let management = Management::new(ports.management, &login.password);
        Ok(Self { folder, ports, login, console, management, lease })
    }

    /// The URL of a database.
    pub fn database_url(&self, database: &str) -> String {
        self.address("postgres", self.ports.postgres, database)
    }

    /// The URL of a virtual host, at the first node.
    pub fn amqp_url(&self, vhost: &str) -> String {
        self.address("amqp", self.ports.amqp, vhost)
    }

    /// The URLs of a virtual host, one for each node.
    pub fn amqp_urls(&self, vhost: &str) -> Vec<String> {
        self.ports.of_nodes().iter().map(|node| self.address("amqp", node.amqp, vhost)).collect()
    }

    fn address(&self, scheme: &str, port: u16, path: &str) -> String {
        // Form encoding, except that a space is %20 in a path.
        let path: String = url::form_urlencoded::byte_serialize(path.as_bytes()).collect();
        format!("{scheme}://{USER}:{}@127.0.0.1:{port}/{}", self.login.password, path.replace('+', "%20"))
    }

    /// RabbitMQ's management console.
    pub fn console(&self) -> &Console {
        &self.console
    }

    /// The present processes of the servers.
    pub fn pids(&self) -> Option<Pids> {
        let state = State::read(&self.folder)?;
        let pid = |status: &ServerStatus| match status {
            ServerStatus::Running { pid } => Some(*pid),
            _ => None,
        };
        Some(Pids {
            keeper: state.keeper_pid,
            postgres: pid(&state.postgres),
            rabbitmq: pid(&state.rabbitmq),
            peers: std::array::from_fn(|peer| state.peers.get(peer).and_then(&pid)),
            epmd: pid(&state.epmd),
        })
    }

    /// Creates a database, if it does not exist.
    pub async fn create_database(&self, name: &str) -> Result<(), StackError> {
        database::create(self.ports.postgres, &self.login.password, name).await
    }

    /// Drops a database with its contents, if it exists.
    pub async fn drop_database(&self, name: &str) -> Result<(), StackError> {
        database::drop(self.ports.postgres, &self.login.password, name).await
    }

    /// Creates a virtual host, if it does not exist, with all permissions for the stack's user.
    pub async fn create_vhost(&self, name: &str) -> Result<(), StackError> {
        self.management.create_vhost(name).await
    }

    /// Deletes a virtual host with its contents, if it exists.
    pub async fn drop_vhost(&self, name: &str) -> Result<(), StackError> {
        // With a client of its own: the other one's idle connections belong to the runtime that opened them, which may be blocked.
        Management::new(self.ports.management, &self.login.password).delete_vhost(name).await
    }

    /// Stops RabbitMQ until [`Stack::start_rabbitmq`], for all users of the stack.
    pub async fn stop_rabbitmq(&self) -> Result<(), StackError> {
        self.set_stopped(RABBITMQ_STOPPED, true).await?;
        client::wait_for(&self.folder, "Stopping RabbitMQ", |state| {
            state.nodes().all(|node| *node == ServerStatus::Stopped)
        })
        .await
        .map(drop)
    }

    /// Starts RabbitMQ again and waits until it is ready.
    pub async fn start_rabbitmq(&self) -> Result<(), StackError> {
        self.set_stopped(RABBITMQ_STOPPED, false).await?;
        let runs = |state: &State| state.nodes().all(|node| matches!(node, ServerStatus::Running { .. }));
        client::wait_for(&self.folder, "Starting RabbitMQ", runs).await.map(drop)
    }

    /// Stops PostgreSQL until [`Stack::start_postgres`], for all users of the stack.
    pub async fn stop_postgres(&self) -> Result<(), StackError> {
        self.set_stopped(POSTGRES_STOPPED, true).await?;
        client::wait_for(&self.folder, "Stopping PostgreSQL", |state| state.postgres == ServerStatus::Stopped)
            .await
            .map(drop)
    }

    /// Starts PostgreSQL again and waits until it is ready.
    pub async fn start_postgres(&self) -> Result<(), StackError> {
        self.set_stopped(POSTGRES_STOPPED, false).await?;
        let runs = |state: &State| matches!(state.postgres, ServerStatus::Running { .. });
        client::wait_for(&self.folder, "Starting PostgreSQL", runs).await.map(drop)
    }

    /// Runs `rabbitmqctl` with these arguments, for this stack's RabbitMQ.
    pub async fn control_rabbitmq(&self, args: &[&str]) -> Result<(), StackError> {
        let what = || format!("{} by rabbitmqctl", args.join(" "));
        let failed = |answer: String| StackError::Management { what: what(), answer };
        let mut command = Node::all(&self.login, self.ports)
            .first()
            .and_then(|node| rabbitmq::control(&self.folder, node))
            .ok_or_else(|| failed("rabbitmqctl not found".to_owned()))?;
        let output = command.args(args).output().await.map_err(|error| failed(error.to_string()))?;
        if output.status.success() {
            return Ok(());
        }
        Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
    }

    async fn set_stopped(&self, name: &str, stopped: bool) -> Result<(), StackError> {
        let path = self.folder.path(name);
        let done = if stopped { fs::write(&path, "") } else { fs::remove_file(&path) };
        match done {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(io_error("Changing", &path)(error)),
            _ => Ok(()),
        }
    }

    /// Releases the stack. If no other process uses it, waits until its servers and its keeper have ended.
    pub async fn stop(self) -> Result<Stopped, StackError> {
        let Self { folder, lease, .. } = self;
        drop(lease);
        let request = folder.path(END_REQUEST);
        fs::write(&request, "").map_err(io_error("Writing", &request))?;
        Ok(if client::wait_for_end(&folder, &request).await? { Stopped::Ended } else { Stopped::StillUsed })
    }
}

/// Installs the programs of both servers, if they are missing. `report` gets one line per step.
pub async fn ensure_servers(report: impl Fn(&str)) -> Result<(), StackError> {
    ensure_packages(&[POSTGRESQL], &report).await?;
    Programs::ensure(&report).await
}

/// The folder of the stack of this checkout: MAILRUN_HOME, else `.mailrun` in the workspace that cargo runs or that contains the
/// current folder, else in the current folder. For another release, a folder below it: no RabbitMQ reads the data of a later one, nor
/// of a much earlier one.
pub fn home() -> PathBuf {
    match Release::chosen() {
        Release::System => home_of_checkout(),
        release => home_of_checkout().join(format!("broker-{}", release.name())),
    }
}

/// The private folder of this checkout, for any release of RabbitMQ.
#[must_use]
pub fn home_of_checkout() -> PathBuf {
    if let Some(home) = env::var_os("MAILRUN_HOME").filter(|home| !home.is_empty()) {
        return home.into();
    }
    let current = env::current_dir().unwrap_or_else(|_| PathBuf::from("."));
    // Cargo sets the package's folder; looked up at run time, because a built program may be moved.
    let package = env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from);
    let root = package.iter().chain([&current]).find_map(|start| workspace_above(start));
    root.unwrap_or(current).join(".mailrun")
}

fn workspace_above(start: &Path) -> Option<PathBuf> {
    start
        .ancestors()
        .find(|folder| folder.join("Cargo.toml").is_file() && folder.join("migrations").is_dir())
        .map(Path::to_path_buf)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_workspace_from_a_subfolder() {
        let dir = tempfile::tempdir().unwrap();
        let below = dir.path().join("cli/src");
        fs::create_dir_all(&below).unwrap();
        fs::write(dir.path().join("cli/Cargo.toml"), "").unwrap();
        assert_eq!(workspace_above(&below), None);
        fs::write(dir.path().join("Cargo.toml"), "").unwrap();
        fs::create_dir(dir.path().join("migrations")).unwrap();
        assert_eq!(workspace_above(&below), Some(dir.path().to_path_buf()));
    }
}
