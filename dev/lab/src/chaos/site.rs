//! An installation for one run: an empty database and virtual host, the real processes, and a mail server.

use std::{
    ffi::OsString,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::Path,
    process::Stdio,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result};
use lapin::{Channel, Connection, ConnectionProperties};
use mailrun_core::queue::{ITEMS, RESULTS, RUNS, RUNS_PAUSED, RUNS_WAIT, retry_queue};
use rand::RngExt as _;
use rustix::process::Signal;
use sqlx::{
    PgPool,
    postgres::{PgConnectOptions, PgPoolOptions},
};
use tokio::{
    process::Command,
    time::{Instant, timeout},
};
use url::Url;

use super::{Setting, revision::Revision, signal::send_signal, smtp_faults::SmtpFaults};
use crate::proxy::Proxy;
use crate::{
    doubler::Doubler,
    local::{SENDERS, Services, own_program, to_sink},
    visitor::Visitor,
};
use mailrun_sink::{self, RateMeter, Sink};
use mailrun_stack::Stack;

/// The heartbeat timeout of workers.
pub(super) const DEAD_AFTER: Duration = Duration::from_secs(3);
/// When a run counts as stalled.
pub(super) const STALLED_AFTER: Duration = Duration::from_secs(3);
/// The retry schedule.
const RETRY_DELAYS_MS: [u64; 4] = [300, 600, 1_500, 3_000];
/// The timeout for answers of RabbitMQ, PostgreSQL and the mail server.
pub(super) const ANSWER: Duration = Duration::from_secs(5);
/// The heartbeat interval of connections to RabbitMQ.
pub(super) const HEARTBEAT: Duration = Duration::from_secs(4);
/// Connections of one sender.
const CONNECTIONS: u32 = 20;
/// The mail server's latency per mail; more for a short list, which would otherwise end too soon.
const LATENCY_MS: std::ops::RangeInclusive<u32> = 20..=400;
/// The intended duration of a short list.
const SHORTEST_MS: u32 = 8_000;
/// For plans whose faults wait for each other, which takes some seconds each.
const IN_TURN_LATENCY_MS: std::ops::RangeInclusive<u32> = 20..=2_000;
const IN_TURN_SHORTEST_MS: u32 = 60_000;
/// The key of the bounce hook.
pub(super) const HOOK_KEY: &str = "the-key-of-the-fault-bench";
/// Services end cleanly within this time, and are killed after slightly more.
const CLEAN_STOP: Duration = Duration::from_secs(30);
/// Ports of the web server, outside the range assigned to other sockets.
const PORTS: std::ops::Range<u16> = 20_000..30_000;

/// An installation.
pub(super) struct Site<'a> {
    pub(super) stack: &'a Stack,
    pub(super) sink: Sink,
    pub(super) smtp_faults: Arc<SmtpFaults>,
    pub(super) pool: PgPool,
    pub(super) visitor: Visitor,
    /// Between our processes and RabbitMQ.
    pub(super) to_broker: Proxy,
    /// Between them and PostgreSQL.
    pub(super) to_database: Proxy,
    /// Between the senders and the mail server.
    pub(super) to_mail: Proxy,
    /// Publishes each message a second time, if the plan requires it.
    _doubler: Option<Doubler>,
    /// The program that an upgrade starts from.
    pub(super) revision: Option<&'a Revision>,
    /// The installation's rate limit, in sends per second.
    pub(super) limit: Option<u32>,
    name: String,
    /// Of the services.
    environment: Vec<(OsString, OsString)>,
    services: Services,
}

/// What an installation is for.
pub(super) struct Purpose {
    /// Part of its name, unique among those that exist at the same time.
    pub(super) name: String,
    /// Whether its faults wait for each other, so that its run must last longer.
    pub(super) in_turn: bool,
    /// Whether each message is published twice.
    pub(super) duplicates: bool,
    /// Whether it has a rate limit.
    pub(super) limited: bool,
    /// Whether it starts with an older program.
    pub(super) upgrades: bool,
}

/// The names of all senders.
pub(super) fn senders() -> impl Iterator<Item = String> {
    (1..=SENDERS).map(|number| format!("send-{number}"))
}

/// A limit with which a list takes about twenty seconds.
fn limit(recipients: u32) -> u32 {
    (recipients / 20).max(20)
}

