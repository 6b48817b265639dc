//! Runs processes of this program as children: restarts those that die, stops all in order, and ensures that none outlives its parent.
//!
//! A killed parent cannot stop its children, so each child watches its standard input: the parent holds the other end of that pipe
//! and never writes, and the kernel closes it when the parent ends for whatever reason.

use std::{
    ffi::OsString,
    fs::File,
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::Stdio,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncBufReadExt as _, AsyncRead, BufReader},
    process::{Child, ChildStdin, Command},
    sync::{mpsc, oneshot},
    task::JoinHandle,
};

use mailrun_app::shutdown::STOP_ON_STDIN_EOF;
use mailrun_stack::{
    open_log,
    supervise::{Event, Program, Supervision},
};

/// A process of this program.
#[derive(Clone, Debug)]
pub struct Service {
    /// Its name in the log and with its events, for example `web` or `worker-1`.
    pub name: String,
    /// The program's arguments.
    pub args: Vec<OsString>,
    /// Environment variables in addition to the parent's.
    pub env: Vec<(OsString, OsString)>,
}

type Tell = Arc<dyn Fn(&str, Event) + Send + Sync>;

/// The children of this process.
pub struct Supervisor {
    program: PathBuf,
    log: Arc<Mutex<File>>,
    tell: Tell,
    deaths: Arc<AtomicU32>,
    children: Vec<Supervised>,
}

struct Supervised {
    name: String,
    /// Its current process id.
    pid: Arc<AtomicU32>,
    /// Dropping it stops the service at once.
    orders: mpsc::UnboundedSender<Order>,
    kept: JoinHandle<()>,
}

/// An order to the task that runs a service: stop it.
struct Order {
    /// Time limit for the process to end.
    within: Duration,
    /// The program to start then. The sender is completed when it was started: whether the previous process ended by itself.
    next: Option<(PathBuf, oneshot::Sender<io::Result<bool>>)>,
}

impl Supervisor {
    /// For children of `program`; their output goes to `log`, each line prefixed with the service's name. `tell` gets their names and
    /// events.
    pub fn new(program: PathBuf, log: &Path, tell: impl Fn(&str, Event) + Send + Sync + 'static) -> io::Result<Self> {
        if let Some(folder) = log.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let log = Arc::new(Mutex::new(open_log(log)?));
        Ok(Self { program, log, tell: Arc::new(tell), deaths: Arc::default(), children: Vec::new() })
    }

    /// Starts a service, which runs until [`Supervisor::stop`].
    pub fn start(&mut self, service: Service) -> io::Result<()> {
        let name = service.name.clone();
        let mut process = Supervision::new(self.process(service));
        process.start()?;
        let pid = Arc::clone(&process.program.pid);
        let (orders, received) = mpsc::unbounded_channel();
        let kept = tokio::spawn(keep(process, received, Arc::clone(&self.tell), Arc::clone(&self.deaths)));
        self.children.push(Supervised { name, pid, orders, kept });
        Ok(())
    }

    fn process(&self, service: Service) -> Process {
        let (path, log) = (self.program.clone(), Arc::clone(&self.log));
        Process { path, service, log, pid: Arc::default(), input: None, copies: Vec::new() }
    }

    /// Ends a service with SIGTERM, and SIGKILL after `within`, and starts it with another program, which is also restarted when it dies. Returns
    /// whether the previous process ended by itself.
    pub async fn replace(&self, name: &str, program: &Path, within: Duration) -> io::Result<bool> {
        let gone = || io::Error::new(io::ErrorKind::NotFound, format!("there is no service {name}"));
        let child = self.children.iter().find(|child| child.name == name).ok_or_else(gone)?;
        let (done, replaced) = oneshot::channel();
        let order = Order { within, next: Some((program.to_owned(), done)) };
        child.orders.send(order).map_err(|_| gone())?;
        replaced.await.map_err(|_| gone())?
    }

    /// How often services ended unexpectedly.
    pub fn deaths(&self) -> u32 {
        self.deaths.load(Ordering::Relaxed)
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
            let _ = child.orders.send(Order { within: each, next: None });
            if let Err(error) = child.kept.await {
                tracing::error!(service = child.name, %error, "the task of a service failed");
            }
        }
    }
}

/// Runs one service until it is stopped without another program to start.
async fn keep(
    mut process: Supervision<Process>,
    mut orders: mpsc::UnboundedReceiver<Order>,
    tell: Tell,
    deaths: Arc<AtomicU32>,
) {
    loop {
        let mut order = None;
        let stop = async {
            order = orders.recv().await;
            // If the supervisor was dropped: without waiting.
            order.as_ref().map_or(Duration::ZERO, |order| order.within)
        };
        let event = process.next(stop).await;
        let by_itself = match &event {
            Event::Started { .. } => None,
            Event::Died { how, pause, .. } => {
                process.program.written().await;
                let line = format!("{how}; restarting in {pause:?}");
                write_line(&process.program.log, &process.program.service.name, &line);
                deaths.fetch_add(1, Ordering::Relaxed);
                None
            }
            Event::Stopped(by_itself) => {
                process.program.written().await;
                Some(!matches!(by_itself, Ok(false)))
            }
        };
        tell(&process.program.service.name, event);
        let Some(by_itself) = by_itself else { continue };
        let Some(Order { next: Some((program, done)), .. }) = order else { return };
        process.program.path = program;
        // The receiver may be gone.
        let _ = done.send(process.start().map(|()| by_itself));
    }
}

