//! `GET /healthz`: whether the database responds, checked at most once a second; `GET /livez` and `GET /readyz`.

use std::time::Duration;

use axum::{
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use mailrun_app::monitoring;
use moka::future::Cache;
use sqlx::{Connection as _, PgPool};
use tokio::time::timeout;

use crate::Shared;

/// How long a result is reused.
const FRESH_FOR: Duration = Duration::from_secs(1);
/// Timeout for acquiring a database connection, and again for the ping.
const CHECK_TIMEOUT: Duration = Duration::from_secs(2);

/// The most recent result of the database check.
#[derive(Debug)]
pub(crate) struct CheckCache(Cache<(), bool>);

impl CheckCache {
    pub(crate) fn new() -> Self {
        Self(Cache::builder().max_capacity(1).time_to_live(FRESH_FOR).build())
    }

    /// Returns the cached result, or that of `check`. Concurrent callers share one check.
    async fn get(&self, check: impl Future<Output = bool>) -> bool {
        self.0.get_with((), check).await
    }
}

/// `GET /healthz`
pub(crate) async fn show(State(app): Shared) -> Response {
    if app.health_check.get(database_answers(&app.background)).await {
        "ok".into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "the database does not respond").into_response()
    }
}

/// `GET /livez`: whether the process works.
pub(crate) async fn live(State(app): Shared) -> Response {
    monitoring::live(&app.health)
}

/// `GET /readyz`: the same as `/healthz`, and whether RabbitMQ accepts the outbox's messages.
pub(crate) async fn ready(State(app): Shared) -> Response {
    let answered = app.health_check.get(database_answers(&app.background)).await;
    app.health.database_answers(answered);
    monitoring::ready(&app.health)
}

async fn database_answers(pool: &PgPool) -> bool {
    let Ok(Ok(mut connection)) = timeout(CHECK_TIMEOUT, pool.acquire()).await else {
        return false;
    };
    matches!(timeout(CHECK_TIMEOUT, connection.ping()).await, Ok(Ok(())))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[tokio::test]
    async fn concurrent_requests_share_one_check() {
        let (health, checks) = (CheckCache::new(), AtomicU32::new(0));
        let check = async || {
            checks.fetch_add(1, Ordering::Relaxed);
            tokio::task::yield_now().await;
            false
        };
        let answers = futures::future::join_all((0..100).map(|_| health.get(check()))).await;
        assert!(answers.iter().all(|answer| !answer));
        assert_eq!(checks.load(Ordering::Relaxed), 1);
    }
}
