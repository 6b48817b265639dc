//! Faults of our own processes.

use std::time::Duration;

use anyhow::Result;
use rand::{RngExt as _, rngs::StdRng, seq::SliceRandom as _};
use rustix::process::Signal;
use tokio::time::sleep;

use super::{
    super::{
        signal::send_signal,
        site::{DEAD_AFTER, STALLED_AFTER, Site, senders},
    },
    Fault, some_seconds,
};

/// The faults of this file.
pub(super) const FAULTS: &[Fault] = &[
    Fault::new("kill-send", "kill -9 a sender", |site, rng, _| {
        Box::pin(async move { site.signal(&a_sender(rng), Signal::KILL) })
    }),
    Fault::new("kill-fan-out", "kill -9 the fan-out worker", |site, _, _| {
        Box::pin(async move { site.signal("fan-out", Signal::KILL) })
    }),
    Fault::new("kill-progress", "kill -9 the progress worker", |site, _, _| {
        Box::pin(async move { site.signal("progress", Signal::KILL) })
    }),
    Fault::new("kill-web", "kill -9 the web server, once during the submission", |site, _, _| {
        Box::pin(async move { site.signal("web", Signal::KILL) })
    })
    .also_at_the_form(),
    Fault::new("term-send", "SIGTERM a sender", |site, rng, _| {
        Box::pin(async move { site.signal(&a_sender(rng), Signal::TERM) })
    }),
    Fault::new("term-fan-out", "SIGTERM the fan-out worker", |site, _, _| {
        Box::pin(async move { site.signal("fan-out", Signal::TERM) })
    }),
    Fault::new("term-progress", "SIGTERM the progress worker", |site, _, _| {
        Box::pin(async move { site.signal("progress", Signal::TERM) })
    }),
    Fault::new("term-web", "SIGTERM the web server, once during the submission", |site, _, _| {
        Box::pin(async move { site.signal("web", Signal::TERM) })
    })
    .also_at_the_form(),
    Fault::new("term-twice", "SIGTERM one process after another, and each again a moment later", |site, rng, _| {
        Box::pin(term_twice(site, rng))
    }),
    Fault::new(
        "stop-send",
        "SIGSTOP a sender for longer than its heartbeat timeout, then continue it",
        |site, rng, _| Box::pin(async move { stop_for(site, &a_sender(rng), some_seconds(rng)).await }),
    ),
    Fault::new(
        "term-send-uncounted",
        "SIGSTOP the progress worker while all senders restart cleanly",
        |site, rng, _| Box::pin(term_uncounted(site, some_seconds(rng))),
    ),
];

/// The name of a random sender.
fn a_sender(rng: &mut StdRng) -> String {
    format!("send-{}", rng.random_range(1..=crate::local::SENDERS))
}

/// Sends SIGTERM to each service, in any order, and again before it may have ended.
async fn term_twice(site: &Site<'_>, rng: &mut StdRng) -> Result<()> {
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
async fn stop_for(site: &Site<'_>, service: &str, more: Duration) -> Result<()> {
    let pid = site.pid(service)?;
    send_signal(pid, std::process::id(), Signal::STOP)?;
    sleep(DEAD_AFTER + more).await;
    // It may have been killed meanwhile.
    send_signal(pid, std::process::id(), Signal::CONT).or_else(|_| Ok(()))
}

/// Stops the progress worker (SIGSTOP), ends all senders cleanly meanwhile, and continues it after `more`.
async fn term_uncounted(site: &Site<'_>, more: Duration) -> Result<()> {
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
