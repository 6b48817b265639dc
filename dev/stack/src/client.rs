//! The client's side: finds or starts the keeper of a folder, and waits for the state it reports.

use std::{
    fs,
    path::Path,
    process::{ExitStatus, Stdio},
    time::{Duration, Instant},
};

use tokio::{process::Command, task::JoinHandle};

use super::{
    error::{StackError, io_error},
    folder::{Folder, open_log, tail},
    keeper::KEEPER_LOCK,
    lease,
    nodes::Nodes,
    processes,
    release::{Release, VARIABLE},
    state::{Phase, ServerStatus, State, now_ms},
};

/// How often a client reads the keeper's state.
const POLL: Duration = Duration::from_millis(25);
/// Time limit for a start, a stop or a change.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(180);
/// How often a keeper that ends without an error is replaced.
const KEEPERS: u32 = 3;

/// The command line of a keeper.
pub(crate) struct KeeperCommand<'a> {
    /// The mailrun program.
    pub(crate) program: &'a Path,
    /// How long it stays after the last client.
    pub(crate) linger: Duration,
    /// The number of RabbitMQ nodes.
    pub(crate) nodes: Nodes,
}

impl KeeperCommand<'_> {
    /// Starts it in its own process group, so that Ctrl-C in the client's terminal does not reach it.
    fn start(&self, folder: &Folder) -> Result<JoinHandle<std::io::Result<ExitStatus>>, StackError> {
        let program = self.program.canonicalize().map_err(io_error("Finding", self.program))?;
        let log_path = folder.log("keeper");
        let log = open_log(&log_path).map_err(io_error("Opening", &log_path))?;
        let same_log = log.try_clone().map_err(io_error("Opening", &log_path))?;
        let mut child = Command::new(&program)
            .args(["stack-keeper", "--linger-seconds", &self.linger.as_secs().to_string(), "--home"])
            .arg(folder.root())
            .args(["--nodes", self.nodes.name()])
            .env(VARIABLE, Release::chosen().name())
            .process_group(0)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(same_log)
            .spawn()
            .map_err(io_error("Starting", &program))?;
        // Awaited in the background, so that a keeper that has ended leaves no zombie in its client.
        Ok(tokio::spawn(async move { child.wait().await }))
    }
}

/// Waits until the stack is ready, starting a keeper if none runs. The caller holds the lease.
pub(crate) async fn join(
    folder: &Folder,
    keeper: &KeeperCommand<'_>,
    report: impl Fn(&str),
) -> Result<State, StackError> {
    let begun_ms = now_ms();
    let deadline = Deadline::new("Starting the local stack");
    let mut started: Option<JoinHandle<std::io::Result<ExitStatus>>> = None;
    let mut keepers = 0;
    let mut notes_shown = 0;
    loop {
        let state = State::read(folder);
        if keeper_runs(folder)? {
            if let Some(state) = state.filter(|state| processes::exists(state.keeper_pid)) {
                if state.phase != Phase::Stopping {
                    state.notes.iter().skip(notes_shown).for_each(|note| report(note));
                    notes_shown = notes_shown.max(state.notes.len());
                }
                let settled =
                    |status: &ServerStatus| matches!(status, ServerStatus::Running { .. } | ServerStatus::Stopped);
                if state.phase == Phase::Ready && state.all(settled) {
                    // A request for one node accepts a cluster as well.
                    if keeper.nodes == Nodes::Three && state.ports.peers.is_none() {
                        let why = "It already runs with one RabbitMQ node; stop its users first.";
                        return Err(StackError::NotStarted(why.to_owned()));
                    }
                    return Ok(state);
                }
            }
        } else if started.as_ref().is_none_or(JoinHandle::is_finished) {
            if let Some(State { phase: Phase::Failed(why), written_at_ms, .. }) = state
                && written_at_ms >= begun_ms
            {
                return Err(StackError::NotStarted(why));
            }
            if keepers == KEEPERS {
                let log = folder.log("keeper");
                return Err(StackError::NotStarted(format!(
                    "Its keeper ended immediately. The end of {}:\n{}",
                    log.display(),
                    tail(&log, 10)
                )));
            }
            forget_state(folder)?;
            started = Some(keeper.start(folder)?);
            keepers += 1;
        }
        deadline.pause(folder).await?;
    }
}

/// Waits until the state of a running keeper satisfies `holds`.
pub(crate) async fn wait_for(
    folder: &Folder,
    what: &'static str,
    holds: impl Fn(&State) -> bool,
) -> Result<State, StackError> {
    let deadline = Deadline::new(what);
    loop {
        if !keeper_runs(folder)? {
            return Err(StackError::NotStarted("Its keeper has ended; start it again.".to_owned()));
        }
        if let Some(state) = State::read(folder).filter(&holds) {
            return Ok(state);
        }
        deadline.pause(folder).await?;
    }
}

/// Waits until the keeper has ended, or has refused because of other clients. Stops servers without a keeper.
pub(crate) async fn wait_for_end(folder: &Folder, request: &Path) -> Result<bool, StackError> {
    let deadline = Deadline::new("Stopping the local stack");
    loop {
        let lock_path = folder.path(KEEPER_LOCK);
        if let Some(_alone) = lease::try_exclusive(&lock_path).map_err(io_error("Locking", &lock_path))? {
            processes::end_leftovers(folder)
                .await
                .map_err(|source| StackError::Io { what: "Stopping the servers failed".to_owned(), source })?;
            let _ = fs::remove_file(request);
            return Ok(true);
        }
        let serving = State::read(folder).is_some_and(|state| matches!(state.phase, Phase::Ready | Phase::Starting));
        if serving && !request.exists() {
            return Ok(false);
        }
        deadline.pause(folder).await?;
    }
}

fn keeper_runs(folder: &Folder) -> Result<bool, StackError> {
    let path = folder.path(KEEPER_LOCK);
    lease::held_exclusively(&path).map_err(io_error("Checking", &path))
}

/// Removes the state of a killed keeper, so that it is not taken for the next keeper's.
fn forget_state(folder: &Folder) -> Result<(), StackError> {
    let path = folder.path(KEEPER_LOCK);
    if let Some(_alone) = lease::try_exclusive(&path).map_err(io_error("Locking", &path))? {
        let _ = fs::remove_file(folder.path("state.json"));
    }
    Ok(())
}

/// Polls until a deadline.
pub(crate) struct Deadline {
    what: &'static str,
    end: Instant,
}

impl Deadline {
    /// Starts the timer.
    pub(crate) fn new(what: &'static str) -> Self {
        Self { what, end: Instant::now() + TIMEOUT }
    }

    /// Waits one interval, or fails after the deadline.
    pub(crate) async fn pause(&self, folder: &Folder) -> Result<(), StackError> {
        if Instant::now() >= self.end {
            return Err(self.passed(folder));
        }
        tokio::time::sleep(POLL).await;
        Ok(())
    }

    /// The error after the deadline.
    pub(crate) fn passed(&self, folder: &Folder) -> StackError {
        StackError::Timeout { what: self.what, seconds: TIMEOUT.as_secs(), logs: folder.logs().display().to_string() }
    }
}
