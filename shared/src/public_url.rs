//! The address under which others reach the pages, as it stands in links: checked once, when the settings are read.

use std::fmt;

use serde::Deserialize;
use url::Url;

/// An `http` or `https` address without query and fragment, and without a slash at its end: a path can be put behind it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct PublicUrl(String);

/// Why an address can't be the public one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the public address is like https://invites.example.org: it begins with https:// (or http://), and has neither a login nor a query"
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
            && url.query().is_none()
            && url.fragment().is_none();
        if plain { Ok(Self(url.as_str().trim_end_matches('/').to_owned())) } else { Err(NotPublic) }
    }
}

impl PublicUrl {
    /// The address of a page; `path` begins with a slash.
    #[must_use]
    pub fn page(&self, path: &str) -> String {
        format!("{}{path}", self.0)
    }
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
    fn slashes_at_the_end_make_no_difference() {
        for text in ["https://a.example", "https://a.example/", " HTTPS://A.example// "] {
            assert_eq!(read(text).as_deref(), Ok("https://a.example/u/x"), "{text}");
        }
        assert_eq!(read("http://a.example:8080/mail/").as_deref(), Ok("http://a.example:8080/mail/u/x"));
    }

    #[test]
    fn what_is_no_plain_address_is_refused() {
        for text in [
            "a.example",
            "ftp://a.example",
            "https://",
            "https://a.example/?x",
            "https://a.example/#x",
            "https://u:p@a.example",
            "mailto:a@x.org",
        ] {
            assert_eq!(read(text), Err(NotPublic), "{text}");
        }
    }
}
