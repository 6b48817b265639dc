//! `POST /hooks/bounces`: mail providers and mail servers report bounces and complaints here.

use std::time::Duration;

use axum::{
    body::{Body, to_bytes},
    extract::{Request, State},
    http::{HeaderMap, Method, StatusCode, header},
    response::{IntoResponse, Response},
};
use mailrun_ledger::{
    held_suppressions::{Missing, suppress_missing},
    in_time,
    suppressions::{self, Reason},
};
use secrecy::ExposeSecret as _;
use tokio::time::timeout;
use tracing::{info, warn};

use crate::{
    App, Shared, correlate,
    password::{basic_password, credentials, is_same},
    report::{
        self, Report, ReportError, ReportedAddress,
        sns::{Envelope, Kind},
    },
    sns::Refusal,
};

/// A report including the mail that it is about.
const MAX_REPORT_BYTES: usize = 4 * 1024 * 1024;
/// Amazon SNS sends at most 256 kB before escaping. Without a key, nothing longer is read.
const MAX_SNS_BYTES: usize = 1024 * 1024;
/// How much of a stranger's text is logged.
const MAX_SHOWN: usize = 200;
/// Time limit for receiving a report.
const RECEIVE_TIMEOUT: Duration = Duration::from_secs(30);
/// Answered to an unsupported report.
const SUPPORTED: &str = "Supported formats: Amazon SES (through SNS or raw), Postmark webhooks, and delivery status notifications (RFC 3464) as a raw mail.";

/// `POST /hooks/bounces`. Responses are plain text, because they appear in a provider's log.
pub(crate) async fn bounces(State(app): Shared, request: Request<Body>) -> Response {
    let key = app.config.hook_key.as_ref();
    if key.is_none() && app.sns.is_none() {
        return (StatusCode::NOT_FOUND, "The bounce hook is disabled: set web.hook_key.\n").into_response();
    }
    let has_key = key.is_some_and(|key| carries_key(request.headers(), key.expose_secret()));
    // Messages of Amazon SNS are signed and need no key.
    if !has_key && app.sns.is_none() {
        return no_key();
    }
    if request.method() != Method::POST {
        return (StatusCode::METHOD_NOT_ALLOWED, [(header::ALLOW, "POST")], "Send reports with POST.\n")
            .into_response();
    }
    let (parts, body) = request.into_parts();
    let limit = if has_key { MAX_REPORT_BYTES } else { MAX_SNS_BYTES };
    let body = match timeout(RECEIVE_TIMEOUT, to_bytes(body, limit)).await {
        Ok(Ok(body)) => body,
        Ok(Err(_)) => {
            return (StatusCode::PAYLOAD_TOO_LARGE, "The report is larger than 4 MB, or incomplete.\n").into_response();
        }
        Err(_) => return (StatusCode::REQUEST_TIMEOUT, "The report did not arrive in time.\n").into_response(),
    };
    if !has_key && !report::is_json(&body) {
        return no_key();
    }
    let content_type = parts.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    match report::read(content_type, &body) {
        Ok(Report::Sns(envelope)) => from_sns(&app, &envelope).await,
        _ if !has_key => no_key(),
        Ok(Report::Provider(reported)) => suppress_reported(&app, &reported).await,
        Ok(Report::Mail(returned)) => match in_time(app.answer_timeout, correlate::confirmed(&app, &returned)).await {
            Ok(reported) => suppress_reported(&app, &reported).await,
            Err(error) => unavailable(&error),
        },
        Err(reason) => unsupported(&reason),
    }
}

