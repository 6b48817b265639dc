//! `/relay`: relays that the breaker has stopped, and the operator's answer.

use askama::Template;
use axum::{
    extract::{Path, State},
    response::{Redirect, Response},
};
use chrono::Utc;
use mailrun_ledger::relay_stops::{self, Fault, RelayStop};
use tracing::info;

use crate::{
    Shared,
    body::Form,
    error::{ErrorPage, html},
    view::Moment,
};

#[derive(Template)]
#[template(path = "relay.html")]
struct RelayPage {
    stops: Vec<Row>,
}

struct Row {
    number: i64,
    relay: String,
    reason: String,
    runs: Vec<uuid::Uuid>,
    since: Moment,
}

/// `GET /relay`
pub(crate) async fn show(State(app): Shared) -> Result<Response, ErrorPage> {
    let stops = relay_stops::recent(&mut *app.pool.acquire().await?).await?;
    let now = Utc::now();
    let row = |RelayStop { number, relay, stopped_at, reason, runs, .. }| Row {
        number,
        relay,
        reason,
        runs,
        since: Moment::new(stopped_at, now),
    };
    Ok(html(&RelayPage { stops: stops.into_iter().filter(|stop| stop.fault.is_none()).map(row).collect() }))
}

/// `POST /relay/{number}`, with the `fault`: `us` or `them`. A stop that is already answered is left unchanged.
pub(crate) async fn answer(
    State(app): Shared,
    Path(number): Path<String>,
    Form(fields, _memory): Form,
) -> Result<Redirect, ErrorPage> {
    let fault = match fields.get("fault") {
        Some("us") => Some(Fault::Us),
        Some("them") => Some(Fault::Them),
        _ => None,
    };
    if let (Ok(number), Some(fault)) = (number.parse(), fault) {
        let answered = relay_stops::answer(&mut *app.pool.acquire().await?, Some(number), fault).await?;
        app.outbox.notify_one();
        info!(number, ?fault, answered, "relay stop answered");
    }
    Ok(Redirect::to("/relay"))
}

/// `GET` on the same address, after a login or from the browser's history.
pub(crate) async fn back() -> Redirect {
    Redirect::to("/relay")
}
