//! Settings: read once in `main` from defaults, `mailrun.toml` and the environment, then passed down as typed values.
//!
//! Keys contain their unit, unknown keys are refused, and secrets are redacted when settings are printed.

mod access;
mod relay;
mod smtp;

use std::{
    collections::{BTreeSet, HashMap},
    ffi::OsString,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use config::{Environment, File, FileFormat};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;

use mailrun_broker::Broker;
use mailrun_core::{
    agreement::Agreement,
    health::Health,
    public_url::PublicUrl,
    setting::{DAY, ms},
};

pub use mailrun_broker::settings::AmqpConfig;
pub use mailrun_core::{outcome::OnUnknown, setting::InvalidSetting};
pub use mailrun_ledger::settings::{DatabaseConfig, RolesConfig, SuppressionsConfig, Writer};

pub use access::Proxy;
pub use relay::{Login, Mechanism, Password, Relay, RelayTls};
pub use smtp::{BreakerConfig, DkimConfig, MailerKind, Sender, SmtpConfig};

/// All settings.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// PostgreSQL.
    pub database: DatabaseConfig,
    /// RabbitMQ.
    pub amqp: AmqpConfig,
    /// The pages.
    pub web: WebConfig,
    /// The fan-out.
    pub fan_out: FanOutConfig,
    /// The senders.
    pub send: SendConfig,
    /// Retries after a temporary failure.
    pub retry: RetryConfig,
    /// The progress workers.
    pub progress: ProgressConfig,
    /// The sweeper, which repairs stalled runs.
    pub sweep: SweepConfig,
    /// The watchdog, which replaces consumers that receive nothing.
    pub watchdog: WatchdogConfig,
    /// How long runs are kept.
    pub retention: RetentionConfig,
    /// How workers detect that another one has died.
    pub heartbeat: HeartbeatConfig,
    /// The mailer.
    pub mailer: MailerConfig,
    /// When the suppressions of a run are held for a person.
    pub suppressions: SuppressionsConfig,
    /// The monitoring endpoints.
    pub metrics: MetricsConfig,
    /// Logging.
    pub log: LogConfig,
    /// Which servers are configured explicitly.
    #[serde(skip)]
    pub named: Named,
    /// Removed settings that were found. They have no effect.
    #[serde(skip)]
    pub ignored: Vec<&'static str>,
}

/// Which servers are configured explicitly, in the file or in the environment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Named {
    /// `database.url`, or `DATABASE_URL`.
    pub database: bool,
    /// `amqp.urls`, or `AMQP_URL`.
    pub broker: bool,
}

/// `[web]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WebConfig {
    /// The address to listen on. If others can reach it, a password is required.
    pub listen: SocketAddr,
    /// The password for the pages (any user name). None: no login, only allowed on loopback.
    pub password: Option<SecretString>,
    /// The maximum size of a request body.
    pub max_body_bytes: usize,
    /// The maximum number of addresses in one run.
    pub max_addresses: usize,
    /// The default subject of invitations.
    pub subject: String,
    /// The default text of invitations.
    pub body: String,
    /// The public address of the pages, for links in mails. None: mails contain no unsubscribe link.
    pub public_url: Option<PublicUrl>,
    /// Reverse proxies in front of the pages. Their forwarding headers are trusted for a request's client, host, port and scheme;
    /// those from any other address are ignored.
    pub trusted_proxies: Vec<Proxy>,
    /// The maximum number of connections. Others wait.
    pub max_connections: usize,
    /// The time limit for a request head, counted from the start of the connection or from the previous response. So it also limits
    /// idle time.
    #[serde(rename = "header_timeout_ms", with = "ms")]
    pub header_timeout: Duration,
    /// A connection older than this closes after the current request.
    #[serde(rename = "connection_age_ms", with = "ms")]
    pub connection_age: Duration,
    /// The secret with which mail providers report bounces and complaints. None: reports are refused.
    pub hook_key: Option<SecretString>,
    /// The ARNs of the Amazon SNS topics whose messages are accepted.
    pub sns_topics: Vec<String>,
    /// Files with the signing certificates of Amazon SNS. None: they are fetched from Amazon and verified against the trusted
    /// authorities.
    pub sns_certificates: Vec<PathBuf>,
}

