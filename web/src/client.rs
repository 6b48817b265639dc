//! Who sent a request, and to which host: from the connection, or from the headers of a trusted proxy.

use std::net::{IpAddr, SocketAddr};

use axum::{
    extract::{ConnectInfo, Request},
    http::{HeaderMap, Uri, uri::Authority},
};
use mailrun_app::config::Proxy;

/// Headers that only proxies send, in addition to those that begin with `x-forwarded-` or `x-original-`.
const FORWARDING: [&str; 11] = [
    "forwarded",
    "via",
    "x-real-ip",
    "x-client-ip",
    "x-cluster-client-ip",
    "x-envoy-external-address",
    "x-amzn-trace-id",
    "true-client-ip",
    "cf-connecting-ip",
    "cdn-loop",
    "fastly-client-ip",
];

/// The first header that shows that a request came through a proxy.
pub(crate) fn forwarding_header(headers: &HeaderMap) -> Option<&str> {
    headers
        .keys()
        .map(axum::http::HeaderName::as_str)
        .find(|name| name.starts_with("x-forwarded-") || name.starts_with("x-original-") || FORWARDING.contains(name))
}

/// The client of a request and the address it was sent to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ConnectionInfo {
    /// The client's address, or that of the nearest untrusted proxy.
    pub(crate) client: IpAddr,
    /// The host, with the port if one was given.
    pub(crate) host: Option<String>,
    /// `http` or `https`, if a trusted proxy reported it.
    pub(crate) scheme: Option<String>,
}

/// A header's value. An unreadable value must not pass for a missing one.
pub(crate) fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).map(|value| value.to_str().unwrap_or("unreadable"))
}

/// The host in the request itself, with the port if one was given.
pub(crate) fn host_of<'a>(uri: &'a Uri, headers: &'a HeaderMap) -> Option<&'a str> {
    uri.authority().map(Authority::as_str).or_else(|| text(headers, "host"))
}

impl ConnectionInfo {
    /// Reads `request`, using the headers of `trusted` proxies.
    pub(crate) fn by(request: &Request, trusted: &[Proxy]) -> Self {
        let peer = request.extensions().get::<ConnectInfo<SocketAddr>>().map(|peer| peer.0.ip());
        // The server always sets it. Without it, no proxy is trusted.
        let peer = peer.unwrap_or(IpAddr::from([0; 4]));
        Self::of(peer, host_of(request.uri(), request.headers()), request.headers(), trusted)
    }

    /// `host` is the host in the request itself; `peer` is the address of the connection.
    pub(crate) fn of(peer: IpAddr, host: Option<&str>, headers: &HeaderMap, trusted: &[Proxy]) -> Self {
        let is_trusted = |address: IpAddr| trusted.iter().any(|proxy| proxy.contains(address));
        let direct = Self { client: peer.to_canonical(), host: host.map(str::to_owned), scheme: None };
        if !is_trusted(peer) {
            return direct;
        }
        let forwarded = Forwarded::read(headers);
        // Each proxy appends the address of its peer. The first untrusted one from the right may have forged everything left of it.
        let chain = forwarded.clients.iter().rev().map_while(|client| *client);
        let mut client = direct.client;
        for address in chain {
            client = address;
            if !is_trusted(address) {
                break;
            }
        }
        let host = forwarded.host.map(|host| match forwarded.port {
            Some(port) if port_of(&host).is_none() => format!("{host}:{port}"),
            _ => host,
        });
        Self { client, host: host.or(direct.host), scheme: forwarded.scheme }
    }
}

/// The contents of the forwarding headers.
#[derive(Debug, Default)]
struct Forwarded {
    /// From the original client to the nearest proxy's peer; none for an entry that cannot be parsed.
    clients: Vec<Option<IpAddr>>,
    host: Option<String>,
    port: Option<u16>,
    scheme: Option<String>,
}

