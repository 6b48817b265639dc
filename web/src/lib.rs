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
mod logins;
mod origin;
mod password;
mod people;
mod progress;
mod relay;
mod relay_stops;
mod report;
mod results;
mod runs;
mod sns;
mod suppressions;
mod test_sends;
mod text;
mod unsubscribe;
mod view;

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::Body,
    extract::{MatchedPath, State},
    http::{HeaderValue, Request, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{any, get, post},
};
use mailrun_shared::{
    broker::Broker,
    config::{Config, ConfigError, MailerKind, SuppressionsConfig, WebConfig},
    health::Health,
    lineage, metric,
    monitoring::{Monitoring, MonitoringError},
    server::{self, Limits},
    store,
};
use metrics::histogram;
use sqlx::PgPool;
use tokio::{
    net::TcpListener,
    sync::{Notify, OnceCell},
    time::sleep,
};
use tokio_util::sync::CancellationToken;
use tower_http::{set_header::SetResponseHeaderLayer, trace::TraceLayer};
use tracing::{Level, error, info, info_span};

use self::error::ErrorPage;
// For other pages with the same look and the same checks.
pub use origin::{is_local, is_same_origin};
pub use sns::SnsError;
pub use view::{grouped, rate};

/// The style of the pages.
pub const STYLE_SHEET: &str = include_str!("../static/style.css");
/// Their icon.
pub const ICON: &str = include_str!("../static/icon.svg");

/// A person waits for the page, so the wait for a database connection ends sooner than a worker's.
const ACQUIRE_TIMEOUT_MS: u64 = 5_000;
/// At the end, connections to RabbitMQ are closed within this time or left.
const CLOSE: Duration = Duration::from_secs(3);
/// Connections for what must not wait for the pages: the outbox relay, the epoch, and the health check.
const BACKGROUND_CONNECTIONS: u32 = 3;
/// Another installation's virtual host is looked at again after this time: it may have been taken over.
const FOREIGN_RETRY: Duration = Duration::from_secs(10);
/// Nothing but our own files, and nobody may frame a page.
const CONTENT_SECURITY_POLICY: &str = "default-src 'none'; style-src 'self'; script-src 'self'; \
     img-src 'self' data:; connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'";

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
    /// The memory for forms that are being read.
    room: body::Room,
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
    database.acquire_timeout_ms = database.acquire_timeout_ms.min(ACQUIRE_TIMEOUT_MS);
    let pool = store::open(&database, "mailrun web")?;
    database.max_connections = BACKGROUND_CONNECTIONS;
    let background = store::open(&database, "mailrun web outbox")?;
    let sns = sns::Verifier::new(&config.web)?;
    let address = config.web.listen;
    let not_listening = |source| WebError::Listen { address, source };
    let listener = TcpListener::bind(address).await.map_err(not_listening)?;
    // Port 0 is only known by now.
    info!(address = %listener.local_addr().map_err(not_listening)?, login = config.web.password.is_some(), "serving the pages");

    let outbox = Arc::new(Notify::new());
    let broker = Broker::with_health(&config, "mailrun web", health.clone());
    let publisher = broker.publisher(1);
    // Whoever of the two ends first takes the other along.
    let ending = stop.child_token();
    let limit = database.answer_timeout();
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
        header: Duration::from_millis(config.web.header_timeout_ms),
        age: Duration::from_millis(config.web.connection_age_ms),
    };
    let room = body::Room::new(config.web.max_body_bytes);
    let app = Arc::new(App {
        pool: pool.clone(),
        background: background.clone(),
        answers: health::Answers::new(),
        health: health.clone(),
        config: config.web,
        outbox,
        logins: logins::Logins::new(),
        in_doubt: form::nothing_in_doubt(),
        room,
        watched: progress::watched(),
        ids: OnceCell::new(),
        sns,
        simulated: config.mailer.kind == MailerKind::Simulated,
        dead_after: Duration::from_millis(config.heartbeat.dead_after_ms),
        suppressions: config.suppressions,
        answer_timeout: limit,
    });
    let tell = async {
        ending.cancelled().await;
        health.stopping();
    };
    tokio::join!(server::serve(listener, router(app), limits, &ending), tell);
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