impl Default for WebConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 8080)),
            password: None,
            max_body_bytes: 64 * 1024 * 1024,
            max_addresses: 1_000_000,
            subject: "You are invited!".into(),
            body: "Join us. We have cake.".into(),
            public_url: None,
            trusted_proxies: Vec::new(),
            max_connections: 512,
            header_timeout: Duration::from_millis(20_000),
            connection_age: Duration::from_millis(300_000),
            hook_key: None,
            sns_topics: Vec::new(),
            sns_certificates: Vec::new(),
        }
    }
}

/// `[fan_out]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FanOutConfig {
    /// The window of a run in time: at most what it gets through in this time may be released and not yet tried. It is the delay of
    /// a pause, and the time for which a small run waits behind a large one.
    #[serde(rename = "window_ms", with = "ms")]
    pub window: Duration,
    /// The maximum window of a run in items. It bounds the item queues.
    pub window_items: i32,
    /// While this many items of a run are deferred, no more of its items are released. It bounds the retry queues.
    pub deferred_items: i32,
    /// The number of items that one step releases.
    pub chunk_items: i32,
    /// The maximum rate of all runs and processes together, in emails per second. None: no limit.
    pub sends_per_second: Option<i32>,
    /// How late a send may be under a rate limit. A later one gets a new send time, so that delayed mails do not go out in one
    /// burst.
    #[serde(rename = "rate_burst_ms", with = "ms")]
    pub rate_burst: Duration,
}

impl Default for FanOutConfig {
    fn default() -> Self {
        Self {
            window: Duration::from_millis(500),
            window_items: 10_000,
            deferred_items: 20_000,
            chunk_items: 5_000,
            sends_per_second: None,
            rate_burst: Duration::from_millis(200),
        }
    }
}

/// `[send]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SendConfig {
    /// The maximum number of attempts that a process has claimed and not finished. With SMTP it claims fewer: what its
    /// connections need. A worker that is killed leaves at most this many invitations in the state `unknown`.
    pub permits: usize,
    /// The prefetch of the item consumers.
    pub prefetch: u16,
    /// The maximum number of results in one message.
    pub result_batch: usize,
    /// Whether an attempt with an unknown outcome waits for a person, or is sent again.
    pub on_unknown: OnUnknown,
    /// How long a shutdown waits for sends in progress.
    #[serde(rename = "shutdown_deadline_ms", with = "ms")]
    pub shutdown_deadline: Duration,
}

impl Default for SendConfig {
    fn default() -> Self {
        Self {
            permits: 200,
            prefetch: 400,
            result_batch: 200,
            on_unknown: OnUnknown::Hold,
            shutdown_deadline: Duration::from_millis(30_000),
        }
    }
}

/// `[retry]`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RetryConfig {
    /// The retry schedule: how long an item waits before its second, third, … try. After the last one it becomes a dead letter.
    /// None: the mailer's default.
    pub rungs_ms: Option<Vec<u64>>,
}

/// `[progress]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ProgressConfig {
    /// The maximum number of result messages that are counted in one transaction.
    pub batch_messages: usize,
}

impl Default for ProgressConfig {
    fn default() -> Self {
        Self { batch_messages: 50 }
    }
}

/// `[sweep]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SweepConfig {
    /// The interval between two sweeps.
    #[serde(rename = "interval_ms", with = "ms")]
    pub interval: Duration,
    /// A run whose counters have not changed for this long is considered stalled.
    #[serde(rename = "stalled_after_ms", with = "ms")]
    pub stalled_after: Duration,
}

impl Default for SweepConfig {
    fn default() -> Self {
        Self { interval: Duration::from_millis(2_000), stalled_after: Duration::from_millis(15_000) }
    }
}

/// `[watchdog]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WatchdogConfig {
    /// A consumer that receives nothing for this long, although messages are ready, gets a new connection.
    #[serde(rename = "idle_after_ms", with = "ms")]
    pub idle_after: Duration,
}

