//! Runs processes of this program as children: restarts those that die, stops all in order, and ensures that none outlives its parent.
//!
//! A killed parent cannot stop its children, so each child watches its standard input: the parent holds the other end of that pipe
//! and never writes, and the kernel closes it when the parent ends for whatever reason.

use std::{
    ffi::OsString,
    fs::File,
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncRead, BufReader},
    process::{Child, ChildStdin, Command},
    sync::{mpsc, oneshot},
    task::JoinHandle,
};

use mailrun_app::shutdown::STOP_ON_STDIN_EOF;
use mailrun_stack::open_log;

/// The pause before the first restart; it doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// A child that ran this long restarts after the first pause.
const HEALTHY: Duration = Duration::from_secs(30);

/// A process of this program.
#[derive(Clone, Debug)]
pub struct Service {
    /// Its name in the log and in notices, for example `web` or `worker-1`.
    pub name: String,
    /// The program's arguments.
    pub args: Vec<OsString>,
    /// Environment variables in addition to the parent's.
    pub env: Vec<(OsString, OsString)>,
}

/// An event of a child.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// It was started.
    Started {
        /// The service.
        name: String,
        /// Its process id.
        pid: u32,
    },
    /// It ended unexpectedly and will be restarted.
    Died {
        /// The service.
        name: String,
        /// How it ended.
        how: String,
        /// How often it died in a row.
        deaths: u32,
        /// The pause before the restart.
        pause: Duration,
    },
    /// It did not stop in time and was killed.
    Killed {
        /// The service.
        name: String,
    },
}

type Tell = Arc<dyn Fn(Notice) + Send + Sync>;

/// The children of this process.
pub struct Supervisor {
    program: PathBuf,
    log: Arc<Mutex<File>>,
    tell: Tell,
    children: Vec<Supervised>,
}

struct Supervised {
    name: String,
    /// Its current process id.
    pid: Arc<AtomicU32>,
    /// How often it ended unexpectedly.
    deaths: Arc<AtomicU32>,
    /// Dropping it stops the service at once.
    orders: mpsc::UnboundedSender<Order>,
    kept: JoinHandle<()>,
}

/// Orders to the task that runs a service.
enum Order {
    /// Stop the service within this time.
    Stop(Duration),
    Replace(Replacement),
}

/// Another program for a service.
struct Replacement {
    program: PathBuf,
    /// Time limit for the running process to end.
    within: Duration,
    /// Completed when the other program was started: whether the previous process ended by itself.
    done: oneshot::Sender<io::Result<bool>>,
}

impl Supervisor {
    /// For children of `program`; their output goes to `log`, each line prefixed with the service's name.
    pub fn new(program: PathBuf, log: &Path, tell: impl Fn(Notice) + Send + Sync + 'static) -> io::Result<Self> {
        if let Some(folder) = log.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let log = Arc::new(Mutex::new(open_log(log)?));
        Ok(Self { program, log, tell: Arc::new(tell), children: Vec::new() })
    }

    /// Starts a service, which runs until [`Supervisor::stop`].
    pub fn start(&mut self, service: Service) -> io::Result<()> {
        let child = spawn(&self.program, &service, &self.log)?;
        let (orders, received) = mpsc::unbounded_channel();
        let name = service.name.clone();
        let pid = Arc::new(AtomicU32::new(child.child.id().unwrap_or_default()));
        let deaths = Arc::new(AtomicU32::new(0));
        let keeper = Keeper {
            program: self.program.clone(),
            service,
            log: Arc::clone(&self.log),
            tell: Arc::clone(&self.tell),
            pid: Arc::clone(&pid),
            deaths: Arc::clone(&deaths),
        };
        let kept = tokio::spawn(keeper.keep(child, received));
        self.children.push(Supervised { name, pid, deaths, orders, kept });
        Ok(())
    }