impl<'a> Site<'a> {
    /// Creates an installation on `stack`.
    pub(super) async fn create(stack: &'a Stack, setting: &'a Setting<'_>, purpose: Purpose) -> Result<Self> {
        let name = format!("chaos-{}", purpose.name);
        let log = setting.logs.join(format!("services-{}.log", purpose.name));
        stack.create_database(&name).await?;
        stack.create_vhost(&name).await?;
        let (shortest_ms, latencies_ms) =
            if purpose.in_turn { (IN_TURN_SHORTEST_MS, IN_TURN_LATENCY_MS) } else { (SHORTEST_MS, LATENCY_MS) };
        let latency_ms = shortest_ms * CONNECTIONS * SENDERS as u32 / setting.recipients.max(1);
        let latency = Duration::from_millis(latency_ms.clamp(*latencies_ms.start(), *latencies_ms.end()).into());
        let sink = Sink::start(mailrun_sink::Options { latency, keep: 0, ..mailrun_sink::Options::default() }).await?;
        let smtp_faults = Arc::new(SmtpFaults::default());
        let _ = smtp_faults.meter.set(RateMeter::start());
        let limit = purpose.limited.then(|| limit(setting.recipients));
        smtp_faults.defers.store(limit.is_some(), Ordering::Relaxed);
        sink.set_rule(smtp_faults.rule());

        let (to_database, database_url) = through_proxy(&stack.database_url(&name)).await?;
        let (to_broker, first_node) = through_proxy(&stack.amqp_url(&name)).await?;
        // No network fault affects a cluster, so its other nodes are reached directly.
        let other_nodes = stack.amqp_urls(&name).into_iter().skip(1);
        let amqp_urls: Vec<String> = [first_node].into_iter().chain(other_nodes).collect();
        let to_mail = Proxy::start(sink.address()).await?;
        let mut environment: Vec<(OsString, OsString)> =
            vec![("DATABASE_URL".into(), database_url.into()), ("AMQP_URL".into(), amqp_urls.join(",").into())];
        environment.extend(setting.file.map(|file| ("MAILRUN_CONFIG".into(), file.into())));
        environment.extend(to_sink(to_mail.address()));
        environment.extend(settings(setting.resend));
        let limited = limit.map(|limit| ("MAILRUN_FAN_OUT__SENDS_PER_SECOND".into(), limit.to_string().into()));
        environment.extend(limited);
        let mut config = setting.config.clone();
        // Not the next free port from 8080: a killed web server must find its port free again.
        config.web.listen = free_address().context("no free port for the web server")?;
        let revision = setting.revision.as_ref().filter(|_| purpose.upgrades);
        let program = revision.map_or_else(own_program, |revision| Ok(revision.program.clone()))?;
        let services = Services::start(program, &config, environment.clone(), SENDERS, None, log, |_| {}).await?;
        let doubler = match purpose.duplicates {
            true => Some(Doubler::start(&stack.amqp_url(&name), &queues()).await?),
            false => None,
        };
        let options: PgConnectOptions = stack.database_url(&name).parse()?;
        let pool = PgPoolOptions::new()
            .max_connections(8)
            .acquire_timeout(Duration::from_secs(2))
            .connect_lazy_with(options.application_name("mailrun chaos"));
        let visitor = Visitor::new(&config, &services.web_url)?;
        Ok(Self {
            stack,
            sink,
            smtp_faults,
            pool,
            visitor,
            to_broker,
            to_database,
            to_mail,
            _doubler: doubler,
            revision,
            limit,
            name,
            environment,
            services,
        })
    }

    /// The name of its database and virtual host.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The URL of the pages.
    pub(super) fn web_url(&self) -> &str {
        &self.services.web_url
    }

    /// The bench's own connection to the database.
    pub(super) fn database(&self) -> PgConnectOptions {
        PgConnectOptions::clone(&self.pool.connect_options())
    }

    /// The names of the services.
    pub(super) fn services(&self) -> Vec<String> {
        self.services.pids().map(|(name, _)| name.to_owned()).collect()
    }

    /// Opens a connection with a channel.
    pub(super) async fn channel(&self) -> Result<(Connection, Channel)> {
        let properties = ConnectionProperties::default().with_connection_name("mailrun chaos".into());
        let url = self.stack.amqp_url(&self.name);
        let connection = Connection::connect(&url, properties);
        let connection = timeout(Duration::from_secs(10), connection).await.context("RabbitMQ does not respond")??;
        let channel = connection.create_channel().await?;
        Ok((connection, channel))
    }

    /// Runs a command of Mailrun with the services' settings on this database, which may be another one. Fails if it takes longer than
    /// `limit`.
    pub(super) async fn run(&self, database: &str, args: &[&str], limit: Duration) -> Result<()> {
        let mut command = Command::new(own_program()?);
        command.args(args).envs(self.environment.iter().map(|(key, value)| (key, value)));
        command.env("DATABASE_URL", self.stack.database_url(database));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
        let ended = timeout(limit, command.status()).await.with_context(|| format!("mailrun {args:?} timed out"))??;
        anyhow::ensure!(ended.success(), "mailrun {args:?} failed");
        Ok(())
    }

