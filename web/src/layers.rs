//! The layers around routes: access, limits, how errors are written, what is logged of a path, headers, and metrics.

use std::{sync::Arc, time::Instant};

use axum::{
    Extension, Router,
    body::Body,
    extract::{MatchedPath, State},
    http::{HeaderName, HeaderValue, Request, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
};
use mailrun_core::metric;
use metrics::histogram;
use tower_http::{
    set_header::SetResponseHeaderLayer,
    trace::{DefaultOnResponse, TraceLayer},
};
use tracing::{Level, info_span};

use crate::{App, Shared, error::ErrorPage, guard, problem};

/// Only our own files, and no page in a frame.
const CONTENT_SECURITY_POLICY: &str = "default-src 'none'; style-src 'self'; script-src 'self'; \
     img-src 'self' data:; connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'";

/// Who may ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Anyone.
    Public,
    /// Requests that pass [`guard::check`].
    Closed,
}

/// How long a route may take, and how large its form may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Limits {
    /// Answered within `database.answer_timeout_ms`; a short form.
    Page,
    /// The handler limits its own time; a short form.
    Slow,
    /// The handler limits its own time; a form of up to `web.max_body_bytes`, in the memory that all of these share.
    Upload,
}

/// How errors are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Errors {
    /// As pages.
    Page,
    /// As problem details.
    Problem,
    /// As problem details for a caller that accepts JSON and no HTML, otherwise as pages.
    AsAccepted,
}

/// What is logged of a request's path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LoggedPath {
    /// The path of its route, with the names of its parameters: their values may be secret.
    Route,
    /// All of it: its parameters are ids.
    Whole,
}

impl LoggedPath {
    fn of(self, request: &Request<Body>) -> &str {
        match self {
            Self::Route => route_of(request),
            Self::Whole => request.uri().path(),
        }
    }
}

/// The layers that the routes of one router share.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layers {
    pub(crate) access: Access,
    pub(crate) limits: Limits,
    pub(crate) errors: Errors,
    pub(crate) logged: LoggedPath,
}

impl Layers {
    /// What applies unless a router says otherwise: a login, short time and forms, and no part of a path in the log that may be
    /// secret.
    pub(crate) const CLOSED: Self =
        Self { access: Access::Closed, limits: Limits::Page, errors: Errors::Page, logged: LoggedPath::Route };

    /// Puts them around the routes that `router` has by now, and around its fallback.
    pub(crate) fn around(self, router: Router<Arc<App>>, app: &Arc<App>) -> Router<Arc<App>> {
        let router = match self.limits {
            Limits::Page => router.layer(middleware::from_fn_with_state(Arc::clone(app), in_time)),
            Limits::Slow => router,
            Limits::Upload => router.layer(Extension(Arc::clone(&app.room))),
        };
        let router = match self.access {
            Access::Public => router,
            Access::Closed => router.layer(middleware::from_fn_with_state(Arc::clone(app), guard::check)),
        };
        // Around the access check and the time limit: their errors are written in the same form.
        let router = match self.errors {
            Errors::Page => router,
            Errors::Problem => router.layer(middleware::from_fn(problem::always)),
            Errors::AsAccepted => router.layer(middleware::from_fn(problem::where_accepted)),
        };
        let logged = self.logged;
        // An error is logged where it is known, so the trace adds only the request that it happened in.
        router.layer(
            TraceLayer::new_for_http()
                .make_span_with(move |request: &Request<Body>| {
                    info_span!("request", method = %request.method(), path = logged.of(request))
                })
                .on_response(DefaultOnResponse::new().level(Level::DEBUG))
                .on_failure(()),
        )
    }
}

/// The layers of every response, whichever router it is from.
pub(crate) fn around_all(router: Router<Arc<App>>) -> Router<Arc<App>> {
    let header = |name: HeaderName, value| SetResponseHeaderLayer::overriding(name, HeaderValue::from_static(value));
    router
        .layer(header(header::CONTENT_SECURITY_POLICY, CONTENT_SECURITY_POLICY))
        .layer(header(header::X_CONTENT_TYPE_OPTIONS, "nosniff"))
        .layer(header(header::REFERRER_POLICY, "same-origin"))
        .layer(middleware::from_fn(measured))
}

/// The route's path with the names of its parameters; `none` for a request that no route is for.
fn route_of(request: &Request<Body>) -> &str {
    request.extensions().get::<MatchedPath>().map_or("none", MatchedPath::as_str)
}

/// Counts requests by route and status, with how long they took.
async fn measured(request: Request<Body>, next: Next) -> Response {
    let route = route_of(&request).to_owned();
    let begun = Instant::now();
    let response = next.run(request).await;
    let status = response.status().as_u16().to_string();
    histogram!(metric::REQUEST_SECONDS, "route" => route, "status" => status).record(begun.elapsed());
    response
}

/// Answers in time even if the database does not: a connection to it that was cut off is silent.
async fn in_time(State(app): Shared, request: Request<Body>, next: Next) -> Response {
    let answer = mailrun_ledger::in_time(app.answer_timeout, async { Ok::<_, sqlx::Error>(next.run(request).await) });
    answer.await.unwrap_or_else(|error| ErrorPage::from_database(&error).into_response())
}
