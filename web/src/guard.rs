//! The checks for closed routes: the login, or without a password that the request comes from this machine; and for a request
//! that changes something, that one of our own pages sent it.

use std::sync::Arc;

use axum::{
    extract::{Request, State},
    http::Method,
    middleware::Next,
    response::{IntoResponse, Response},
};
use secrecy::ExposeSecret;

use crate::{
    App,
    client::{ConnectionInfo, host_of},
    origin::{from_another_site, is_ours, reached_by_others},
    password::log_in,
};

/// Forwards a request that passes the checks, or answers it.
pub(crate) async fn check(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let config = &app.config;
    let info = ConnectionInfo::by(&request, &config.trusted_proxies);
    let (headers, host) = (request.headers(), host_of(request.uri(), request.headers()));
    let refusal = match &config.password {
        None => reached_by_others(request.version(), headers, host).map(IntoResponse::into_response),
        Some(password) => log_in(&app.logins, info.client, headers, password.expose_secret()).await,
    };
    if let Some(refusal) = refusal {
        return refusal;
    }
    let reads = matches!(*request.method(), Method::GET | Method::HEAD | Method::OPTIONS);
    if !reads && !is_ours(request.headers(), &info, config.public_url.as_ref()) {
        return from_another_site().into_response();
    }
    next.run(request).await
}
