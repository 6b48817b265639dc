//! Finds and ends the server processes of a killed keeper, and no others.

use std::{
    fs, io,
    path::Path,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal};

use super::folder::Folder;

/// A process with its command line.
#[derive(Debug)]
struct Process {
    pid: u32,
    command: String,
}

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
fn of_server(marker: &str) -> io::Result<Vec<Process>> {
    let mut found = all()?;
    // PostgreSQL's children have the cluster's name in a rewritten title; they end with their parent.
    found.retain(|process| process.command.contains(marker) && !process.command.starts_with("postgres: "));
    Ok(found)
}

async fn end(process: &Process, marker: &str, stop: Signal) -> io::Result<()> {
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

/// All processes of the machine, from /proc if it exists, else from `ps`.
fn all() -> io::Result<Vec<Process>> {
    if !Path::new("/proc/self/cmdline").exists() {
        let output = std::process::Command::new("ps").args(["-axww", "-o", "pid=,command="]).output()?;
        return Ok(String::from_utf8_lossy(&output.stdout).lines().filter_map(ps_line).collect());
    }
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        // A process may end between listing and reading. Zombies have no command line.
        let Ok(line) = fs::read(entry.path().join("cmdline")) else {
            continue;
        };
        let command = String::from_utf8_lossy(&line).replace('\0', " ").trim().to_owned();
        if !command.is_empty() {
            found.push(Process { pid, command });
        }
    }
    Ok(found)
}

fn ps_line(line: &str) -> Option<Process> {
    let (pid, command) = line.trim_start().split_once(' ')?;
    Some(Process { pid: pid.parse().ok()?, command: command.trim().to_owned() })
}

#[cfg(test)]
mod tests {
    use std::{os::unix::process::CommandExt as _, process::Command};

    use super::*;

    #[tokio::test]
    async fn ends_only_processes_with_the_marker() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::open(dir.path()).unwrap();
        let mut ours = Command::new("sleep").arg0(folder.marker("epmd")).arg("60").spawn().unwrap();
        let mut stranger = Command::new("sleep").arg("60").spawn().unwrap();
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

    #[test]
    fn parses_ps_lines() {
        let process = ps_line("   42 /usr/bin/epmd -port 1").unwrap();
        assert_eq!((process.pid, process.command.as_str()), (42, "/usr/bin/epmd -port 1"));
    }
}