    /// Ends a service with SIGTERM, and SIGKILL after `within`, and starts it with another program, which is also restarted when it dies. Returns
    /// whether the previous process ended by itself.
    pub async fn replace(&self, name: &str, program: &Path, within: Duration) -> io::Result<bool> {
        let gone = || io::Error::new(io::ErrorKind::NotFound, format!("there is no service {name}"));
        let child = self.children.iter().find(|child| child.name == name).ok_or_else(gone)?;
        let (done, replaced) = oneshot::channel();
        let order = Order::Replace(Replacement { program: program.to_owned(), within, done });
        child.orders.send(order).map_err(|_| gone())?;
        replaced.await.map_err(|_| gone())?
    }

    /// How often services ended unexpectedly.
    pub fn deaths(&self) -> u32 {
        self.children.iter().map(|child| child.deaths.load(Ordering::Relaxed)).sum()
    }

    /// The services and their process ids; for a dead one, its last.
    pub fn pids(&self) -> impl Iterator<Item = (&str, u32)> {
        self.children.iter().map(|child| (child.name.as_str(), child.pid.load(Ordering::Relaxed)))
    }

    /// Stops the services one after another, those in `order` first and in that order: SIGTERM, then SIGKILL after `each`.
    pub async fn stop(self, order: &[&str], each: Duration) {
        let mut children = self.children;
        let place = |name: &str| order.iter().position(|first| *first == name).unwrap_or(order.len());
        children.sort_by_key(|child| place(&child.name));
        for child in children {
            // A panic of its task is reported below.
            let _ = child.orders.send(Order::Stop(each));
            if let Err(error) = child.kept.await {
                tracing::error!(service = child.name, %error, "the task of a service failed");
            }
        }
    }
}

/// Runs one service.
struct Keeper {
    program: PathBuf,
    service: Service,
    log: Arc<Mutex<File>>,
    tell: Tell,
    pid: Arc<AtomicU32>,
    deaths: Arc<AtomicU32>,
}

impl Keeper {
    async fn keep(mut self, first: Started, mut orders: mpsc::UnboundedReceiver<Order>) {
        let name = self.service.name.clone();
        let mut next = Ok(first);
        let mut deaths = 0;
        loop {
            let began = Instant::now();
            let how = match next {
                Ok(mut started) => {
                    let pid = started.child.id().unwrap_or_default();
                    self.pid.store(pid, Ordering::Relaxed);
                    (self.tell)(Notice::Started { name: name.clone(), pid });
                    let order = tokio::select! {
                        exit = started.child.wait() => Err(exit),
                        order = orders.recv() => Ok(order),
                    };
                    match order {
                        Err(exit) => {
                            started.written().await;
                            ending(exit)
                        }
                        Ok(order) => {
                            let within = match &order {
                                Some(Order::Stop(within)) => *within,
                                Some(Order::Replace(replacement)) => replacement.within,
                                // The supervisor was dropped: stop without waiting.
                                None => Duration::ZERO,
                            };
                            let ended = end(&mut started.child, within).await;
                            if !ended {
                                (self.tell)(Notice::Killed { name: name.clone() });
                            }
                            started.written().await;
                            let Some(Order::Replace(replacement)) = order else { return };
                            deaths = 0;
                            next = self.replace(replacement, ended);
                            continue;
                        }
                    }
                }
                Err(error) => format!("it did not start: {error}"),
            };
            deaths = if began.elapsed() >= HEALTHY { 1 } else { deaths + 1 };
            self.deaths.fetch_add(1, Ordering::Relaxed);
            let pause = (FIRST_PAUSE * 2_u32.pow((deaths - 1).min(10))).min(LONGEST_PAUSE);
            write_line(&self.log, &name, &format!("ended unexpectedly ({how}); restarting in {pause:?}"));
            (self.tell)(Notice::Died { name: name.clone(), how, deaths, pause });
            next = tokio::select! {
                () = tokio::time::sleep(pause) => spawn(&self.program, &self.service, &self.log),
                order = orders.recv() => match order {
                    Some(Order::Replace(replacement)) => self.replace(replacement, true),
                    Some(Order::Stop(_)) | None => return,
                },
            };
        }
    }