impl Default for WatchdogConfig {
    fn default() -> Self {
        Self { idle_after: Duration::from_millis(10_000) }
    }
}

/// `[retention]`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RetentionConfig {
    /// Runs are deleted this many days after they are over; 0: never.
    pub keep_days: u32,
}

impl RetentionConfig {
    /// How long runs are kept. None: for ever.
    #[must_use]
    pub fn keep(&self) -> Option<Duration> {
        (self.keep_days > 0).then(|| DAY * self.keep_days)
    }
}

/// `[heartbeat]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HeartbeatConfig {
    /// The heartbeat interval of a worker.
    #[serde(rename = "interval_ms", with = "ms")]
    pub interval: Duration,
    /// A worker without a heartbeat for this long is considered dead, by the others and by itself.
    #[serde(rename = "dead_after_ms", with = "ms")]
    pub dead_after: Duration,
}

impl Default for HeartbeatConfig {
    fn default() -> Self {
        Self { interval: Duration::from_millis(1_000), dead_after: Duration::from_millis(8_000) }
    }
}

/// `[mailer]`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MailerConfig {
    /// Which mailer is used.
    pub kind: MailerKind,
    /// The simulated mailer.
    pub simulated: SimulatedConfig,
    /// The SMTP mailer.
    pub smtp: SmtpConfig,
}

/// `[mailer.simulated]`: no mail leaves the machine. Which sends fail depends only on these numbers.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SimulatedConfig {
    /// The duration of each send.
    #[serde(rename = "latency_ms", with = "ms")]
    pub latency: Duration,
    /// Every Nth email of a run fails with *Internet Down* until it is replayed; 0 disables.
    pub down_every: i32,
    /// The first try of every Nth email of a run fails, and the next one succeeds; 0 disables.
    pub flaky_every: i32,
    /// A file that receives the Message-ID of each email handed over, one per line; for tests.
    pub journal: Option<PathBuf>,
}

impl Default for SimulatedConfig {
    fn default() -> Self {
        Self { latency: Duration::from_millis(0), down_every: 100, flaky_every: 150, journal: None }
    }
}

/// `[metrics]`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MetricsConfig {
    /// The address of `/metrics`, `/livez` and `/readyz`. None: they are disabled. Port 0 selects a free port, which is logged.
    pub listen: Option<SocketAddr>,
}

/// `[log]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// What to log, in the syntax of `RUST_LOG`, which overrides it.
    pub filter: String,
    /// Writes one JSON object per line, for machines.
    pub json: bool,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { filter: "info,sqlx=warn,lapin=warn".into(), json: false }
    }
}

