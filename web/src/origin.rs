//! Where a request comes from: this machine or another one, one of our own pages or another site.

use axum::http::{HeaderMap, StatusCode, Version};
use mailrun_core::public_url::{PublicUrl, is_this_machine};

use crate::{
    client::{ConnectionInfo, forwarding_header, is_origin_of, name_of, text},
    error::ErrorPage,
};

/// Whether one of our own pages sent a request that changes something, under the host that the browser knows.
pub(crate) fn is_ours(headers: &HeaderMap, info: &ConnectionInfo, public_url: Option<&PublicUrl>) -> bool {
    let (host, scheme) = (info.host.as_deref(), info.scheme.as_deref());
    match (text(headers, "sec-fetch-site"), text(headers, "origin")) {
        (None, Some(origin)) if public_url.is_some_and(|url| url.origin() == origin) => true,
        (None, Some(origin)) => host.is_some_and(|host| is_origin_of(origin, host, scheme)),
        (site, origin) => is_same_origin(site, origin, host),
    }
}

pub(crate) fn from_another_site() -> ErrorPage {
    ErrorPage::new(
        StatusCode::FORBIDDEN,
        "Request from another site",
        "A page of another site sent this form, so it was not accepted. Open Mailrun and send it from there. \
        Behind a proxy, set web.public_url or web.trusted_proxies.",
    )
}

/// Without a password: why a request may come from another machine. It names another host, or came through a proxy. Another
/// site can point its own name at this machine (DNS rebinding), and a proxy forwards anyone's requests.
pub(crate) fn reached_by_others(version: Version, headers: &HeaderMap, host: Option<&str>) -> Option<ErrorPage> {
    let refused = |title, why: String| {
        let message = format!(
            "Without a password, these pages are available only on this machine. {why} Set web.password to allow other clients."
        );
        Some(ErrorPage::new(StatusCode::FORBIDDEN, title, message))
    };
    if !host.is_some_and(is_local) {
        return refused("Host not allowed", "The request's host is not localhost.".to_owned());
    }
    let proxied = |sign: &str| refused("Proxy not allowed", format!("The request came through a proxy ({sign})."));
    if let Some(name) = forwarding_header(headers) {
        return proxied(name);
    }
    // No browser uses HTTP/1.0. nginx does by default, with the configured name of its upstream as the host.
    if version < Version::HTTP_11 {
        return proxied("HTTP/1.0");
    }
    // The browser's name for this site is not the host that arrived here, so a proxy has replaced it.
    let is_elsewhere = |url: &str| {
        url.split_once("://").is_some_and(|(_, rest)| !is_local(rest.split(['/', '?', '#']).next().unwrap_or_default()))
    };
    if text(headers, "sec-fetch-site") == Some("same-origin")
        && ["origin", "referer"].iter().any(|name| text(headers, name).is_some_and(is_elsewhere))
    {
        return proxied("the page has another host");
    }
    None
}

/// Whether a request that changes something comes from our own pages or from a client other than a browser, by its headers
/// `Sec-Fetch-Site`, `Origin` and `Host`.
#[must_use]
pub fn is_same_origin(fetch_site: Option<&str>, origin: Option<&str>, host: Option<&str>) -> bool {
    match (fetch_site, origin) {
        // `none`: the user initiated it, not a page.
        (Some(site), _) => matches!(site, "same-origin" | "none"),
        (None, Some(origin)) => host.is_some_and(|host| is_origin_of(origin, host, None)),
        (None, None) => true,
    }
}

/// Whether a `Host` names this machine, with or without a port.
#[must_use]
pub fn is_local(host: &str) -> bool {
    // An IPv6 address in a `Host` is in brackets.
    is_this_machine(name_of(host)) && !host.starts_with(':')
}

#[cfg(test)]
mod tests {
    use axum::http::{HeaderName, HeaderValue};

    use super::*;

    #[test]
    fn accepts_forms_from_our_own_pages() {
        let host = Some("localhost:8080");
        assert!(is_same_origin(Some("same-origin"), Some("http://localhost:8080"), host));
        assert!(is_same_origin(Some("none"), None, host));
        assert!(is_same_origin(None, Some("http://LOCALHOST:8080"), host));
        assert!(is_same_origin(None, Some("https://mail.example.org"), Some("mail.example.org")));
        assert!(is_same_origin(None, Some("https://mail.example.org"), Some("mail.example.org:443")));
    }

    #[test]
    fn refuses_forms_from_other_sites() {
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
    fn accepts_requests_of_other_clients_than_browsers() {
        assert!(is_same_origin(None, None, Some("localhost:8080")));
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
    fn refuses_proxied_requests_without_a_password() {
        let refused = |version, pairs: &[(&'static str, &str)], host| {
            let pair = |(name, value): &(&'static str, &str)| {
                (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap())
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
        assert!(refused(Version::HTTP_10, &[], local), "nginx by default");
        assert!(refused(Version::HTTP_11, &[], Some("a.example")) && refused(Version::HTTP_11, &[], None));
    }
}
