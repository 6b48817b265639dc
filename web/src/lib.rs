//! The web server: accepts lists through the form, shows runs from the ledger, and publishes the outbox to RabbitMQ.

mod actions;
mod assets;
mod body;
mod client;
mod correlate;
mod count;
mod error;
mod form;
mod guard;
mod health;
mod hooks;
mod ids;
mod layers;
mod logins;
mod origin;
mod outbox;
mod password;
mod people;
mod problem;
mod progress;
mod relay_stops;
mod report;
mod results;
mod routes;
mod runs;
mod sns;
mod suppressions;
mod test_sends;
mod text;
mod unsubscribe;
mod view;

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use axum::extract::State;
use mailrun_app::{
    config::{Config, ConfigError, MailerKind, SuppressionsConfig, WebConfig},
    lineage,
    monitoring::{Monitoring, MonitoringError},
    server::{self, Limits},
};
use mailrun_broker::Broker;
use mailrun_core::health::Health;
use sqlx::PgPool;
use tokio::{
    net::TcpListener,
    sync::{Notify, OnceCell},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

// Exported for other pages with the same style and the same checks.
pub use origin::{is_local, is_same_origin};
pub use sns::SnsError;
pub use view::{grouped, rate};

/// The style sheet of the pages.
pub const STYLE_SHEET: &str = include_str!("../static/style.css");
/// The icon of the pages.
pub const ICON: &str = include_str!("../static/icon.svg");

/// People wait for a page, so acquiring a database connection times out sooner than in a worker.
const ACQUIRE_TIMEOUT: Duration = Duration::from_millis(5_000);
/// Time limits for closing the connections to RabbitMQ, and those to PostgreSQL, at shutdown.
const CLOSE: Duration = Duration::from_secs(3);
/// Connections reserved for the outbox publisher, the epoch and the health check, which must not wait for the pages.
const BACKGROUND_CONNECTIONS: u32 = 3;
/// How often a virtual host of another installation is checked again: it may be reassigned.
const FOREIGN_RETRY: Duration = Duration::from_secs(10);

/// Why the web server cannot start or has ended.
#[derive(Debug, thiserror::Error)]
pub enum WebError {
    /// The configuration would expose the pages.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The setting `database.url` is malformed.
    #[error("database.url is not a valid PostgreSQL URL: {0}")]
    Database(#[from] sqlx::Error),
    /// The address is in use, or does not belong to this machine.
    #[error(
        "cannot listen on {address}: {source}; stop the process that uses it, or set web.listen to another address"
    )]
    Listen {
        /// The setting `web.listen`.
        address: SocketAddr,
        /// The system's error.
        source: io::Error,
    },
    /// The monitoring endpoint cannot be started as configured.
    #[error(transparent)]
    Monitoring(#[from] MonitoringError),
    /// Amazon SNS messages cannot be verified as configured.
    #[error(transparent)]
    Sns(#[from] SnsError),
    /// A bug: the outbox publisher panicked.
    #[error("the outbox publisher ended unexpectedly: {0}")]
    Publisher(#[from] tokio::task::JoinError),
}

/// The state shared by all handlers.
struct App {
    pool: PgPool,
    /// Connections reserved for background work.
    background: PgPool,
    /// Cached results of health checks.
    health_check: health::CheckCache,
    /// Why this process is not ready.
    health: Health,
    config: WebConfig,
    /// Wakes the outbox publisher.
    outbox: Arc<Notify>,
    /// Recent failed logins.
    logins: logins::Logins,
    /// Submissions in progress, or with an unknown result.
    unconfirmed: form::Unconfirmed,
    /// The memory for uploads that are being read.
    form_memory: Arc<body::FormMemory>,
    /// Cached progress of the watched runs.
    watched: progress::Watched,
    /// Verifies our own ids; set on first use.
    ids: OnceCell<ids::Ids>,
    /// Verifies messages of Amazon SNS; none: no topic is configured.
    sns: Option<sns::Verifier>,
    /// Whether the mailer is simulated.
    simulated: bool,
    /// When the suppressions of a run are held for review.
    suppressions: SuppressionsConfig,
    /// Time limit for the database.
    answer_timeout: Duration,
}

type Shared = State<Arc<App>>;

impl App {
    fn new(
        config: Config,
        pool: PgPool,
        background: PgPool,
        health: Health,
        outbox: Arc<Notify>,
        sns: Option<sns::Verifier>,
    ) -> Self {
        Self {
            pool,
            background,
            health_check: health::CheckCache::new(),
            health,
            outbox,
            logins: logins::Logins::new(),
            unconfirmed: form::new_unconfirmed(),
            form_memory: Arc::new(body::FormMemory::new(config.web.max_body_bytes)),
            watched: progress::watched(),
            ids: OnceCell::new(),
            sns,
            simulated: config.mailer.kind == MailerKind::Simulated,
            suppressions: config.suppressions,
            answer_timeout: config.database.answer_timeout,
            config: config.web,
        }
    }
}

/// Serves the pages and publishes the outbox until `stop` is cancelled.
///
/// The schema must exist: `mailrun setup` creates it. PostgreSQL and RabbitMQ need not be available yet.
///
/// # Errors
/// The settings are invalid, or a part ended unexpectedly.
pub async fn run(config: Config, stop: CancellationToken) -> Result<(), WebError> {
    config.web.check_access()?;
    let health = Health::default();
    let monitoring = Monitoring::start(&config.metrics, "web", &health).await?;
    let mut database = config.database.clone();
    database.acquire_timeout = ACQUIRE_TIMEOUT;
    let pool = mailrun_ledger::open(&database, "mailrun web")?;
    database.max_connections = BACKGROUND_CONNECTIONS;
    let background = mailrun_ledger::open(&database, "mailrun web outbox")?;
    let sns = sns::Verifier::new(&config.web)?;
    let address = config.web.listen;
    let not_listening = |source| WebError::Listen { address, source };
    let listener = TcpListener::bind(address).await.map_err(not_listening)?;
    // The actual port, if the configured one is 0.
    info!(address = %listener.local_addr().map_err(not_listening)?, login = config.web.password.is_some(), "web server started");

    let outbox = Arc::new(Notify::new());
    let broker = config.broker_with_health("mailrun web", health.clone());
    let publisher = broker.publisher(1);
    // Whichever ends first stops the other.
    let ending = stop.child_token();
    let limit = database.answer_timeout;
    let publishing = tokio::spawn({
        let (pool, outbox, ending) = (background.clone(), Arc::clone(&outbox), ending.clone());
        let broker = Arc::clone(&broker);
        async move {
            let _guard = ending.clone().drop_guard();
            tokio::join!(
                outbox::run(&pool, limit, &publisher, broker.epoch(), &outbox, &ending),
                keep_lineage(&pool, &broker, limit, &ending),
            );
        }
    });
    let limits = Limits {
        connections: config.web.max_connections,
        header: config.web.header_timeout,
        age: config.web.connection_age,
    };
    let app = Arc::new(App::new(config, pool.clone(), background.clone(), health.clone(), outbox, sns));
    let tell = async {
        ending.cancelled().await;
        health.stopping();
    };
    tokio::join!(server::serve(listener, routes::router(app), limits, &ending), tell);
    publishing.await?;
    broker.closed(CLOSE).await;
    // Nothing is in progress any more: a PostgreSQL that does not answer must not delay the end.
    let _ = timeout(CLOSE, async { tokio::join!(pool.close(), background.close()) }).await;
    monitoring.stop().await;
    Ok(())
}

/// Checks that ledger and broker belong together. On a virtual host of another installation the pages stay available, and
/// accepted runs wait in the outbox.
async fn keep_lineage(pool: &PgPool, broker: &Arc<Broker>, limit: Duration, stop: &CancellationToken) {
    while let Err(foreign) = lineage::keep(pool, broker, limit, stop).await {
        error!("{foreign}. Nothing is published until this is resolved");
        if stop.run_until_cancelled(sleep(FOREIGN_RETRY)).await.is_none() {
            return;
        }
    }
}