/// Why the settings can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Unreadable, of the wrong type, or an unknown key.
    #[error("can't read the settings: {}", without_lines_of_the_file(.0))]
    Read(#[from] config::ConfigError),
    /// Well-formed, but invalid.
    #[error(transparent)]
    Value(#[from] InvalidSetting),
}

/// Removes a key such as `send.claim_batch` from a table. Returns false if the table does not contain it.
fn take(table: &mut config::Map<String, config::Value>, key: &str) -> bool {
    match key.split_once('.') {
        None => table.remove(key).is_some(),
        Some((section, rest)) => match table.get_mut(section).map(|section| &mut section.kind) {
            Some(config::ValueKind::Table(section)) => take(section, rest),
            _ => false,
        },
    }
}

/// Removes the quoted lines of the file from a syntax error, since they may contain a password.
fn without_lines_of_the_file(error: &config::ConfigError) -> String {
    let text = error.to_string();
    let lines = text.lines().filter(|line| {
        !line.trim_start().trim_start_matches(|digit: char| digit.is_ascii_digit()).trim_start().starts_with('|')
    });
    lines.collect::<Vec<_>>().join("; ")
}

/// The key allows its holder to suppress addresses, so it must not be guessable.
const MIN_HOOK_KEY_BYTES: usize = 16;
/// The prefix of environment variables: `MAILRUN_SEND__PERMITS=10` is `permits` in `[send]`.
const PREFIX: &str = "MAILRUN_";

/// Settings of earlier versions. For one release they are ignored with a warning, so that a process still starts after an upgrade.
const REMOVED: [&str; 8] = [
    "amqp.publish_twice",
    "database.acquire_timeout_ms",
    "retention.interval_s",
    "retry.in_process_first_ms",
    "retry.in_process_tries",
    "send.claim_batch",
    "sweep.batch_items",
    "watchdog.stuck_after_ms",
];

/// Variables whose values are lists, separated by commas.
const LISTS: [&str; 6] = [
    "MAILRUN_AMQP__URLS",
    "MAILRUN_RETRY__RUNGS_MS",
    "MAILRUN_MAILER__SMTP__RELAYS",
    "MAILRUN_WEB__SNS_TOPICS",
    "MAILRUN_WEB__SNS_CERTIFICATES",
    "MAILRUN_WEB__TRUSTED_PROXIES",
];

impl Config {
    /// Reads the settings: defaults, then `file` or `mailrun.toml` in the working directory, then the environment.
    ///
    /// # Errors
    /// The first invalid setting, with its key.
    pub fn load(file: Option<&Path>) -> Result<Self, ConfigError> {
        // Unrelated variables may not be UTF-8.
        let text = |text: OsString| text.to_string_lossy().into_owned();
        Self::read(file, std::env::vars_os().map(|(key, value)| (text(key), text(value))).collect())
    }

    fn read(file: Option<&Path>, environment: HashMap<String, String>) -> Result<Self, ConfigError> {
        let file = match file {
            Some(path) => File::from(path).required(true),
            None => File::new("mailrun.toml", FileFormat::Toml).required(false),
        };
        let nonempty = |key: &str| environment.get(key).filter(|value| !value.is_empty()).cloned();
        let database_url = nonempty("DATABASE_URL");
        let amqp_urls = nonempty("AMQP_URL").or_else(|| nonempty("MAILRUN_AMQP__URLS"));
        let rungs = nonempty("MAILRUN_RETRY__RUNGS_MS");
        let relays = nonempty("MAILRUN_MAILER__SMTP__RELAYS");
        let topics = nonempty("MAILRUN_WEB__SNS_TOPICS");
        let certificates = nonempty("MAILRUN_WEB__SNS_CERTIFICATES");
        let proxies = nonempty("MAILRUN_WEB__TRUSTED_PROXIES");
        // Only names with a section are settings: not MAILRUN_HOME and MAILRUN_CONFIG.
        let ours = environment
            .into_iter()
            .filter(|(key, _)| key.strip_prefix(PREFIX).is_some_and(|key| key.contains("__")))
            // Lists are read above; an empty one is ignored.
            .filter(|(key, _)| !LISTS.contains(&key.as_str()))
            .collect();
        // Values stay text until their key's type parses them, so that a password of digits is not read as a number.
        let environment = Environment::with_prefix("MAILRUN").prefix_separator("_").separator("__").source(Some(ours));
        let mut builder = config::Config::builder().add_source(file).add_source(environment);
        if let Some(url) = database_url {
            builder = builder.set_override("database.url", url)?;
        }
        for (key, list) in [
            ("amqp.urls", amqp_urls),
            ("retry.rungs_ms", rungs),
            ("mailer.smtp.relays", relays),
            ("web.sns_topics", topics),
            ("web.sns_certificates", certificates),
            ("web.trusted_proxies", proxies),
        ] {
            if let Some(list) = list {
                builder = builder.set_override(key, list.split(',').map(str::trim).collect::<Vec<_>>())?;
            }
        }
        let settings = builder.build()?;
        let named = |key| settings.get::<config::Value>(key).is_ok();
        let named = Named { database: named("database.url"), broker: named("amqp.urls") };
        let mut table = settings.cache.into_table()?;
        let ignored = REMOVED.into_iter().filter(|key| take(&mut table, key)).collect();
        let known: Self = config::Value::new(None, config::ValueKind::Table(table)).try_deserialize()?;
        let config = Self { named, ignored, ..known };
        config.check()?;
        Ok(config)
    }

    /// RabbitMQ as configured. `name` is the connection name in the management console.
    #[must_use]
    pub fn broker(&self, name: impl Into<String>) -> Arc<Broker> {
        Broker::new(&self.amqp, self.all_rungs(), name)
    }

    /// The same, for a process that exposes its health.
    #[must_use]
    pub fn broker_with_health(&self, name: impl Into<String>, health: Health) -> Arc<Broker> {
        Broker::with_health(&self.amqp, self.all_rungs(), name, health)
    }

    /// The domain of every `Message-ID`. It must be a real domain, since mail servers distrust others.
    #[must_use]
    pub fn message_id_domain(&self) -> String {
        match self.mailer.kind {
            MailerKind::Simulated => "mailrun".to_owned(),
            MailerKind::Smtp => self.mailer.smtp.from.domain(),
        }
    }

    /// How many mails a process sends at the same time. `None`: as many as there are permits.
    #[must_use]
    pub fn connections(&self) -> Option<usize> {
        match self.mailer.kind {
            MailerKind::Simulated => None,
            MailerKind::Smtp => Some(self.mailer.smtp.connections),
        }
    }

    /// How many attempts a process has in progress unless it is very fast: with SMTP, one on each connection and the next one.
    #[must_use]
    pub fn usual_attempts(&self) -> usize {
        self.connections().map_or(self.send.permits, |connections| (2 * connections).min(self.send.permits))
    }

    /// The retry schedule: how long an item waits before its second, third, … try. By default minutes to hours with SMTP, since a
    /// deferring relay expects that, and seconds with the simulated mailer.
    #[must_use]
    pub fn rungs(&self) -> Vec<Duration> {
        let suits = self.mailer.kind.rungs_ms();
        self.retry.rungs_ms.as_deref().unwrap_or(suits).iter().copied().map(Duration::from_millis).collect()
    }

    /// The settings that must be the same in every worker.
    #[must_use]
    pub fn agreement(&self) -> Agreement {
        let ms = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        Agreement {
            retry_delays_ms: self.rungs().into_iter().map(ms).collect(),
            heartbeat_interval_ms: ms(self.heartbeat.interval),
            dead_after_ms: ms(self.heartbeat.dead_after),
            sends_per_second: self.fan_out.sends_per_second,
            item_queues: self.amqp.item_queues,
            jobs: None,
        }
    }

    /// The retry delays of all mailers and of the settings. Each needs a queue, since the process that declares the queues may not
    /// know which mailer the senders use.
    #[must_use]
    pub fn all_rungs(&self) -> Vec<Duration> {
        let all = MailerKind::ALL.into_iter().flat_map(MailerKind::rungs_ms).copied().map(Duration::from_millis);
        all.chain(self.rungs()).collect::<BTreeSet<_>>().into_iter().collect()
    }

    fn check(&self) -> Result<(), ConfigError> {
        let wrong = |key, reason: &str| Err(InvalidSetting::new(key, reason).into());
        self.database.check()?;
        self.amqp.check()?;
        self.web.check_password()?;
        if !(1..=100_000).contains(&self.web.max_connections)
            || self.web.header_timeout.is_zero()
            || self.web.connection_age.is_zero()
        {
            return wrong(
                "web",
                "max_connections is from 1 to 100000, header_timeout_ms and connection_age_ms at least 1",
            );
        }
        if self.web.sns_topics.iter().any(|topic| !topic.starts_with("arn:") || !topic.contains(":sns:")) {
            return wrong("web.sns_topics", "each must look like arn:aws:sns:eu-west-1:123456789012:bounces");
        }
        if self.web.hook_key.as_ref().is_some_and(|key| key.expose_secret().len() < MIN_HOOK_KEY_BYTES) {
            return wrong("web.hook_key", "at least 16 characters, for instance from `openssl rand -hex 24`");
        }
        if !(1..=1_000).contains(&self.send.permits) {
            return wrong("send.permits", "from 1 to 1000");
        }
        if self.send.prefetch == 0 || self.send.prefetch > 2_000 {
            return wrong("send.prefetch", "from 1 to 2000, the maximum of a quorum queue");
        }
        if self.send.result_batch == 0 || self.progress.batch_messages == 0 {
            return wrong("send.result_batch, progress.batch_messages", "at least 1");
        }
        if !(1..=5_000).contains(&self.fan_out.chunk_items)
            || self.fan_out.window_items < 1
            || self.fan_out.deferred_items < 1
        {
            return wrong("fan_out", "chunk_items is from 1 to 5000, window_items and deferred_items at least 1");
        }
        if self.fan_out.sends_per_second.is_some_and(|limit| limit < 1) {
            return wrong("fan_out.sends_per_second", "at least 1; leave it out for no limit");
        }
        if self.heartbeat.interval.is_zero() || self.heartbeat.dead_after < self.heartbeat.interval.saturating_mul(3) {
            return wrong(
                "heartbeat.dead_after_ms",
                "at least three times interval_ms, so that a worker survives a lost heartbeat",
            );
        }
        if self.sweep.interval.is_zero() {
            return wrong("sweep.interval_ms", "at least 1");
        }
        if !(100..=600_000).contains(&self.watchdog.idle_after.as_millis()) {
            return wrong("watchdog.idle_after_ms", "from 100 to 600000");
        }
        let rungs = self.rungs();
        if !(1..=20).contains(&rungs.len()) || rungs.contains(&Duration::ZERO) {
            return wrong("retry.rungs_ms", "1 to 20 delays of at least 1 ms each");
        }
        self.mailer.smtp.check(self.mailer.kind)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(environment: &[(&str, &str)]) -> Result<Config, ConfigError> {
        let environment = environment.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        Config::read(None, environment)
    }

    #[test]
    fn the_defaults_are_valid() {
        read(&[]).unwrap();
    }

    #[test]
    fn the_environment_sets_any_key() {
        let config = read(&[
            ("MAILRUN_SEND__PERMITS", "7"),
            ("MAILRUN_RETRY__RUNGS_MS", "5,10"),
            ("MAILRUN_MAILER__SIMULATED__LATENCY_MS", "3"),
            ("MAILRUN_HOME", "/somewhere"),
            ("AMQP_URL", "amqps://a, amqps://b"),
            ("DATABASE_URL", "postgres://x"),
        ])
        .unwrap();
        assert_eq!(config.send.permits, 7);
        assert_eq!(config.rungs(), [5, 10].map(Duration::from_millis));
        assert_eq!(config.mailer.simulated.latency, Duration::from_millis(3));
        assert_eq!(config.amqp.urls.len(), 2);
        assert_eq!(config.amqp.urls[1].expose_secret(), "amqps://b");
    }

    #[test]
    fn a_removed_setting_is_ignored_and_reported() {
        let config = read(&[("MAILRUN_SEND__CLAIM_BATCH", "9"), ("MAILRUN_AMQP__PUBLISH_TWICE", "true")]).unwrap();
        assert_eq!(config.ignored, ["amqp.publish_twice", "send.claim_batch"]);
        assert!(read(&[("MAILRUN_SEND__CLAIM_BATCHES", "9")]).is_err(), "unknown settings are refused");
    }

    #[test]
    fn the_environment_or_the_file_names_servers() {
        assert_eq!(read(&[]).unwrap().named, Named::default());
        assert_eq!(read(&[("AMQP_URL", "amqps://a")]).unwrap().named, Named { database: false, broker: true });
        let file = tempfile::Builder::new().suffix(".toml").tempfile().unwrap();
        std::fs::write(&file, "[database]\nurl = 'postgres://x'\n").unwrap();
        let config = Config::read(Some(file.path()), HashMap::new()).unwrap();
        assert_eq!(config.named, Named { database: true, broker: false });
    }

    #[test]
    fn a_numeric_password_keeps_its_leading_zero() {
        let config = read(&[("MAILRUN_WEB__PASSWORD", "01234567")]).unwrap();
        assert_eq!(config.web.password.unwrap().expose_secret(), "01234567");
    }

    #[test]
    fn the_environment_sets_flags_and_lists() {
        let config =
            read(&[("MAILRUN_AMQP__ALLOW_PLAINTEXT", "true"), ("MAILRUN_AMQP__URLS", "amqps://a,amqps://b")]).unwrap();
        assert!(config.amqp.allow_plaintext);
        assert_eq!(config.amqp.urls.len(), 2);
    }

    #[test]
    fn sns_topics_must_be_arns() {
        let topics = |topics: &str| read(&[("MAILRUN_WEB__SNS_TOPICS", topics)]).map(|config| config.web.sns_topics);
        let arns = ["arn:aws:sns:eu-west-1:123456789012:bounces", "arn:aws-cn:sns:cn-north-1:123456789012:x"];
        assert_eq!(topics(&arns.join(", ")).unwrap(), arns);
        assert_eq!(topics("").unwrap(), [""; 0]);
        assert!(topics("bounces").unwrap_err().to_string().contains("web.sns_topics"));
    }

    #[test]
    fn unknown_keys_are_refused() {
        assert!(read(&[("MAILRUN_SEND__PERMITZ", "7")]).unwrap_err().to_string().contains("permitz"));
    }

    #[test]
    fn an_address_that_others_can_reach_needs_a_password() {
        let error = read(&[("MAILRUN_WEB__LISTEN", "0.0.0.0:80")]).unwrap_err().to_string();
        assert!(error.contains("web.password"), "{error}");
        read(&[("MAILRUN_WEB__LISTEN", "0.0.0.0:80"), ("MAILRUN_WEB__PASSWORD", "let me in")]).unwrap();
    }

    #[test]
    fn message_ids_use_the_senders_domain_in_ascii() {
        let domain = |settings: &[(&str, &str)]| read(settings).unwrap().message_id_domain();
        assert_eq!(domain(&[]), "mailrun");
        let smtp = [("MAILRUN_MAILER__KIND", "smtp"), ("MAILRUN_MAILER__SMTP__RELAYS", "smtp://localhost?tls=none")];
        let from = ("MAILRUN_MAILER__SMTP__FROM", "Zoë <zoe@müller.example>");
        assert_eq!(domain(&[smtp[0], smtp[1], from]), "xn--mller-kva.example");
    }

    #[test]
    fn smtp_needs_a_relay_and_a_sender() {
        let smtp = ("MAILRUN_MAILER__KIND", "smtp");
        let relays = |urls| ("MAILRUN_MAILER__SMTP__RELAYS", urls);
        let why = |settings: &[_]| read(settings).unwrap_err().to_string();
        assert!(why(&[smtp]).contains("mailer.smtp.relays"));
        let config = read(&[
            smtp,
            relays("smtp://u:p@a, smtps://u:p@b"),
            ("MAILRUN_MAILER__SMTP__FROM", "Ann's List <ann@example.org>"),
            ("MAILRUN_MAILER__SMTP__DKIM__DOMAIN", "example.org"),
            ("MAILRUN_MAILER__SMTP__DKIM__SELECTOR", "s"),
            ("MAILRUN_MAILER__SMTP__DKIM__KEY_FILE", "/k"),
        ])
        .unwrap()
        .mailer;
        assert_eq!((config.kind, config.smtp.relays().unwrap().len()), (MailerKind::Smtp, 2));
        assert_eq!(config.smtp.from.to_string(), "Ann's List <ann@example.org>");
        assert_eq!(config.smtp.dkim.unwrap().selector, "s");
        let broken = why(&[relays("smtp://u:p@a,smtp://u:hunter2@b?tls=no")]);
        assert!(broken.contains("relay 2") && !broken.contains("hunter2"), "{broken}");
        assert!(why(&[relays("smtp://b?tls=none")]).contains("allow_plaintext"));
        read(&[relays("smtp://b?tls=none"), ("MAILRUN_MAILER__SMTP__ALLOW_PLAINTEXT", "true")]).unwrap();
        assert!(why(&[("MAILRUN_MAILER__SMTP__FROM", "nobody")]).contains("is not a sender"));
        assert!(why(&[("MAILRUN_MAILER__SMTP__RELAY", "x")]).contains("relay"));
    }

    #[test]
    fn the_public_address_is_checked() {
        let config = read(&[("MAILRUN_WEB__PUBLIC_URL", "https://invites.example.org/")]).unwrap();
        assert_eq!(config.web.public_url.unwrap().to_string(), "https://invites.example.org");
        let error = read(&[("MAILRUN_WEB__PUBLIC_URL", "invites.example.org")]).unwrap_err().to_string();
        assert!(error.contains("public_url") && error.contains("https://"), "{error}");
        assert!(read(&[("MAILRUN_WEB__HOOK_KEY", "short")]).is_err());
    }

    #[test]
    fn an_error_in_the_file_does_not_quote_its_line() {
        for content in [
            "[database]\nurl = \"postgres://u:hunter2@h\n",
            "[web]\npassword = hunter2\n",
            "[database]\nurl = [\"postgres://u:hunter2@h\"]\n",
            "[amqp]\nurls = { a = \"hunter2\" }\n",
            "[web]\npassword = { hunter2 = 1 }\n",
        ] {
            let file = tempfile::Builder::new().suffix(".toml").tempfile().unwrap();
            std::fs::write(&file, content).unwrap();
            let error = Config::read(Some(file.path()), HashMap::new()).unwrap_err().to_string();
            assert!(!error.contains("hunter2") || content.contains("{ hunter2"), "{error}");
        }
    }

    #[test]
    fn secrets_are_not_printed() {
        let config = read(&[
            ("DATABASE_URL", "postgres://u:hunter2@h/d"),
            ("AMQP_URL", "amqps://u:hunter2@h"),
            ("MAILRUN_MAILER__SMTP__RELAYS", "smtp://u:hunter2@h"),
        ])
        .unwrap();
        assert!(!format!("{config:?}").contains("hunter2"));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        #[test]
        fn any_settings_are_accepted_or_refused(
            settings in prop::collection::vec((prop::sample::select(&[
                "DATABASE_URL", "AMQP_URL", "MAILRUN_WEB__LISTEN", "MAILRUN_WEB__PUBLIC_URL", "MAILRUN_WEB__PASSWORD", "MAILRUN_WEB__MAX_BODY_BYTES",
                "MAILRUN_SEND__PERMITS", "MAILRUN_SEND__PREFETCH", "MAILRUN_RETRY__RUNGS_MS", "MAILRUN_HEARTBEAT__INTERVAL_MS",
                "MAILRUN_HEARTBEAT__DEAD_AFTER_MS", "MAILRUN_FAN_OUT__SENDS_PER_SECOND", "MAILRUN_AMQP__ITEM_QUEUES", "MAILRUN_MAILER__KIND",
                "MAILRUN_MAILER__SMTP__RELAYS", "MAILRUN_MAILER__SMTP__FROM", "MAILRUN_MAILER__SMTP__CONNECTIONS", "MAILRUN_NONE__SUCH",
            ][..]), prop_oneof![
                any::<i64>().prop_map(|number| number.to_string()), any::<u64>().prop_map(|number| number.to_string()),
                Just("smtp".to_owned()), Just("smtp://a@b:1?tls=none".to_owned()), Just("Ann <ann@example.org>".to_owned()), "\\PC{0,30}",
            ]), 0..6),
            toml in "(\\[[a-z_.]{1,12}\\]\n|[a-z_]{1,12} = ([0-9]{1,22}|\"\\PC{0,9}\"|\\[\\]|true)\n|\\PC{0,9}\n){0,4}",
        ) {
            let environment: HashMap<_, _> = settings.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
            let file = tempfile::Builder::new().suffix(".toml").tempfile().unwrap();
            std::fs::write(&file, toml).unwrap();
            for file in [None, Some(file.path())] {
                match Config::read(file, environment.clone()) {
                    Ok(config) => {
                        prop_assert!(config.usual_attempts() >= 1);
                        let _ = (config.rungs(), config.message_id_domain(), format!("{config:?}"));
                    }
                    Err(reason) => prop_assert!(!reason.to_string().is_empty()),
                }
            }
        }
    }
}
