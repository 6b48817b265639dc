//! `[database]` and `[suppressions]`: the connection to PostgreSQL, its encryption, and the roles that setup creates.

use std::time::Duration;

use mailrun_core::{
    public_url::is_this_machine,
    setting::{DAY, InvalidSetting, ms},
};
use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;
use sqlx::postgres::{PgConnectOptions, PgSslMode};
use url::Url;

use crate::scram;

/// `[database]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DatabaseConfig {
    /// `postgres://user:password@host:port/database`. `DATABASE_URL` takes precedence.
    pub url: SecretString,
    /// The maximum number of connections of a process.
    pub max_connections: u32,
    /// How long acquiring a connection from the pool may take. Not a setting: pages wait for a shorter time than workers.
    #[serde(skip)]
    pub acquire_timeout: Duration,
    /// Allows unencrypted or unverified connections to other hosts, as `url` says.
    pub allow_plaintext: bool,
    /// The roles that `mailrun setup` creates.
    pub roles: RolesConfig,
    /// PostgreSQL must answer a statement within this time. Otherwise the connection is closed.
    #[serde(rename = "answer_timeout_ms", with = "ms")]
    pub answer_timeout: Duration,
}

impl Default for DatabaseConfig {
    fn default() -> Self {
        Self {
            url: "postgres://mailrun@127.0.0.1:5432/mailrun".into(),
            max_connections: 10,
            acquire_timeout: Duration::from_secs(10),
            allow_plaintext: false,
            roles: RolesConfig::default(),
            answer_timeout: Duration::from_millis(30_000),
        }
    }
}

/// The query parameters that `database.url` may have.
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
    /// The connection options. A connection to another host is encrypted, and the server's certificate and name are verified,
    /// unless `allow_plaintext` leaves that to the URL.
    ///
    /// # Errors
    /// What is wrong with the URL, without quoting any part of it.
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
            return Err("it has an unknown parameter after the question mark");
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

    /// Checks the settings.
    ///
    /// # Errors
    /// The first invalid setting.
    pub fn check(&self) -> Result<(), InvalidSetting> {
        let wrong = |key, reason: &str| Err(InvalidSetting::new(key, reason));
        if let Err(reason) = self.options() {
            return wrong("database.url", reason);
        }
        if !(1..=DAY.as_millis()).contains(&self.answer_timeout.as_millis()) {
            return wrong("database.answer_timeout_ms", "from 1 to 86400000, which is a day");
        }
        self.roles.check()
    }
}

/// The writers of the ledger, each with its own role.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Writer {
    /// The web process.
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
    /// The roles of processes, without combinations.
    pub const PROCESSES: [Self; 4] = [Self::Web, Self::FanOut, Self::Send, Self::Progress];
    /// The roles of workers, without combinations.
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

/// `[database.roles]`: the roles that `mailrun setup` creates. Only setup needs these settings.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RolesConfig {
    /// The prefix of their names: `mailrun_web`, `mailrun_send`. Roles belong to the whole server, so two installations on one
    /// server need two prefixes.
    pub prefix: String,
    /// The password of the web process's role. `None`: the role can't log in, or keeps its password.
    pub web_password: Option<SecretString>,
    /// The password of fan-out workers.
    pub fan_out_password: Option<SecretString>,
    /// The password of senders.
    pub send_password: Option<SecretString>,
    /// The password of progress workers.
    pub progress_password: Option<SecretString>,
    /// The password of workers with several roles.
    pub worker_password: Option<SecretString>,
    /// The password of the operator's commands.
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

/// PostgreSQL's maximum length of a name, minus the longest suffix.
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

    /// Whether any role has a password, so that all roles must exist.
    #[must_use]
    pub fn is_used(&self) -> bool {
        Writer::ALL.iter().any(|writer| self.password(*writer).is_some())
    }

    /// The SCRAM verifier of a role's password. The password itself would appear in the server's log.
    pub(crate) fn verifier(&self, writer: Writer) -> Option<String> {
        self.password(writer).map(|password| scram::verifier(password.expose_secret(), rand::random()))
    }

    fn check(&self) -> Result<(), InvalidSetting> {
        let wrong = |key, reason: &str| Err(InvalidSetting::new(key, reason));
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

/// `[suppressions]`
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SuppressionsConfig {
    /// A run that suppresses more than this percentage of its recipients gets a review; 100 disables reviews.
    pub hold_percent: u32,
    /// The minimum number of suppressions for a review.
    pub hold_at_least: u32,
}

impl Default for SuppressionsConfig {
    fn default() -> Self {
        Self { hold_percent: 10, hold_at_least: 20 }
    }
}

impl SuppressionsConfig {
    /// Whether `count` suppressions of a run with `total` recipients are held for review.
    #[must_use]
    pub fn holds(&self, count: i64, total: i64) -> bool {
        count >= i64::from(self.hold_at_least) && count * 100 > total * i64::from(self.hold_percent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn database(url: &str, allow_plaintext: bool) -> DatabaseConfig {
        DatabaseConfig { url: url.into(), allow_plaintext, ..DatabaseConfig::default() }
    }

    #[test]
    fn connections_to_other_hosts_are_verified() {
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
    fn rejects_malformed_urls_without_quoting_the_password() {
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
    }

    #[test]
    fn holds_an_unusual_share() {
        let holds = |count, total| SuppressionsConfig::default().holds(count, total);
        assert!(!holds(19, 20) && holds(20, 20));
        assert!(!holds(20, 200) && holds(21, 200));
        assert!(!holds(100, 1_000) && holds(101, 1_000));
    }
}
