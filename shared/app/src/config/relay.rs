//! The URL of a mail relay.

use std::{borrow::Cow, fmt, net::IpAddr, path::PathBuf};

use percent_encoding::percent_decode_str;
use secrecy::{ExposeSecret, SecretString};
use url::{Host, Url};

/// A mail server that takes our mail on: `smtp://user:password@host:587` or `smtps://user:password@host:465`.
///
/// After a question mark may follow, joined by `&`:
/// - `weight=3`: how large its share of the mail is, beside the others'; 1 without it;
/// - `auth=plain`, `login` or `xoauth2`: how to log in; without it, `plain` or `login`, whichever the relay offers;
/// - `tls=none`: speak unencrypted; `tls=required` is what goes without saying;
/// - `ca_file=/path`: a PEM file with the authorities to trust, instead of the system's;
/// - `password_file=/path`: a file with the password or token, read at each login, since tokens change.
#[derive(Clone)]
pub struct Relay {
    /// Its name or address; IPv6 without brackets.
    pub host: String,
    /// 587, or 465 for `smtps`, unless the URL says otherwise.
    pub port: u16,
    /// How the connection is encrypted.
    pub tls: RelayTls,
    /// How to log in; none: not at all.
    pub login: Option<Login>,
    /// The authorities to trust; none: the system's.
    pub ca_file: Option<PathBuf>,
    /// Its share of the mail, from 1.
    pub weight: u32,
}

/// How a connection is encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RelayTls {
    /// From its first byte.
    Implicit,
    /// After STARTTLS, and not at all without it.
    StartTls,
    /// Not at all.
    None,
}

/// How to log in.
#[derive(Clone, Debug)]
pub struct Login {
    /// The user.
    pub user: String,
    /// Where the password is, or the token.
    pub password: Password,
    /// The way; none: as the relay offers.
    pub mechanism: Option<Mechanism>,
}

/// Where a password is.
#[derive(Clone, Debug)]
pub enum Password {
    /// Here.
    Here(SecretString),
    /// In a file, which is read at each login. A line break at its end is no part of it.
    File(PathBuf),
}

/// A way to log in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mechanism {
    /// User and password at once (RFC 4616).
    Plain,
    /// One after the other, as old servers ask for them.
    Login,
    /// A token of OAuth 2, as large providers ask for it.
    XOAuth2,
}

/// Without what is secret.
impl fmt::Debug for Relay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Relay({self}, {:?}, weight {})", self.tls, self.weight)
    }
}

/// What it is called in logs: host and port.
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
    /// Reads a URL.
    ///
    /// # Errors
    /// What is wrong with it, without a word of what it says: it may be the password.
    pub fn parse(url: &SecretString) -> Result<Self, &'static str> {
        let url = Url::parse(url.expose_secret()).map_err(
            |_| "is no URL: write it as smtp://user:password@host:587, and special characters of the password as %40",
        )?;
        let (mut tls, port) = match url.scheme() {
            "smtp" => (RelayTls::StartTls, 587),
            "smtps" => (RelayTls::Implicit, 465),
            _ => return Err("begins with neither smtp:// nor smtps://"),
        };
        let host = match url.host() {
            Some(Host::Ipv6(address)) => address.to_string(),
            Some(host) if host.to_string().is_ascii() => host.to_string(),
            Some(_) => return Err("has a host that is not ASCII: write it in its xn-- form"),
            None => return Err("has no host"),
        };
        if !matches!(url.path(), "" | "/") || url.fragment().is_some() {
            return Err(
                "has something after its host and port: only ?weight=, auth=, tls=, ca_file=, password_file= may",
            );
        }
        let (mut weight, mut mechanism, mut ca_file, mut password_file) = (1, None, None, None);
        for (key, value) in url.query_pairs() {
            match (&*key, &*value) {
                ("weight", value) => {
                    let read = value.parse().ok().filter(|weight| (1..=1_000).contains(weight));
                    weight = read.ok_or("has a weight that is not from 1 to 1000")?;
                }
                ("auth", "plain") => mechanism = Some(Mechanism::Plain),
                ("auth", "login") => mechanism = Some(Mechanism::Login),
                ("auth", "xoauth2") => mechanism = Some(Mechanism::XOAuth2),
                ("auth", _) => return Err("has an auth that is neither plain, login nor xoauth2"),
                ("tls", "required") => {}
                ("tls", "none") if tls == RelayTls::Implicit => return Err("has both smtps:// and tls=none"),
                ("tls", "none") => tls = RelayTls::None,
                ("tls", _) => return Err("has a tls that is neither required nor none"),
                ("ca_file", path) => ca_file = Some(PathBuf::from(path)),
                ("password_file", path) => password_file = Some(PathBuf::from(path)),
                _ => return Err("has an unknown setting: only weight, auth, tls, ca_file and password_file are known"),
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
            (true, None) if mechanism.is_some() => return Err("has an auth, and no user"),
            (true, None) => None,
            (false, Some(password)) => Some(Login { user, password, mechanism }),
            (true, Some(_)) => return Err("has a password, and no user"),
            (false, None) => return Err("has a user, and neither a password nor a password_file"),
        };
        Ok(Self { host, port: url.port().unwrap_or(port), tls, login, ca_file, weight })
    }

    /// Whether nobody between us and it can read along: it is encrypted, or on this machine.
    #[must_use]
    pub fn is_private(&self) -> bool {
        let loopback = self.host.parse::<IpAddr>().map_or(self.host == "localhost", |address| address.is_loopback());
        self.tls != RelayTls::None || loopback
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(url: &str) -> Result<Relay, &'static str> {
        Relay::parse(&url.into())
    }

    #[test]
    fn a_url_says_all_there_is_to_know() {
        let relay = parse("smtp://ann%40x.org:p%2fw@mail.example:2525?weight=3&auth=login&ca_file=/a").unwrap();
        assert_eq!((relay.host.as_str(), relay.port, relay.weight), ("mail.example", 2525, 3));
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
    fn what_is_wrong_is_said_without_the_password() {
        for url in [
            "hunter2",
            "http://u:hunter2@h",
            "smtp://u:hunter2@h/path",
            "smtp://u:hunter2@h?tls=maybe",
            "smtps://u:hunter2@h?tls=none",
            "smtp://u:hunter2@h?hunter2=1",
            "smtp://u:hunter2@h?weight=0",
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
