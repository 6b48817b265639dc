//! The URL of a mail relay.

use std::{borrow::Cow, fmt, net::IpAddr, path::PathBuf};

use percent_encoding::percent_decode_str;
use secrecy::{ExposeSecret, SecretString};
use url::{Host, Url};

/// A mail server that we hand mail to: `smtp://user:password@host:587` or `smtps://user:password@host:465`.
///
/// Query parameters:
/// - `weight=3`: its share of the mail relative to the other relays, 1 by default;
/// - `auth=plain`, `login` or `xoauth2`: the SASL mechanism; by default `plain` or `login`, whichever the relay offers;
/// - `tls=none`: no encryption; `tls=required` is the default;
/// - `ca_file=/path`: a PEM file with the certificate authorities to trust, instead of the system's;
/// - `pipelining=off`: never sends commands before the replies to the previous ones, for relays that mishandle it;
/// - `chunking=on`: sends the message with its envelope (`BDAT`), where the relay offers it;
/// - `password_file=/path`: a file with the password or token. It is read at each login, since tokens change.
#[derive(Clone)]
pub struct Relay {
    /// Host name or address; IPv6 without brackets.
    pub host: String,
    /// By default 587, or 465 for `smtps`.
    pub port: u16,
    /// How the connection is encrypted.
    pub tls: RelayTls,
    /// The credentials. None: no login.
    pub login: Option<Login>,
    /// The certificate authorities to trust. None: the system's.
    pub ca_file: Option<PathBuf>,
    /// Its share of the mail, at least 1.
    pub weight: u32,
    /// Whether to send commands together, if the relay offers that (RFC 2920).
    pub pipelining: bool,
    /// Whether to send messages in chunks, if the relay offers that (RFC 3030).
    pub chunking: bool,
}

/// How a connection is encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RelayTls {
    /// From the first byte.
    Implicit,
    /// With STARTTLS, which is required.
    StartTls,
    /// Not encrypted.
    None,
}

/// Credentials for a relay.
#[derive(Clone, Debug)]
pub struct Login {
    /// The user.
    pub user: String,
    /// The source of the password or token.
    pub password: Password,
    /// The SASL mechanism. None: chosen from those that the relay offers.
    pub mechanism: Option<Mechanism>,
}

/// The source of a password.
#[derive(Clone, Debug)]
pub enum Password {
    /// In the settings.
    Here(SecretString),
    /// In a file, which is read at each login. A trailing line break is ignored.
    File(PathBuf),
}

/// A SASL mechanism.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mechanism {
    /// User and password in one message (RFC 4616).
    Plain,
    /// User and password in separate messages, for old servers.
    Login,
    /// An OAuth 2 token, for large providers.
    XOAuth2,
}

/// Omits the credentials.
impl fmt::Debug for Relay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Relay({self}, {:?}, weight {})", self.tls, self.weight)
    }
}

