//! `[mailer.smtp]`: sending real mail through one or more relays.

use std::{fmt, path::PathBuf, time::Duration};

use email_address::{EmailAddress, Options};
use mailrun_core::setting::{ms, ms_if_any};
use secrecy::SecretString;
use serde::Deserialize;

use super::{ConfigError, InvalidSetting, relay::Relay};

/// The longest time limit that a single step of an attempt may have.
const MAX_TIMEOUT: Duration = Duration::from_secs(900);
/// The time limit for the reply to DATA in RFC 5321, 4.5.3.2: two minutes.
const LONGEST_DATA: Duration = Duration::from_secs(120);

/// Which mailer is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MailerKind {
    /// Simulated: no mail leaves the machine.
    #[default]
    Simulated,
    /// The relays of `[mailer.smtp]`.
    Smtp,
}

impl MailerKind {
    /// All kinds.
    pub const ALL: [Self; 2] = [Self::Simulated, Self::Smtp];

    /// The default retry delays for this mailer, in milliseconds.
    #[must_use]
    pub fn rungs_ms(self) -> &'static [u64] {
        match self {
            Self::Simulated => &[250, 1_000, 5_000],
            Self::Smtp => &[1_000, 5_000, 30_000, 300_000, 1_800_000, 7_200_000, 28_800_000],
        }
    }
}

/// `[mailer.smtp]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SmtpConfig {
    /// The sender of the invitations.
    pub from: Sender,
    /// Where replies go. None: to `from`.
    pub reply_to: Option<Sender>,
    /// `smtp://user:password@host:587` (STARTTLS) or `smtps://user:password@host:465`; see [`Relay`] for the parameters.
    pub relays: Vec<SecretString>,
    /// The maximum number of connections per process, to all relays together.
    pub connections: usize,
    /// A connection is closed after this many messages.
    pub messages_per_connection: u32,
    /// A connection is closed after being idle for this long.
    #[serde(rename = "idle_ms", with = "ms")]
    pub idle: Duration,
    /// The time limit for connecting to a relay, and separately for the TLS handshake.
    #[serde(rename = "connect_timeout_ms", with = "ms")]
    pub connect_timeout: Duration,
    /// The time limit for the greeting. None: `command_timeout`.
    #[serde(rename = "greeting_timeout_ms", with = "ms_if_any")]
    pub greeting_timeout: Option<Duration>,
    /// The time limit for the reply to each command. The defaults of this limit and of those for DATA and the message are those of
    /// RFC 5321, 4.5.3.2.
    #[serde(rename = "command_timeout_ms", with = "ms")]
    pub command_timeout: Duration,
    /// The time limit for the reply to DATA. None: `command_timeout`, at most two minutes.
    #[serde(rename = "data_timeout_ms", with = "ms_if_any")]
    pub data_timeout: Option<Duration>,
    /// The time limit for transferring a message, and separately for the reply to it.
    #[serde(rename = "message_timeout_ms", with = "ms")]
    pub message_timeout: Duration,
    /// The maximum size of a message, including its headers.
    pub max_message_bytes: usize,
    /// The maximum number of connections per process that send to the same recipient domain; 0: no limit.
    pub per_domain: usize,
    /// The name in EHLO. None: the host's name if it contains a dot, otherwise its address.
    pub hello: Option<String>,
    /// Allows unencrypted mail and passwords to relays on other machines.
    pub allow_plaintext: bool,
    /// DKIM signing. None: the mail is not signed here.
    pub dkim: Option<DkimConfig>,
    /// When unexplained refusals stop a relay.
    pub breaker: BreakerConfig,
}

/// `[mailer.smtp.breaker]`
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BreakerConfig {
    /// This many consecutive refusals of different recipients with the same text stop a relay; 0 disables the breaker.
    pub in_a_row: usize,
    /// The number of most recent messages for `percent`.
    pub window: usize,
    /// A relay stops if at least this share of them was refused permanently.
    pub percent: usize,
}

impl Default for BreakerConfig {
    fn default() -> Self {
        Self { in_a_row: 20, window: 200, percent: 50 }
    }
}

impl Default for SmtpConfig {
    fn default() -> Self {
        Self {
            from: Sender { name: Some("Mailrun".into()), email: "mailrun@localhost".into() },
            reply_to: None,
            relays: Vec::new(),
            connections: 20,
            messages_per_connection: 100,
            idle: Duration::from_millis(30_000),
            connect_timeout: Duration::from_millis(10_000),
            greeting_timeout: None,
            command_timeout: Duration::from_millis(300_000),
            data_timeout: None,
            message_timeout: Duration::from_millis(600_000),
            max_message_bytes: 1024 * 1024,
            per_domain: 0,
            hello: None,
            allow_plaintext: false,
            dkim: None,
            breaker: BreakerConfig::default(),
        }
    }
}

