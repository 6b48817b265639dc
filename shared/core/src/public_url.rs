//! The public address of the pages, as used in links. It is validated once, when the settings are read.

use std::{fmt, net::IpAddr};

use serde::Deserialize;
use url::Url;

/// An `http` or `https` origin without a trailing slash, so that a path can be appended. It has no path of its own, since the pages
/// link to each other from the root.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct PublicUrl(String);

/// Why an address can't be the public one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the public address must look like https://invites.example.org: https:// (or http://) and a host, without a login, path or \
     query; give the pages a host name of their own"
)]
pub struct NotPublic;

impl TryFrom<String> for PublicUrl {
    type Error = NotPublic;

    fn try_from(text: String) -> Result<Self, NotPublic> {
        let url = Url::parse(text.trim()).map_err(|_| NotPublic)?;
        let plain = matches!(url.scheme(), "http" | "https")
            && url.has_host()
            && url.username().is_empty()
            && url.password().is_none()
            && url.path().trim_matches('/').is_empty()
            && url.query().is_none()
            && url.fragment().is_none();
        if plain { Ok(Self(url.as_str().trim_end_matches('/').to_owned())) } else { Err(NotPublic) }
    }
}

impl PublicUrl {
    /// The URL of a page; `path` starts with a slash.
    #[must_use]
    pub fn page(&self, path: &str) -> String {
        format!("{}{path}", self.0)
    }

    /// Scheme, host and port in the form of the `Origin` header: without the scheme's default port.
    #[must_use]
    pub fn origin(&self) -> &str {
        &self.0
    }

    /// Whether it names this machine, so that others can't follow its links.
    #[must_use]
    pub fn is_local(&self) -> bool {
        Url::parse(&self.0).is_ok_and(|url| is_this_machine(url.host_str().unwrap_or_default()))
    }
}

/// Whether a host name or address, with or without brackets, is this machine's own.
#[must_use]
pub fn is_this_machine(host: &str) -> bool {
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    bare.eq_ignore_ascii_case("localhost")
        || bare.parse().is_ok_and(|address: IpAddr| address.to_canonical().is_loopback())
}

impl fmt::Display for PublicUrl {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<String, NotPublic> {
        PublicUrl::try_from(text.to_owned()).map(|url| url.page("/u/x"))
    }

    #[test]
    fn trailing_slashes_are_ignored() {
        for text in ["https://a.example", "https://a.example/", " HTTPS://A.example// "] {
            assert_eq!(read(text).as_deref(), Ok("https://a.example/u/x"), "{text}");
        }
        assert_eq!(read("http://a.example:8080/").as_deref(), Ok("http://a.example:8080/u/x"));
    }

    #[test]
    fn the_origin_is_in_the_form_that_browsers_send() {
        let url = PublicUrl::try_from("HTTPS://A.example:443/".to_owned()).unwrap();
        assert_eq!(url.origin(), "https://a.example");
    }

    #[test]
    fn only_this_machine_is_local() {
        let local = |text: &str| PublicUrl::try_from(text.to_owned()).unwrap().is_local();
        for url in ["http://localhost:8080", "http://127.0.0.1", "http://127.9.9.9:1", "http://[::1]:8080"] {
            assert!(local(url), "{url}");
        }
        for url in ["https://a.example", "http://192.0.2.1", "http://localhost.example", "http://0.0.0.0:8080"] {
            assert!(!local(url), "{url}");
        }
    }

    #[test]
    fn urls_other_than_a_plain_origin_are_refused() {
        for text in [
            "a.example",
            "ftp://a.example",
            "https://",
            "https://a.example/mail",
            "https://a.example/mail/",
            "https://a.example/?x",
            "https://a.example/#x",
            "https://u:p@a.example",
            "mailto:a@x.org",
        ] {
            assert_eq!(read(text), Err(NotPublic), "{text}");
        }
    }
}
