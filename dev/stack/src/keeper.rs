//! The process that runs both servers as long as a client holds the lease of their folder.

use std::{
    fs::{self, File},
    path::Path,
    time::{Duration, Instant},
};

use tokio::{
    signal::unix::{SignalKind, signal},
    time::MissedTickBehavior,
};

use super::{
    cluster, database,
    error::{StackError, io_error},
    folder::Folder,
    lease,
    management::Management,
    nodes::Nodes,
    ports::Ports,
    processes, rabbitmq,
    release::Release,
    servers::Servers,
    state::{Login, Phase, ServerStatus, State},
};

/// The database created on the first start.
pub(crate) const DEFAULT_DATABASE: &str = "mailrun";
/// Locked by the one keeper of a folder.
pub(crate) const KEEPER_LOCK: &str = "keeper.lock";
/// Shared by all clients of a folder.
pub(crate) const LEASE: &str = "lease";
/// Exists while RabbitMQ is to be stopped.
pub(crate) const RABBITMQ_STOPPED: &str = "rabbitmq-stopped";
/// Exists while PostgreSQL is to be stopped.
pub(crate) const POSTGRES_STOPPED: &str = "postgres-stopped";
/// Asks the keeper to end now if no client holds the lease. If one does, the keeper removes it.
pub(crate) const END_REQUEST: &str = "end-if-unused";

/// How often the keeper checks the lease and the requests.
const TICK: Duration = Duration::from_millis(100);
/// How often ports are chosen again because another process took one before the server started.
const PORT_TRIES: u32 = 4;

/// Runs the stack of a folder until its lease was free for `linger`, or until SIGTERM. Returns immediately if another keeper runs.
///
/// For a process of its own: the folder stays locked until that process ends.
pub async fn run(home: &Path, linger: Duration, nodes: Nodes) -> Result<(), StackError> {
    let folder = Folder::open(home)?;
    let lock_path = folder.path(KEEPER_LOCK);
    // Retried, because a client takes the lock for an instant to check whether a keeper runs.
    let lock =
        lease::exclusive_within(&lock_path, Duration::from_secs(2)).await.map_err(io_error("Locking", &lock_path))?;
    let Some(lock) = lock else {
        return Ok(());
    };
    // Held by the process, not by this function: to a client, a free lock means that the keeper has ended completely.
    std::mem::forget(lock);
    for name in ["state.json", RABBITMQ_STOPPED, POSTGRES_STOPPED, END_REQUEST] {
        remove(&folder.path(name))?;
    }
    let result = keep(&folder, linger, nodes).await;
    match &result {
        Ok(()) => remove(&folder.path("state.json"))?,
        Err(error) => {
            // Written last, after the servers have ended: a client that reads it may start another keeper at once.
            let mut state = State::new(Ports::default());
            state.phase = Phase::Failed(error.to_string());
            state.write(&folder)?;
        }
    }
    result
}

async fn keep(folder: &Folder, linger: Duration, nodes: Nodes) -> Result<(), StackError> {
    let lease_path = folder.path(LEASE);
    let lease = lease::open(&lease_path).map_err(io_error("Opening", &lease_path))?;
    let login = Login::load(folder)?;
    let ended = processes::end_leftovers(folder).await.map_err(|source| StackError::Io {
        what: "Stopping the servers of an earlier run failed".to_owned(),
        source,
    })?;
    if ended > 0 {
        eprintln!("Stopped {ended} processes of an earlier keeper");
    }
    let mut watch = Watch { lease, linger, unused_since: None };
    for attempt in 1.. {
        let ports_path = folder.path("ports.json");
        let (ports, _reserved) =
            Ports::choose(&ports_path, nodes).map_err(io_error("Choosing ports for", &ports_path))?;
        let mut state = State::new(ports);
        state.notes.push(format!("Starting PostgreSQL on port {} and RabbitMQ on port {}", ports.postgres, ports.amqp));
        state.write(folder)?;
        let servers = Servers::start(folder, &login, ports).await?;
        let outcome = serve(folder, &login, &servers, &mut state, &mut watch).await;
        state.phase = Phase::Stopping;
        let stopping = state.write(folder);
        servers.end().await;
        stopping?;
        match outcome {
            Ok(()) => return Ok(()),
            Err(Failure::PortTaken(why)) if attempt < PORT_TRIES => {
                eprintln!("Choosing other ports: {why}");
            }
            Err(Failure::PortTaken(why)) => return Err(StackError::NotStarted(why)),
            Err(Failure::Stack(error)) => return Err(error),
        }
    }
    Ok(())
}

