//! The private RabbitMQ and its own Erlang port mapper: programs, configuration, and start commands.

use std::{
    env,
    ffi::OsStr,
    io,
    path::{Path, PathBuf},
    process::Stdio,
};

use rustix::process::Signal;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    process::Command,
};

use super::{
    cluster::Node,
    error::{StackError, io_error},
    folder::{Folder, open_log, private_dir, write_private},
    management::Management,
    packages::{Package, ensure_packages, on_path, versions},
    ports::Ports,
    release::Release,
    server::Server,
    state::{Login, USER},
    tree::Tree,
};

/// The message broker.
pub const RABBITMQ: Package = Package {
    name: "RabbitMQ",
    purpose: "carry the messages between Mailrun's processes",
    apt: &["rabbitmq-server"],
    elsewhere: "RabbitMQ 3.10 or later (macOS: `brew install rabbitmq`; Fedora: `dnf install rabbitmq-server`)",
    present: || Programs::of_system().is_some(),
};

/// The virtual host created on the first start.
pub(crate) const DEFAULT_VHOST: &str = "mailrun";

const PLUGINS: &str = "[rabbitmq_management,rabbitmq_prometheus,rabbitmq_shovel,rabbitmq_shovel_management].\n";

/// RabbitMQ's start script and the port mapper.
#[derive(Clone, Debug)]
pub(crate) struct Programs {
    server: PathBuf,
    epmd: PathBuf,
    /// The tree that contains them, unless they are the system's.
    tree: Option<Tree>,
}

impl Programs {
    /// Finds those of the chosen release: the system's, if they match it.
    pub(crate) fn find() -> Option<Self> {
        let system = Self::of_system();
        match Release::chosen() {
            Release::System => system,
            release => system.filter(|programs| release.has(programs.version().as_deref())).or_else(Self::in_tree),
        }
    }

    /// Installs those of the chosen release, if they are missing. `report` gets one line per step.
    pub(crate) async fn ensure(report: impl Fn(&str)) -> Result<(), StackError> {
        Release::check_environment()?;
        let release = Release::chosen();
        match release {
            Release::System => ensure_packages(&[RABBITMQ], report).await,
            _ if Self::of_system().is_some_and(|programs| release.has(programs.version().as_deref())) => Ok(()),
            Release::Four => Tree::ensure(report).await,
        }
    }

    fn in_tree() -> Option<Self> {
        let tree = Tree::find()?;
        let (server, epmd) = tree.programs()?;
        Some(Self { server, epmd, tree: Some(tree) })
    }

    /// Finds the system's. The packaged wrapper in /usr/sbin switches users, so the wrapped script comes first.
    pub(crate) fn of_system() -> Option<Self> {
        let packaged = || {
            versions("/usr/lib/rabbitmq/lib", "rabbitmq_server-")
                .into_iter()
                .rev()
                .map(|version| version.join("sbin/rabbitmq-server"))
                .chain(
                    ["/usr/lib/rabbitmq/bin/rabbitmq-server", "/opt/homebrew/opt/rabbitmq/sbin/rabbitmq-server"]
                        .map(PathBuf::from),
                )
                .find(|script| script.is_file())
        };
        let runtime = || versions("/usr/lib/erlang", "erts-").pop().map(|version| version.join("bin/epmd"));
        Some(Self {
            server: packaged().or_else(|| on_path("rabbitmq-server"))?,
            epmd: on_path("epmd").or_else(runtime).filter(|epmd| epmd.is_file())?,
            tree: None,
        })
    }

    /// The version of the system's, from the name of RabbitMQ's own library beside the script.
    pub(crate) fn version(&self) -> Option<String> {
        let plugins = self.server.canonicalize().ok()?.parent()?.with_file_name("plugins");
        let rabbit = versions(plugins.to_str()?, "rabbit-").pop()?;
        Some(rabbit.file_name()?.to_str()?.strip_prefix("rabbit-")?.trim_end_matches(".ez").to_owned())
    }

    /// A command that becomes one of them, with `name` as its own name.
    fn command(&self, program: &Path, name: &OsStr) -> Command {
        match &self.tree {
            Some(tree) => tree.command(program, name),
            None => {
                let mut command = Command::new(program);
                command.arg0(name);
                command
            }
        }
    }

    /// `rabbitmqctl`; none if it is not beside the server's script.
    fn control(&self) -> Option<Command> {
        let script = self.server.with_file_name("rabbitmqctl");
        (self.tree.is_some() || script.is_file()).then(|| self.command(&script, script.as_os_str()))
    }
}