    /// Starts the other program. `ended`: whether the previous process ended by itself.
    fn replace(&mut self, replacement: Replacement, ended: bool) -> io::Result<Started> {
        let Replacement { program, done, .. } = replacement;
        self.program = program;
        let started = spawn(&self.program, &self.service, &self.log);
        let told = started.as_ref().map(|_| ended).map_err(|error| io::Error::new(error.kind(), error.to_string()));
        // The receiver may be gone.
        let _ = done.send(told);
        started
    }
}

fn ending(exit: io::Result<ExitStatus>) -> String {
    exit.map_or_else(|error| error.to_string(), |status| status.to_string())
}

/// A child and the tasks that copy its output.
struct Started {
    child: Child,
    /// The parent's end of the child's standard input. Separate from the child, whose `wait` would close it.
    input: Option<ChildStdin>,
    copies: Vec<JoinHandle<()>>,
}

impl Started {
    /// Waits until its last lines are in the log. Bounded, because a grandchild may still hold the pipe.
    async fn written(self) {
        drop(self.input);
        for copy in self.copies {
            let _ = tokio::time::timeout(Duration::from_secs(2), copy).await;
        }
    }
}

fn spawn(program: &Path, service: &Service, log: &Arc<Mutex<File>>) -> io::Result<Started> {
    let mut child = Command::new(program)
        .args(&service.args)
        .envs(service.env.iter().map(|(key, value)| (key, value)))
        .env(STOP_ON_STDIN_EOF, "1")
        // Its own process group: Ctrl-C reaches only the parent, which then stops its children in order.
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let input = child.stdin.take();
    let mut copies = Vec::new();
    if let Some(output) = child.stdout.take() {
        copies.push(tokio::spawn(copy(output, service.name.clone(), Arc::clone(log))));
    }
    if let Some(errors) = child.stderr.take() {
        copies.push(tokio::spawn(copy(errors, service.name.clone(), Arc::clone(log))));
    }
    Ok(Started { child, input, copies })
}

async fn copy(from: impl AsyncRead + Unpin, name: String, log: Arc<Mutex<File>>) {
    let mut lines = BufReader::new(from).split(b'\n');
    while let Ok(Some(line)) = lines.next_segment().await {
        write_line(&log, &name, &String::from_utf8_lossy(&line));
    }
}

fn write_line(log: &Mutex<File>, name: &str, line: &str) {
    let line = format!("{name:<10} | {}\n", line.trim_end());
    // A full disk must not stop the service.
    let _ = log.lock().unwrap_or_else(PoisonError::into_inner).write_all(line.as_bytes());
}

