//! Runs one server process while it is wanted, and reports its state.

use std::{io, path::Path, time::Duration};

use rustix::process::Signal;
use tokio::{
    process::{Child, Command},
    sync::watch,
};

use super::{
    folder::tail,
    state::ServerStatus,
    supervise::{Event, Program, Supervision},
};

/// After a first success, a server may die this often in a row without answering before its keeper gives up.
const MAX_FAILED_STARTS: u32 = 6;
/// Time limit for a start, and for stopping a server that has answered.
const TIMEOUT: Duration = Duration::from_secs(90);

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

impl<S: Server> Program for S {
    const STOP: Signal = <S as Server>::STOP;
    const ANSWER_LIMIT: Duration = TIMEOUT;
    /// RabbitMQ defers a signal until it has started; both servers recover from being killed.
    const STOP_LIMIT_BEFORE_ANSWER: Duration = Duration::from_secs(10);
    const FIRST_PAUSE: Duration = Duration::from_millis(200);
    const LONGEST_PAUSE: Duration = Duration::from_millis(3200);
    const HEALTHY: Duration = Duration::from_secs(15);

    fn start(&mut self) -> io::Result<Child> {
        self.command()?.spawn()
    }

    fn answers(&self) -> impl Future<Output = bool> + Send {
        Server::answers(self)
    }
}

/// Runs the server while it is wanted, until the sender of `wanted` is dropped or the server is given up; `status` always has its state.
pub(crate) async fn keep<S: Server>(server: S, mut wanted: watch::Receiver<bool>, status: watch::Sender<ServerStatus>) {
    let mut server = Supervision::new(server);
    let mut allowed = server.program.first_starts();
    loop {
        let mut has_sender = true;
        let unwanted = async {
            has_sender = wanted.wait_for(|wanted| !*wanted).await.is_ok();
            TIMEOUT
        };
        match server.next(unwanted).await {
            Event::Started { pid } => {
                allowed = MAX_FAILED_STARTS;
                status.send_replace(ServerStatus::Running { pid });
            }
            Event::Died { how, failed_starts, .. } if failed_starts >= allowed => {
                let log = server.program.log();
                let why = format!("{} {how}. The end of {}:\n{}", S::NAME, log.display(), tail(log, 15));
                status.send_replace(ServerStatus::Failed { why });
                return;
            }
            Event::Died { how, pause, .. } => {
                eprintln!("{} {how}; restarting it in {pause:?}", S::NAME);
                status.send_replace(ServerStatus::Starting);
            }
            Event::Stopped(by_itself) => {
                if let Err(error) = by_itself {
                    eprintln!("Stopping {} failed: {error}", S::NAME);
                }
                status.send_replace(ServerStatus::Stopped);
                if !has_sender || wanted.wait_for(|wanted| *wanted).await.is_err() {
                    return;
                }
                status.send_replace(ServerStatus::Starting);
            }
        }
    }
}
