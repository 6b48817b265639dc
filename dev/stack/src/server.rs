//! Keeps one server process running: starts it, waits until it answers, restarts it when it dies, stops it when asked.

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

/// A server that has run once may then die this often in a row without having answered before its keeper gives up.
const IN_VAIN: u32 = 6;
/// The pause before a start doubles this often.
const DOUBLINGS: u32 = 5;
/// A server that ran this long has recovered from earlier deaths.
const HEALTHY: Duration = Duration::from_secs(15);
/// How often a starting server is asked whether it answers.
const POLL: Duration = Duration::from_millis(50);
/// How long a server may take to start, or to stop when it has answered.
const PATIENCE: Duration = Duration::from_secs(90);
/// How long one may take to stop that hasn't answered yet. RabbitMQ puts a signal off until it has started; both
/// servers recover from being killed.
const PATIENCE_BEFORE_ANSWER: Duration = Duration::from_secs(10);

/// What the keeper wants of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// To run.
    Running,
    /// To be stopped until it's wanted again.
    Stopped,
    /// To be stopped for good.
    Ended,
}

/// How one kind of server is started, asked and stopped.
pub(crate) trait Server: Send + Sync + 'static {
    /// Its name, for people.
    const NAME: &'static str;
    /// The signal that makes it stop cleanly.
    const STOP: Signal;

    /// Its log.
    fn log(&self) -> &Path;
    /// The command that becomes the server itself, not a parent of it.
    fn command(&self) -> io::Result<Command>;
    /// How often in a row its very first start may fail before that is told: mostly whoever waits for it should read at once
    /// why. More often where another one's start may be the reason, which is over by then.
    fn first_starts(&self) -> u32 {
        1
    }
    /// Whether it answers, as itself and not some other server on its port.
    fn answers(&self) -> impl Future<Output = bool> + Send;
}

/// Runs until the server is wanted [`Wanted::Ended`] or has failed; `status` always says how it is.
pub(crate) async fn keep<S: Server>(
    server: S,
    mut wanted: watch::Receiver<Wanted>,
    status: watch::Sender<ServerStatus>,
) {
    let (mut deaths, mut in_vain) = (0, 0);
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
            End::Silent => format!("{} didn't answer within {} s", S::NAME, PATIENCE.as_secs()),
            End::NotStarted(error) => format!("{} could not be started: {error}", S::NAME),
            End::Died(status) => format!("{} ended unexpectedly ({status})", S::NAME),
        };
        deaths = if started.elapsed() > HEALTHY { 1 } else { deaths + 1 };
        // Whoever kills it again and again is not its fault.
        in_vain = if answered { 0 } else { in_vain + 1 };
        let allowed = if ever_ran { IN_VAIN } else { server.first_starts() };
        if in_vain >= allowed {
            let why = format!("{why}. The end of {}:\n{}", server.log().display(), tail(server.log(), 15));
            status.send_replace(ServerStatus::Failed { why });
            return;
        }
        let pause = Duration::from_millis(100) * 2_u32.pow(deaths.min(DOUBLINGS));
        eprintln!("{why}; starting it again in {pause:?}");
        status.send_replace(ServerStatus::Starting);
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            _ = wanted.changed() => {}
        }
    }
}

/// How one life of the server ended.
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
    let patience = if ready == Some(true) { PATIENCE } else { PATIENCE_BEFORE_ANSWER };
    if let Err(error) = stop::<S>(&mut child, patience).await {
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
    tokio::time::timeout(PATIENCE, ask).await.is_ok()
}

async fn no_longer_running(wanted: &mut watch::Receiver<Wanted>) {
    // A sender that's gone wants nothing any more.
    let _ = wanted.wait_for(|wanted| *wanted != Wanted::Running).await;
}

/// Stops the process cleanly, or by force when it doesn't end in time.
async fn stop<S: Server>(child: &mut Child, patience: Duration) -> io::Result<()> {
    let Some(pid) = child.id() else { return Ok(()) };
    signal(pid, S::STOP)?;
    match tokio::time::timeout(patience, child.wait()).await {
        Ok(exit) => exit.map(drop),
        Err(_) => child.kill().await,
    }
}
