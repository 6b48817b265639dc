//! An installation for each test: a database and a virtual host on the shared private stack, and the real binaries.

use std::{
    collections::HashMap,
    fs::File,
    io::Write as _,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use futures::{StreamExt as _, stream};
use mailrun_ledger::sweep::{self, Repairs};
use mailrun_stack::{self, Stack, ensure_servers};
use reqwest::{Client, header::LOCATION, redirect};
use serde_json::Value;
use sqlx::{Connection as _, PgConnection, PgPool};
use tokio::{runtime::Runtime, sync::OnceCell};
use uuid::Uuid;

/// The servers stay up for the next test program.
const LINGER: Duration = Duration::from_secs(20);
/// How many databases and virtual hosts of tests that failed or were killed may remain: dropping them takes time.
const LEFTOVERS: usize = 20;
/// Longer than any slow machine needs.
const TIMEOUT: Duration = Duration::from_secs(120);
pub const MAILRUN: &str = env!("CARGO_BIN_EXE_mailrun-dev");

/// Prints a step immediately: the test harness captures `eprintln!`, and an installation takes minutes.
pub fn say(step: &str) {
    let _ = writeln!(std::io::stderr(), "{step}…");
}

pub struct World {
    pub stack: Stack,
    pub pool: PgPool,
    pub web: String,
    pub client: Client,
    pub name: String,
    pub folder: tempfile::TempDir,
    /// The program that is started from now on.
    pub program: PathBuf,
    environment: Vec<(String, String)>,
    children: Vec<Child>,
}

impl World {
    /// On the shared stack.
    pub async fn new(settings: &[(&str, &str)]) -> Self {
        Self::on(&mailrun_stack::home(), settings).await
    }

    pub async fn on(home: &Path, settings: &[(&str, &str)]) -> Self {
        Self::prepared(home, settings, async |_| {}).await
    }

    /// On the shared stack, with an existing ledger that is migrated.
    pub async fn on_ledger(settings: &[(&str, &str)], prepare: impl AsyncFnOnce(&PgPool)) -> Self {
        Self::prepared(&mailrun_stack::home(), settings, prepare).await
    }

    async fn prepared(home: &Path, settings: &[(&str, &str)], prepare: impl AsyncFnOnce(&PgPool)) -> Self {
        ensure_servers(say).await.unwrap();
        let stack = Stack::start(home, Path::new(MAILRUN), LINGER, |step| eprintln!("{step}")).await.unwrap();
        tidy(&stack).await;
        let name = format!("test-{}-{}", std::process::id(), Uuid::new_v4().simple());
        stack.create_database(&name).await.unwrap();
        stack.create_vhost(&name).await.unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let folder = tempfile::tempdir().unwrap();
        let set = |key: &str, value: String| (key.to_owned(), value);
        let mut environment = vec![
            set("DATABASE_URL", stack.database_url(&name)),
            set("AMQP_URL", stack.amqp_url(&name)),
            set("MAILRUN_WEB__LISTEN", format!("127.0.0.1:{port}")),
            set("MAILRUN_MAILER__SIMULATED__JOURNAL", folder.path().join("journal").display().to_string()),
            set("MAILRUN_RETRY__RUNGS_MS", "100,200".into()),
            set("MAILRUN_HEARTBEAT__INTERVAL_MS", "300".into()),
            set("MAILRUN_HEARTBEAT__DEAD_AFTER_MS", "3000".into()),
            set("MAILRUN_SWEEP__INTERVAL_MS", "300".into()),
            set("MAILRUN_SWEEP__STALLED_AFTER_MS", "2000".into()),
        ];
        environment.extend(settings.iter().map(|(key, value)| set(key, (*value).to_owned())));
        let pool = PgPool::connect_lazy(&stack.database_url(&name)).unwrap();
        prepare(&pool).await;
        // A connection that is kept may be closed by the web server just before it is used again.
        let client = Client::builder().no_proxy().pool_max_idle_per_host(0).redirect(redirect::Policy::none());
        let client = client.build().unwrap();
        let web = format!("http://127.0.0.1:{port}");
        let program = PathBuf::from(MAILRUN);
        let mut world = Self { stack, pool, web, client, name, folder, program, environment, children: Vec::new() };
        assert!(world.run_to_end(&["setup"]), "setup failed: {}", world.log());
        world.start(&["web"]);
        let health = format!("{}/healthz", world.web);
        until("the pages answer", async || world.client.get(&health).send().await.is_ok()).await;
        world
    }

    /// Sets an environment variable of processes started from now on.
    pub fn set(&mut self, key: &str, value: String) {
        self.environment.push((key.to_owned(), value));
    }

    fn spawn(&self, args: &[&str]) -> Child {
        let log = File::options().create(true).append(true).open(self.log_path()).unwrap();
        Command::new(&self.program)
            .args(args)
            .envs(self.environment.iter().map(|(key, value)| (key, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap()
    }

    fn log_path(&self) -> PathBuf {
        self.folder.path().join("log")
    }

    /// The output of the processes.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// Runs a command; returns whether its exit code was 0.
    pub fn run_to_end(&self, args: &[&str]) -> bool {
        self.spawn(args).wait().unwrap().success()
    }

    /// Runs a command with additional settings; returns whether its exit code was 0, and its output.
    pub fn output(&self, args: &[&str], settings: &[(&str, &str)]) -> (bool, String) {
        let environment = self.environment.iter().map(|(key, value)| (key.as_str(), value.as_str()));
        let mut command = Command::new(MAILRUN);
        command.args(args).envs(environment.chain(settings.iter().copied())).stdin(Stdio::null());
        let output = command.stderr(Stdio::inherit()).output().unwrap();
        (output.status.success(), String::from_utf8(output.stdout).unwrap())
    }

    /// Starts a process, which is killed after the test, and returns its index.
    pub fn start(&mut self, args: &[&str]) -> usize {
        let child = self.spawn(args);
        self.children.push(child);
        self.children.len() - 1
    }

    pub fn worker(&mut self, roles: &str) -> usize {
        self.start(&["worker", "--roles", roles])
    }

    /// A worker of each role.
    pub fn workers(&mut self) {
        self.worker("fan-out");
        self.worker("send");
        self.worker("progress");
    }

    /// Whether it is still running.
    pub fn is_running(&mut self, child: usize) -> bool {
        self.children[child].try_wait().unwrap().is_none()
    }

    /// Sends a signal without waiting.
    pub fn signal(&self, child: usize, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.children[child]);
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Waits until it has ended by itself; returns whether its exit code was 0.
    pub async fn until_ended(&mut self, child: usize) -> bool {
        let end = Instant::now() + TIMEOUT;
        loop {
            if let Some(status) = self.children[child].try_wait().unwrap() {
                return status.success();
            }
            assert!(Instant::now() < end, "it does not end\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
    }

    pub fn kill(&mut self, child: usize) {
        self.children[child].kill().unwrap();
        self.children[child].wait().unwrap();
    }

    /// SIGTERM to all running processes, one after another.
    pub fn terminate_all(&mut self) {
        for child in 0..self.children.len() {
            assert!(!self.is_running(child) || self.terminate(child), "{}", self.log());
        }
    }

    /// SIGTERM to those still running.
    pub fn terminate_rest(&mut self) {
        for child in 0..self.children.len() {
            if self.is_running(child) {
                assert!(self.terminate(child), "{}", self.log());
            }
        }
    }

    /// SIGTERM; returns whether the exit code was 0.
    pub fn terminate(&mut self, child: usize) -> bool {
        if let Some(ended) = self.children[child].try_wait().unwrap() {
            return ended.success();
        }
        let pid = rustix::process::Pid::from_child(&self.children[child]);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        self.children[child].wait().unwrap().success()
    }

    pub async fn token(&self) -> String {
        let page = self.client.get(&self.web).send().await.unwrap().text().await.unwrap();
        field(&page, "token")
    }

    /// Submits the form; returns the run's URL, or the status and page of a refusal.
    pub async fn submit(&self, token: &str, emails: &str) -> Result<String, (u16, String)> {
        let form = HashMap::from([("token", token), ("emails", emails)]);
        let answer = self.client.post(format!("{}/invites", self.web)).form(&form).send().await.unwrap();
        match (answer.status().as_u16(), answer.headers().get(LOCATION)) {
            (303, Some(location)) => Ok(format!("{}{}", self.web, location.to_str().unwrap())),
            (status, _) => Err((status, answer.text().await.unwrap())),
        }
    }

    pub async fn invite(&self, emails: &str) -> String {
        self.submit(&self.token().await, emails).await.unwrap()
    }

    pub async fn progress(&self, run: &str) -> Value {
        self.client.get(format!("{run}/progress")).send().await.unwrap().json().await.unwrap()
    }

    pub async fn until_progress(&self, run: &str, what: &str, holds: impl Fn(&Value) -> bool) -> Value {
        let end = Instant::now() + TIMEOUT;
        loop {
            let progress = self.progress(run).await;
            if holds(&progress) {
                return progress;
            }
            assert!(Instant::now() < end, "never {what}: {progress}\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
    }

    pub async fn until_over(&self, run: &str) -> Value {
        self.until_progress(run, "over", |progress| progress["over"] == true).await
    }

    pub async fn retry(&self, run: &str, states: &str) {
        let page = self.client.get(run).send().await.unwrap().text().await.unwrap();
        let form = HashMap::from([("token", field(&page, "token")), ("states", states.to_owned())]);
        self.client.post(format!("{run}/retry")).form(&form).send().await.unwrap().error_for_status().unwrap();
    }

    /// The Message-IDs handed over, once per hand-over.
    pub fn handed_over(&self) -> Vec<String> {
        let journal = std::fs::read_to_string(self.folder.path().join("journal")).unwrap_or_default();
        journal.lines().map(str::to_owned).collect()
    }

    /// How many mails were handed over after their first time.
    pub fn duplicates(&self) -> usize {
        let all = self.handed_over();
        all.len() - all.iter().collect::<std::collections::HashSet<_>>().len()
    }

    pub fn assert_no_duplicates(&self) {
        assert_eq!(self.duplicates(), 0, "a mail was handed over twice");
    }

    /// Guarantee 2, in SQL: each counter equals a count of the items.
    pub async fn counters_equal_counts(&self) {
        let drifted: i64 = sqlx::query_scalar(
            "SELECT count(*) FROM run_progress p
             JOIN LATERAL (SELECT count(*) FILTER (WHERE state = 'pending') pending,
                                  count(*) FILTER (WHERE state = 'retrying') retrying,
                                  count(*) FILTER (WHERE state = 'cancelled') cancelled,
                                  count(*) FILTER (WHERE state = 'skipped') skipped,
                                  count(*) FILTER (WHERE state = 'unknown') unknown,
                                  count(*) FILTER (WHERE state = 'failed') failed,
                                  count(*) FILTER (WHERE state = 'sent') sent
                           FROM run_items i WHERE i.run_id = p.run_id) c ON true
             WHERE (p.pending, p.retrying, p.cancelled, p.skipped, p.unknown, p.failed, p.sent)
                   IS DISTINCT FROM (c.pending, c.retrying, c.cancelled, c.skipped, c.unknown, c.failed, c.sent)",
        )
        .fetch_one(&self.pool)
        .await
        .unwrap();
        assert_eq!(drifted, 0, "counters have drifted");
    }

    /// The sweeper's repairs of a run.
    pub async fn repairs(&self, run: &str) -> Repairs {
        sweep::repairs(&self.pool, run.rsplit('/').next().unwrap().parse().unwrap()).await.unwrap()
    }

    /// A channel on the test's virtual host, like the management console's.
    pub async fn channel(&self) -> lapin::Channel {
        let connection =
            lapin::Connection::connect(&self.stack.amqp_url(&self.name), Default::default()).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        // The connection must outlive the channel; it ends with the test program.
        std::mem::forget(connection);
        channel
    }

    /// Publishes a body with only a routing key.
    pub async fn publish(&self, queue: &str, body: &[u8]) {
        let channel = self.channel().await;
        channel
            .basic_publish("mailrun".into(), queue.into(), Default::default(), body, Default::default())
            .await
            .unwrap();
        channel.close(200, "done".into()).await.unwrap();
    }
}

/// Drops what failed tests of earlier programs left on the stack, once per test program.
async fn tidy(stack: &Stack) {
    static TIDIED: OnceCell<()> = OnceCell::const_new();
    let tidy = async || {
        let mut conn = PgConnection::connect(&stack.database_url("postgres")).await.unwrap();
        let worlds = sqlx::query_scalar("SELECT datname::text FROM pg_database WHERE datname LIKE 'test-%'");
        let worlds: Vec<String> = worlds.fetch_all(&mut conn).await.unwrap();
        let is_left = |name: &&String| {
            let owner = name.split('-').nth(1).unwrap_or_default();
            !Path::new("/proc").join(owner).join("stat").exists()
        };
        let left: Vec<&String> = worlds.iter().filter(is_left).collect();
        if left.len() > LEFTOVERS {
            say(&format!("Dropping the leftovers of {} earlier tests", left.len()));
            let drops = left.into_iter().map(|name| async move {
                // Another test program may do so simultaneously.
                let _ = (stack.drop_vhost(name).await, stack.drop_database(name).await);
            });
            stream::iter(drops).buffer_unordered(8).collect::<()>().await;
        }
    };
    TIDIED.get_or_init(tidy).await;
}

impl Drop for World {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            // Keep the database and the virtual host of a failed test for debugging.
            eprintln!("{}", self.log());
            return;
        }
        // Idle queues cost RabbitMQ time and memory. Not on the test's own runtime, which is blocked here.
        let drop = async || {
            // Where RabbitMQ is stopped, the whole stack is the test's own.
            let _ = tokio::join!(self.stack.drop_vhost(&self.name), self.stack.drop_database(&self.name));
        };
        std::thread::scope(|scope| scope.spawn(|| Runtime::new().unwrap().block_on(drop())).join()).unwrap();
    }
}

/// The value of a hidden field.
pub fn field(page: &str, name: &str) -> String {
    let (_, rest) = page.split_once(&format!("name=\"{name}\" value=\"")).unwrap();
    rest.split_once('"').unwrap().0.to_owned()
}

pub fn people(count: usize) -> String {
    (1..=count).map(|number| format!("guest-{number:06}@example.org\n")).collect()
}

pub async fn until(what: &str, holds: impl AsyncFn() -> bool) {
    let end = Instant::now() + TIMEOUT;
    while !holds().await {
        assert!(Instant::now() < end, "never: {what}");
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
}