/// Amazon SNS sends its password only after a challenge.
fn no_key() -> Response {
    let ask = [(header::WWW_AUTHENTICATE, r#"Basic realm="Mailrun hooks", charset="UTF-8""#)];
    (StatusCode::UNAUTHORIZED, ask, "The key is missing or wrong.\n").into_response()
}

fn unsupported(reason: &ReportError) -> Response {
    warn!(%reason, "unsupported bounce report");
    (StatusCode::BAD_REQUEST, format!("Unsupported report: {reason}. {SUPPORTED}\n")).into_response()
}

fn unavailable(error: &sqlx::Error) -> Response {
    warn!(%error, "storing a bounce report failed, its sender will repeat it");
    (StatusCode::SERVICE_UNAVAILABLE, "The database is not responding: send the report again later.\n").into_response()
}

/// A message of Amazon SNS is accepted by its signature and topic, with or without the key.
async fn from_sns(app: &App, envelope: &Envelope) -> Response {
    let verified = match &app.sns {
        Some(verifier) => verifier.verify(envelope).await,
        None => Err(Refusal::Topic),
    };
    match verified {
        Ok(()) => {}
        Err(refusal @ Refusal::Unreachable(_)) => {
            warn!(%refusal, "verifying an Amazon SNS message failed, SNS will repeat it");
            return (StatusCode::SERVICE_UNAVAILABLE, format!("Temporarily refused: {refusal}.\n")).into_response();
        }
        Err(refusal) => {
            let topic: String = envelope.topic_arn.chars().filter(char::is_ascii_graphic).take(MAX_SHOWN).collect();
            warn!(%refusal, topic, "Amazon SNS message refused");
            return (StatusCode::FORBIDDEN, format!("Refused: {refusal}.\n")).into_response();
        }
    }
    if envelope.kind == Kind::SubscriptionConfirmation {
        let url = envelope.subscribe_url.as_deref().unwrap_or("none");
        warn!(
            url,
            topic = envelope.topic_arn,
            "Amazon SNS asks to confirm a subscription: open this URL in a browser to confirm it"
        );
        return "The subscription is not confirmed automatically: open the SubscribeURL, which is in the log of mailrun web.\n"
            .into_response();
    }
    match envelope.reported() {
        Ok(reported) => suppress_reported(app, &reported).await,
        Err(reason) => unsupported(&reason),
    }
}

/// Suppresses the addresses of a verified report.
async fn suppress_reported(app: &App, reported: &[ReportedAddress]) -> Response {
    match in_time(app.answer_timeout, suppress(app, reported)).await {
        Ok(new) => {
            info!(reported = reported.len(), new, "bounce report accepted");
            (StatusCode::OK, format!("Accepted. Suppressed addresses: {}, new: {new}.\n", reported.len()))
                .into_response()
        }
        Err(error) => unavailable(&error),
    }
}

/// Returns how many addresses were newly suppressed. Those of a run that suppresses an unusual share of its recipients are held
/// for review.
async fn suppress(app: &App, reported: &[ReportedAddress]) -> sqlx::Result<usize> {
    let mut reported: Vec<_> = reported.iter().collect();
    // A fixed order, so that two reports of the same people cannot deadlock.
    reported.sort_by(|a, b| a.email.cmp(&b.email));
    let mut tx = app.pool.begin().await?;
    let (mut new, mut missing) = (0, Vec::new());
    for ReportedAddress { email, reason, detail, run_id } in reported {
        match run_id {
            Some(run_id) if *reason == Reason::Bounced => {
                missing.push(Missing { run_id: *run_id, email: email.clone(), detail: detail.clone() });
            }
            _ => new += usize::from(suppressions::suppress(&mut tx, email, *reason, detail.as_deref()).await?),
        }
    }
    // Last, because it locks the runs' counters.
    new += suppress_missing(&mut tx, &app.suppressions, &missing).await?.new;
    tx.commit().await?;
    Ok(new)
}

/// Whether the request carries the key, as a bearer token or as the password of any user.
fn carries_key(headers: &HeaderMap, key: &str) -> bool {
    let token = credentials(headers, "bearer").map(|token| token.as_bytes().to_vec());
    token.or_else(|| basic_password(headers)).is_some_and(|given| is_same(&given, key))
}

#[cfg(test)]
mod tests {
    use base64::{Engine as _, engine::general_purpose::STANDARD};

    use super::*;

    #[test]
    fn the_key_is_a_bearer_token_or_a_password() {
        let headers = |value: &str| HeaderMap::from_iter([(header::AUTHORIZATION, value.parse().unwrap())]);
        let basic = |login: &str| headers(&format!("Basic {}", STANDARD.encode(login)));
        assert!(carries_key(&headers("Bearer a-long-key"), "a-long-key"));
        assert!(carries_key(&basic("mailrun:a-long-key"), "a-long-key"));
        for wrong in [
            headers("Bearer a-long-kez"),
            headers("Bearer"),
            headers("Bearer "),
            basic("a-long-key:"),
            HeaderMap::new(),
        ] {
            assert!(!carries_key(&wrong, "a-long-key"));
        }
    }
}
