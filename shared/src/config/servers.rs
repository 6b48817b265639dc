//! The addresses of both servers: checked when the settings are read, and encrypted beyond this machine.

use std::path::PathBuf;

use lapin::uri::{AMQPScheme, AMQPUri};
use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;
use sqlx::postgres::{PgConnectOptions, PgSslMode};
use url::Url;

use super::{AmqpConfig, ConfigError, DatabaseConfig};
use crate::{public_url::is_this_machine, scram};

/// What may stand behind the `?` of `database.url`.
const PARAMETERS: [&str; 19] = [
    "sslmode",
    "ssl-mode",
    "sslrootcert",
    "ssl-root-cert",
    "ssl-ca",
    "sslcert",
    "ssl-cert",
    "sslkey",
    "ssl-key",
    "statement-cache-capacity",
    "host",
    "hostaddr",
    "port",
    "dbname",
    "user",
    "password",
    "application_name",
    "options",
    "connect_timeout",
];

impl DatabaseConfig {
    /// How PostgreSQL is reached. Beyond this machine the connection is encrypted, and the server's certificate and name are
    /// verified, unless `allow_plaintext` leaves that to the address.
    ///
    /// # Errors
    /// What is wrong with the address, without any part of it.
    pub fn options(&self) -> Result<PgConnectOptions, &'static str> {
        const MALFORMED: &str = "it is not like postgres://user:password@host:port/database; \
                                 special characters of a password are written as in any URL, such as %40 for @";
        let text = self.url.expose_secret();
        let url = Url::parse(text).map_err(|_| MALFORMED)?;
        if !matches!(url.scheme(), "postgres" | "postgresql") {
            return Err(MALFORMED);
        }
        let is_known = |name: &str| PARAMETERS.contains(&name) || name.starts_with("options[");
        if url.query_pairs().any(|(name, _)| !is_known(&name)) {
            return Err("it has an unknown parameter behind the question mark");
        }
        let options: PgConnectOptions = text.parse().map_err(|_| MALFORMED)?;
        let is_local = options.get_socket().is_some()
            || options.get_host().starts_with('/')
            || is_this_machine(options.get_host());
        if is_local || self.allow_plaintext {
            return Ok(options);
        }
        let says_how = url.query_pairs().any(|(name, _)| matches!(&*name, "sslmode" | "ssl-mode"));
        match options.get_ssl_mode() {
            PgSslMode::VerifyFull => Ok(options),
            _ if says_how => {
                Err("its sslmode does not verify a server beyond this machine: leave it out or set verify-full, \
                                  or set database.allow_plaintext")
            }
            _ => Ok(options.ssl_mode(PgSslMode::VerifyFull)),
        }
    }

    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let wrong = |key, reason: &str| Err(ConfigError::Value { key, reason: reason.to_owned() });
        if let Err(reason) = self.options() {
            return wrong("database.url", reason);
        }
        self.roles.check()
    }
}

impl AmqpConfig {
    pub(super) fn check_urls(&self) -> Result<(), ConfigError> {
        let wrong = |reason| Err(ConfigError::Value { key: "amqp.urls", reason });
        if self.urls.is_empty() {
            return wrong("name at least one node, as amqp://user:password@host:port/vhost".to_owned());
        }
        for (number, url) in (1..).zip(&self.urls) {
            let Ok(uri) = url.expose_secret().parse::<AMQPUri>() else {
                return wrong(format!(
                    "address {number} is not like amqp://user:password@host:port/vhost; special characters of a password are \
                     written as in any URL, such as %40 for @ and %2C for a comma"
                ));
            };
            if uri.scheme == AMQPScheme::AMQP && !is_this_machine(&uri.authority.host) && !self.allow_plaintext {
                return wrong(format!(
                    "address {number} is beyond this machine and not encrypted: use amqps://, or set amqp.allow_plaintext"
                ));
            }
        }
        Ok(())
    }
}

/// Who writes to the ledger, each with a role of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Writer {
    /// The pages.
    Web,
    /// A worker with the role `fan-out`.
    FanOut,
    /// A worker with the role `send`.
    Send,
    /// A worker with the role `progress`.
    Progress,
    /// A worker with several roles.
    Worker,
    /// The operator's commands.
    Operator,
}

impl Writer {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::Web, Self::FanOut, Self::Send, Self::Progress, Self::Worker, Self::Operator];
    /// Those that a process is, one by one.
    pub const PROCESSES: [Self; 4] = [Self::Web, Self::FanOut, Self::Send, Self::Progress];
    /// Those that a worker may be.
    pub const WORKERS: [Self; 3] = [Self::FanOut, Self::Send, Self::Progress];

    fn suffix(self) -> &'static str {
        match self {
            Self::Web => "web",
            Self::FanOut => "fan_out",
            Self::Send => "send",
            Self::Progress => "progress",
            Self::Worker => "worker",
            Self::Operator => "operator",
        }
    }
}

/// `[database.roles]`: the roles that `mailrun setup` makes. Only setup needs these settings.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RolesConfig {
    /// Their names begin with it: `mailrun_web`, `mailrun_send`. Roles belong to the whole server, so two installations on one
    /// need two prefixes.
    pub prefix: String,
    /// The password of the pages' role; none: it can't log in, or keeps the password it has.
    pub web_password: Option<SecretString>,
    /// That of the fan-out workers.
    pub fan_out_password: Option<SecretString>,
    /// That of the senders.
    pub send_password: Option<SecretString>,
    /// That of the progress workers.
    pub progress_password: Option<SecretString>,
    /// That of workers with several roles.
    pub worker_password: Option<SecretString>,
    /// That of the operator's commands.
    pub operator_password: Option<SecretString>,
}

