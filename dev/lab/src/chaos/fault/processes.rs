//! Faults of our own processes.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use rand::{RngExt as _, rngs::StdRng, seq::SliceRandom as _};
use rustix::process::{Pid, Signal};
use tokio::time::sleep;

use super::super::site::{DEAD_AFTER, STALLED_AFTER, Site};
use mailrun_stack::proc;

/// The name of a random sender.
pub(super) fn a_sender(rng: &mut StdRng) -> String {
    format!("send-{}", rng.random_range(1..=crate::local::SENDERS))
}

/// The names of all senders.
pub(in super::super) fn senders() -> impl Iterator<Item = String> {
    (1..=crate::local::SENDERS).map(|number| format!("send-{number}"))
}

/// Sends SIGTERM to each service, in any order, and again before it may have ended.
pub(super) async fn term_twice(site: &Site<'_>, rng: &mut StdRng) -> Result<()> {
    let mut services = site.services();
    services.shuffle(rng);
    for service in services {
        let pid = site.pid(&service)?;
        send_signal(pid, std::process::id(), Signal::TERM)?;
        sleep(Duration::from_millis(rng.random_range(0..300))).await;
        // It may have ended by now.
        let _ = send_signal(pid, std::process::id(), Signal::TERM);
    }
    Ok(())
}

/// Stops a service (SIGSTOP) for `more` than its heartbeat timeout, and continues it.
pub(super) async fn stop_for(site: &Site<'_>, service: &str, more: Duration) -> Result<()> {
    let pid = site.pid(service)?;
    send_signal(pid, std::process::id(), Signal::STOP)?;
    sleep(DEAD_AFTER + more).await;
    // It may have been killed meanwhile.
    send_signal(pid, std::process::id(), Signal::CONT).or_else(|_| Ok(()))
}

/// Stops the progress worker (SIGSTOP), ends all senders cleanly meanwhile, and continues it after `more`.
pub(super) async fn term_uncounted(site: &Site<'_>, more: Duration) -> Result<()> {
    let counting = site.pid("progress")?;
    send_signal(counting, std::process::id(), Signal::STOP)?;
    for sender in senders() {
        // It may have been killed a moment ago.
        let _ = site.signal(&sender, Signal::TERM);
    }
    // Long enough that the senders' claims would be declared lost.
    sleep(DEAD_AFTER + STALLED_AFTER + more).await;
    send_signal(counting, std::process::id(), Signal::CONT).or_else(|_| Ok(()))
}

/// Sends a signal to a child process of `parent` only: the id may have been reused.
pub(in super::super) fn send_signal(pid: u32, parent: u32, signal: Signal) -> Result<()> {
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
