//! `[amqp]`: how to reach RabbitMQ. Connections that leave this machine must be encrypted.

use std::{path::PathBuf, time::Duration};

use lapin::uri::{AMQPScheme, AMQPUri};
use mailrun_core::{
    public_url::is_this_machine,
    setting::{DAY, InvalidSetting, ms, s},
};
use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;

/// `[amqp]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AmqpConfig {
    /// `amqp://user:password@host:port/vhost`, one for each node of the cluster, tried in turn. `AMQP_URL` overrides it; it
    /// separates several with commas.
    pub urls: Vec<SecretString>,
    /// Allows unencrypted connections to other machines.
    pub allow_plaintext: bool,
    /// A PEM file with certificate authorities to trust in addition to the system's, for `amqps://`.
    pub ca_file: Option<PathBuf>,
    /// The number of publisher channels of a process. Each is a connection of its own with one confirm channel.
    pub publish_lanes: usize,
    /// The number of queues that item messages are spread over. Raise it on the senders first: they consume only the queues that
    /// they know of.
    pub item_queues: u16,
    /// Whether processes declare the exchanges and queues when they connect. Set it to false if they lack the permission, and run
    /// `mailrun setup` with a user that has it.
    pub declare_topology: bool,
    /// The time limit for a publish, an ack or a declaration.
    #[serde(rename = "answer_timeout_ms", with = "ms")]
    pub answer_timeout: Duration,
    /// The AMQP heartbeat interval. A connection that is silent for two intervals is closed.
    #[serde(rename = "heartbeat_s", with = "s")]
    pub heartbeat: Duration,
}

impl Default for AmqpConfig {
    fn default() -> Self {
        Self {
            urls: vec!["amqp://guest:guest@127.0.0.1:5672/%2f".into()],
            allow_plaintext: false,
            ca_file: None,
            publish_lanes: 2,
            item_queues: 1,
            declare_topology: true,
            answer_timeout: Duration::from_millis(30_000),
            heartbeat: Duration::from_secs(15),
        }
    }
}

impl AmqpConfig {
    /// Checks the settings.
    ///
    /// # Errors
    /// The first invalid setting.
    pub fn check(&self) -> Result<(), InvalidSetting> {
        self.check_urls()?;
        if !(1..=64).contains(&self.item_queues) {
            return Err(InvalidSetting::new("amqp.item_queues", "from 1 to 64"));
        }
        if self.publish_lanes == 0 {
            return Err(InvalidSetting::new("amqp.publish_lanes", "at least 1"));
        }
        // AMQP has 16 bits for it.
        if !(1..=u64::from(u16::MAX)).contains(&self.heartbeat.as_secs()) {
            return Err(InvalidSetting::new("amqp.heartbeat_s", "from 1 to 65535"));
        }
        if self.answer_timeout.is_zero() || self.answer_timeout > DAY {
            return Err(InvalidSetting::new("amqp.answer_timeout_ms", "from 1 to 86400000, which is a day"));
        }
        Ok(())
    }

    fn check_urls(&self) -> Result<(), InvalidSetting> {
        let wrong = |reason| Err(InvalidSetting { key: "amqp.urls", reason });
        if self.urls.is_empty() {
            return wrong("name at least one node, as amqp://user:password@host:port/vhost".to_owned());
        }
        for (number, url) in (1..).zip(&self.urls) {
            let Ok(uri) = url.expose_secret().parse::<AMQPUri>() else {
                return wrong(format!(
                    "URL {number} does not look like amqp://user:password@host:port/vhost; percent-encode special characters of \
                     the password, such as %40 for @ and %2C for a comma"
                ));
            };
            if uri.scheme == AMQPScheme::AMQP && !is_this_machine(&uri.authority.host) && !self.allow_plaintext {
                return wrong(format!(
                    "URL {number} leaves this machine unencrypted: use amqps://, or set amqp.allow_plaintext"
                ));
            }
        }
        Ok(())
    }
}

/// Reads the certificate authorities from `amqp.ca_file`.
pub(crate) async fn authorities(file: Option<&PathBuf>) -> std::io::Result<Option<String>> {
    match file {
        Some(file) => tokio::fs::read_to_string(file).await.map(Some),
        None => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_to_other_machines_must_be_encrypted() {
        let amqp = |url: &str, allow_plaintext| {
            let config = AmqpConfig { urls: vec![url.into()], allow_plaintext, ..AmqpConfig::default() };
            config.check_urls().map_err(|error| error.to_string())
        };
        assert!(amqp("amqp://u:hunter2@mq.example", false).unwrap_err().contains("amqps://"));
        for (url, allow_plaintext) in [
            ("amqp://mq.example", true),
            ("amqps://mq.example", false),
            ("amqp://localhost/v", false),
            ("amqp://127.0.0.1:5672/%2f", false),
            ("amqp://[::1]:5672", false),
        ] {
            assert_eq!(amqp(url, allow_plaintext), Ok(()), "{url}");
        }
    }

    #[test]
    fn a_heartbeat_fits_the_protocol() {
        let amqp = |s| AmqpConfig { heartbeat: Duration::from_secs(s), ..AmqpConfig::default() }.check();
        assert_eq!((amqp(1), amqp(65_535)), (Ok(()), Ok(())));
        for s in [0, 65_536] {
            assert!(amqp(s).unwrap_err().to_string().contains("amqp.heartbeat_s"));
        }
    }

    #[test]
    fn malformed_urls_are_refused_without_their_password() {
        let amqp =
            |url: &str| AmqpConfig { urls: vec!["amqp://localhost".into(), url.into()], ..AmqpConfig::default() };
        for url in ["hunter2", "", "http://u:hunter2@h", "amqp://u:hunter2@h:port", "amqps://u:hun#ter2@h/x/y"] {
            let error = amqp(url).check_urls().unwrap_err().to_string();
            assert!(error.contains("URL 2") && !error.contains("hun"), "{url}: {error}");
        }
    }
}