    /// Ends a service cleanly, and starts it with another program.
    pub(super) async fn replace(&self, service: &str, program: &Path) -> Result<()> {
        self.services.replace(service, program).await
    }

    /// How often services ended unexpectedly.
    pub(super) fn deaths(&self) -> u32 {
        self.services.deaths()
    }

    /// The process id of a service.
    pub(super) fn pid(&self, service: &str) -> Result<u32> {
        let pid = self.services.pids().find_map(|(name, pid)| (name == service).then_some(pid));
        pid.with_context(|| format!("there is no service {service}"))
    }

    /// Sends a signal to a service. Fails if it has just ended.
    pub(super) fn signal(&self, service: &str, signal: Signal) -> Result<()> {
        send_signal(self.pid(service)?, std::process::id(), signal)
    }

    /// Stops the services; returns whether all of them ended cleanly.
    pub(super) async fn stop(self) -> (Stopped<'a>, bool) {
        let Self { stack, sink, pool, to_broker, to_database, to_mail, name, services, .. } = self;
        let began = Instant::now();
        services.stop().await;
        let good = began.elapsed() < CLEAN_STOP;
        for proxy in [to_broker, to_database, to_mail] {
            proxy.stop().await;
        }
        sink.stop().await;
        (Stopped { stack, sink, pool, name }, good)
    }
}

/// An installation whose services have ended. Its data is still there.
pub(super) struct Stopped<'a> {
    stack: &'a Stack,
    pub(super) sink: Sink,
    pub(super) pool: PgPool,
    name: String,
}

impl Stopped<'_> {
    /// Drops it with its contents.
    pub(super) async fn drop(self) -> Result<()> {
        self.pool.close().await;
        self.stack.drop_vhost(&self.name).await?;
        Ok(self.stack.drop_database(&self.name).await?)
    }
}

/// The retry queues.
pub(super) fn retry_queues() -> Vec<String> {
    RETRY_DELAYS_MS.map(|ms| retry_queue(Duration::from_millis(ms))).to_vec()
}

/// The queues that messages of a run pass through.
pub(super) fn queues() -> Vec<String> {
    [RUNS, RUNS_WAIT, RUNS_PAUSED, ITEMS, RESULTS].map(str::to_owned).into_iter().chain(retry_queues()).collect()
}

/// Short times, so that what takes a minute with the defaults takes seconds here. The rules are the same. Settings that older programs
/// refuse do not belong here, because upgrades start with them.
fn settings(resend: bool) -> Vec<(OsString, OsString)> {
    let answer_ms = ANSWER.as_millis().to_string();
    let delays = RETRY_DELAYS_MS.map(|ms| ms.to_string()).join(",");
    let settings = [
        ("RETRY__RUNGS_MS", delays),
        ("HEARTBEAT__INTERVAL_MS", "300".into()),
        ("HEARTBEAT__DEAD_AFTER_MS", DEAD_AFTER.as_millis().to_string()),
        ("SWEEP__INTERVAL_MS", "500".into()),
        ("SWEEP__STALLED_AFTER_MS", STALLED_AFTER.as_millis().to_string()),
        ("SEND__ON_UNKNOWN", if resend { "resend" } else { "hold" }.into()),
        ("MAILER__SMTP__CONNECTIONS", CONNECTIONS.to_string()),
        ("MAILER__SMTP__COMMAND_TIMEOUT_MS", answer_ms.clone()),
        ("MAILER__SMTP__MESSAGE_TIMEOUT_MS", answer_ms.clone()),
        ("DATABASE__ANSWER_TIMEOUT_MS", answer_ms.clone()),
        ("AMQP__ANSWER_TIMEOUT_MS", answer_ms),
        ("AMQP__HEARTBEAT_S", HEARTBEAT.as_secs().to_string()),
        ("WEB__HOOK_KEY", HOOK_KEY.into()),
    ];
    settings.into_iter().map(|(key, value)| (format!("MAILRUN_{key}").into(), value.into())).collect()
}

/// Starts a proxy in front of the server of `url`, and returns the URL through the proxy.
async fn through_proxy(url: &str) -> Result<(Proxy, String)> {
    let mut url: Url = url.parse()?;
    let port = url.port().context("the URL has no port")?;
    let proxy = Proxy::start((Ipv4Addr::LOCALHOST, port).into()).await?;
    url.set_port(Some(proxy.address().port())).ok().context("the URL cannot have a port")?;
    Ok((proxy, url.into()))
}

/// A free loopback address, outside the range that the system assigns to outgoing connections.
fn free_address() -> Option<SocketAddr> {
    let mut rng = rand::rng();
    std::iter::repeat_with(|| SocketAddr::from((Ipv4Addr::LOCALHOST, rng.random_range(PORTS))))
        .take(100)
        .find(|address| TcpListener::bind(address).is_ok())
}
