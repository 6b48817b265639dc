//! Where a request comes from: this machine or beyond, one of our own pages or another site's.

use axum::http::{HeaderMap, StatusCode, Version};
use mailrun_core::public_url::{PublicUrl, is_this_machine};

use crate::{
    client::{Asked, forwarding_header, is_origin_of, name_of, text},
    error::ErrorPage,
};

/// Whether a request that changes something was made by one of our own pages, under the name that the browser knows.
pub(crate) fn is_ours(headers: &HeaderMap, asked: &Asked, public_url: Option<&PublicUrl>) -> bool {
    let (host, scheme) = (asked.host.as_deref(), asked.scheme.as_deref());
    match (text(headers, "sec-fetch-site"), text(headers, "origin")) {
        (None, Some(origin)) if public_url.is_some_and(|url| url.origin() == origin) => true,
        (None, Some(origin)) => host.is_some_and(|host| is_origin_of(origin, host, scheme)),
        (site, origin) => is_same_origin(site, origin, host),
    }
}

pub(crate) fn from_another_site() -> ErrorPage {
    ErrorPage::new(
        StatusCode::FORBIDDEN,
        "Sent from another site",
        "This form was sent by a page of another site, so it was not taken. Open Mailrun and send it from there. \
         Behind a proxy, set web.public_url, or web.trusted_proxies.",
    )
}

/// Why a request may come from beyond this machine, where there is no password: it names another host, or it shows signs of a
/// proxy. Another site can point a name of its own at this machine (DNS rebinding), and a proxy passes on anyone's requests.
pub(crate) fn reached_by_others(version: Version, headers: &HeaderMap, host: Option<&str>) -> Option<ErrorPage> {
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
    // No browser uses HTTP/1.0. nginx does by default, with the configured name of its upstream as the host.
    if version < Version::HTTP_11 {
        return proxied("HTTP/1.0");
    }
    // The browser knows this site under another name than the host that arrived here, so a proxy has replaced it.
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

/// Whether a request that changes something comes from our own pages, or from a client that is no browser, judged by its headers
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

#[cfg(test)]
mod tests {
    use axum::http::{HeaderName, HeaderValue};

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
        assert!(refused(Version::HTTP_10, &[], local), "nginx, unless it is told otherwise");
        assert!(refused(Version::HTTP_11, &[], Some("a.example")) && refused(Version::HTTP_11, &[], None));
    }
}
