//! The private PostgreSQL: its programs, data folder, account, and start command.

use std::{
    ffi::OsString,
    fs, io,
    path::{Path, PathBuf},
    process::{Command as Blocking, Stdio},
};

use rustix::process::Signal;
use sqlx::{
    ConnectOptions as _, Connection as _, PgConnection,
    postgres::{PgConnectOptions, PgSslMode},
};
use tokio::process::Command;

use super::{
    error::{StackError, io_error},
    folder::{Folder, open_log, write_private},
    packages::{Package, on_path, versions},
    server::Server,
    state::{Login, USER},
};

/// The database.
pub const POSTGRESQL: Package = Package {
    name: "PostgreSQL",
    purpose: "keep runs, items and their outcomes",
    apt: &["postgresql"],
    elsewhere: "PostgreSQL 14 or later (macOS: `brew install postgresql@17`; Fedora: `dnf install postgresql-server`)",
    present: || newest_programs().is_some(),
};

/// The folder of the newest PostgreSQL's programs.
pub(crate) fn newest_programs() -> Option<PathBuf> {
    let mut installed = versions("/usr/lib/postgresql", "");
    for prefix in ["/opt/homebrew/opt", "/usr/local/opt"] {
        installed.extend(versions(prefix, "postgresql@"));
    }
    installed
        .into_iter()
        .rev()
        .map(|folder| folder.join("bin"))
        .find(|bin| complete(bin))
        .or_else(|| on_path("pg_ctl")?.canonicalize().ok()?.parent().map(Path::to_path_buf).filter(|bin| complete(bin)))
}

fn complete(bin: &Path) -> bool {
    bin.join("postgres").is_file() && bin.join("initdb").is_file()
}

/// The programs for data written by this major version.
fn programs_of(version: &str) -> Option<PathBuf> {
    let candidates = [
        format!("/usr/lib/postgresql/{version}/bin"),
        format!("/opt/homebrew/opt/postgresql@{version}/bin"),
        format!("/usr/local/opt/postgresql@{version}/bin"),
    ];
    let newest = newest_programs().filter(|bin| {
        let output = Blocking::new(bin.join("postgres")).arg("--version").output();
        output.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains(&format!(" {version}.")))
    });
    candidates.into_iter().map(PathBuf::from).find(|bin| complete(bin)).or(newest)
}

/// The path of the library that counts statements, relative to the programs: on Debian, Homebrew, Fedora.
const STATISTICS: [&str; 4] = [
    "../lib/pg_stat_statements.so",
    "../lib/postgresql/pg_stat_statements.dylib",
    "../lib/postgresql/pg_stat_statements.so",
    "../lib64/pgsql/pg_stat_statements.so",
];

/// The account that the server runs as: it refuses to run as root.
#[derive(Clone, Debug)]
struct Account {
    uid: u32,
    gid: u32,
    /// Arguments of `setpriv`.
    switches: Vec<OsString>,
}

/// A PostgreSQL that is ready to start.
pub(crate) struct Postgres {
    bin: PathBuf,
    data: PathBuf,
    account: Option<Account>,
    port: u16,
    password: String,
    marker: String,
    log: PathBuf,
}

impl Postgres {
    /// Finds the programs and creates the data folder if it does not exist. Blocks for seconds the first time.
    pub(crate) fn prepare(folder: &Folder, login: &Login, port: u16) -> Result<Self, StackError> {
        let (parent, account) = place(folder)?;
        let data = parent.join("data");
        let log = folder.log("postgres");
        let bin = match fs::read_to_string(data.join("PG_VERSION")) {
            Ok(version) => programs_of(version.trim()).ok_or_else(|| {
                StackError::Missing(format!(
                    "The data in {} was written by PostgreSQL {}, which is not installed. Install that version, or delete the folder {} to start empty.",
                    data.display(),
                    version.trim(),
                    folder.root().display(),
                ))
            })?,
            Err(_) => newest_programs().ok_or_else(|| StackError::NotStarted("PostgreSQL's programs were not found.".to_owned()))?,
        };
        let postgres =
            Self { bin, data, account, port, password: login.password.clone(), marker: folder.marker("postgres"), log };
        if !postgres.data.join("PG_VERSION").exists() {
            postgres.create_data(&parent)?;
        }
        Ok(postgres)
    }

    /// Creates the data beside its final place and moves it there when complete, so that a crash leaves no partial data.
    fn create_data(&self, parent: &Path) -> Result<(), StackError> {
        let new = parent.join("data.new");
        if new.exists() {
            fs::remove_dir_all(&new).map_err(io_error("Removing", &new))?;
        }
        let password = parent.join("password");
        write_private(&password, self.password.as_bytes()).map_err(io_error("Writing", &password))?;
        if let Some(account) = &self.account {
            std::os::unix::fs::chown(&password, Some(account.uid), Some(account.gid))
                .map_err(io_error("Changing the owner of", &password))?;
        }
        let mut initdb: Blocking = self.program("initdb");
        initdb.arg("--pgdata").arg(&new).arg("--pwfile").arg(&password).args(["--username", USER]);
        initdb.args(["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C"]);
        let output = initdb.stdin(Stdio::null()).output();
        fs::remove_file(&password).map_err(io_error("Removing", &password))?;
        let output = output.map_err(io_error("Starting", &self.bin.join("initdb")))?;
        if !output.status.success() {
            return Err(StackError::NotStarted(format!(
                "PostgreSQL's initdb failed ({}):\n{}",
                output.status,
                String::from_utf8_lossy(&output.stderr).trim(),
            )));
        }
        fs::rename(&new, &self.data).map_err(io_error("Renaming", &self.data))
    }