/// A RabbitMQ that is ready to start.
pub(crate) struct RabbitMq {
    in_cluster: bool,
    programs: Programs,
    home: PathBuf,
    log: PathBuf,
    ports: Ports,
    node_name: String,
    marker: String,
    management: Management,
}

impl RabbitMq {
    /// Writes the configuration.
    pub(crate) fn prepare(folder: &Folder, programs: &Programs, login: &Login, node: Node) -> Result<Self, StackError> {
        let home = folder.path(&node.folder);
        for name in ["", "data", "config", "config/none"] {
            private_dir(&home.join(name))?;
        }
        for (name, content) in [
            ("config/rabbitmq.conf", configuration(login, &node)),
            ("config/advanced.config", "[].\n".to_owned()),
            ("config/rabbitmq-env.conf", String::new()),
            ("config/enabled_plugins", PLUGINS.to_owned()),
            (".erlang.cookie", login.cookie.clone()),
        ] {
            let path = home.join(name);
            write_private(&path, content.as_bytes()).map_err(io_error("Writing", &path))?;
        }
        Ok(Self {
            in_cluster: node.is_in_cluster(),
            programs: programs.clone(),
            log: folder.log(&format!("{}-start", node.folder)),
            home,
            ports: node.ports,
            node_name: node.name,
            marker: folder.marker(&node.folder),
            management: Management::new(node.ports.management, &login.password),
        })
    }
}

/// `rabbitmqctl` for a node of a folder, without arguments; none if it is not beside the server's script.
pub(crate) fn control(folder: &Folder, node: &Node) -> Option<Command> {
    let mut command = Programs::find()?.control()?;
    let home = folder.path(&node.folder);
    let config = home.join("config");
    command
        .env_clear()
        .env("PATH", env::var_os("PATH").unwrap_or_default())
        .env("LANG", "C.UTF-8")
        // The cookie is there.
        .env("HOME", &home)
        .env("ERL_EPMD_PORT", node.ports.epmd.to_string())
        .env("ERL_EPMD_ADDRESS", "127.0.0.1")
        .env("ERL_FLAGS", "-start_epmd false")
        .env("ERL_CRASH_DUMP_SECONDS", "0")
        .env("RABBITMQ_NODENAME", &node.name)
        .env("RABBITMQ_CONF_ENV_FILE", config.join("rabbitmq-env.conf"))
        .current_dir(&home)
        .stdin(Stdio::null())
        .kill_on_drop(true);
    Some(command)
}

fn configuration(login: &Login, node: &Node) -> String {
    let Ports { amqp, management, prometheus, .. } = node.ports;
    let (name, cluster) = (&node.folder, node.cluster_configuration());
    let password = &login.password;
    format!(
        "# Written at each start; changes are lost.
listeners.tcp.local = 127.0.0.1:{amqp}
management.tcp.ip = 127.0.0.1
management.tcp.port = {management}
prometheus.tcp.ip = 127.0.0.1
prometheus.tcp.port = {prometheus}

default_vhost = {DEFAULT_VHOST}
default_user = {USER}
default_pass = {password}
default_user_tags.administrator = true
default_permissions.configure = .*
default_permissions.read = .*
default_permissions.write = .*

vm_memory_high_watermark.absolute = 1GiB
disk_free_limit.absolute = 200MB
# The default of 512 MB per log is too much for a laptop.
raft.wal_max_size_bytes = 67108864

log.console = false
log.file = {name}.log
log.file.level = warning
log.file.rotation.size = 5242880
log.file.rotation.count = 1
{cluster}"
    )
}

impl Server for RabbitMq {
    const NAME: &'static str = "RabbitMQ";
    const STOP: Signal = Signal::TERM;

    fn log(&self) -> &Path {
        &self.log
    }

