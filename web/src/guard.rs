//! Who may ask: the login, requests from other sites, and names that are not ours.

use std::sync::Arc;

use axum::{
    extract::{Request, State},
    http::{HeaderMap, HeaderValue, Method, StatusCode, header, uri::Authority},
    middleware::Next,
    response::{IntoResponse, Response},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use secrecy::ExposeSecret;
use subtle::ConstantTimeEq;

use crate::{App, error::ErrorPage};

/// Lets a request pass, or answers it.
pub(crate) async fn check(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    match refuse(&app, &request) {
        Some(refusal) => refusal,
        None => next.run(request).await,
    }
}

fn refuse(app: &App, request: &Request) -> Option<Response> {
    let path = request.uri().path();
    if is_for_everybody(path) {
        return None;
    }
    let headers = request.headers();
    let host = request.uri().authority().map(Authority::as_str).or_else(|| text(headers, "host"));
    match &app.config.password {
        // A page of another site can point a name of its own at this machine; without a login, the name is what tells.
        None if app.config.listen.ip().is_loopback()
            && !path.starts_with("/static/")
            && !host.is_some_and(is_local) =>
        {
            return Some(
                ErrorPage::new(
                    StatusCode::FORBIDDEN,
                    "Not under this name",
                    "Without a password, these pages answer only to localhost. Set web.password to use another name.",
                )
                .into_response(),
            );
        }
        Some(password) if !path.starts_with("/static/") && !knows(headers, password.expose_secret()) => {
            return Some(log_in());
        }
        _ => {}
    }
    let reads = matches!(*request.method(), Method::GET | Method::HEAD | Method::OPTIONS);
    if !reads && !is_same_origin(text(headers, "sec-fetch-site"), text(headers, "origin"), host) {
        return Some(
            ErrorPage::new(
                StatusCode::FORBIDDEN,
                "Sent from another site",
                "This form was sent by a page of another site, so it was not taken. Open Mailrun and send it from there.",
            )
            .into_response(),
        );
    }
    None
}

/// What strangers call: the health check, the links in mails, which mail providers follow as well, and the bounce hook, which
/// asks for a key of its own. The style of a page is no secret either, see above.
fn is_for_everybody(path: &str) -> bool {
    path == "/u" || path.starts_with("/u/") || path == "/healthz" || path == "/hooks/bounces"
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    // An unreadable value must not pass for an absent one.
    headers.get(name).map(|value| value.to_str().unwrap_or("unreadable"))
}

/// Whether a request that changes something comes from our own pages, or from no browser at all. Told from its headers
/// `Sec-Fetch-Site`, `Origin` and `Host`.
#[must_use]
pub fn is_same_origin(fetch_site: Option<&str>, origin: Option<&str>, host: Option<&str>) -> bool {
    match (fetch_site, origin) {
        // `none`: the person did it, not a page.
        (Some(site), _) => matches!(site, "same-origin" | "none"),
        // The scheme may differ behind a proxy that speaks TLS; the host and port may not.
        (None, Some(origin)) => {
            let from = origin.split_once("://").map(|(_, authority)| authority);
            from.zip(host).is_some_and(|(from, host)| from.eq_ignore_ascii_case(host))
        }
        (None, None) => true,
    }
}

/// Whether a `Host` names this machine, with or without a port.
#[must_use]
pub fn is_local(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    name.eq_ignore_ascii_case("localhost") || name == "127.0.0.1" || name == "[::1]"
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

/// What stands behind this scheme in the header `Authorization`.
pub(crate) fn credentials<'a>(headers: &'a HeaderMap, scheme: &str) -> Option<&'a str> {
    let (given, credentials) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    given.eq_ignore_ascii_case(scheme).then(|| credentials.trim())
}

/// Whether a secret was given, in a time that does not tell how much of it was right.
pub(crate) fn is_same(given: &[u8], secret: &str) -> bool {
    given.ct_eq(secret.as_bytes()).into()
}

fn log_in() -> Response {
    let mut response = ErrorPage::new(
        StatusCode::UNAUTHORIZED,
        "Please log in",
        "These pages need a password. Reload the page to be asked for it; any user name will do.",
    )
    .into_response();
    response
        .headers_mut()
        .insert(header::WWW_AUTHENTICATE, HeaderValue::from_static(r#"Basic realm="Mailrun", charset="UTF-8""#));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_pages_may_send_forms() {
        let host = Some("localhost:8080");
        assert!(is_same_origin(Some("same-origin"), Some("http://localhost:8080"), host));
        assert!(is_same_origin(Some("none"), None, host));
        assert!(is_same_origin(None, Some("http://LOCALHOST:8080"), host));
        assert!(is_same_origin(None, Some("https://mail.example.org"), Some("mail.example.org")));
    }

    #[test]
    fn other_sites_may_not() {
        let host = Some("localhost:8080");
        for site in ["cross-site", "same-site", "unreadable", ""] {
            assert!(!is_same_origin(Some(site), Some("http://localhost:8080"), host), "{site}");
        }
        for origin in ["http://evil.example", "null", "http://localhost:9090", "http://localhost:8080.evil.example"] {
            assert!(!is_same_origin(None, Some(origin), host), "{origin}");
        }
        assert!(!is_same_origin(None, Some("http://localhost:8080"), None));
    }

    #[test]
    fn a_client_that_is_no_browser_may() {
        assert!(is_same_origin(None, None, Some("localhost:8080")));
    }

    #[test]
    fn strangers_reach_links_and_hooks_and_nothing_else() {
        for path in ["/u/AAAA", "/u/AAAA/", "/u/a/b", "/u/", "/u", "/hooks/bounces", "/healthz"] {
            assert!(is_for_everybody(path), "{path}");
        }
        for path in ["/", "/ux", "/hooks", "/hooks/", "/hooks/bounces/x", "/runs", "//u/a", "/runs/u/"] {
            assert!(!is_for_everybody(path), "{path}");
        }
    }

    #[test]
    fn only_names_of_this_machine_are_local() {
        for host in ["localhost", "LocalHost:8080", "127.0.0.1", "127.0.0.1:1", "[::1]", "[::1]:8080"] {
            assert!(is_local(host), "{host}");
        }
        for host in ["evil.example", "localhost.evil.example:8080", "127.0.0.1.evil.example", "", "0.0.0.0", "::1"] {
            assert!(!is_local(host), "{host}");
        }
    }

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
