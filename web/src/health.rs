//! `GET /healthz`: whether the database answers, asked once a second however many want to know; `GET /livez` and `GET /readyz`.

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

/// An answer is given again for so long.
const FRESH_FOR: Duration = Duration::from_secs(1);
/// How long the database may take for a connection, and again to answer on it.
const PATIENCE: Duration = Duration::from_secs(2);

/// What the database has answered lately.
#[derive(Debug)]
pub(crate) struct Answers(Cache<(), bool>);

impl Answers {
    pub(crate) fn new() -> Self {
        Self(Cache::builder().max_capacity(1).time_to_live(FRESH_FOR).build())
    }

    /// What `check` says, or said a moment ago. Those who ask meanwhile wait for the same answer.
    async fn ask(&self, check: impl Future<Output = bool>) -> bool {
        self.0.get_with((), check).await
    }
}

/// `GET /healthz`
pub(crate) async fn show(State(app): Shared) -> Response {
    if app.answers.ask(answers(&app.background)).await {
        "ok".into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "the database does not answer").into_response()
    }
}

/// `GET /livez`: whether the process is of any use.
pub(crate) async fn live(State(app): Shared) -> Response {
    monitoring::live(&app.health)
}

/// `GET /readyz`: the same as `/healthz`, and whether RabbitMQ takes what is in the outbox.
pub(crate) async fn ready(State(app): Shared) -> Response {
    let answered = app.answers.ask(answers(&app.background)).await;
    app.health.database_answers(answered);
    monitoring::ready(&app.health)
}

async fn answers(pool: &PgPool) -> bool {
    let Ok(Ok(mut connection)) = timeout(PATIENCE, pool.acquire()).await else {
        return false;
    };
    matches!(timeout(PATIENCE, connection.ping()).await, Ok(Ok(())))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[tokio::test]
    async fn many_who_ask_at_once_cost_one_check() {
        let (health, checks) = (Answers::new(), AtomicU32::new(0));
        let check = async || {
            checks.fetch_add(1, Ordering::Relaxed);
            tokio::task::yield_now().await;
            false
        };
        let answers = futures::future::join_all((0..100).map(|_| health.ask(check()))).await;
        assert!(answers.iter().all(|answer| !answer));
        assert_eq!(checks.load(Ordering::Relaxed), 1);
    }
}
