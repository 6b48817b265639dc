//! The keeper's state for its clients in `state.json`, and the login that both use in `login.json`.

use std::{
    fs, io,
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use rand::RngExt as _;
use serde::{Deserialize, Serialize};

use super::{
    error::{StackError, io_error},
    folder::{Folder, write_private},
    ports::Ports,
};

/// The user of both servers.
pub(crate) const USER: &str = "mailrun";

/// The state of one server.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "status")]
pub(crate) enum ServerStatus {
    /// Starting, for the first time or again.
    #[default]
    Starting,
    /// Answering.
    Running {
        /// The process id.
        pid: u32,
    },
    /// Stopped on request.
    Stopped,
    /// It did not start, or died too often.
    Failed {
        /// The reason, with the end of its log.
        why: String,
    },
}

/// The state of the whole stack.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Phase {
    /// The servers are starting.
    Starting,
    /// Ready for clients.
    Ready,
    /// Stopping; it accepts no new clients.
    Stopping,
    /// Failed; the text gives the reason.
    Failed(String),
}

#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct State {
    /// The keeper's process.
    pub(crate) keeper_pid: u32,
    /// When this was written, in milliseconds since 1970.
    pub(crate) written_at_ms: u64,
    /// The state of the whole stack.
    pub(crate) phase: Phase,
    /// One line per step of the start so far, for people.
    pub(crate) notes: Vec<String>,
    /// The ports in use.
    pub(crate) ports: Ports,
    /// PostgreSQL.
    pub(crate) postgres: ServerStatus,
    /// RabbitMQ, or its first node.
    pub(crate) rabbitmq: ServerStatus,
    /// The other nodes of a cluster.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) peers: Vec<ServerStatus>,
    /// The Erlang port mapper.
    pub(crate) epmd: ServerStatus,
}

impl State {
    /// The state of a stack that this process is starting.
    pub(crate) fn new(ports: Ports) -> Self {
        Self {
            keeper_pid: std::process::id(),
            written_at_ms: now_ms(),
            phase: Phase::Starting,
            notes: Vec::new(),
            ports,
            postgres: ServerStatus::Starting,
            rabbitmq: ServerStatus::Starting,
            peers: ports.peers.map_or_else(Vec::new, |peers| vec![ServerStatus::Starting; peers.len()]),
            epmd: ServerStatus::Starting,
        }
    }

    /// Whether all servers satisfy `holds`.
    pub(crate) fn all(&self, holds: impl Fn(&ServerStatus) -> bool) -> bool {
        [&self.postgres, &self.epmd].into_iter().chain(self.nodes()).all(holds)
    }

    pub(crate) fn nodes(&self) -> impl Iterator<Item = &ServerStatus> {
        std::iter::once(&self.rabbitmq).chain(&self.peers)
    }

    /// Reads the file; `None` if it does not exist.
    pub(crate) fn read(folder: &Folder) -> Option<Self> {
        serde_json::from_slice(&fs::read(folder.path("state.json")).ok()?).ok()
    }

    /// Writes the file with the current time.
    pub(crate) fn write(&mut self, folder: &Folder) -> Result<(), StackError> {
        self.written_at_ms = now_ms();
        let path = folder.path("state.json");
        let text = serde_json::to_vec_pretty(self).map_err(io::Error::from).map_err(io_error("Writing", &path))?;
        write_private(&path, &text).map_err(io_error("Writing", &path))
    }
}

/// Milliseconds since 1970.
pub(crate) fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |age| age.as_millis().try_into().unwrap_or(u64::MAX))
}

/// The secrets and names generated once per folder.
#[derive(Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Login {
    /// The password of both servers' user.
    pub(crate) password: String,
    /// RabbitMQ's node name, which is part of its data. It does not change when the folder is moved.
    pub(crate) node_name: String,
    /// The secret between RabbitMQ and its command-line tools.
    pub(crate) cookie: String,
}

impl Login {
    /// Reads the login, or generates and stores it before any server starts.
    pub(crate) fn load(folder: &Folder) -> Result<Self, StackError> {
        let path = folder.path("login.json");
        match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).map_err(io::Error::from).map_err(io_error("Reading", &path)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let login =
                    Self { password: word(32), node_name: format!("mailrun-{}@localhost", word(6)), cookie: word(40) };
                login.write(&path).map_err(io_error("Writing", &path))?;
                Ok(login)
            }
            Err(error) => Err(io_error("Reading", &path)(error)),
        }
    }

    fn write(&self, path: &Path) -> io::Result<()> {
        write_private(path, &serde_json::to_vec_pretty(self)?)
    }
}

/// A random word of lower-case letters and digits, which needs no quoting.
fn word(length: usize) -> String {
    const LETTERS: &[u8; 32] = b"abcdefghijkmnopqrstuvwxyz2345678";
    let mut random = rand::rng();
    (0..length).map(|_| char::from(LETTERS[random.random_range(0..LETTERS.len())])).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn the_login_is_generated_once_and_private() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::open(dir.path()).unwrap();
        let first = Login::load(&folder).unwrap();
        assert_eq!(Login::load(&folder).unwrap().password, first.password);
        let mode = fs::metadata(folder.path("login.json")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
