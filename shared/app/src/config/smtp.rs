//! `[mailer.smtp]`: mail that leaves the machine, through one relay or several.

use std::{fmt, path::PathBuf, time::Duration};

use email_address::{EmailAddress, Options};
use mailrun_core::setting::{ms, ms_if_any};
use secrecy::SecretString;
use serde::Deserialize;

use super::{ConfigError, InvalidSetting, relay::Relay};

/// No step of an attempt may take longer.
const MAX_TIMEOUT: Duration = Duration::from_secs(900);
/// DATA is answered within two minutes, RFC 5321, 4.5.3.2.
const LONGEST_DATA: Duration = Duration::from_secs(120);

/// Who carries the mail.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MailerKind {
    /// Nobody: no mail leaves the machine.
    #[default]
    Simulated,
    /// The relays of `[mailer.smtp]`.
    Smtp,
}

impl MailerKind {
    /// All there are.
    pub const ALL: [Self; 2] = [Self::Simulated, Self::Smtp];

    /// The rungs that suit it, in milliseconds.
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
    /// Who the invitations are from.
    pub from: Sender,
    /// Who gets the answers; none: `from`.
    pub reply_to: Option<Sender>,
    /// `smtp://user:password@host:587` (STARTTLS) or `smtps://user:password@host:465`; see [`Relay`] for what may follow.
    pub relays: Vec<SecretString>,
    /// Connections of one process at most, to all relays together.
    pub connections: usize,
    /// A connection is given up after so many messages.
    pub messages_per_connection: u32,
    /// A connection that nothing was sent on for so long is given up.
    #[serde(rename = "idle_ms", with = "ms")]
    pub idle: Duration,
    /// A relay must accept a connection, and again agree on its encryption, within this time.
    #[serde(rename = "connect_timeout_ms", with = "ms")]
    pub connect_timeout: Duration,
    /// A relay must greet within this time; none: as for a command.
    #[serde(rename = "greeting_timeout_ms", with = "ms_if_any")]
    pub greeting_timeout: Option<Duration>,
    /// A relay must answer each command within this time. This limit and those of DATA and the message are by default those of
    /// RFC 5321, 4.5.3.2.
    #[serde(rename = "command_timeout_ms", with = "ms")]
    pub command_timeout: Duration,
    /// A relay must answer DATA within this time; none: as for another command, and within two minutes.
    #[serde(rename = "data_timeout_ms", with = "ms_if_any")]
    pub data_timeout: Option<Duration>,
    /// A relay must take a message in within this time, and answer it within the same time again.
    #[serde(rename = "message_timeout_ms", with = "ms")]
    pub message_timeout: Duration,
    /// The largest message, headers and all.
    pub max_message_bytes: usize,
    /// Connections of one process that send to the same recipient's domain, at most; 0: as many as there are.
    pub per_domain: usize,
    /// What the worker calls itself; none: the name of its host if it has a dot, and its address otherwise.
    pub hello: Option<String>,
    /// Lets mail and passwords go unencrypted to relays beyond this machine.
    pub allow_plaintext: bool,
    /// Signs the mail; none: it is not signed here.
    pub dkim: Option<DkimConfig>,
    /// When refusals that nobody can explain stop a relay.
    pub breaker: BreakerConfig,
}

/// `[mailer.smtp.breaker]`
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BreakerConfig {
    /// So many different recipients in a row that are refused with the same words; 0: nothing stops a relay.
    pub in_a_row: usize,
    /// The last messages, of which a share is looked at.
    pub window: usize,
    /// That share, if it was refused for good.
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
    /// The domain that signs: that of `from`, or one above it.
    pub domain: String,
    /// The name under which its key is published: `<selector>._domainkey.<domain>`.
    pub selector: String,
    /// A file with the private key: RSA as PEM (PKCS #1).
    pub key_file: PathBuf,
}

/// Who a mail is from, or whom to answer: `Name <address>`, or an address alone.
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
        let wrong = || format!("{text:?} is no sender: write it as Name <name@example.org>");
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
    /// The domain of the address, in ASCII, as headers want it.
    #[must_use]
    pub fn domain(&self) -> String {
        let domain = self.email.rsplit('@').next().unwrap_or_default();
        // One that can't be written in ASCII is refused before anything is sent from it.
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
    /// The relays, read.
    ///
    /// # Errors
    /// What is wrong with the first one that can't be used, without its password.
    pub fn relays(&self) -> Result<Vec<Relay>, InvalidSetting> {
        let read = |(number, url)| {
            let wrong = |reason: String| InvalidSetting::new("mailer.smtp.relays", format!("relay {number} {reason}"));
            let relay = Relay::parse(url).map_err(|reason| wrong(reason.into()))?;
            if !relay.is_private() && !self.allow_plaintext {
                return Err(wrong(format!(
                    "({}) has tls=none and is not on this machine: leave tls=none away, or set mailer.smtp.allow_plaintext",
                    relay.host
                )));
            }
            Ok(relay)
        };
        (1..).zip(&self.relays).map(read).collect()
    }

    /// How long a relay may take to greet.
    #[must_use]
    pub fn greeting_timeout(&self) -> Duration {
        self.greeting_timeout.unwrap_or(self.command_timeout)
    }

    /// How long a relay may take to answer DATA.
    #[must_use]
    pub fn data_timeout(&self) -> Duration {
        self.data_timeout.unwrap_or(self.command_timeout.min(LONGEST_DATA))
    }

    pub(super) fn check(&self, kind: MailerKind) -> Result<(), ConfigError> {
        let wrong = |key, reason: &str| Err(InvalidSetting::new(key, reason).into());
        let relays = self.relays()?;
        if kind == MailerKind::Smtp && relays.is_empty() {
            return wrong("mailer.smtp.relays", "name at least one, as smtp://user:password@host:587");
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
                "from 1 to 900000, since an attempt has 20 minutes in all",
            );
        }
        if self.breaker.window == 0 || !(1..=100).contains(&self.breaker.percent) {
            return wrong("mailer.smtp.breaker", "window is at least 1, and percent from 1 to 100");
        }
        let hello = self.hello.as_deref();
        if hello.is_some_and(|name| name.is_empty() || !name.chars().all(|c| c.is_ascii_graphic())) {
            return wrong("mailer.smtp.hello", "the name of a host, without spaces");
        }
        Ok(())
    }
}
