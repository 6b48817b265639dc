//! The login: one password with any user name, and a limit on failed attempts.

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

/// None: the request carries the password. The answer to a failed attempt is delayed. After too many failures, attempts are
/// refused for a while without being checked.
pub(crate) async fn log_in(logins: &Logins, client: IpAddr, headers: &HeaderMap, password: &str) -> Option<Response> {
    if headers.get(header::AUTHORIZATION).is_none() {
        return Some(ask_for_password(headers));
    }
    if let Some(refusal) = refuse_limited(logins, client) {
        return Some(refusal);
    }
    if carries_password(headers, password) {
        return None;
    }
    let failed = logins.failed(client, Instant::now());
    // Simultaneous attempts all pass the check above; those over the limit are refused here.
    if failed.over_limit
        && let Some(refusal) = refuse_limited(logins, client)
    {
        return Some(refusal);
    }
    delay_failed(failed).await;
    Some(ask_for_password(headers))
}

/// The response to a client with too many failures, even if it has the password now.
fn refuse_limited(logins: &Logins, client: IpAddr) -> Option<Response> {
    let wait = logins.wait(client, Instant::now())?;
    debug!("login refused, too many failures");
    let seconds = wait.as_secs() + 1;
    let mut response = ErrorPage::new(
        StatusCode::TOO_MANY_REQUESTS,
        "Too many failed logins",
        format!("Too many logins from your address have failed. Wait {seconds} seconds, then reload the page."),
    )
    .into_response();
    response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
    Some(response)
}

/// Logs a failed attempt and delays its answer. Neither the address nor the attempted password is logged.
async fn delay_failed(failed: Failed) {
    if failed.limited {
        warn!(failures = failed.failures, "login failed, refusing further attempts of this client for now");
    } else {
        warn!(failures = failed.failures, "login failed");
    }
    sleep(failed.delay).await;
}

/// Whether the request carries the password, with any user name.
fn carries_password(headers: &HeaderMap, password: &str) -> bool {
    basic_password(headers).is_some_and(|given| is_same(&given, password))
}

/// The password of a Basic login, for any user name.
pub(crate) fn basic_password(headers: &HeaderMap) -> Option<Vec<u8>> {
    let decoded = STANDARD.decode(credentials(headers, "basic")?).ok()?;
    let colon = decoded.iter().position(|byte| *byte == b':')?;
    Some(decoded[colon + 1..].to_vec())
}

/// The credentials of this scheme in the `Authorization` header.
pub(crate) fn credentials<'a>(headers: &'a HeaderMap, scheme: &str) -> Option<&'a str> {
    let (given, credentials) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    given.eq_ignore_ascii_case(scheme).then(|| credentials.trim())
}

/// Compares in constant time.
pub(crate) fn is_same(given: &[u8], secret: &str) -> bool {
    given.ct_eq(secret.as_bytes()).into()
}

/// A known scheme makes the browser open a login dialog. A page's own poll gets an unknown scheme, so that the page explains what
/// to do and no dialog opens over it.
fn ask_for_password(headers: &HeaderMap) -> Response {
    let by_script = text(headers, "sec-fetch-dest") == Some("empty");
    let scheme = if by_script { r#"MailrunPage realm="Mailrun""# } else { r#"Basic realm="Mailrun", charset="UTF-8""# };
    let mut response = ErrorPage::new(
        StatusCode::UNAUTHORIZED,
        "Login required",
        "These pages require a password. Reload the page to enter it; the user name does not matter.",
    )
    .into_response();
    response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static(scheme));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_the_password_with_any_user_name() {
        let headers = |value: &str| HeaderMap::from_iter([(header::AUTHORIZATION, value.parse().unwrap())]);
        let basic = |login: &str| headers(&format!("Basic {}", STANDARD.encode(login)));
        assert!(carries_password(&basic("ann:let:me in"), "let:me in"));
        assert!(carries_password(&basic(":let:me in"), "let:me in"));
        for login in ["ann:let", "ann:", "let:me in", ""] {
            assert!(!carries_password(&basic(login), "let:me in"), "{login}");
        }
        assert!(!carries_password(&headers("Bearer abc"), "abc"));
        assert!(!carries_password(&headers("Basic %%%"), "abc"));
        assert!(!carries_password(&HeaderMap::new(), ""));
    }
}
