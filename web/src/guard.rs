//! Who may ask: the login, requests from other sites, requests through proxies, and names that are not ours.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Instant,
};

use axum::{
    extract::{ConnectInfo, Request, State},
    http::{HeaderMap, HeaderValue, Method, StatusCode, Version, header, uri::Authority},
    middleware::Next,
    response::{IntoResponse, Response},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use mailrun_core::public_url::is_this_machine;
use secrecy::ExposeSecret;
use subtle::ConstantTimeEq;
use tokio::time::sleep;
use tracing::{debug, warn};

use crate::{
    App,
    client::{Asked, forwarding_header, is_origin_of, name_of},
    error::ErrorPage,
    logins::{Failed, Logins},
};

/// Lets a request pass, or answers it.
pub(crate) async fn check(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    if is_for_everybody(path) {
        return next.run(request).await;
    }
    let (headers, method, version) = (request.headers(), request.method(), request.version());
    let host = request.uri().authority().map(Authority::as_str).or_else(|| text(headers, "host"));
    let is_style = path.starts_with("/static/");
    let refusal = match &app.config.password {
        _ if is_style => None,
        None => reached_by_others(version, headers, host).map(IntoResponse::into_response),
        Some(password) => log_in(&app.logins, client(&app, &request), headers, password.expose_secret()).await,
    };
    if let Some(refusal) = refusal {
        return refusal;
    }
    let reads = matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS);
    if !reads && !is_ours(&app, &request, host) {
        return from_another_site().into_response();
    }
    next.run(request).await
}

/// The address that a request's failed logins count for.
fn client(app: &App, request: &Request) -> IpAddr {
    asked(app, request, None).client
}

fn asked(app: &App, request: &Request, host: Option<&str>) -> Asked {
    let peer = request.extensions().get::<ConnectInfo<SocketAddr>>().map(|peer| peer.0.ip());
    // The server says it with every request; without a peer there is nobody to trust.
    let peer = peer.unwrap_or(IpAddr::from([0; 4]));
    Asked::of(peer, host, request.headers(), &app.config.trusted_proxies)
}

/// Whether a request that changes something was made by one of our own pages, under the name that its browser knows us by.
fn is_ours(app: &App, request: &Request, host: Option<&str>) -> bool {
    let headers = request.headers();
    let (site, origin) = (text(headers, "sec-fetch-site"), text(headers, "origin"));
    let asked = asked(app, request, host);
    let is_public = |origin| app.config.public_url.as_ref().is_some_and(|url| url.origin() == origin);
    match (site, origin) {
        (None, Some(origin)) if is_public(origin) => true,
        (None, Some(origin)) => asked.host.is_some_and(|host| is_origin_of(origin, &host, asked.scheme.as_deref())),
        (site, origin) => is_same_origin(site, origin, asked.host.as_deref()),
    }
}

fn from_another_site() -> ErrorPage {
    ErrorPage::new(
        StatusCode::FORBIDDEN,
        "Sent from another site",
        "This form was sent by a page of another site, so it was not taken. Open Mailrun and send it from there. \
         Behind a proxy, set web.public_url, or web.trusted_proxies.",
    )
}

/// Why a request may come from beyond this machine, where there is no password: its name is another one, or it shows signs
/// of a proxy. A page of another site can point a name of its own at this machine, and a proxy passes on everybody's requests.
fn reached_by_others(version: Version, headers: &HeaderMap, host: Option<&str>) -> Option<ErrorPage> {
    let refused = |title, why: String| {
        let message = format!(
            "Without a password, these pages answer only to this machine. {why} Set web.password to open them to others."
        );
        Some(ErrorPage::new(StatusCode::FORBIDDEN, title, message))
    };
    if !host.is_some_and(is_local) {
        return refused("Host not allowed", "This request names another host than localhost.".to_owned());
    }
    let proxied = |sign: &str| refused("Proxy not allowed", format!("This request came through a proxy ({sign})."));
    if let Some(name) = forwarding_header(headers) {
        return proxied(name);
    }
    // No browser speaks it; nginx does, with the name it was configured with as the host, unless it is told otherwise.
    if version < Version::HTTP_11 {
        return proxied("HTTP/1.0");
    }
    // The browser believes to be on this site, under another name than the one that arrived here.
    let is_elsewhere = |url: &str| {
        url.split_once("://").is_some_and(|(_, rest)| !is_local(rest.split(['/', '?', '#']).next().unwrap_or_default()))
    };
    if text(headers, "sec-fetch-site") == Some("same-origin")
        && ["origin", "referer"].iter().any(|name| text(headers, name).is_some_and(is_elsewhere))
    {
        return proxied("its page has another name");
    }
    None
}

