//! Signals to processes of ours.

use anyhow::{Context as _, Result, bail};
use mailrun_stack::proc;
use rustix::process::{Pid, Signal};

/// Sends a signal to a child process of `parent` only: the id may have been reused.
pub(super) fn send_signal(pid: u32, parent: u32, signal: Signal) -> Result<()> {
    let process = proc::process(pid).with_context(|| format!("process {pid} has ended"))?;
    if process.parent != parent {
        bail!("process {pid} has ended");
    }
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).context("no process has this id")?;
    Ok(rustix::process::kill_process(pid, signal)?)
}

/// The child processes of `parent` that run this program.
pub(super) fn children(parent: u32, program: &str) -> Vec<u32> {
    let all = proc::all().unwrap_or_default();
    all.iter().filter(|other| other.parent == parent && other.program == program).map(|other| other.pid).collect()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn signals_only_children_of_the_given_parent() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        assert!(send_signal(child.id(), 1, Signal::KILL).is_err());
        assert!(child.try_wait().unwrap().is_none());
        send_signal(child.id(), std::process::id(), Signal::KILL).unwrap();
        assert!(!child.wait().unwrap().success());
        assert!(send_signal(child.id(), std::process::id(), Signal::KILL).is_err());
    }
}