impl Forwarded {
    /// From the `X-Forwarded-…` headers, or without any of them from `Forwarded` (RFC 7239).
    fn read(headers: &HeaderMap) -> Self {
        let all = |name: &str| {
            let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
            values.flat_map(|value| value.split(',')).map(|part| part.trim().to_owned()).collect::<Vec<_>>()
        };
        // With several proxies, the first value is that of the proxy the client connected to.
        let first = |name: &str| all(name).into_iter().find(|part| !part.is_empty());
        let (clients, host) = (all("x-forwarded-for"), first("x-forwarded-host"));
        let (port, scheme) = (first("x-forwarded-port"), first("x-forwarded-proto"));
        if clients.is_empty() && host.is_none() && port.is_none() && scheme.is_none() {
            return Self::standard(headers);
        }
        Self {
            clients: clients.iter().map(|client| address(client)).collect(),
            host,
            port: port.and_then(|port| port.parse().ok()),
            scheme: scheme.map(|scheme| scheme.to_ascii_lowercase()),
        }
    }

    fn standard(headers: &HeaderMap) -> Self {
        let mut read = Self::default();
        for value in headers.get_all("forwarded").iter().filter_map(|value| value.to_str().ok()) {
            for element in split_unquoted(value, ',') {
                for pair in split_unquoted(element, ';') {
                    let Some((name, value)) = pair.split_once('=') else { continue };
                    let value = value.trim().trim_matches('"');
                    match name.trim().to_ascii_lowercase().as_str() {
                        "for" => read.clients.push(address(value)),
                        "host" => read.host = read.host.or_else(|| Some(value.to_owned())),
                        "proto" => read.scheme = read.scheme.or_else(|| Some(value.to_ascii_lowercase())),
                        _ => {}
                    }
                }
            }
        }
        read
    }
}

/// Parses an address with or without a port, with or without brackets.
fn address(text: &str) -> Option<IpAddr> {
    let bare = match text.strip_prefix('[') {
        Some(rest) => rest.split_once(']').map(|(address, _)| address)?,
        None => text,
    };
    let address = bare.parse::<IpAddr>().ok().or_else(|| bare.rsplit_once(':')?.0.parse().ok());
    address.map(|address| address.to_canonical())
}

fn split_unquoted(text: &str, at: char) -> impl Iterator<Item = &str> {
    let mut quoted = false;
    text.split(move |character| {
        quoted ^= character == '"';
        character == at && !quoted
    })
}

fn port_of(host: &str) -> Option<u16> {
    let (name, port) = host.rsplit_once(':')?;
    // An IPv6 address is in brackets.
    if name.contains(':') && !name.ends_with(']') { None } else { port.parse().ok() }
}

/// Whether a browser's `Origin` names this host. `scheme` is the scheme of the request, if known.
pub(crate) fn is_origin_of(origin: &str, host: &str, scheme: Option<&str>) -> bool {
    let Some((from_scheme, from)) = origin.split_once("://") else {
        return false;
    };
    let Some(usual) = usual_port(from_scheme) else {
        return false;
    };
    let scheme = scheme.unwrap_or(from_scheme);
    // Without an explicit port, ours is the default port of the request's scheme.
    let (Some(from_port), Some(port)) = (Some(port_of(from).unwrap_or(usual)), port_of(host).or(usual_port(scheme)))
    else {
        return false;
    };
    scheme.eq_ignore_ascii_case(from_scheme) && from_port == port && name_of(from).eq_ignore_ascii_case(name_of(host))
}

fn usual_port(scheme: &str) -> Option<u16> {
    match scheme.to_ascii_lowercase().as_str() {
        "http" => Some(80),
        "https" => Some(443),
        _ => None,
    }
}

/// The host without its port.
pub(crate) fn name_of(host: &str) -> &str {
    match port_of(host) {
        Some(_) => host.rsplit_once(':').map_or(host, |(name, _)| name),
        None => host,
    }
}

#[cfg(test)]
mod tests {
    use axum::http::{HeaderName, HeaderValue};
    use proptest::prelude::*;

    use super::*;

    fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
        let pair =
            |(name, value): &(&str, &str)| (name.parse::<HeaderName>().unwrap(), HeaderValue::from_str(value).unwrap());
        pairs.iter().map(pair).collect()
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn info(peer: &str, pairs: &[(&str, &str)]) -> (String, Option<String>, Option<String>) {
        let trusted = ["10.0.0.0/8".to_owned(), "::1".to_owned()].map(|text| Proxy::try_from(text).unwrap());
        let info = ConnectionInfo::of(ip(peer), Some("internal:8080"), &headers(pairs), &trusted);
        (info.client.to_string(), info.host, info.scheme)
    }