/// None: the request carries the password. Every failed attempt is answered late, and too many are not looked at for a while.
async fn log_in(logins: &Logins, client: IpAddr, headers: &HeaderMap, password: &str) -> Option<Response> {
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
    // It was let in beside the one that reached the limit.
    if failed.beyond
        && let Some(refusal) = turn_away(logins, client)
    {
        return Some(refusal);
    }
    delay_failed(failed).await;
    Some(ask_for_password(headers))
}

/// The answer to a client that has failed too often, whatever it knows now.
fn turn_away(logins: &Logins, client: IpAddr) -> Option<Response> {
    let wait = logins.wait(client, Instant::now())?;
    debug!("a login was not looked at: too many have failed");
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

/// Logs a failed attempt, and takes its time. Neither the address nor what was tried is logged.
async fn delay_failed(failed: Failed) {
    if failed.limited {
        warn!(
            failures = failed.failures,
            "login failed; further attempts of this client are not looked at for a while"
        );
    } else {
        warn!(failures = failed.failures, "login failed");
    }
    sleep(failed.delay).await;
}

/// What strangers call: the health check, the links in mails, which mail providers follow as well, and the bounce hook, which
/// asks for a key of its own. The style of a page is no secret either, see above.
fn is_for_everybody(path: &str) -> bool {
    path == "/u" || path.starts_with("/u/") || ["/healthz", "/livez", "/readyz", "/hooks/bounces"].contains(&path)
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
        (None, Some(origin)) => host.is_some_and(|host| is_origin_of(origin, host, None)),
        (None, None) => true,
    }
}

/// Whether a `Host` names this machine, with or without a port.
#[must_use]
pub fn is_local(host: &str) -> bool {
    // An IPv6 address in a `Host` stands in brackets.
    is_this_machine(name_of(host)) && !host.starts_with(':')
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
    fn our_own_pages_may_send_forms() {
        let host = Some("localhost:8080");
        assert!(is_same_origin(Some("same-origin"), Some("http://localhost:8080"), host));
        assert!(is_same_origin(Some("none"), None, host));
        assert!(is_same_origin(None, Some("http://LOCALHOST:8080"), host));
        assert!(is_same_origin(None, Some("https://mail.example.org"), Some("mail.example.org")));
        assert!(is_same_origin(None, Some("https://mail.example.org"), Some("mail.example.org:443")));
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
        for path in ["/u/AAAA", "/u/AAAA/", "/u/a/b", "/u/", "/u", "/hooks/bounces", "/healthz", "/livez", "/readyz"] {
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
    fn without_a_password_signs_of_a_proxy_are_refused() {
        let refused = |version, pairs: &[(&'static str, &str)], host| {
            let pair = |(name, value): &(&'static str, &str)| {
                (header::HeaderName::from_static(name), HeaderValue::from_str(value).unwrap())
            };
            reached_by_others(version, &pairs.iter().map(pair).collect(), host).is_some()
        };
        let local = Some("localhost:8080");
        for pairs in [
            &[][..],
            &[("sec-fetch-site", "cross-site"), ("referer", "http://wiki.example/")],
            &[("sec-fetch-site", "same-origin"), ("referer", "http://localhost:8080/runs?x=http://a.example/")],
            &[("sec-fetch-site", "same-origin"), ("origin", "http://127.0.0.1:8080")],
        ] {
            assert!(!refused(Version::HTTP_11, pairs, local), "{pairs:?}");
        }
        for pairs in [
            &[("x-forwarded-for", "192.0.2.7")][..],
            &[("forwarded", "for=192.0.2.7")],
            &[("via", "1.1 proxy")],
            &[("x-real-ip", "127.0.0.1")],
            &[("sec-fetch-site", "same-origin"), ("referer", "https://a.example/")],
            &[("sec-fetch-site", "same-origin"), ("origin", "https://a.example")],
        ] {
            assert!(refused(Version::HTTP_11, pairs, local), "{pairs:?}");
        }
        assert!(refused(Version::HTTP_10, &[], local), "nginx, unless it is told otherwise");
        assert!(refused(Version::HTTP_11, &[], Some("a.example")) && refused(Version::HTTP_11, &[], None));
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