/// Host and port, for logs.
impl fmt::Display for Relay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl Relay {
    /// Parses a relay URL.
    ///
    /// # Errors
    /// What is wrong. The text quotes nothing from the URL, since any part of it may be the password.
    pub fn parse(url: &SecretString) -> Result<Self, &'static str> {
        let url = Url::parse(url.expose_secret()).map_err(
            |_| "is not a URL: write it as smtp://user:password@host:587, with special characters of the password such as %40",
        )?;
        let (mut tls, port) = match url.scheme() {
            "smtp" => (RelayTls::StartTls, 587),
            "smtps" => (RelayTls::Implicit, 465),
            _ => return Err("starts with neither smtp:// nor smtps://"),
        };
        let host = match url.host() {
            Some(Host::Ipv6(address)) => address.to_string(),
            Some(host) if host.to_string().is_ascii() => host.to_string(),
            Some(_) => return Err("has a host that is not ASCII: write it in its xn-- form"),
            None => return Err("has no host"),
        };
        if !matches!(url.path(), "" | "/") || url.fragment().is_some() {
            return Err(
                "has a path or fragment: after host and port only ?weight=, auth=, tls=, pipelining=, chunking=, ca_file=, password_file= may follow",
            );
        }
        let (mut weight, mut mechanism, mut ca_file, mut password_file) = (1, None, None, None);
        let (mut pipelining, mut chunking) = (true, false);
        for (key, value) in url.query_pairs() {
            match (&*key, &*value) {
                ("weight", value) => {
                    let read = value.parse().ok().filter(|weight| (1..=1_000).contains(weight));
                    weight = read.ok_or("has a weight outside 1 to 1000")?;
                }
                ("auth", "plain") => mechanism = Some(Mechanism::Plain),
                ("auth", "login") => mechanism = Some(Mechanism::Login),
                ("auth", "xoauth2") => mechanism = Some(Mechanism::XOAuth2),
                ("auth", _) => return Err("has an auth other than plain, login or xoauth2"),
                ("tls", "required") => {}
                ("tls", "none") if tls == RelayTls::Implicit => return Err("has both smtps:// and tls=none"),
                ("tls", "none") => tls = RelayTls::None,
                ("tls", _) => return Err("has a tls other than required or none"),
                ("pipelining", value) => {
                    pipelining = on_or_off(value).ok_or("has a pipelining other than on or off")?;
                }
                ("chunking", value) => chunking = on_or_off(value).ok_or("has a chunking other than on or off")?,
                ("ca_file", path) => ca_file = Some(PathBuf::from(path)),
                ("password_file", path) => password_file = Some(PathBuf::from(path)),
                _ => {
                    return Err(
                        "has an unknown parameter: only weight, auth, tls, pipelining, chunking, ca_file and password_file are known",
                    );
                }
            }
        }
        let decoded = |text: &str| percent_decode_str(text).decode_utf8().map(Cow::into_owned).ok();
        let user = decoded(url.username()).ok_or("has a user that is not UTF-8")?;
        let password = match (url.password(), password_file) {
            (Some(_), Some(_)) => return Err("has both a password and a password_file"),
            (Some(password), None) => {
                Some(Password::Here(decoded(password).ok_or("has a password that is not UTF-8")?.into()))
            }
            (None, file) => file.map(Password::File),
        };
        let login = match (user.is_empty(), password) {
            (true, None) if mechanism.is_some() => return Err("has an auth, but no user"),
            (true, None) => None,
            (false, Some(password)) => Some(Login { user, password, mechanism }),
            (true, Some(_)) => return Err("has a password, but no user"),
            (false, None) => return Err("has a user, but neither a password nor a password_file"),
        };
        Ok(Self { host, port: url.port().unwrap_or(port), tls, login, ca_file, weight, pipelining, chunking })
    }

    /// Whether mail to it can't be read on the way: the connection is encrypted, or stays on this machine.
    #[must_use]
    pub fn is_private(&self) -> bool {
        let loopback = self.host.parse::<IpAddr>().map_or(self.host == "localhost", |address| address.is_loopback());
        self.tls != RelayTls::None || loopback
    }
}

fn on_or_off(value: &str) -> Option<bool> {
    match value {
        "on" => Some(true),
        "off" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(url: &str) -> Result<Relay, &'static str> {
        Relay::parse(&url.into())
    }

    #[test]
    fn parses_every_part_of_a_url() {
        let relay = parse("smtp://ann%40x.org:p%2fw@mail.example:2525?weight=3&auth=login&ca_file=/a").unwrap();
        assert_eq!((relay.host.as_str(), relay.port, relay.weight), ("mail.example", 2525, 3));
        assert_eq!((relay.pipelining, relay.chunking), (true, false), "by default");
        let other = parse("smtp://mail.example?pipelining=off&chunking=on").unwrap();
        assert_eq!((other.pipelining, other.chunking), (false, true));
        assert_eq!((relay.tls, relay.ca_file), (RelayTls::StartTls, Some("/a".into())));
        let login = relay.login.unwrap();
        assert_eq!((login.user.as_str(), login.mechanism), ("ann@x.org", Some(Mechanism::Login)));
        assert!(matches!(login.password, Password::Here(password) if password.expose_secret() == "p/w"));
        let relay = parse("smtps://u@[::1]?auth=xoauth2&password_file=/run/token").unwrap();
        assert_eq!((relay.to_string().as_str(), relay.tls), ("[::1]:465", RelayTls::Implicit));
        assert!(matches!(relay.login.unwrap().password, Password::File(_)));
        let relay = parse("smtp://localhost?tls=none").unwrap();
        assert!(relay.login.is_none() && relay.port == 587 && relay.is_private());
        assert!(!parse("smtp://mail.example?tls=none").unwrap().is_private());
    }

    #[test]
    fn errors_do_not_quote_the_password() {
        for url in [
            "hunter2",
            "http://u:hunter2@h",
            "smtp://u:hunter2@h/path",
            "smtp://u:hunter2@h?tls=maybe",
            "smtps://u:hunter2@h?tls=none",
            "smtp://u:hunter2@h?hunter2=1",
            "smtp://u:hunter2@h?weight=0",
            "smtp://u:hunter2@h?pipelining=hunter2",
            "smtp://u:hunter2@h?chunking=",
            "smtp://u:hunter2@h?auth=hunter2",
            "smtp://u:hunter2@h?password_file=/x",
            "smtp://:hunter2@h",
            "smtp://u@h",
            "smtp://u:hunter2@h:99999",
            "smtp://",
        ] {
            let reason = parse(url).unwrap_err();
            assert!(!reason.contains("hunter2"), "{reason}");
        }
        assert!(!format!("{:?}", parse("smtp://u:hunter2@h").unwrap()).contains("hunter2"));
    }
}
