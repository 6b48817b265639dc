//! The monitoring endpoints `/metrics`, `/livez` and `/readyz`, on an address of their own.

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

/// A few scrapers, with small requests.
const LIMITS: Limits = Limits { connections: 16, header: Duration::from_secs(10), age: Duration::from_secs(300) };
/// How often histograms are aggregated, since samples accumulate until the next scrape otherwise.
const UPKEEP: Duration = Duration::from_secs(5);
/// The version of the Prometheus text format.
const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// From 1 ms (a claim) to 30 s (a slow relay).
const BUCKETS: [f64; 14] = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0];

static RECORDER: OnceLock<PrometheusHandle> = OnceLock::new();

/// Installs the metrics recorder for this process. Events before this call are lost.
///
/// # Errors
/// None in practice: the buckets are not empty.
fn install(process: &str) -> Result<&'static PrometheusHandle, BuildError> {
    if let Some(handle) = RECORDER.get() {
        return Ok(handle);
    }
    let recorder = PrometheusBuilder::new().set_buckets(&BUCKETS)?.build_recorder();
    let handle = RECORDER.get_or_init(|| recorder.handle());
    // This fails if a recorder is installed already, whose handle is the one in use.
    let _ = metrics::set_global_recorder(recorder);
    metric::describe();
    gauge!(metric::INFO, "version" => env!("CARGO_PKG_VERSION"), "process" => process.to_owned()).set(1);
    Ok(handle)
}

/// Why the monitoring endpoints can't start.
#[derive(Debug, thiserror::Error)]
pub enum MonitoringError {
    /// The address is in use, or does not belong to this machine.
    #[error(
        "can't listen on {address}: {source}; give each process its own address in metrics.listen, or remove the setting"
    )]
    Listen {
        /// The setting `metrics.listen`.
        address: SocketAddr,
        /// The error of the operating system.
        source: io::Error,
    },
    /// A bug.
    #[error("can't record metrics: {0}")]
    Recorder(#[from] BuildError),
}

/// The monitoring listener of a process, if it has one. It answers until [`Self::stop`], so also while the process drains.
#[derive(Debug, Default)]
pub struct Monitoring(Option<(CancellationToken, JoinHandle<()>)>);

impl Monitoring {
    /// Starts listening if `config` has an address. Call it first: metrics recorded before are lost.
    ///
    /// # Errors
    /// The address can't be listened on.
    pub async fn start(config: &MetricsConfig, process: &str, health: &Health) -> Result<Self, MonitoringError> {
        let Some(address) = config.listen else { return Ok(Self::default()) };
        let metrics = install(process)?;
        let not_listening = |source| MonitoringError::Listen { address, source };
        let listener = TcpListener::bind(address).await.map_err(not_listening)?;
        // Log the bound address: the port is not known before if the setting says 0.
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

    /// Stops listening. Call it last.
    pub async fn stop(self) {
        if let Some((stop, serving)) = self.0 {
            stop.cancel();
            // It fails only after a panic, which is logged where it happened.
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

/// `GET /livez`: 503 if the process must be restarted.
#[must_use]
pub fn live(health: &Health) -> Response {
    answer(health.failure().as_slice())
}

/// `GET /readyz`: 503 with the reasons while the process can't do its work.
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