/// `[mailer.smtp.dkim]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DkimConfig {
    /// The signing domain: that of `from` or a parent domain.
    pub domain: String,
    /// The selector: the public key is published at `<selector>._domainkey.<domain>`.
    pub selector: String,
    /// The file with the private key: RSA, PEM (PKCS #1).
    pub key_file: PathBuf,
}

/// A sender or reply address: `Name <address>`, or the address alone.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Sender {
    /// The display name.
    pub name: Option<String>,
    /// The address. Its domain may be a bare name such as `localhost`.
    pub email: String,
}

impl TryFrom<String> for Sender {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not a sender: write it as Name <name@example.org>");
        if text.chars().any(char::is_control) {
            return Err(wrong());
        }
        let (name, email) = match text.rsplit_once('<') {
            Some((name, rest)) => (name.trim(), rest.trim_end().strip_suffix('>').ok_or_else(wrong)?),
            None => ("", text.trim()),
        };
        let options = Options::default().without_display_text().without_domain_literal();
        EmailAddress::parse_with_options(email, options).map_err(|_| wrong())?;
        let name = name.strip_prefix('"').and_then(|name| name.strip_suffix('"')).unwrap_or(name).trim();
        Ok(Self { name: (!name.is_empty()).then(|| name.to_owned()), email: email.to_owned() })
    }
}

impl Sender {
    /// The domain of the address in ASCII, as headers require it.
    #[must_use]
    pub fn domain(&self) -> String {
        let domain = self.email.rsplit('@').next().unwrap_or_default();
        // A domain that can't be converted to ASCII is refused before anything is sent from it.
        idna::domain_to_ascii(domain).unwrap_or_else(|_| domain.to_owned())
    }
}

impl fmt::Display for Sender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.name {
            Some(name) => write!(f, "{name} <{}>", self.email),
            None => f.write_str(&self.email),
        }
    }
}

impl SmtpConfig {
    /// Parses `relays`.
    ///
    /// # Errors
    /// What is wrong with the first invalid relay, without its password.
    pub fn relays(&self) -> Result<Vec<Relay>, InvalidSetting> {
        let read = |(number, url)| {
            let wrong = |reason: String| InvalidSetting::new("mailer.smtp.relays", format!("relay {number} {reason}"));
            let relay = Relay::parse(url).map_err(|reason| wrong(reason.into()))?;
            if !relay.is_private() && !self.allow_plaintext {
                return Err(wrong(format!(
                    "({}) has tls=none and is not on this machine: remove tls=none, or set mailer.smtp.allow_plaintext",
                    relay.host
                )));
            }
            Ok(relay)
        };
        (1..).zip(&self.relays).map(read).collect()
    }

    /// The time limit for the greeting.
    #[must_use]
    pub fn greeting_timeout(&self) -> Duration {
        self.greeting_timeout.unwrap_or(self.command_timeout)
    }

    /// The time limit for the reply to DATA.
    #[must_use]
    pub fn data_timeout(&self) -> Duration {
        self.data_timeout.unwrap_or(self.command_timeout.min(LONGEST_DATA))
    }

    pub(super) fn check(&self, kind: MailerKind) -> Result<(), ConfigError> {
        let wrong = |key, reason: &str| Err(InvalidSetting::new(key, reason).into());
        let relays = self.relays()?;
        if kind == MailerKind::Smtp && relays.is_empty() {
            return wrong("mailer.smtp.relays", "at least one is needed, such as smtp://user:password@host:587");
        }
        if !(1..=1_000).contains(&self.connections) {
            return wrong("mailer.smtp.connections", "from 1 to 1000");
        }
        if self.messages_per_connection == 0 || self.max_message_bytes == 0 || self.idle.is_zero() {
            return wrong(
                "mailer.smtp.messages_per_connection, mailer.smtp.max_message_bytes, mailer.smtp.idle_ms",
                "at least 1",
            );
        }
        let limits = [
            self.connect_timeout,
            self.greeting_timeout(),
            self.command_timeout,
            self.data_timeout(),
            self.message_timeout,
        ];
        if limits.iter().any(|limit| limit.is_zero() || *limit > MAX_TIMEOUT) {
            return wrong(
                "mailer.smtp.connect_timeout_ms, greeting_timeout_ms, command_timeout_ms, data_timeout_ms, message_timeout_ms",
                "from 1 to 900000, since the whole attempt has 20 minutes",
            );
        }
        if self.breaker.window == 0 || !(1..=100).contains(&self.breaker.percent) {
            return wrong("mailer.smtp.breaker", "window is at least 1, and percent from 1 to 100");
        }
        let hello = self.hello.as_deref();
        if hello.is_some_and(|name| name.is_empty() || !name.chars().all(|c| c.is_ascii_graphic())) {
            return wrong("mailer.smtp.hello", "must be a host name without spaces");
        }
        Ok(())
    }
}
