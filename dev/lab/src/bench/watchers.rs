//! Watchers: the cost of many open results pages during a run, and the age of the numbers they show.
//!
//! One run with one watcher, one with many, and one with a single page and a fast probe. The watchers poll like
//! `web/static/results.js`, each over its own connection, opened before the run.

use std::{
    fmt,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, ensure};
use mailrun_app::config::Config;
use rustix::process::{Resource, getrlimit, setrlimit};
use serde::Serialize;
use sqlx::PgConnection;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufStream},
    net::TcpStream,
    task::JoinSet,
    time::{sleep, timeout},
};

use super::{
    Settings,
    cpu::Cpu,
    people,
    pipeline::{Mailrun, Run, Setup},
    place::Place,
    statements::Statements,
    writes::Writes,
};
use crate::visitor::{Progress, login};
use mailrun_stack::Stack;

/// The page's interval from a response to the next poll.
const LIVE: Duration = Duration::from_millis(300);
/// The page's first wait after an error, and its timeout.
const AFTER_ERROR: Duration = Duration::from_secs(1);
const TIMEOUT: Duration = Duration::from_secs(10);
/// Between two polls of the probe.
const PROBE: Duration = Duration::from_millis(20);
/// Open files of a process besides the watchers' connections.
const OTHER_FILES: u64 = 500;
/// Text that occurs only in the polls' query.
const POLL_QUERY: &str = "FROM run_samples s";

/// The results with one watcher, with many, and with a probe.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Watched {
    /// Web's CPU time per poll beyond those of one watcher; null without more polls.
    web_cpu_microseconds_per_poll: Option<f64>,
    one: Audience,
    many: Audience,
    /// One page and a probe that polls every 20 ms.
    probed: Audience,
}

/// A run with its watchers, from the response to the POST until the end.
#[derive(Clone, Debug, Serialize)]
struct Audience {
    watchers: usize,
    items_per_second: f64,
    seconds: f64,
    polls: usize,
    errors: usize,
    /// From request to response as the bench measures it, which shares the processors with the servers.
    poll_p50_ms: Option<f64>,
    poll_p99_ms: Option<f64>,
    /// The age of a response's numbers while the run is in progress: how long ago that many items had been claimed.
    age_p50_ms: Option<f64>,
    age_p99_ms: Option<f64>,
    /// All transactions of this database: the run's and the polls'.
    commits: i64,
    /// Queries of the polls alone; null without `pg_stat_statements`.
    progress_queries: Option<i64>,
    cpu_seconds: Cpu,
}

/// Measures with one watcher, with `watchers`, and with a probe. Fails if the system does not allow that many connections.
pub(super) async fn measure(stack: &Stack, settings: &Settings<'_>, items: usize, watchers: usize) -> Result<Watched> {
    // The web server inherits it.
    allow_files(u64::try_from(watchers)? + OTHER_FILES)?;
    let one = watch(stack, settings, items, vec![LIVE]).await?;
    let many = watch(stack, settings, items, vec![LIVE; watchers]).await?;
    let probed = watch(stack, settings, items, vec![LIVE, PROBE]).await?;
    let more = many.polls.checked_sub(one.polls).filter(|more| *more > 0);
    let web = many.cpu_seconds.web - one.cpu_seconds.web;
    Ok(Watched { web_cpu_microseconds_per_poll: more.map(|more| web * 1e6 / more as f64), one, many, probed })
}

/// Raises the limit of open files.
fn allow_files(needed: u64) -> Result<()> {
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current.is_none_or(|current| current >= needed) {
        return Ok(());
    }
    let most = limit.maximum.unwrap_or(u64::MAX);
    ensure!(
        most >= needed,
        "{needed} open files are needed but only {most} allowed: raise `ulimit -Hn`, or use fewer watchers"
    );
    limit.current = Some(needed);
    setrlimit(Resource::Nofile, limit).context("raising the limit of open files failed")
}

/// One run with a watcher for each of the pauses.
async fn watch(stack: &Stack, settings: &Settings<'_>, items: usize, pauses: Vec<Duration>) -> Result<Audience> {
    let place = Place::create(stack, "watchers").await?;
    let mut conn = place.database().await?;
    let mailrun = Mailrun::start(&place, settings, Setup::default()).await?;
    let watched = watch_run(&place, &mailrun, &mut conn, settings.config, items, pauses).await;
    mailrun.services.stop().await;
    let (mut audience, before) = watched?;
    // The services' sessions have ended, and have therefore reported their transactions.
    audience.commits = (Writes::now(&mut conn).await? - before).commits;
    drop(conn);
    place.drop().await?;
    eprintln!("{audience}");
    Ok(audience)
}