impl Default for RolesConfig {
    fn default() -> Self {
        Self {
            prefix: "mailrun".to_owned(),
            web_password: None,
            fan_out_password: None,
            send_password: None,
            progress_password: None,
            worker_password: None,
            operator_password: None,
        }
    }
}

/// The length of a name in PostgreSQL, without the longest suffix.
const MAX_PREFIX_BYTES: usize = 63 - "_operator".len();

impl RolesConfig {
    /// The name of a writer's role.
    #[must_use]
    pub fn name(&self, writer: Writer) -> String {
        format!("{}_{}", self.prefix, writer.suffix())
    }

    fn password(&self, writer: Writer) -> Option<&SecretString> {
        match writer {
            Writer::Web => self.web_password.as_ref(),
            Writer::FanOut => self.fan_out_password.as_ref(),
            Writer::Send => self.send_password.as_ref(),
            Writer::Progress => self.progress_password.as_ref(),
            Writer::Worker => self.worker_password.as_ref(),
            Writer::Operator => self.operator_password.as_ref(),
        }
    }

    /// Whether a role is to log in, so that all of them have to be there.
    #[must_use]
    pub fn is_used(&self) -> bool {
        Writer::ALL.iter().any(|writer| self.password(*writer).is_some())
    }

    /// What PostgreSQL keeps in the place of a role's password. The password itself would stand in the server's log.
    pub(crate) fn verifier(&self, writer: Writer) -> Option<String> {
        self.password(writer).map(|password| scram::verifier(password.expose_secret(), rand::random()))
    }

    fn check(&self) -> Result<(), ConfigError> {
        let wrong = |key, reason: &str| Err(ConfigError::Value { key, reason: reason.to_owned() });
        if self.prefix.is_empty() || self.prefix.len() > MAX_PREFIX_BYTES || self.prefix.contains('\0') {
            return wrong("database.roles.prefix", "from 1 to 54 bytes");
        }
        let usable = |password: &SecretString| {
            let password = password.expose_secret();
            password.len() >= 8 && password.bytes().all(|byte| byte.is_ascii_graphic())
        };
        if Writer::ALL.iter().filter_map(|writer| self.password(*writer)).any(|password| !usable(password)) {
            return wrong(
                "database.roles",
                "a password has at least 8 characters, of ASCII and without spaces, for instance from `openssl rand -hex 24`",
            );
        }
        Ok(())
    }
}

/// Reads the authorities that `amqp.ca_file` names.
pub(crate) async fn authorities(file: Option<&PathBuf>) -> std::io::Result<Option<String>> {
    match file {
        Some(file) => tokio::fs::read_to_string(file).await.map(Some),
        None => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn database(url: &str, allow_plaintext: bool) -> DatabaseConfig {
        DatabaseConfig { url: url.into(), allow_plaintext, ..DatabaseConfig::default() }
    }

    #[test]
    fn beyond_this_machine_postgresql_is_verified() {
        for url in
            ["postgres://u@db.example/d", "postgres://u@192.0.2.1/d", "postgresql://u@db.example/d?sslmode=verify-full"]
        {
            let options = database(url, false).options().unwrap();
            assert!(matches!(options.get_ssl_mode(), PgSslMode::VerifyFull), "{url}");
        }
        for mode in ["disable", "allow", "prefer", "require", "verify-ca"] {
            let url = format!("postgres://u@db.example/d?sslmode={mode}");
            assert!(database(&url, false).options().unwrap_err().contains("allow_plaintext"), "{url}");
            assert!(database(&url, true).options().is_ok(), "{url}");
        }
        for url in [
            "postgres://u@localhost/d",
            "postgres://u@127.0.0.1:5432/d",
            "postgres://u@[::1]/d",
            "postgres://%2Frun%2Fpg/d",
        ] {
            let options = database(url, false).options().unwrap();
            assert!(!matches!(options.get_ssl_mode(), PgSslMode::VerifyFull), "{url}");
        }
        let url = "postgres://u@localhost/d?host=db.example";
        assert!(
            matches!(database(url, false).options().unwrap().get_ssl_mode(), PgSslMode::VerifyFull),
            "the host that counts"
        );
    }

    #[test]
    fn malformed_addresses_are_refused_without_their_password() {
        for url in [
            "hunter2",
            "",
            "postgres://u:hunter2@h:port/d",
            "postgres://u:hun/ter2@h/d",
            "mysql://u:hunter2@h/d",
            "postgres://u:hunter2@h/d?sslmode=hunter2",
            "postgres://u:hunter2@h/d?pasword=hunter2",
            "postgres://u@h/d?hostaddr=hunter2",
        ] {
            let error = database(url, false).check().unwrap_err().to_string();
            assert!(error.contains("database.url") && !error.contains("hun"), "{url}: {error}");
        }
        let amqp =
            |url: &str| AmqpConfig { urls: vec!["amqp://localhost".into(), url.into()], ..AmqpConfig::default() };
        for url in ["hunter2", "", "http://u:hunter2@h", "amqp://u:hunter2@h:port", "amqps://u:hun#ter2@h/x/y"] {
            let error = amqp(url).check_urls().unwrap_err().to_string();
            assert!(error.contains("address 2") && !error.contains("hun"), "{url}: {error}");
        }
    }

    #[test]
    fn beyond_this_machine_rabbitmq_is_encrypted() {
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
}
