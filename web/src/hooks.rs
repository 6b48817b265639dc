//! `POST /hooks/bounces`: mail providers and mail servers report here which addresses are not to be written to again.

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
        self, NotUnderstood, Report, Verdict,
        sns::{Envelope, Kind},
    },
    sns::Refusal,
};

/// A report with the mail that it is about; longer ones are no reports of ours.
const MAX_REPORT_BYTES: usize = 4 * 1024 * 1024;
/// Amazon SNS sends at most 256 kB, which may need escapes. Without a key nothing longer is read.
const MAX_SNS_BYTES: usize = 1024 * 1024;
/// So much of a name that a stranger chose is logged.
const MAX_SHOWN: usize = 200;
/// A report must be here after so long.
const PATIENCE: Duration = Duration::from_secs(30);
/// Said to whoever sends something else.
const UNDERSTOOD: &str = "Understood are: Amazon SES (through SNS or raw), Postmark's webhooks, and delivery status notifications (RFC 3464) as a raw mail.";

/// `POST /hooks/bounces`. Its answers are plain text: they are read in a provider's log.
pub(crate) async fn bounces(State(app): Shared, request: Request<Body>) -> Response {
    let key = app.config.hook_key.as_ref();
    if key.is_none() && app.sns.is_none() {
        return (StatusCode::NOT_FOUND, "There is no bounce hook: set web.hook_key.\n").into_response();
    }
    let has_key = key.is_some_and(|key| knows(request.headers(), key.expose_secret()));
    // Amazon SNS signs what it sends, and needs no key.
    if !has_key && app.sns.is_none() {
        return no_key();
    }
    if request.method() != Method::POST {
        return (StatusCode::METHOD_NOT_ALLOWED, [(header::ALLOW, "POST")], "Reports are sent by POST.\n")
            .into_response();
    }
    let (parts, body) = request.into_parts();
    let limit = if has_key { MAX_REPORT_BYTES } else { MAX_SNS_BYTES };
    let body = match timeout(PATIENCE, to_bytes(body, limit)).await {
        Ok(Ok(body)) => body,
        Ok(Err(_)) => {
            return (StatusCode::PAYLOAD_TOO_LARGE, "The report is larger than 4 MB, or did not arrive completely.\n")
                .into_response();
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
        Ok(Report::Provider(verdicts)) => keep(&app, &verdicts).await,
        Ok(Report::Mail(returned)) => match in_time(app.answer_timeout, correlate::confirmed(&app, &returned)).await {
            Ok(verdicts) => keep(&app, &verdicts).await,
            Err(error) => come_again(&error),
        },
        Err(reason) => not_understood(&reason),
    }
}

/// Amazon SNS sends its password only when it is asked for it.
fn no_key() -> Response {
    let ask = [(header::WWW_AUTHENTICATE, r#"Basic realm="Mailrun hooks", charset="UTF-8""#)];
    (StatusCode::UNAUTHORIZED, ask, "The key is missing or wrong.\n").into_response()
}

fn not_understood(reason: &NotUnderstood) -> Response {
    warn!(%reason, "a bounce report is not understood");
    (StatusCode::BAD_REQUEST, format!("This is not understood: {reason}. {UNDERSTOOD}\n")).into_response()
}

fn come_again(error: &sqlx::Error) -> Response {
    warn!(%error, "a bounce report can't be kept; its sender is asked to repeat it");
    (StatusCode::SERVICE_UNAVAILABLE, "The database does not answer: send it again later.\n").into_response()
}

/// A message of Amazon SNS counts by its signature and its topic, with or without the key.
async fn from_sns(app: &App, envelope: &Envelope) -> Response {
    let verified = match &app.sns {
        Some(verifier) => verifier.verify(envelope).await,
        None => Err(Refusal::Topic),
    };
    match verified {
        Ok(()) => {}
        Err(refusal @ Refusal::Unreachable(_)) => {
            warn!(%refusal, "a message of Amazon SNS can't be verified; it is asked to repeat it");
            return (StatusCode::SERVICE_UNAVAILABLE, format!("Not accepted now: {refusal}.\n")).into_response();
        }
        Err(refusal) => {
            let topic: String = envelope.topic_arn.chars().filter(char::is_ascii_graphic).take(MAX_SHOWN).collect();
            warn!(%refusal, topic, "a message of Amazon SNS is not accepted");
            return (StatusCode::FORBIDDEN, format!("Not accepted: {refusal}.\n")).into_response();
        }
    }
    if envelope.kind == Kind::SubscriptionConfirmation {
        let url = envelope.subscribe_url.as_deref().unwrap_or("none");
        warn!(
            url,
            topic = envelope.topic_arn,
            "Amazon SNS wants to send reports: open this address in a browser to allow it"
        );
        return "Noted. Nothing is confirmed by itself: open the SubscribeURL, which is in the log of mailrun web.\n"
            .into_response();
    }
    match envelope.verdicts() {
        Ok(verdicts) => keep(app, &verdicts).await,
        Err(reason) => not_understood(&reason),
    }
}

/// Suppresses what a report has proved.
async fn keep(app: &App, verdicts: &[Verdict]) -> Response {
    match in_time(app.answer_timeout, suppress(app, verdicts)).await {
        Ok(new) => {
            info!(reported = verdicts.len(), new, "a bounce report is taken");
            (StatusCode::OK, format!("Taken. Not written to any more: {}, new: {new}.\n", verdicts.len()))
                .into_response()
        }
        Err(error) => come_again(&error),
    }
}

/// Returns how many of them were not on the list before. Those of a run that suppresses an unusual share of its recipients are
/// held for review.
async fn suppress(app: &App, verdicts: &[Verdict]) -> sqlx::Result<usize> {
    let mut verdicts: Vec<_> = verdicts.iter().collect();
    // In one order for everybody, so that two reports of the same people wait for each other and don't deadlock.
    verdicts.sort_by(|a, b| a.email.cmp(&b.email));
    let mut tx = app.pool.begin().await?;
    let (mut new, mut missing) = (0, Vec::new());
    for Verdict { email, reason, detail, run_id } in verdicts {
        match run_id {
            Some(run_id) if *reason == Reason::Bounced => {
                missing.push(Missing { run_id: *run_id, email: email.clone(), detail: detail.clone() });
            }
            _ => new += usize::from(suppressions::suppress(&mut tx, email, *reason, detail.as_deref()).await?),
        }
    }
    // Last: it locks the counters of the runs.
    new += suppress_missing(&mut tx, &app.suppressions, &missing).await?.new;
    tx.commit().await?;
    Ok(new)
}

/// Whether the request carries the key: as a bearer token, or as the password of any user.
fn knows(headers: &HeaderMap, key: &str) -> bool {
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
        assert!(knows(&headers("Bearer a-long-key"), "a-long-key"));
        assert!(knows(&basic("mailrun:a-long-key"), "a-long-key"));
        for wrong in [
            headers("Bearer a-long-kez"),
            headers("Bearer"),
            headers("Bearer "),
            basic("a-long-key:"),
            HeaderMap::new(),
        ] {
            assert!(!knows(&wrong, "a-long-key"));
        }
    }
}