async fn watch_run(
    place: &Place<'_>,
    mailrun: &Mailrun,
    conn: &mut PgConnection,
    config: &Config,
    items: usize,
    pauses: Vec<Duration>,
) -> Result<(Audience, Writes)> {
    let address = mailrun.services.web_url.trim_start_matches("http://");
    let watchers = pauses.len();
    let mut watching = Vec::with_capacity(watchers);
    for pause in pauses {
        watching.push(Watcher { connection: KeepAlive::connect(address).await?, pause, polls: Vec::new(), errors: 0 });
    }
    let form = mailrun.visitor.fill_in(&people("guest", items)).await?;
    place.quiet(conn).await?;
    let run = mailrun.submit(form).await?;
    let (started, before) = (Instant::now(), Writes::now(conn).await?);
    let before_polls = Statements::with(conn, POLL_QUERY).await;
    let cpu = Cpu::now(place.stack, Some(&mailrun.services))?;
    let request = request(config, address, &run);
    let mut all = JoinSet::new();
    for (number, watcher) in watching.into_iter().enumerate() {
        let offset = LIVE.mul_f64(number as f64 / watchers as f64);
        all.spawn(watcher.poll(address.to_owned(), request.clone(), offset));
    }
    let watched = all.join_all().await;
    let seconds = started.elapsed().as_secs_f64();
    let cpu_seconds = Cpu::now(place.stack, Some(&mailrun.services))? - cpu;
    let progress_queries =
        Statements::with(conn, POLL_QUERY).await.zip(before_polls).map(|(now, then)| (now - then).calls);
    let end = mailrun.progress(&run).await?;
    ensure!(end.sent == items as u64, "{} of {items} invitations were sent: {}", end.sent, run.url);
    let drain = run.finished_after(conn).await?.saturating_sub(run.answered);
    let polls: Vec<Poll> = watched.iter().flat_map(|watcher| watcher.polls.iter().copied()).collect();
    let latencies = polls.iter().map(|poll| poll.took.as_secs_f64() * 1e3).collect();
    let ages = ages(&polls, &claims(conn).await?);
    let ((poll_p50_ms, poll_p99_ms), (age_p50_ms, age_p99_ms)) = (percentiles(latencies), percentiles(ages));
    let audience = Audience {
        watchers,
        items_per_second: items as f64 / drain.as_secs_f64(),
        seconds,
        polls: polls.len(),
        errors: watched.iter().map(|watcher| watcher.errors).sum(),
        poll_p50_ms,
        poll_p99_ms,
        age_p50_ms,
        age_p99_ms,
        commits: 0,
        progress_queries,
        cpu_seconds,
    };
    Ok((audience, before))
}

/// When each of the run's items was claimed, in order, in seconds since 1970: the place has no other run.
async fn claims(conn: &mut PgConnection) -> Result<Vec<f64>> {
    let claims = "SELECT extract(epoch FROM started_at)::double precision FROM attempts ORDER BY started_at";
    Ok(sqlx::query_scalar(claims).fetch_all(conn).await?)
}

/// The age of each response's numbers, in milliseconds, while the run was in progress.
fn ages(polls: &[Poll], claims: &[f64]) -> Vec<f64> {
    let under_way = polls.iter().filter(|poll| poll.settled > 0 && poll.settled < claims.len());
    under_way.filter_map(|poll| Some((poll.at - claims.get(poll.settled - 1)?) * 1e3)).collect()
}

/// The 50th and the 99th percentile. Not from a histogram: the values are exact, and an age may be negative.
fn percentiles(mut values: Vec<f64>) -> (Option<f64>, Option<f64>) {
    values.sort_by(f64::total_cmp);
    let at = |share: f64| values.get(((values.len() as f64 * share).ceil() as usize).saturating_sub(1)).copied();
    (at(0.5), at(0.99))
}

/// The request of a poll, the same for all watchers.
fn request(config: &Config, address: &str, run: &Run) -> String {
    let path = run.url.trim_start_matches("http://").trim_start_matches(address);
    let login = login(config).map(|login| format!("Authorization: {login}\r\n")).unwrap_or_default();
    format!("GET {path}/progress HTTP/1.1\r\nHost: {address}\r\n{login}\r\n")
}