/// Ends a child cleanly, or kills it after `wait`; returns whether it ended cleanly.
async fn end(child: &mut Child, wait: Duration) -> bool {
    if let Some(pid) = child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?)) {
        // Nothing else waits for the child, so its id cannot have been reused.
        let _ = rustix::process::kill_process(pid, Signal::TERM);
    }
    let ended = tokio::time::timeout(wait, child.wait()).await.is_ok();
    if !ended {
        let _ = child.kill().await;
    }
    ended
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

    use super::*;

    /// A supervisor of shell scripts, with its notices.
    fn of_scripts(log: &Path) -> (Supervisor, UnboundedReceiver<Notice>) {
        let (send, notices) = unbounded_channel();
        let tell = move |notice| send.send(notice).unwrap();
        (Supervisor::new("/bin/sh".into(), log, tell).unwrap(), notices)
    }

    fn script(name: &str, text: &str) -> Service {
        Service { name: name.to_owned(), args: vec!["-c".into(), text.into()], env: Vec::new() }
    }

    async fn logged(log: &Path, text: &str) {
        let there = async {
            while !std::fs::read_to_string(log).unwrap().contains(text) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), there).await.unwrap();
    }

    #[tokio::test]
    async fn restarts_a_child_that_dies() {
        let dir = tempfile::tempdir().unwrap();
        let (mut supervisor, mut notices) = of_scripts(&dir.path().join("log"));
        supervisor.start(script("short", "echo hello; exit 3")).unwrap();
        for expected in 1..=2 {
            assert!(matches!(notices.recv().await, Some(Notice::Started { .. })));
            match notices.recv().await {
                Some(Notice::Died { deaths, how, .. }) => {
                    assert_eq!((deaths, how.as_str()), (expected, "exit status: 3"));
                }
                other => panic!("expected a death, got {other:?}"),
            }
        }
        supervisor.stop(&[], Duration::from_secs(5)).await;
        assert!(std::fs::read_to_string(dir.path().join("log")).unwrap().contains("short      | hello\n"));
    }

    #[tokio::test]
    async fn stops_children_in_order_and_kills_a_stubborn_one() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let (mut supervisor, mut notices) = of_scripts(&log);
        let polite = "trap 'echo last words; exit 0' TERM; echo ready; while :; do sleep 0.05; done";
        supervisor.start(script("stubborn", "trap '' TERM; echo deaf; while :; do sleep 0.05; done")).unwrap();
        supervisor.start(script("second", polite)).unwrap();
        supervisor.start(script("first", polite)).unwrap();
        for text in ["stubborn   | deaf", "second     | ready", "first      | ready"] {
            logged(&log, text).await;
        }
        supervisor.stop(&["first", "second"], Duration::from_secs(1)).await;
        let text = std::fs::read_to_string(&log).unwrap();
        let place = |line: &str| text.find(line).unwrap();
        assert!(place("first      | last words") < place("second     | last words"));
        let mut killed = Vec::new();
        while let Ok(notice) = notices.try_recv() {
            if let Notice::Killed { name } = notice {
                killed.push(name);
            }
        }
        assert_eq!(killed, ["stubborn"]);
    }

    #[tokio::test]
    async fn replaces_a_service_by_another_program() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let (mut supervisor, mut notices) = of_scripts(&log);
        let polite = "trap 'echo last words; exit 0' TERM; echo ready; while :; do sleep 0.05; done";
        supervisor.start(script("service", polite)).unwrap();
        logged(&log, "ready").await;
        // It prints the arguments of the script.
        let ended = supervisor.replace("service", Path::new("/bin/echo"), Duration::from_secs(5)).await.unwrap();
        assert!(ended, "the first program ended cleanly");
        logged(&log, "service    | -c trap").await;
        let mut died = Vec::new();
        while died.len() < 2 {
            if let Some(Notice::Died { how, .. }) = notices.recv().await {
                died.push(how);
            }
        }
        assert_eq!(died, ["exit status: 0", "exit status: 0"], "the other program is restarted");
        assert!(supervisor.deaths() >= 2);
        assert!(supervisor.replace("nobody", Path::new("/bin/echo"), Duration::ZERO).await.is_err());
        supervisor.stop(&[], Duration::from_secs(5)).await;
    }

    #[tokio::test]
    async fn a_childs_input_stays_open_until_its_parent_closes_it() {
        let dir = tempfile::tempdir().unwrap();
        let log = Arc::new(Mutex::new(open_log(&dir.path().join("log")).unwrap()));
        let mut started = spawn(Path::new("/bin/sh"), &script("child", "cat; exit 7"), &log).unwrap();
        let early = tokio::time::timeout(Duration::from_millis(300), started.child.wait()).await;
        assert!(early.is_err(), "waiting for the child must not close its input");
        drop(started.input.take());
        assert_eq!(started.child.wait().await.unwrap().code(), Some(7));
    }
}