/// A service's process.
struct Process {
    /// Its program.
    path: PathBuf,
    service: Service,
    log: Arc<Mutex<File>>,
    pid: Arc<AtomicU32>,
    /// The parent's end of its standard input. Separate from the child, whose `wait` would close it.
    input: Option<ChildStdin>,
    /// The tasks that copy its output.
    copies: Vec<JoinHandle<()>>,
}

impl Process {
    /// Waits until the last lines of an ended process are in the log. Bounded, because a grandchild may still hold the pipe.
    async fn written(&mut self) {
        self.input = None;
        for copy in self.copies.drain(..) {
            let _ = tokio::time::timeout(Duration::from_secs(2), copy).await;
        }
    }

    fn copy(&self, output: Option<impl AsyncRead + Unpin + Send + 'static>) -> Option<JoinHandle<()>> {
        let mut lines = BufReader::new(output?).split(b'\n');
        let (name, log) = (self.service.name.clone(), Arc::clone(&self.log));
        Some(tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_segment().await {
                write_line(&log, &name, &String::from_utf8_lossy(&line));
            }
        }))
    }
}

impl Program for Process {
    const FIRST_PAUSE: Duration = Duration::from_millis(250);
    const LONGEST_PAUSE: Duration = Duration::from_secs(10);
    const HEALTHY: Duration = Duration::from_secs(30);

    fn start(&mut self) -> io::Result<Child> {
        let mut child = Command::new(&self.path)
            .args(&self.service.args)
            .envs(self.service.env.iter().map(|(key, value)| (key, value)))
            .env(STOP_ON_STDIN_EOF, "1")
            // Its own process group: Ctrl-C reaches only the parent, which then stops its children in order.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        self.pid.store(child.id().unwrap_or_default(), Ordering::Relaxed);
        self.input = child.stdin.take();
        self.copies = [self.copy(child.stdout.take()), self.copy(child.stderr.take())].into_iter().flatten().collect();
        Ok(child)
    }
}

fn write_line(log: &Mutex<File>, name: &str, line: &str) {
    let line = format!("{name:<10} | {}\n", line.trim_end());
    // A full disk must not stop the service.
    let _ = log.lock().unwrap_or_else(PoisonError::into_inner).write_all(line.as_bytes());
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

    use super::*;

    /// A supervisor of shell scripts, with their events.
    fn of_scripts(log: &Path) -> (Supervisor, UnboundedReceiver<(String, Event)>) {
        let (send, events) = unbounded_channel();
        let tell = move |name: &str, event| send.send((name.to_owned(), event)).unwrap();
        (Supervisor::new("/bin/sh".into(), log, tell).unwrap(), events)
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
        let (mut supervisor, mut events) = of_scripts(&dir.path().join("log"));
        supervisor.start(script("short", "echo hello; exit 3")).unwrap();
        for expected in 1..=2 {
            assert!(matches!(events.recv().await, Some((_, Event::Started { .. }))));
            match events.recv().await {
                Some((_, Event::Died { deaths, how, .. })) => {
                    assert_eq!((deaths, how.as_str()), (expected, "ended unexpectedly (exit status: 3)"));
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
        let (mut supervisor, mut events) = of_scripts(&log);
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
        while let Ok((name, event)) = events.try_recv() {
            if matches!(event, Event::Stopped(Ok(false))) {
                killed.push(name);
            }
        }
        assert_eq!(killed, ["stubborn"]);
    }

    #[tokio::test]
    async fn replaces_a_service_by_another_program() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let (mut supervisor, mut events) = of_scripts(&log);
        let polite = "trap 'echo last words; exit 0' TERM; echo ready; while :; do sleep 0.05; done";
        supervisor.start(script("service", polite)).unwrap();
        logged(&log, "ready").await;
        // It prints the arguments of the script.
        let ended = supervisor.replace("service", Path::new("/bin/echo"), Duration::from_secs(5)).await.unwrap();
        assert!(ended, "the first program ended cleanly");
        logged(&log, "service    | -c trap").await;
        let mut died = Vec::new();
        while died.len() < 2 {
            if let Some((_, Event::Died { how, .. })) = events.recv().await {
                died.push(how);
            }
        }
        assert_eq!(died, ["ended unexpectedly (exit status: 0)"; 2], "the other program is restarted");
        assert!(supervisor.deaths() >= 2);
        assert!(supervisor.replace("nobody", Path::new("/bin/echo"), Duration::ZERO).await.is_err());
        supervisor.stop(&[], Duration::from_secs(5)).await;
    }

    #[tokio::test]
    async fn a_childs_input_stays_open_until_its_parent_closes_it() {
        let dir = tempfile::tempdir().unwrap();
        let (supervisor, _events) = of_scripts(&dir.path().join("log"));
        let mut process = supervisor.process(script("child", "cat; exit 7"));
        let mut child = process.start().unwrap();
        let early = tokio::time::timeout(Duration::from_millis(300), child.wait()).await;
        assert!(early.is_err(), "waiting for the child must not close its input");
        drop(process.input.take());
        assert_eq!(child.wait().await.unwrap().code(), Some(7));
    }
}