/// One response.
#[derive(Clone, Copy, Debug)]
struct Poll {
    took: Duration,
    /// When it arrived, in seconds since 1970.
    at: f64,
    /// Settled items in it.
    settled: usize,
}

/// An open results page.
struct Watcher {
    connection: KeepAlive,
    pause: Duration,
    polls: Vec<Poll>,
    errors: usize,
}

impl Watcher {
    /// Polls until the run is over, starting after `offset`.
    async fn poll(mut self, address: String, request: String, offset: Duration) -> Self {
        sleep(offset).await;
        loop {
            match timeout(TIMEOUT, self.ask(&request)).await {
                Ok(Ok(true)) => return self,
                Ok(Ok(false)) => sleep(self.pause).await,
                Ok(Err(_)) | Err(_) => {
                    self.errors += 1;
                    sleep(AFTER_ERROR).await;
                    // If that fails too, so does the next poll.
                    if let Ok(connection) = KeepAlive::connect(&address).await {
                        self.connection = connection;
                    }
                }
            }
        }
    }

    /// Polls once and returns whether the run is over.
    async fn ask(&mut self, request: &str) -> Result<bool> {
        let started = Instant::now();
        let answer = self.connection.ask(request).await?;
        let took = started.elapsed();
        let at = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64();
        let progress: Progress = serde_json::from_slice(&answer)?;
        self.polls.push(Poll { took, at, settled: usize::try_from(progress.settled())? });
        Ok(progress.over)
    }
}

/// A persistent connection with a minimal HTTP client, which costs the bench almost nothing beside the servers it measures.
struct KeepAlive(BufStream<TcpStream>);

impl KeepAlive {
    async fn connect(address: &str) -> Result<Self> {
        let stream = TcpStream::connect(address).await.context("cannot connect to the web server")?;
        stream.set_nodelay(true)?;
        // Small buffers, because thousands are open.
        Ok(Self(BufStream::with_capacity(2048, 512, stream)))
    }

    async fn ask(&mut self, request: &str) -> Result<Vec<u8>> {
        self.0.write_all(request.as_bytes()).await?;
        self.0.flush().await?;
        let mut line = String::new();
        self.0.read_line(&mut line).await?;
        ensure!(line.starts_with("HTTP/1.1 200"), "unexpected response: {line}");
        let mut length = 0;
        while line != "\r\n" {
            line.clear();
            ensure!(self.0.read_line(&mut line).await? > 0, "the response was cut off");
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse()?;
            }
        }
        let mut body = vec![0; length];
        self.0.read_exact(&mut body).await?;
        Ok(body)
    }
}

impl fmt::Display for Audience {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |figure: Option<f64>| figure.map_or("-".to_owned(), |figure| format!("{figure:.1}"));
        write!(
            f,
            "{} watchers: {:.0} items per second, {} polls, {} errors, response {} ms (p99 {}), age {} ms (p99 {}), {} commits",
            self.watchers,
            self.items_per_second,
            self.polls,
            self.errors,
            shown(self.poll_p50_ms),
            shown(self.poll_p99_ms),
            shown(self.age_p50_ms),
            shown(self.age_p99_ms),
            self.commits
        )?;
        match self.progress_queries {
            Some(queries) => write!(f, ", {queries} queries of the polls"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Watched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}\n{}\nWith a probe every 20 ms: {}", self.one, self.many, self.probed)?;
        match self.web_cpu_microseconds_per_poll {
            Some(cpu) => write!(f, "One poll costs the web server {cpu:.0} CPU microseconds"),
            None => write!(f, "Too few polls to determine the cost of one"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_age_counts_from_the_claim_of_the_last_settled_item() {
        let poll = |at, settled| Poll { took: Duration::ZERO, at, settled };
        let claims = [10.0, 10.5, 11.0];
        assert_eq!(ages(&[poll(10.2, 0), poll(11.0, 2), poll(12.0, 3)], &claims), [500.0]);
    }

    #[test]
    fn percentiles_are_observed_values() {
        assert_eq!(percentiles((1..=100).map(f64::from).collect()), (Some(50.0), Some(99.0)));
        assert_eq!(percentiles(Vec::new()), (None, None));
    }
}
