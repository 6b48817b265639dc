//! What a monitoring system asks of a process: `/metrics`, `/livez` and `/readyz`, on an address of their own.

use std::{io, net::SocketAddr, sync::OnceLock, time::Duration};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use metrics::gauge;
use metrics_exporter_prometheus::{BuildError, PrometheusBuilder, PrometheusHandle};
use tokio::{net::TcpListener, task::JoinHandle, time::interval};
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::{
    config::MetricsConfig,
    server::{self, Limits},
};
use mailrun_core::{health::Health, metric};

/// Few ask, and each asks little.
const LIMITS: Limits = Limits { connections: 16, header: Duration::from_secs(10), age: Duration::from_secs(300) };
/// Histograms are summed up so often, whether somebody reads them or not.
const UPKEEP: Duration = Duration::from_secs(5);
/// The version of Prometheus' text format.
const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// From a millisecond, which is a claim, to half a minute, which is a slow mail server.
const BUCKETS: [f64; 14] = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0];

static RECORDER: OnceLock<PrometheusHandle> = OnceLock::new();

/// Has everything recorded from now on, in the name of this process. What was asked for before is not recorded.
///
/// # Errors
/// None in practice: the buckets are not empty.
fn install(process: &str) -> Result<&'static PrometheusHandle, BuildError> {
    if let Some(handle) = RECORDER.get() {
        return Ok(handle);
    }
    let recorder = PrometheusBuilder::new().set_buckets(&BUCKETS)?.build_recorder();
    let handle = RECORDER.get_or_init(|| recorder.handle());
    // Otherwise there is one already, which is the one that is read.
    let _ = metrics::set_global_recorder(recorder);
    metric::describe();
    gauge!(metric::INFO, "version" => env!("CARGO_PKG_VERSION"), "process" => process.to_owned()).set(1);
    Ok(handle)
}

/// Why a process can't be monitored as configured.
#[derive(Debug, thiserror::Error)]
pub enum MonitoringError {
    /// The address is taken, or not this machine's.
    #[error(
        "can't listen on {address}: {source}; set metrics.listen to an address of its own for each process, or leave it out"
    )]
    Listen {
        /// The setting `metrics.listen`.
        address: SocketAddr,
        /// What the system says.
        source: io::Error,
    },
    /// A bug.
    #[error("nothing can be recorded: {0}")]
    Recorder(#[from] BuildError),
}

/// The listener of a process, if it has one. Answers until it is stopped: so also while the process drains.
#[derive(Debug, Default)]
pub struct Monitoring(Option<(CancellationToken, JoinHandle<()>)>);

impl Monitoring {
    /// Listens, if `config` says so, in the name of `process`. To be called first: what is counted before is not recorded.
    ///
    /// # Errors
    /// When the address can't be listened on.
    pub async fn start(config: &MetricsConfig, process: &str, health: &Health) -> Result<Self, MonitoringError> {
        let Some(address) = config.listen else { return Ok(Self::default()) };
        let metrics = install(process)?;
        let not_listening = |source| MonitoringError::Listen { address, source };
        let listener = TcpListener::bind(address).await.map_err(not_listening)?;
        // Port 0 is only known by now.
        info!("metrics at http://{}/metrics", listener.local_addr().map_err(not_listening)?);
        let router = Router::new()
            .route("/metrics", get(scrape))
            .route("/livez", get(async |State(App { health, .. })| live(&health)))
            .route("/readyz", get(async |State(App { health, .. })| ready(&health)))
            .with_state(App { metrics, health: health.clone() });
        let stop = CancellationToken::new();
        let serving = tokio::spawn({
            let stop = stop.clone();
            async move {
                let upkeep = async {
                    let mut ticks = interval(UPKEEP);
                    loop {
                        ticks.tick().await;
                        metrics.run_upkeep();
                    }
                };
                tokio::join!(server::serve(listener, router, LIMITS, &stop), stop.run_until_cancelled(upkeep));
            }
        });
        Ok(Self(Some((stop, serving))))
    }

    /// Stops listening: the last thing that a process does.
    pub async fn stop(self) {
        if let Some((stop, serving)) = self.0 {
            stop.cancel();
            // It can only have panicked, which is reported where it happened.
            let _ = serving.await;
        }
    }
}

#[derive(Clone)]
struct App {
    metrics: &'static PrometheusHandle,
    health: Health,
}

async fn scrape(State(App { metrics, health }): State<App>) -> impl IntoResponse {
    gauge!(metric::READY).set(if health.troubles().is_empty() { 1 } else { 0 });
    ([(header::CONTENT_TYPE, TEXT)], metrics.render())
}

/// `GET /livez`: 503 if only a new start helps.
#[must_use]
pub fn live(health: &Health) -> Response {
    answer(health.failure().as_slice())
}

/// `GET /readyz`: 503 while the process can't do its work, with the reasons.
#[must_use]
pub fn ready(health: &Health) -> Response {
    answer(&health.troubles())
}

fn answer(troubles: &[String]) -> Response {
    if troubles.is_empty() {
        return "ok\n".into_response();
    }
    (StatusCode::SERVICE_UNAVAILABLE, format!("{}\n", troubles.join("\n"))).into_response()
}