    /// One of the programs, run by the account, without settings from the environment.
    fn program(&self, name: &str) -> Blocking {
        let path = self.bin.join(name);
        let mut command = match &self.account {
            None => Blocking::new(path),
            Some(account) => {
                let mut command = Blocking::new("setpriv");
                command.args(&account.switches).arg(path);
                command
            }
        };
        command
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("LC_ALL", "C")
            .current_dir("/");
        command
    }
}

impl Server for Postgres {
    const NAME: &'static str = "PostgreSQL";
    // "Fast" shutdown: ends sessions, writes a checkpoint, ends.
    const STOP: Signal = Signal::INT;

    fn log(&self) -> &Path {
        &self.log
    }

    fn command(&self) -> io::Result<Command> {
        let log = open_log(&self.log)?;
        let mut command = self.program("postgres");
        command.arg("-D").arg(&self.data);
        let (port, cluster) = (format!("port={}", self.port), format!("cluster_name={}", self.marker));
        for setting in [
            port.as_str(),
            cluster.as_str(),
            "listen_addresses=127.0.0.1",
            "unix_socket_directories=",
            "max_connections=200",
            "shared_buffers=256MB",
            "max_wal_size=2GB",
            // Mailrun's guarantees after a crash depend on these two.
            "fsync=on",
            "synchronous_commit=on",
            "password_encryption=scram-sha-256",
            "logging_collector=off",
            "log_min_messages=warning",
            "log_checkpoints=off",
        ] {
            command.arg("-c").arg(setting);
        }
        // For the bench's statement counts; nothing else needs it.
        if STATISTICS.iter().any(|library| self.bin.join(library).is_file()) {
            command.arg("-c").arg("shared_preload_libraries=pg_stat_statements");
        }
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        Ok(command.into())
    }

    async fn answers(&self) -> bool {
        // The password is this folder's, so no other server passes.
        let ask = async {
            let mut connection = connect(self.port, &self.password, "postgres").await?;
            sqlx::query("SELECT 1").execute(&mut connection).await?;
            connection.close().await
        };
        ask.await.is_ok()
    }
}

/// Connects to the private server.
pub(crate) async fn connect(port: u16, password: &str, database: &str) -> Result<PgConnection, sqlx::Error> {
    PgConnectOptions::new_without_pgpass()
        .host("127.0.0.1")
        .port(port)
        .username(USER)
        .password(password)
        .database(database)
        .ssl_mode(PgSslMode::Disable)
        .connect()
        .await
}

/// The folder of the data and the account of the server: this user beside the other data, or for root another account, which must be
/// able to reach the folder.
fn place(folder: &Folder) -> Result<(PathBuf, Option<Account>), StackError> {
    let inside = folder.path("postgres");
    if !rustix::process::geteuid().is_root() {
        fs::create_dir_all(&inside).map_err(io_error("Creating", &inside))?;
        return Ok((inside, None));
    }
    let (uid, gid) = ordinary_account().ok_or_else(|| {
        StackError::NotStarted("PostgreSQL cannot run as root, and this system has neither a user `postgres` nor `nobody`. Start Mailrun as another user.".to_owned())
    })?;
    let plain =
        vec![format!("--reuid={uid}").into(), format!("--regid={gid}").into(), OsString::from("--clear-groups")];
    // Below a folder that only root may enter, such as /root: an ordinary account, with the capability to traverse folders.
    let mut passing = plain.clone();
    passing.extend(["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"].map(OsString::from));
    // Where a container withholds that capability: outside the checkout. A note in the folder says so.
    let outside = Path::new("/var/lib").join(folder.name());
    let note = folder.path("postgres-data-is-elsewhere.txt");
    let mut places = vec![(&inside, &plain), (&inside, &passing), (&outside, &plain)];
    // Data stays where it was created, whatever capabilities this process has now: another place would look like lost data.
    let has_data = |parent: &Path| parent.join("data/PG_VERSION").exists();
    if places.iter().any(|(parent, _)| has_data(parent)) {
        places.retain(|(parent, _)| has_data(parent));
    }
    for (parent, switches) in places {
        fs::create_dir_all(parent).map_err(io_error("Creating", parent))?;
        std::os::unix::fs::chown(parent, Some(uid), Some(gid)).map_err(io_error("Changing the owner of", parent))?;
        // Not `test -x`: access(2) ignores capabilities beyond the account's own.
        let reaches =
            Blocking::new("setpriv").args(switches).args(["test", "-d"]).arg(parent).stderr(Stdio::null()).status();
        match reaches {
            Ok(status) if status.success() => {
                if parent == &outside {
                    let text = format!(
                        "PostgreSQL cannot run as root, and its account cannot access this folder.\nIts data is in {}.\n",
                        outside.display()
                    );
                    fs::write(&note, text).map_err(io_error("Writing", &note))?;
                }
                return Ok((parent.clone(), Some(Account { uid, gid, switches: switches.clone() })));
            }
            Ok(_) => {}
            Err(error) => return Err(io_error("Starting", Path::new("setpriv"))(error)),
        }
    }
    Err(StackError::NotStarted(
        "PostgreSQL cannot run as root, and its account cannot access the data folder. Start Mailrun as another user."
            .to_owned(),
    ))
}

/// The user and group of `postgres`, else of `nobody`.
fn ordinary_account() -> Option<(u32, u32)> {
    let accounts = fs::read_to_string("/etc/passwd").ok()?;
    ["postgres", "nobody"].iter().find_map(|name| {
        let line = accounts.lines().find(|line| line.split(':').next() == Some(name))?;
        let mut ids = line.split(':').skip(2);
        Some((ids.next()?.parse().ok()?, ids.next()?.parse().ok()?))
    })
}