    #[test]
    fn ignores_forwarding_headers_of_an_untrusted_peer() {
        let pairs = [("x-forwarded-for", "1.1.1.1"), ("x-forwarded-host", "a.example"), ("x-forwarded-proto", "https")];
        assert_eq!(info("192.0.2.7", &pairs), ("192.0.2.7".into(), Some("internal:8080".into()), None));
    }

    #[test]
    fn a_trusted_proxy_sets_host_port_scheme_and_client() {
        let pairs = [
            ("x-forwarded-for", "192.0.2.7"),
            ("x-forwarded-host", "a.example"),
            ("x-forwarded-port", "8443"),
            ("x-forwarded-proto", "HTTPS"),
        ];
        let expected = ("192.0.2.7".to_owned(), Some("a.example:8443".to_owned()), Some("https".to_owned()));
        assert_eq!(info("10.0.0.1", &pairs), expected);
        let standard = [("forwarded", r#"for="192.0.2.7:4711";host="a.example:8443";proto=https, for=10.0.0.9"#)];
        assert_eq!(info("10.0.0.1", &standard), expected);
        assert_eq!(info("10.0.0.1", &[]), ("10.0.0.1".into(), Some("internal:8080".into()), None));
    }

    #[test]
    fn the_client_is_the_nearest_untrusted_address() {
        let client = |chain: &str| info("10.0.0.1", &[("x-forwarded-for", chain)]).0;
        assert_eq!(client("6.6.6.6, 192.0.2.7, 10.0.0.2"), "192.0.2.7");
        assert_eq!(client("10.0.0.3, 10.0.0.2"), "10.0.0.3");
        assert_eq!(client("6.6.6.6, unknown, 10.0.0.2"), "10.0.0.2");
        assert_eq!(client("[2001:db8::1]:99"), "2001:db8::1");
        assert_eq!(client("192.0.2.7:99"), "192.0.2.7");
        assert_eq!(client(""), "10.0.0.1");
    }

    #[test]
    fn recognises_common_forwarding_headers() {
        for name in ["Forwarded", "Via", "X-Forwarded-For", "X-Forwarded-Whatever", "X-Real-IP", "CF-Connecting-IP"] {
            assert!(forwarding_header(&headers(&[(name, "")])).is_some(), "{name}");
        }
        assert_eq!(
            forwarding_header(&headers(&[("host", "localhost"), ("x-requested-with", "x"), ("forward", "x")])),
            None
        );
    }

    #[test]
    fn compares_the_origin_with_port_and_scheme() {
        for (origin, host, scheme) in [
            ("https://a.example", "a.example", Some("https")),
            ("https://a.example", "a.example:443", None),
            ("https://a.example:8443", "a.example:8443", Some("https")),
            ("http://A.example:80", "a.example", Some("http")),
            ("https://a.example", "a.example", None),
            ("http://[::1]:8080", "[::1]:8080", None),
            ("http://[::1]", "[::1]", None),
        ] {
            assert!(is_origin_of(origin, host, scheme), "{origin} {host}");
        }
        for (origin, host, scheme) in [
            ("http://a.example", "a.example", Some("https")),
            ("https://a.example", "a.example:8443", None),
            ("https://a.example:8443", "a.example", Some("https")),
            ("https://b.example", "a.example", None),
            ("null", "a.example", None),
            ("file://a.example", "a.example", None),
            ("https://a.example", "a.example", Some("file")),
        ] {
            assert!(!is_origin_of(origin, host, scheme), "{origin} {host}");
        }
    }

    proptest! {
        #[test]
        fn any_headers_are_parsed(
            values in prop::collection::vec((prop::sample::select(&[
                "forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-port", "x-forwarded-proto",
            ][..]), "[ -~]{0,40}"), 0..5),
            host in prop::option::of("[ -~]{0,20}"),
        ) {
            let pairs: Vec<_> = values.iter().map(|(name, value)| (*name, value.as_str())).collect();
            let trusted = [Proxy::try_from("127.0.0.1".to_owned()).unwrap()];
            let info = ConnectionInfo::of(ip("127.0.0.1"), host.as_deref(), &headers(&pairs), &trusted);
            let _ = is_origin_of("https://a.example", info.host.as_deref().unwrap_or_default(), info.scheme.as_deref());
        }
    }
}
