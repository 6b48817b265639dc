//! Finds and ends the server processes of a killed keeper, and no others.

use std::{
    io,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal};

use super::{
    folder::Folder,
    proc::{self, Command},
};

/// Sends a signal. A process that has already ended is not an error.
pub(crate) fn signal(pid: u32, signal: Signal) -> io::Result<()> {
    let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "no process has this id"));
    };
    match rustix::process::kill_process(pid, signal) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Whether a process with this id exists.
pub(crate) fn exists(pid: u32) -> bool {
    i32::try_from(pid).ok().and_then(Pid::from_raw).is_some_and(|pid| rustix::process::test_kill_process(pid).is_ok())
}

/// Ends the servers of this folder that run without a keeper: RabbitMQ, its port mapper, then PostgreSQL. The caller holds the
/// keeper's lock, so that none of them belongs to a running keeper.
pub(crate) async fn end_leftovers(folder: &Folder) -> io::Result<usize> {
    let mut ended = 0;
    for (server, stop) in [("rabbitmq", Signal::TERM), ("epmd", Signal::TERM), ("postgres", Signal::INT)] {
        let marker = folder.marker(server);
        for process in of_server(&marker)? {
            end(&process, &marker, stop).await?;
            ended += 1;
        }
    }
    Ok(ended)
}

/// The main processes of one server of one folder.
fn of_server(marker: &str) -> io::Result<Vec<Command>> {
    let mut found = proc::commands()?;
    // PostgreSQL's children have the cluster's name in a rewritten title; they end with their parent.
    found.retain(|process| process.line.contains(marker) && !process.line.starts_with("postgres: "));
    Ok(found)
}

async fn end(process: &Command, marker: &str, stop: Signal) -> io::Result<()> {
    signal(process.pid, stop)?;
    for (wait, next) in [(Duration::from_secs(30), Some(Signal::KILL)), (Duration::from_secs(10), None)] {
        let end = Instant::now() + wait;
        while Instant::now() < end {
            // Checks the marker again, not the id alone: the id may have been reused.
            if !of_server(marker)?.iter().any(|other| other.pid == process.pid) {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        if let Some(next) = next {
            signal(process.pid, next)?;
        }
    }
    Err(io::Error::other(format!("process {} does not end", process.pid)))
}

#[cfg(test)]
mod tests {
    use std::{os::unix::process::CommandExt as _, process::Command as Program};

    use super::*;

    #[tokio::test]
    async fn ends_only_processes_with_the_marker() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::open(dir.path()).unwrap();
        let mut ours = Program::new("sleep").arg0(folder.marker("epmd")).arg("60").spawn().unwrap();
        let mut stranger = Program::new("sleep").arg("60").spawn().unwrap();
        // A process that has just started may not show its command line yet.
        while of_server(&folder.marker("epmd")).unwrap().is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(end_leftovers(&folder).await.unwrap(), 1);
        assert!(!ours.wait().unwrap().success());
        assert!(stranger.try_wait().unwrap().is_none());
        stranger.kill().unwrap();
        stranger.wait().unwrap();
    }
}