fn router(app: Arc<App>) -> Router {
    let header = |name, value| SetResponseHeaderLayer::overriding(name, HeaderValue::from_static(value));
    Router::new()
        .route("/", get(form::show))
        .route("/invites", post(form::submit).get(form::back_to_form))
        .route("/invites/count", post(count::count).get(form::back_to_form))
        .route("/runs", get(runs::show))
        .route("/runs/{id}", get(results::show))
        .route("/runs/{id}/progress", get(progress::show))
        .route("/runs/{id}/actions", get(results::actions))
        .route("/runs/{id}/troubles", get(results::troubles))
        .route("/runs/{id}/retry", post(actions::retry).get(actions::back_to_run))
        .route("/runs/{id}/pause", post(actions::pause).get(actions::back_to_run))
        .route("/runs/{id}/resume", post(actions::resume).get(actions::back_to_run))
        .route("/runs/{id}/cancel", post(actions::cancel).get(actions::back_to_run))
        .route("/tests", post(test_sends::ask).get(form::back_to_form))
        .route("/tests/{id}", get(test_sends::show))
        .route("/suppressions", get(suppressions::show).post(suppressions::add))
        .route("/suppressions/remove", post(suppressions::remove_since).get(suppressions::back_to_list))
        .route("/suppressions/held/{run_id}", post(suppressions::decide).get(suppressions::back_to_list))
        .route("/relay", get(relay_stops::show))
        .route("/relay/{number}", post(relay_stops::answer).get(relay_stops::back))
        .route("/suppressions/{number}/remove", post(suppressions::remove).get(suppressions::back_to_list))
        .route("/people/erase", post(people::erase).get(suppressions::back_to_list))
        // With whatever a mail program took for a part of the link.
        .route("/u/{*token}", get(unsubscribe::show).post(unsubscribe::unsubscribe))
        // Without a key there is no such page, however it is asked for.
        .route("/hooks/bounces", any(hooks::bounces))
        .route("/static/{name}", get(assets::show))
        .route("/healthz", get(health::show))
        .route("/livez", get(health::live))
        .route("/readyz", get(health::ready))
        .fallback(error::not_found)
        .method_not_allowed_fallback(error::method_not_allowed)
        .layer(middleware::from_fn_with_state(Arc::clone(&app), in_time))
        .layer(middleware::from_fn_with_state(Arc::clone(&app), guard::check))
        .layer(header(header::CONTENT_SECURITY_POLICY, CONTENT_SECURITY_POLICY))
        .layer(header(header::X_CONTENT_TYPE_OPTIONS, "nosniff"))
        .layer(header(header::REFERRER_POLICY, "same-origin"))
        .layer(middleware::from_fn(measured))
        // What goes wrong is logged where it is known, so the trace adds only the request it happened in.
        .layer(
            TraceLayer::new_for_http()
                .make_span_with(|request: &Request<_>| {
                    info_span!("request", method = %request.method(), path = logged(request.uri().path()))
                })
                .on_response(tower_http::trace::DefaultOnResponse::new().level(Level::DEBUG))
                .on_failure(()),
        )
        .with_state(app)
}

/// A path without what only the recipient of a mail should know.
fn logged(path: &str) -> &str {
    if path.starts_with("/u/") { "/u/…" } else { path }
}

/// What is sent here may take long to arrive, so it sees to that by itself.
const LONG: [&str; 5] = ["/invites", "/invites/count", "/tests", "/hooks/bounces", "/people/erase"];

/// Counts requests, with how long they took. Those that no route is for are one.
async fn measured(request: Request<Body>, next: Next) -> Response {
    let route = request.extensions().get::<MatchedPath>().map_or("none", MatchedPath::as_str).to_owned();
    let begun = Instant::now();
    let response = next.run(request).await;
    let status = response.status().as_u16().to_string();
    histogram!(metric::REQUEST_SECONDS, "route" => route, "status" => status).record(begun.elapsed());
    response
}

/// Answers in time, whatever became of the database: a connection to it that is cut off says nothing.
async fn in_time(State(app): Shared, request: Request<Body>, next: Next) -> Response {
    if LONG.contains(&request.uri().path()) {
        return next.run(request).await;
    }
    let answer = store::in_time(app.answer_timeout, async { Ok::<_, sqlx::Error>(next.run(request).await) });
    answer.await.unwrap_or_else(|error| ErrorPage::from_database(&error).into_response())
}
