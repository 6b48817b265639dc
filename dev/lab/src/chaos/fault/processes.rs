//! Faults of our own processes.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use rand::{RngExt as _, rngs::StdRng, seq::SliceRandom as _};
use rustix::process::{Pid, Signal};
use tokio::time::sleep;

use super::super::site::{DEAD_AFTER, STALLED_AFTER, Site};
use mailrun_stack::proc;

/// The name of one of the senders.
pub(super) fn a_sender(rng: &mut StdRng) -> String {
    format!("send-{}", rng.random_range(1..=crate::local::SENDERS))
}

/// The names of all of them.
pub(in super::super) fn senders() -> impl Iterator<Item = String> {
    (1..=crate::local::SENDERS).map(|number| format!("send-{number}"))
}

/// Asks each service to end, in any order, and again before it may have done so.
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

/// Lets a service stand still for longer than its heartbeat allows, by `more`, and go on.
pub(super) async fn stand_still(site: &Site<'_>, service: &str, more: Duration) -> Result<()> {
    let pid = site.pid(service)?;
    send_signal(pid, std::process::id(), Signal::STOP)?;
    sleep(DEAD_AFTER + more).await;
    // It may have been killed meanwhile.
    send_signal(pid, std::process::id(), Signal::CONT).or_else(|_| Ok(()))
}

/// Stops the process that counts, ends all senders in good order meanwhile, and lets it go on after `more`.
pub(super) async fn term_uncounted(site: &Site<'_>, more: Duration) -> Result<()> {
    let counting = site.pid("progress")?;
    send_signal(counting, std::process::id(), Signal::STOP)?;
    for sender in senders() {
        // It may have been killed a moment ago.
        let _ = site.signal(&sender, Signal::TERM);
    }
    // Long enough that what the senders have claimed would be taken for lost.
    sleep(DEAD_AFTER + STALLED_AFTER + more).await;
    send_signal(counting, std::process::id(), Signal::CONT).or_else(|_| Ok(()))
}

/// Sends a signal to a process that `parent` has started, and to no other: an id may be a stranger's by now.
pub(in super::super) fn send_signal(pid: u32, parent: u32, signal: Signal) -> Result<()> {
    let process = proc::process(pid).with_context(|| format!("process {pid} has ended"))?;
    if process.parent != parent {
        bail!("process {pid} has ended");
    }
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).context("no process has this id")?;
    Ok(rustix::process::kill_process(pid, signal)?)
}

/// The processes that `parent` has started and that run this program.
pub(super) fn children(parent: u32, program: &str) -> Vec<u32> {
    let all = proc::all().unwrap_or_default();
    all.iter().filter(|other| other.parent == parent && other.program == program).map(|other| other.pid).collect()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn only_a_child_of_the_named_parent_gets_a_signal() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        assert!(send_signal(child.id(), 1, Signal::KILL).is_err());
        assert!(child.try_wait().unwrap().is_none());
        send_signal(child.id(), std::process::id(), Signal::KILL).unwrap();
        assert!(!child.wait().unwrap().success());
        assert!(send_signal(child.id(), std::process::id(), Signal::KILL).is_err());
    }
}