/// Why the servers cannot be run.
enum Failure {
    /// A server failed because another process listens on its port.
    PortTaken(String),
    Stack(StackError),
}

impl From<StackError> for Failure {
    fn from(error: StackError) -> Self {
        Self::Stack(error)
    }
}

/// Serves clients until the keeper must end.
async fn serve(
    folder: &Folder,
    login: &Login,
    servers: &Servers,
    state: &mut State,
    watch: &mut Watch,
) -> Result<(), Failure> {
    let listen = |kind| {
        signal(kind).map_err(|source| StackError::Io { what: "Listening for signals failed".to_owned(), source })
    };
    let mut terminate = listen(SignalKind::terminate())?;
    // A closed terminal or Ctrl-C concerns the clients; the keeper ends after them.
    let (_hang_up, _interrupt) = (listen(SignalKind::hangup())?, listen(SignalKind::interrupt())?);
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            _ = terminate.recv() => return Ok(()),
        }
        let before = state.clone();
        servers.report(state);
        if let Some(why) = failure(state) {
            return Err(if servers.port_taken(state) {
                Failure::PortTaken(why)
            } else {
                StackError::NotStarted(why).into()
            });
        }
        if state.phase == Phase::Starting
            && state.all(|status| matches!(status, ServerStatus::Running { .. }))
            && cluster::is_whole(login, state.ports).await
        {
            database::create(state.ports.postgres, &login.password, DEFAULT_DATABASE).await?;
            let management = Management::new(state.ports.management, &login.password);
            management.create_vhost(rabbitmq::DEFAULT_VHOST).await?;
            let version = Release::chosen().check(management.version().await?)?;
            state.notes.push(format!("PostgreSQL and RabbitMQ {version} are ready"));
            state.phase = Phase::Ready;
        }
        if *state != before {
            state.write(folder)?;
        }
        for node in &servers.rabbitmq {
            node.want(!folder.path(RABBITMQ_STOPPED).exists());
        }
        servers.postgres.want(!folder.path(POSTGRES_STOPPED).exists());
        if watch.time_to_end(&folder.path(END_REQUEST))? {
            return Ok(());
        }
    }
}

fn failure(state: &State) -> Option<String> {
    [&state.postgres, &state.epmd].into_iter().chain(state.nodes()).find_map(|status| match status {
        ServerStatus::Failed { why } => Some(why.clone()),
        _ => None,
    })
}

/// Watches whether a client holds the lease.
struct Watch {
    lease: File,
    linger: Duration,
    unused_since: Option<Instant>,
}

impl Watch {
    /// Whether the stack was unused long enough. If so, the lease stays locked: a new client waits until this keeper has ended, and
    /// starts the next one.
    fn time_to_end(&mut self, request: &Path) -> Result<bool, StackError> {
        let asked = request.exists();
        if self.lease.try_lock().is_err() {
            self.unused_since = None;
            if asked {
                remove(request)?;
            }
            return Ok(false);
        }
        let since = *self.unused_since.get_or_insert_with(Instant::now);
        if asked || since.elapsed() >= self.linger {
            return Ok(true);
        }
        self.lease
            .unlock()
            .map_err(|source| StackError::Io { what: "Unlocking the lease failed".to_owned(), source })?;
        Ok(false)
    }
}

/// Removes a file, if it exists.
fn remove(path: &Path) -> Result<(), StackError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(io_error("Removing", path)(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn ends_when_asked_and_unused_or_after_the_linger() {
        let dir = tempfile::tempdir().unwrap();
        let (path, request) = (dir.path().join("lease"), dir.path().join("end"));
        let mut watch =
            Watch { lease: lease::open(&path).unwrap(), linger: Duration::from_secs(60), unused_since: None };
        assert!(!watch.time_to_end(&request).unwrap());

        let client = lease::shared_within(&path, Duration::ZERO).await.unwrap().unwrap();
        fs::write(&request, "").unwrap();
        assert!(!watch.time_to_end(&request).unwrap());
        assert!(!request.exists(), "a request is refused while the stack is in use");

        drop(client);
        fs::write(&request, "").unwrap();
        assert!(watch.time_to_end(&request).unwrap());
        assert!(
            lease::shared_within(&path, Duration::ZERO).await.unwrap().is_none(),
            "no client joins a keeper that is ending"
        );

        let other = dir.path().join("other");
        let mut short = Watch { lease: lease::open(&other).unwrap(), linger: Duration::ZERO, unused_since: None };
        assert!(short.time_to_end(&dir.path().join("none")).unwrap());
    }
}
