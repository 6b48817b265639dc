//! Runs one server process: starts it, waits until it answers, restarts it when it dies, stops it on request.

use std::{
    io,
    path::Path,
    process::ExitStatus,
    time::{Duration, Instant},
};

use rustix::process::Signal;
use tokio::{
    process::{Child, Command},
    sync::watch,
};

use super::{folder::tail, processes::signal, state::ServerStatus};

/// After a first success, a server may die this often in a row without answering before its keeper gives up.
const MAX_FAILED_STARTS: u32 = 6;
/// How often the pause before a start doubles.
const DOUBLINGS: u32 = 5;
/// A server that ran this long has recovered from earlier deaths.
const HEALTHY: Duration = Duration::from_secs(15);
/// How often a starting server is probed.
const POLL: Duration = Duration::from_millis(50);
/// Time limit for a start, and for stopping a server that has answered.
const TIMEOUT: Duration = Duration::from_secs(90);
/// Time limit for stopping a server that has not answered yet. RabbitMQ defers a signal until it has started; both servers recover
/// from being killed.
const TIMEOUT_BEFORE_ANSWER: Duration = Duration::from_secs(10);

/// The wanted state of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// Running.
    Running,
    /// Stopped until it is wanted again.
    Stopped,
    /// Stopped permanently.
    Ended,
}

/// How one kind of server is started, probed and stopped.
pub(crate) trait Server: Send + Sync + 'static {
    /// Its name, for people.
    const NAME: &'static str;
    /// The signal for a clean stop.
    const STOP: Signal;

    fn log(&self) -> &Path;
    /// The command that becomes the server itself, not a parent of it.
    fn command(&self) -> io::Result<Command>;
    /// How often in a row its first start may fail before it is reported. Usually once, so that the reason is seen at once; more often
    /// where another server's start may be the reason, which is then over.
    fn first_starts(&self) -> u32 {
        1
    }
    /// Whether it answers, as itself and not another server on its port.
    fn answers(&self) -> impl Future<Output = bool> + Send;
}

/// Runs until the server is wanted [`Wanted::Ended`] or has failed; `status` always has its state.
pub(crate) async fn keep<S: Server>(
    server: S,
    mut wanted: watch::Receiver<Wanted>,
    status: watch::Sender<ServerStatus>,
) {
    let (mut deaths, mut failed_starts) = (0, 0);
    let mut ever_ran = false;
    loop {
        let now = *wanted.borrow_and_update();
        if now != Wanted::Running {
            status.send_replace(ServerStatus::Stopped);
            if now == Wanted::Ended || wanted.changed().await.is_err() {
                return;
            }
            continue;
        }
        status.send_replace(ServerStatus::Starting);
        let started = Instant::now();
        let mut answered = false;
        let end = run_once(&server, &mut wanted, &status, &mut answered).await;
        ever_ran |= answered;
        let why = match end {
            End::Unwanted => continue,
            End::Silent => format!("{} did not answer within {} s", S::NAME, TIMEOUT.as_secs()),
            End::NotStarted(error) => format!("{} did not start: {error}", S::NAME),
            End::Died(status) => format!("{} ended unexpectedly ({status})", S::NAME),
        };
        deaths = if started.elapsed() > HEALTHY { 1 } else { deaths + 1 };
        // Being killed repeatedly is not the server's fault.
        failed_starts = if answered { 0 } else { failed_starts + 1 };
        let allowed = if ever_ran { MAX_FAILED_STARTS } else { server.first_starts() };
        if failed_starts >= allowed {
            let why = format!("{why}. The end of {}:\n{}", server.log().display(), tail(server.log(), 15));
            status.send_replace(ServerStatus::Failed { why });
            return;
        }
        let pause = Duration::from_millis(100) * 2_u32.pow(deaths.min(DOUBLINGS));
        eprintln!("{why}; restarting it in {pause:?}");
        status.send_replace(ServerStatus::Starting);
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            _ = wanted.changed() => {}
        }
    }
}

/// How one run of the server ended.
enum End {
    NotStarted(io::Error),
    Silent,
    Died(ExitStatus),
    Unwanted,
}

async fn run_once<S: Server>(
    server: &S,
    wanted: &mut watch::Receiver<Wanted>,
    status: &watch::Sender<ServerStatus>,
    answered: &mut bool,
) -> End {
    let mut child = match server.command().and_then(|mut command| command.spawn()) {
        Ok(child) => child,
        Err(error) => return End::NotStarted(error),
    };
    let ready = tokio::select! {
        exit = child.wait() => return died(exit),
        () = no_longer_running(wanted) => None,
        ready = answers_in_time(server) => Some(ready),
    };
    if ready == Some(true)
        && let Some(pid) = child.id()
    {
        *answered = true;
        status.send_replace(ServerStatus::Running { pid });
        tokio::select! {
            exit = child.wait() => return died(exit),
            () = no_longer_running(wanted) => {}
        }
    }
    let limit = if ready == Some(true) { TIMEOUT } else { TIMEOUT_BEFORE_ANSWER };
    if let Err(error) = stop::<S>(&mut child, limit).await {
        eprintln!("Stopping {} failed: {error}", S::NAME);
    }
    if ready == Some(false) { End::Silent } else { End::Unwanted }
}

fn died(exit: io::Result<ExitStatus>) -> End {
    exit.map_or_else(End::NotStarted, End::Died)
}

async fn answers_in_time<S: Server>(server: &S) -> bool {
    let ask = async {
        while !server.answers().await {
            tokio::time::sleep(POLL).await;
        }
    };
    tokio::time::timeout(TIMEOUT, ask).await.is_ok()
}

async fn no_longer_running(wanted: &mut watch::Receiver<Wanted>) {
    // A dropped sender wants nothing any more.
    let _ = wanted.wait_for(|wanted| *wanted != Wanted::Running).await;
}

/// Stops the process cleanly, or kills it after the time limit.
async fn stop<S: Server>(child: &mut Child, limit: Duration) -> io::Result<()> {
    let Some(pid) = child.id() else { return Ok(()) };
    signal(pid, S::STOP)?;
    match tokio::time::timeout(limit, child.wait()).await {
        Ok(exit) => exit.map(drop),
        Err(_) => child.kill().await,
    }
}
