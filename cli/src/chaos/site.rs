//! A Mailrun of its own for one run: an empty database and virtual host, the real processes, and a mail server.

use std::{
    ffi::OsString,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result};
use lapin::{Channel, Connection, ConnectionProperties};
use rand::RngExt as _;
use rustix::process::Signal;
use sqlx::{
    PgPool,
    postgres::{PgConnectOptions, PgPoolOptions},
};
use tokio::time::Instant;

use super::{Setting, fault::send_signal, plan::Plan, weather::Weather};
use crate::{
    local::{SENDERS, Services, to_sink},
    sink::{self, Sink},
    stack::Stack,
    visitor::Visitor,
};

/// A worker that has not been heard of for so long is dead.
pub(super) const DEAD_AFTER: Duration = Duration::from_secs(3);
/// The retry schedule.
pub(super) const RUNGS_MS: [u64; 4] = [300, 600, 1_500, 3_000];
/// Connections of one sender.
const CONNECTIONS: u32 = 20;
/// What the mail server takes for each mail; more for a short list, which would be over before anything could happen.
const LATENCY_MS: std::ops::RangeInclusive<u32> = 20..=400;
/// A short list is made to last so long.
const SHORTEST_MS: u32 = 8_000;
/// Who ends in good order does so within this time; the rest is killed after a little more.
const GOOD_ORDER: Duration = Duration::from_secs(30);
/// Where the pages listen: nobody else is given one of these by chance.
const PORTS: std::ops::Range<u16> = 20_000..30_000;

/// A Mailrun of its own.
pub(super) struct Site<'a> {
    pub(super) stack: &'a Stack,
    pub(super) sink: Sink,
    pub(super) weather: Arc<Weather>,
    pub(super) pool: PgPool,
    pub(super) visitor: Visitor,
    name: String,
    services: Services,
}

impl<'a> Site<'a> {
    /// Creates it on `stack`.
    ///
    /// # Errors
    /// What did not start.
    pub(super) async fn create(stack: &'a Stack, setting: &Setting<'_>, plan: Plan) -> Result<Self> {
        let name = format!("chaos-{}", plan.name());
        let log = setting.logs.join(format!("services-{}.log", plan.name()));
        stack.create_database(&name).await?;
        stack.create_vhost(&name).await?;
        let latency_ms = SHORTEST_MS * CONNECTIONS * SENDERS as u32 / setting.recipients.max(1);
        let latency = Duration::from_millis(latency_ms.clamp(*LATENCY_MS.start(), *LATENCY_MS.end()).into());
        let sink = Sink::start(sink::Options { latency, keep: 0, ..sink::Options::default() }).await?;
        let weather = Arc::new(Weather::default());
        sink.set_rule(weather.rule());

        let mut environment: Vec<(OsString, OsString)> = vec![
            ("DATABASE_URL".into(), stack.database_url(&name).into()),
            ("AMQP_URL".into(), stack.amqp_url(&name).into()),
        ];
        environment.extend(setting.file.map(|file| ("MAILRUN_CONFIG".into(), file.into())));
        environment.extend(to_sink(sink.address()));
        environment.extend(settings(plan.publishes_twice(), setting.resend));
        let mut config = setting.config.clone();
        // Not the next free port from 8080 on: pages that were killed must find theirs free again.
        config.web.listen = free_address().context("no port is free for the pages")?;
        let services = Services::start(&config, environment, SENDERS, None, log, |_| {}).await?;
        let options: PgConnectOptions = stack.database_url(&name).parse()?;
        let pool = PgPoolOptions::new()
            .max_connections(8)
            .acquire_timeout(Duration::from_secs(2))
            .connect_lazy_with(options.application_name("mailrun chaos"));
        let visitor = Visitor::new(&config, &services.web_url)?;
        Ok(Self { stack, sink, weather, pool, visitor, name, services })
    }

    /// A connection of its own, with a channel.
    ///
    /// # Errors
    /// The broker's.
    pub(super) async fn channel(&self) -> Result<(Connection, Channel)> {
        let properties = ConnectionProperties::default().with_connection_name("mailrun chaos".into());
        let url = self.stack.amqp_url(&self.name);
        let connection = Connection::connect(&url, properties);
        let connection =
            tokio::time::timeout(Duration::from_secs(10), connection).await.context("RabbitMQ does not answer")??;
        let channel = connection.create_channel().await?;
        Ok((connection, channel))
    }

    /// The process of a service.
    ///
    /// # Errors
    /// When there is none of this name.
    pub(super) fn pid(&self, service: &str) -> Result<u32> {
        let pid = self.services.pids().find_map(|(name, pid)| (name == service).then_some(pid));
        pid.with_context(|| format!("there is no service {service}"))
    }

    /// Sends a signal to a service.
    ///
    /// # Errors
    /// When it has just ended.
    pub(super) fn signal(&self, service: &str, signal: Signal) -> Result<()> {
        send_signal(self.pid(service)?, std::process::id(), signal)
    }

    /// Stops the services; says whether all of them ended in good order.
    pub(super) async fn stop(self) -> (Stopped<'a>, bool) {
        let Self { stack, sink, pool, name, services, .. } = self;
        let began = Instant::now();
        services.stop().await;
        let good = began.elapsed() < GOOD_ORDER;
        sink.stop().await;
        (Stopped { stack, sink, pool, name }, good)
    }
}

/// A site whose services have ended. What they have done is still there.
pub(super) struct Stopped<'a> {
    stack: &'a Stack,
    pub(super) sink: Sink,
    pub(super) pool: PgPool,
    name: String,
}

impl Stopped<'_> {
    /// Drops it with all it holds.
    ///
    /// # Errors
    /// What could not be dropped.
    pub(super) async fn drop(self) -> Result<()> {
        self.pool.close().await;
        self.stack.drop_vhost(&self.name).await?;
        Ok(self.stack.drop_database(&self.name).await?)
    }
}

/// Short times, so that what takes a minute by the default settings takes seconds here. The rules are the same.
fn settings(publish_twice: bool, resend: bool) -> Vec<(OsString, OsString)> {
    let rungs = RUNGS_MS.map(|ms| ms.to_string()).join(",");
    let settings = [
        ("RETRY__RUNGS_MS", rungs),
        ("HEARTBEAT__INTERVAL_MS", "300".into()),
        ("HEARTBEAT__DEAD_AFTER_MS", DEAD_AFTER.as_millis().to_string()),
        ("SWEEP__INTERVAL_MS", "500".into()),
        ("SWEEP__STALLED_AFTER_MS", "3000".into()),
        ("SEND__ON_UNKNOWN", if resend { "resend" } else { "hold" }.into()),
        ("MAILER__SMTP__CONNECTIONS", CONNECTIONS.to_string()),
        ("MAILER__SMTP__COMMAND_TIMEOUT_MS", "5000".into()),
        ("MAILER__SMTP__MESSAGE_TIMEOUT_MS", "5000".into()),
        ("AMQP__PUBLISH_TWICE", publish_twice.to_string()),
    ];
    settings.into_iter().map(|(key, value)| (format!("MAILRUN_{key}").into(), value.into())).collect()
}

/// A loopback address that nobody uses, outside the range that the system gives to outgoing connections.
fn free_address() -> Option<SocketAddr> {
    let mut rng = rand::rng();
    std::iter::repeat_with(|| SocketAddr::from((Ipv4Addr::LOCALHOST, rng.random_range(PORTS))))
        .take(100)
        .find(|address| TcpListener::bind(address).is_ok())
}