    fn command(&self) -> io::Result<Command> {
        let log = open_log(&self.log)?;
        let config = self.home.join("config");
        let script = &self.programs.server;
        let mut command = self.programs.command(script, script.as_os_str());
        // Nothing of the caller's environment or of /etc/rabbitmq may affect this node.
        command
            .env_clear()
            .env("PATH", env::var_os("PATH").unwrap_or_default())
            .env("LANG", "C.UTF-8")
            .env("HOME", &self.home)
            .env("ERL_EPMD_PORT", self.ports.epmd.to_string())
            .env("ERL_EPMD_ADDRESS", "127.0.0.1")
            // Otherwise, if ours does not answer, Erlang starts its own port mapper, which nothing stops.
            .env("ERL_FLAGS", "-start_epmd false")
            .env("ERL_CRASH_DUMP_SECONDS", "0")
            // Schedulers bound to processors would wait for the other processes on them.
            .env("RABBITMQ_SCHEDULER_BIND_TYPE", "u")
            .env("RABBITMQ_NODENAME", &self.node_name)
            .env("RABBITMQ_DIST_PORT", self.ports.distribution.to_string())
            .env("RABBITMQ_MNESIA_BASE", self.home.join("data"))
            .env("RABBITMQ_SCHEMA_DIR", self.home.join("data/schema"))
            .env("RABBITMQ_GENERATED_CONFIG_DIR", self.home.join("data/generated"))
            .env("RABBITMQ_LOG_BASE", self.log.parent().unwrap_or(&self.home))
            .env("RABBITMQ_CONFIG_FILE", config.join("rabbitmq.conf"))
            .env("RABBITMQ_CONFIG_FILES", config.join("none"))
            .env("RABBITMQ_ADVANCED_CONFIG_FILE", config.join("advanced.config"))
            .env("RABBITMQ_CONF_ENV_FILE", config.join("rabbitmq-env.conf"))
            .env("RABBITMQ_ENABLED_PLUGINS_FILE", config.join("enabled_plugins"))
            // With this, the script becomes the Erlang machine instead of waiting for it; `-noinput` disables the input again.
            .env("RABBITMQ_ALLOW_INPUT", "1")
            .args(["-noinput", "-kernel", "inet_dist_use_interface", "{127,0,0,1}"])
            .args(["+S", "2:2", "-mailrun", &self.marker])
            .current_dir(&self.home)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        Ok(command)
    }

    /// A node asks the others for their features, and ends if one of them is still starting and cannot answer
    /// (RabbitMQ 3.10: `incompatible_feature_flags`).
    fn first_starts(&self) -> u32 {
        if self.in_cluster { 3 } else { 1 }
    }

    async fn answers(&self) -> bool {
        self.management.listens(self.ports.amqp).await
    }
}

/// The Erlang port mapper of this stack, on its own port, so that no other node shares it or outlives it.
pub(crate) struct Epmd {
    programs: Programs,
    port: u16,
    log: PathBuf,
    marker: String,
}

impl Epmd {
    /// The port mapper for these ports.
    pub(crate) fn prepare(folder: &Folder, programs: &Programs, ports: Ports) -> Self {
        Self { programs: programs.clone(), port: ports.epmd, log: folder.log("epmd"), marker: folder.marker("epmd") }
    }
}

impl Server for Epmd {
    const NAME: &'static str = "The Erlang port mapper";
    const STOP: Signal = Signal::TERM;

    fn log(&self) -> &Path {
        &self.log
    }

    fn command(&self) -> io::Result<Command> {
        let log = open_log(&self.log)?;
        // It accepts no name as an option, and must be recognised after its keeper was killed.
        let mut command = self.programs.command(&self.programs.epmd, OsStr::new(&self.marker));
        command
            .env_clear()
            .env("PATH", env::var_os("PATH").unwrap_or_default())
            .args(["-address", "127.0.0.1", "-port", &self.port.to_string()])
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        Ok(command)
    }

    async fn answers(&self) -> bool {
        // The request for the names of all nodes; the response begins with its port.
        let ask = async {
            let mut socket = TcpStream::connect(("127.0.0.1", self.port)).await?;
            socket.write_all(&[0, 1, b'n']).await?;
            socket.read_u32().await
        };
        ask.await.is_ok_and(|port| port == u32::from(self.port))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn reads_the_version_from_the_library_beside_the_script() {
        let dir = tempfile::tempdir().unwrap();
        let server = dir.path().join("sbin/rabbitmq-server");
        for library in ["rabbit-4.0.5", "rabbit_common-4.0.5", "rabbitmq_shovel-4.0.5"] {
            fs::create_dir_all(dir.path().join("plugins").join(library)).unwrap();
        }
        fs::create_dir(dir.path().join("sbin")).unwrap();
        fs::write(&server, "").unwrap();
        let programs = Programs { server, epmd: PathBuf::new(), tree: None };
        assert_eq!(programs.version().as_deref(), Some("4.0.5"));
    }

    #[test]
    fn listens_on_loopback_only() {
        let login =
            Login { password: "secret".to_owned(), node_name: "n@localhost".to_owned(), cookie: "c".to_owned() };
        let ports = Ports { amqp: 1, management: 2, prometheus: 3, ..Ports::default() };
        let text = configuration(&login, &Node::all(&login, ports)[0]);
        assert!(text.contains("listeners.tcp.local = 127.0.0.1:1\n"));
        assert_eq!(text.matches("tcp.ip = 127.0.0.1").count(), 2);
    }
}
