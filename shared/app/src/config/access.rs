//! Access to the pages: what the settings must contain before they are served.

use std::net::IpAddr;

use ipnet::IpNet;
use secrecy::ExposeSecret as _;
use serde::Deserialize;

use super::{ConfigError, InvalidSetting, WebConfig};

/// Shorter passwords can be guessed despite the limit on failed logins.
const MIN_PASSWORD_CHARS: usize = 8;

/// A proxy, or a network of proxies: `10.0.0.5`, `10.0.0.0/8`, `fd00::/8`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Proxy(IpNet);

/// The text is neither an IP address nor a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a trusted proxy is an IP address or a network, such as 10.0.0.5 or 10.0.0.0/8; names are not looked up")]
pub struct NoProxy;

impl TryFrom<String> for Proxy {
    type Error = NoProxy;

    fn try_from(text: String) -> Result<Self, NoProxy> {
        let text = text.trim();
        let network = text.parse().or_else(|_| text.parse().map(|address: IpAddr| IpNet::from(address.to_canonical())));
        network.map(Self).map_err(|_| NoProxy)
    }
}

impl Proxy {
    /// Whether the address belongs to it.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        self.0.contains(&address.to_canonical())
    }
}

impl WebConfig {
    /// A configured password must not be too short. An address that others can reach needs a password.
    pub(super) fn check_password(&self) -> Result<(), ConfigError> {
        let wrong = |key, reason: &str| Err(InvalidSetting::new(key, reason).into());
        match &self.password {
            // An empty password is a mistake, for instance an unset variable: it must not mean that no password is needed.
            Some(password) if password.expose_secret().trim().chars().count() < MIN_PASSWORD_CHARS => wrong(
                "web.password",
                "it is empty or too short: at least 8 characters, for instance from `openssl rand -hex 24`; \
                 leave it out for no login on this machine",
            ),
            None if !self.listen.ip().to_canonical().is_loopback() => {
                wrong("web.listen", "others can reach this address: set web.password as well, or listen on 127.0.0.1")
            }
            _ => Ok(()),
        }
    }

    /// Whether the pages may be served with these settings: any setting that exposes them to others needs a password. Only the web
    /// process checks this, since a worker uses the public address without the password.
    ///
    /// # Errors
    /// The setting that needs a password.
    pub fn check_access(&self) -> Result<(), ConfigError> {
        self.check_password()?;
        if self.password.is_some() {
            return Ok(());
        }
        let needs = |key| {
            let reason = "it exposes the pages to others: set web.password as well, or leave it out".to_owned();
            Err(InvalidSetting { key, reason }.into())
        };
        if self.public_url.as_ref().is_some_and(|url| !url.is_local()) {
            return needs("web.public_url");
        }
        if !self.trusted_proxies.is_empty() {
            return needs("web.trusted_proxies");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn web(password: Option<&str>) -> WebConfig {
        WebConfig { password: password.map(Into::into), ..WebConfig::default() }
    }

    #[test]
    fn an_empty_or_short_password_is_refused_without_being_printed() {
        for password in ["", " ", "brief", "hunter2", "       7", "\t\t\t\t\t\t\t\t"] {
            let error = web(Some(password)).check_access().unwrap_err().to_string();
            assert!(error.contains("web.password"), "{error}");
            assert!(password.trim().is_empty() || !error.contains(password.trim()), "{error}");
        }
        web(Some("let me in")).check_access().unwrap();
        web(None).check_access().unwrap();
    }

    #[test]
    fn exposing_the_pages_needs_a_password() {
        let public = |url: &str| Some(url.to_owned().try_into().unwrap());
        for config in [
            WebConfig { public_url: public("https://invites.example.org"), ..web(None) },
            WebConfig { trusted_proxies: vec![Proxy::try_from("127.0.0.1".to_owned()).unwrap()], ..web(None) },
            WebConfig { listen: "0.0.0.0:8080".parse().unwrap(), ..web(None) },
            WebConfig { listen: "[::]:8080".parse().unwrap(), ..web(None) },
        ] {
            assert!(config.check_access().unwrap_err().to_string().contains("web.password"), "{config:?}");
            WebConfig { password: Some("let me in".into()), ..config }.check_access().unwrap();
        }
        WebConfig { public_url: public("http://localhost:8080"), ..web(None) }.check_access().unwrap();
    }

    #[test]
    fn a_proxy_is_an_address_or_a_network() {
        let proxy = |text: &str| Proxy::try_from(text.to_owned());
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        assert!(proxy("10.0.0.0/8").unwrap().contains(address("10.1.2.3")));
        assert!(proxy("10.0.0.5").unwrap().contains(address("::ffff:10.0.0.5")));
        assert!(!proxy("10.0.0.5").unwrap().contains(address("10.0.0.6")));
        assert!(proxy("fd00::/8").unwrap().contains(address("fd00::1")));
        for wrong in ["", "proxy.example", "10.0.0.0/33", "*"] {
            assert_eq!(proxy(wrong), Err(NoProxy), "{wrong}");
        }
    }
}
