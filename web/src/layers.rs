//! The layers around routes: access, limits, error format, logged path, response headers, and metrics.

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

/// Only our own files, and no framing.
const CONTENT_SECURITY_POLICY: &str = "default-src 'none'; style-src 'self'; script-src 'self'; \
     img-src 'self' data:; connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'";

/// Who may call a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Anyone.
    Public,
    /// Requests that pass [`guard::check`].
    Closed,
}

/// How long a handler may take, and how large its form may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Limits {
    /// A time limit of `database.answer_timeout_ms`; a short form.
    Page,
    /// The handler limits its own time; a short form.
    Slow,
    /// The handler limits its own time; a form of up to `web.max_body_bytes`, in memory shared by all of these.
    Upload,
}

/// The format of errors.
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
    /// The route's pattern: the values of its parameters may be secret.
    Route,
    /// The whole path: its parameters are ids.
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
    /// The default: login required, short time limit and forms, and no secret part of a path in the log.
    pub(crate) const CLOSED: Self =
        Self { access: Access::Closed, limits: Limits::Page, errors: Errors::Page, logged: LoggedPath::Route };

    /// Adds the layers to the routes that `router` has so far, and to its fallback.
    pub(crate) fn around(self, router: Router<Arc<App>>, app: &Arc<App>) -> Router<Arc<App>> {
        let router = match self.limits {
            Limits::Page => router.layer(middleware::from_fn_with_state(Arc::clone(app), in_time)),
            Limits::Slow => router,
            Limits::Upload => router.layer(Extension(Arc::clone(&app.form_memory))),
        };
        let router = match self.access {
            Access::Public => router,
            Access::Closed => router.layer(middleware::from_fn_with_state(Arc::clone(app), guard::check)),
        };
        // Around the access check and the time limit, so that their errors have the same format.
        let router = match self.errors {
            Errors::Page => router,
            Errors::Problem => router.layer(middleware::from_fn(problem::always)),
            Errors::AsAccepted => router.layer(middleware::from_fn(problem::where_accepted)),
        };
        let logged = self.logged;
        // Errors are logged where they occur; the trace only adds their request.
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

/// Adds the layers of every response, regardless of its router.
pub(crate) fn around_all(router: Router<Arc<App>>) -> Router<Arc<App>> {
    let header = |name: HeaderName, value| SetResponseHeaderLayer::overriding(name, HeaderValue::from_static(value));
    router
        .layer(header(header::CONTENT_SECURITY_POLICY, CONTENT_SECURITY_POLICY))
        .layer(header(header::X_CONTENT_TYPE_OPTIONS, "nosniff"))
        .layer(header(header::REFERRER_POLICY, "same-origin"))
        .layer(middleware::from_fn(measured))
}

/// The route's pattern; `none` for a request without a route.
fn route_of(request: &Request<Body>) -> &str {
    request.extensions().get::<MatchedPath>().map_or("none", MatchedPath::as_str)
}

/// Records the duration of requests by route and status.
async fn measured(request: Request<Body>, next: Next) -> Response {
    let route = route_of(&request).to_owned();
    let begun = Instant::now();
    let response = next.run(request).await;
    let status = response.status().as_u16().to_string();
    histogram!(metric::REQUEST_SECONDS, "route" => route, "status" => status).record(begun.elapsed());
    response
}

/// Limits the time of a handler. Without it, a database connection that was cut off silently would block it.
async fn in_time(State(app): Shared, request: Request<Body>, next: Next) -> Response {
    let answer = mailrun_ledger::in_time(app.answer_timeout, async { Ok::<_, sqlx::Error>(next.run(request).await) });
    answer.await.unwrap_or_else(|error| ErrorPage::from_database(&error).into_response())
}
