//! The login: one password under any user name, and what a client that fails too often is answered.

use std::{net::IpAddr, time::Instant};

use axum::{
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use subtle::ConstantTimeEq;
use tokio::time::sleep;
use tracing::{debug, warn};

use crate::{
    client::text,
    error::ErrorPage,
    logins::{Failed, Logins},
};

/// None: the request carries the password. A failed attempt is answered late. After too many, attempts are refused for a while
/// without being checked.
pub(crate) async fn log_in(logins: &Logins, client: IpAddr, headers: &HeaderMap, password: &str) -> Option<Response> {
    if headers.get(header::AUTHORIZATION).is_none() {
        return Some(ask_for_password(headers));
    }
    if let Some(refusal) = turn_away(logins, client) {
        return Some(refusal);
    }
    if knows(headers, password) {
        return None;
    }
    let failed = logins.failed(client, Instant::now());
    // Attempts at the same moment all pass the check above; those beyond the limit are refused here.
    if failed.beyond
        && let Some(refusal) = turn_away(logins, client)
    {
        return Some(refusal);
    }
    delay_failed(failed).await;
    Some(ask_for_password(headers))
}

/// The answer to a client that has failed too often, even if it has the password now.
fn turn_away(logins: &Logins, client: IpAddr) -> Option<Response> {
    let wait = logins.wait(client, Instant::now())?;
    debug!("login refused: too many failures");
    let seconds = wait.as_secs() + 1;
    let mut response = ErrorPage::new(
        StatusCode::TOO_MANY_REQUESTS,
        "Too many failed logins",
        format!("Too many logins from your address have failed. Wait for {seconds} seconds, then reload the page."),
    )
    .into_response();
    response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
    Some(response)
}

/// Logs a failed attempt and delays its answer. Neither the address nor the attempted password is logged.
async fn delay_failed(failed: Failed) {
    if failed.limited {
        warn!(failures = failed.failures, "login failed, refusing further attempts of this client for a while");
    } else {
        warn!(failures = failed.failures, "login failed");
    }
    sleep(failed.delay).await;
}

/// Whether the request carries the password, under any user name.
fn knows(headers: &HeaderMap, password: &str) -> bool {
    basic_password(headers).is_some_and(|given| is_same(&given, password))
}

/// The password of a Basic login, whatever the user's name.
pub(crate) fn basic_password(headers: &HeaderMap) -> Option<Vec<u8>> {
    let decoded = STANDARD.decode(credentials(headers, "basic")?).ok()?;
    let colon = decoded.iter().position(|byte| *byte == b':')?;
    Some(decoded[colon + 1..].to_vec())
}

/// The credentials in the header `Authorization`, if they are of this scheme.
pub(crate) fn credentials<'a>(headers: &'a HeaderMap, scheme: &str) -> Option<&'a str> {
    let (given, credentials) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    given.eq_ignore_ascii_case(scheme).then(|| credentials.trim())
}

/// Whether the secret was given, compared in constant time.
pub(crate) fn is_same(given: &[u8], secret: &str) -> bool {
    given.ct_eq(secret.as_bytes()).into()
}

/// A browser asks for the password when it is told the scheme. A page's own request for its numbers is told another one, which
/// no browser knows: the page explains what to do, and no dialog opens over it.
fn ask_for_password(headers: &HeaderMap) -> Response {
    let by_script = text(headers, "sec-fetch-dest") == Some("empty");
    let scheme = if by_script { r#"MailrunPage realm="Mailrun""# } else { r#"Basic realm="Mailrun", charset="UTF-8""# };
    let mut response = ErrorPage::new(
        StatusCode::UNAUTHORIZED,
        "Login required",
        "These pages need a password. Reload the page to be asked for it; any user name will do.",
    )
    .into_response();
    response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static(scheme));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_known_under_any_user_name() {
        let headers = |value: &str| HeaderMap::from_iter([(header::AUTHORIZATION, value.parse().unwrap())]);
        let basic = |login: &str| headers(&format!("Basic {}", STANDARD.encode(login)));
        assert!(knows(&basic("ann:let:me in"), "let:me in"));
        assert!(knows(&basic(":let:me in"), "let:me in"));
        for login in ["ann:let", "ann:", "let:me in", ""] {
            assert!(!knows(&basic(login), "let:me in"), "{login}");
        }
        assert!(!knows(&headers("Bearer abc"), "abc"));
        assert!(!knows(&headers("Basic %%%"), "abc"));
        assert!(!knows(&HeaderMap::new(), ""));
    }
}
