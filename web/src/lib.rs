//! The pages: takes lists in through the form, shows runs from the ledger, and hands what the outbox holds to RabbitMQ.

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
mod password;
mod people;
mod problem;
mod progress;
mod relay;
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
    time::sleep,
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

// For other pages with the same look and the same checks.
pub use origin::{is_local, is_same_origin};
pub use sns::SnsError;
pub use view::{grouped, rate};

/// The style of the pages.
pub const STYLE_SHEET: &str = include_str!("../static/style.css");
/// Their icon.
pub const ICON: &str = include_str!("../static/icon.svg");

/// A person waits for the page, so the wait for a database connection ends sooner than a worker's.
const ACQUIRE_TIMEOUT: Duration = Duration::from_millis(5_000);
/// At the end, connections to RabbitMQ are closed within this time or left.
const CLOSE: Duration = Duration::from_secs(3);
/// Connections for what must not wait for the pages: the outbox relay, the epoch, and the health check.
const BACKGROUND_CONNECTIONS: u32 = 3;
/// Another installation's virtual host is looked at again after this time: it may have been taken over.
const FOREIGN_RETRY: Duration = Duration::from_secs(10);

/// Why the pages can't be served.
#[derive(Debug, thiserror::Error)]
pub enum WebError {
    /// They would be open to others than they should.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The setting `database.url` is no address.
    #[error("database.url is no address of a PostgreSQL database: {0}")]
    Database(#[from] sqlx::Error),
    /// The address is taken, or not this machine's.
    #[error("can't listen on {address}: {source}; stop what is using it, or set web.listen to another address")]
    Listen {
        /// The setting `web.listen`.
        address: SocketAddr,
        /// What the system says.
        source: io::Error,
    },
    /// It can't be monitored as configured.
    #[error(transparent)]
    Monitoring(#[from] MonitoringError),
    /// Messages of Amazon SNS can't be verified as configured.
    #[error(transparent)]
    Sns(#[from] SnsError),
    /// A bug.
    #[error("the outbox relay ended unasked: {0}")]
    Relay(#[from] tokio::task::JoinError),
}

/// What every handler may use.
struct App {
    pool: PgPool,
    /// Connections that no page takes.
    background: PgPool,
    /// What health checks were answered lately.
    answers: health::Answers,
    /// What keeps this process from its work.
    health: Health,
    config: WebConfig,
    /// Wakes the relay when there is something new in the outbox.
    outbox: Arc<Notify>,
    /// Who has failed to log in lately.
    logins: logins::Logins,
    /// Submissions that are under way, or whose end is not known.
    in_doubt: form::InDoubt,
    /// The memory for uploads that are being read.
    room: Arc<body::Room>,
    /// What polls were answered lately.
    watched: progress::Watched,
    /// What ids of ours are verified with, once the ledger was read.
    ids: OnceCell<ids::Ids>,
    /// Verifies messages of Amazon SNS; none: no topic is configured.
    sns: Option<sns::Verifier>,
    /// Whether no mail leaves this machine.
    simulated: bool,
    /// When a worker is taken for dead.
    dead_after: Duration,
    /// How many suppressions of a run are unusual.
    suppressions: SuppressionsConfig,
    /// How long the database may take to answer.
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
            answers: health::Answers::new(),
            health,
            outbox,
            logins: logins::Logins::new(),
            in_doubt: form::nothing_in_doubt(),
            room: Arc::new(body::Room::new(config.web.max_body_bytes)),
            watched: progress::watched(),
            ids: OnceCell::new(),
            sns,
            simulated: config.mailer.kind == MailerKind::Simulated,
            dead_after: config.heartbeat.dead_after,
            suppressions: config.suppressions,
            answer_timeout: config.database.answer_timeout,
            config: config.web,
        }
    }
}

/// Serves the pages and runs the outbox relay until `stop` is cancelled.
///
/// The schema must be there already: `mailrun setup` makes it. Neither PostgreSQL nor RabbitMQ has to answer yet.
///
/// # Errors
/// When the settings can't be used, or serving ended by itself.
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
    // Port 0 is only known by now.
    info!(address = %listener.local_addr().map_err(not_listening)?, login = config.web.password.is_some(), "serving the pages");

    let outbox = Arc::new(Notify::new());
    let broker = config.broker_with_health("mailrun web", health.clone());
    let publisher = broker.publisher(1);
    // Whoever of the two ends first takes the other along.
    let ending = stop.child_token();
    let limit = database.answer_timeout;
    let relay = tokio::spawn({
        let (pool, outbox, ending) = (background.clone(), Arc::clone(&outbox), ending.clone());
        let broker = Arc::clone(&broker);
        async move {
            let _guard = ending.clone().drop_guard();
            tokio::join!(
                relay::run(&pool, limit, &publisher, broker.epoch(), &outbox, &ending),
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
    relay.await?;
    broker.closed(CLOSE).await;
    pool.close().await;
    background.close().await;
    monitoring.stop().await;
    Ok(())
}

/// Compares ledger and broker. On another installation's virtual host the pages stay, and what is accepted waits in the outbox.
async fn keep_lineage(pool: &PgPool, broker: &Arc<Broker>, limit: Duration, stop: &CancellationToken) {
    while let Err(foreign) = lineage::keep(pool, broker, limit, stop).await {
        error!("{foreign}. Nothing is published until then");
        if stop.run_until_cancelled(sleep(FOREIGN_RETRY)).await.is_none() {
            return;
        }
    }
}
