//! Composes a mail: headers, a text part and an HTML part, from a template and a recipient, with an optional DKIM signature.

use std::{fs, io, path::PathBuf};

use lettre::{
    Message,
    address::Address,
    message::{
        Mailbox, MultiPart,
        dkim::{
            DkimCanonicalization, DkimCanonicalizationType, DkimConfig as Signature, DkimSigningAlgorithm,
            DkimSigningKey,
        },
        header::{HeaderName, HeaderValue},
    },
};
use mailrun_app::config::{DkimConfig, Sender, SmtpConfig};
use mailrun_core::template::Recipient;

use super::{Mail, Outcome, encoding::encode};

/// The headers covered by the DKIM signature. Content-Type is missing because lettre adds that header after signing. One-click
/// unsubscribing requires the last two (RFC 8058).
const SIGNED: [&str; 10] = [
    "From",
    "Reply-To",
    "To",
    "Subject",
    "Date",
    "Message-ID",
    "MIME-Version",
    "Auto-Submitted",
    "List-Unsubscribe",
    "List-Unsubscribe-Post",
];
/// Longer texts are composed on a blocking thread.
const LONG_TEXT_BYTES: usize = 16 * 1024;
/// A longer URL would not fit on one header line.
const MAX_URL_BYTES: usize = 900;

/// Mail cannot be composed with this configuration.
#[derive(Debug, thiserror::Error)]
pub enum ComposerError {
    /// A sender address that mail servers do not accept.
    #[error("the setting mailer.smtp.{key} is not usable: {address} is not a valid email address")]
    Sender {
        /// The setting.
        key: &'static str,
        /// Its value.
        address: String,
    },
    /// The DKIM key cannot be read.
    #[error("the key {path} of mailer.smtp.dkim can't be read: {error}")]
    Key {
        /// The file.
        path: PathBuf,
        /// The I/O error.
        error: io::Error,
    },
    /// The DKIM key has the wrong format.
    #[error("{path} is not a private RSA key in PEM format (PKCS #1: it begins with BEGIN RSA PRIVATE KEY)")]
    KeyKind {
        /// The file.
        path: PathBuf,
    },
}

/// A composed mail with its envelope.
#[derive(Clone, Debug)]
pub struct ComposedMail {
    /// The sender's address, for `MAIL FROM`.
    pub from: String,
    /// The recipient's address, for `RCPT TO`.
    pub to: String,
    /// The recipient's address as the ledger stores it. Never repeated in reasons or logs.
    pub recipient: String,
    /// The recipient's domain, in ASCII and lower case.
    pub domain: String,
    /// The message with CRLF line ends, before dot-stuffing.
    pub bytes: Vec<u8>,
    /// An address has a non-ASCII local part: only a server with SMTPUTF8 accepts it.
    pub needs_utf8: bool,
}

/// Composes mail.
pub struct Composer {
    from: Mailbox,
    reply_to: Option<Mailbox>,
    signature: Option<Signature>,
    max_bytes: usize,
}

impl Composer {
    /// Reads the settings shared by all mails.
    ///
    /// # Errors
    /// If a sender or the DKIM key is not usable.
    pub fn new(config: &SmtpConfig) -> Result<Self, ComposerError> {
        let mailbox = |key, sender: &Sender| {
            let wrong = || ComposerError::Sender { key, address: sender.email.clone() };
            let address = in_ascii(&sender.email).ok_or_else(wrong)?;
            Ok(Mailbox::new(sender.name.as_deref().and_then(in_a_header), address))
        };
        Ok(Self {
            from: mailbox("from", &config.from)?,
            reply_to: config.reply_to.as_ref().map(|sender| mailbox("reply_to", sender)).transpose()?,
            signature: config.dkim.as_ref().map(signature).transpose()?,
            max_bytes: config.max_message_bytes,
        })
    }

    /// Whether composing `mail` would block a runtime thread for too long: it has a long text, or is signed.
    pub fn takes_long(&self, mail: &Mail) -> bool {
        self.signature.is_some() || mail.template.len() > LONG_TEXT_BYTES
    }

    /// Composes `mail`.
    ///
    /// # Errors
    /// The outcome of the attempt if the mail cannot be composed. It is the same on every try.
    pub fn compose(&self, mail: &Mail) -> Result<ComposedMail, Outcome> {
        let failed = |reason: String| Outcome::failed(reason);
        let to = in_ascii(&mail.email)
            .ok_or_else(|| Outcome::Failed { reason: "this is not a valid email address".into(), flagged: true })?;
        let unsubscribe = mail.unsubscribe.as_deref();
        let recipient = Recipient { email: &mail.email, name: mail.name.as_deref(), unsubscribe_url: unsubscribe };
        let rendered = mail.template.render(&recipient).map_err(|error| failed(error.to_string()))?;
        let mut message = Message::builder()
            .message_id(Some(mail.message_id.clone()))
            .from(self.from.clone())
            .to(Mailbox::new(mail.name.as_deref().and_then(in_a_header), to.clone()))
            .subject(rendered.subject)
            .date_now()
            // Suppresses out-of-office replies.
            .raw_header(header("Auto-Submitted", "auto-generated".into()));
        if let Some(reply_to) = &self.reply_to {
            message = message.reply_to(reply_to.clone());
        }
        if let Some(url) = unsubscribe {
            if url.len() > MAX_URL_BYTES || !url.chars().all(|c| c.is_ascii_graphic() && !matches!(c, '<' | '>' | ','))
            {
                return Err(failed("the unsubscribe URL does not fit in a header".into()));
            }
            message = message.raw_header(header("List-Unsubscribe", format!("<{url}>")));
            // One-click unsubscribing requires https (RFC 8058, 3.1). Without it, the link opens the page.
            if url.starts_with("https://") {
                message = message.raw_header(header("List-Unsubscribe-Post", "List-Unsubscribe=One-Click".into()));
            }
        }
        let mut message = message
            .multipart(MultiPart::alternative_plain_html(encode(&rendered.text), encode(&rendered.html)))
            .map_err(|error| failed(format!("can't compose the message: {error}")))?;
        if let Some(signature) = &self.signature {
            message.sign(signature);
        }
        let bytes = message.formatted();
        if bytes.len() > self.max_bytes {
            return Err(failed(format!(
                "the message has {} bytes, and mailer.smtp.max_message_bytes allows {}",
                bytes.len(),
                self.max_bytes
            )));
        }
        let address = |address: &Address| -> String { AsRef::<str>::as_ref(address).to_owned() };
        Ok(ComposedMail {
            needs_utf8: !address(&to).is_ascii() || !address(&self.from.email).is_ascii(),
            from: address(&self.from.email),
            to: address(&to),
            recipient: mail.email.clone(),
            domain: to.domain().to_ascii_lowercase(),
            bytes,
        })
    }
}

/// The address with its domain in ASCII, if valid. The local part is unchanged.
fn in_ascii(email: &str) -> Option<Address> {
    // The address goes into a command and a header: reject anything that could end either.
    if email.chars().any(char::is_control) {
        return None;
    }
    let (user, domain) = email.rsplit_once('@')?;
    Address::new(user, idna::domain_to_ascii(domain).ok()?).ok()
}

/// A name without control characters or surrounding spaces.
fn in_a_header(name: &str) -> Option<String> {
    let name: String = name.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let name = name.trim();
    (!name.is_empty()).then(|| name.to_owned())
}

/// An ASCII header that must be neither folded nor encoded.
fn header(name: &'static str, value: String) -> HeaderValue {
    HeaderValue::dangerous_new_pre_encoded(HeaderName::new_from_ascii_str(name), value.clone(), value)
}

fn signature(config: &DkimConfig) -> Result<Signature, ComposerError> {
    let path = || config.key_file.clone();
    let key = fs::read_to_string(&config.key_file).map_err(|error| ComposerError::Key { path: path(), error })?;
    let key = DkimSigningKey::new(key.trim(), DkimSigningAlgorithm::Rsa)
        .map_err(|_| ComposerError::KeyKind { path: path() })?;
    let relaxed = DkimCanonicalizationType::Relaxed;
    Ok(Signature::new(
        config.selector.clone(),
        config.domain.clone(),
        key,
        SIGNED.map(HeaderName::new_from_ascii_str).to_vec(),
        DkimCanonicalization { header: relaxed, body: relaxed },
    ))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use mail_parser::{HeaderValue as Value, Message as Parsed, MessageParser};
    use mailrun_core::template::Template;

    use super::*;

    const URL: &str = "https://mail.example/u/abc_def?x=1";

    fn mail(email: &str, name: Option<&str>) -> Mail {
        Mail {
            message_id: "<5.abc@mailrun>".into(),
            run_id: None,
            email: email.into(),
            name: name.map(Into::into),
            template: Arc::new(
                Template::new("Grüße an {{ name or 'Sie' }} 🎂", "Hallo **{{ name }}**,\n.\nкуда").unwrap(),
            ),
            unsubscribe: Some(URL.into()),
        }
    }

    fn config() -> SmtpConfig {
        SmtpConfig {
            from: Sender { name: Some("Jürgen, Chef".into()), email: "jo@bücher.example".into() },
            reply_to: Some(Sender { name: None, email: "answers@example.org".into() }),
            ..SmtpConfig::default()
        }
    }

    fn compose(mail: &Mail) -> ComposedMail {
        Composer::new(&config()).unwrap().compose(mail).unwrap()
    }

    fn parsed(composed: &ComposedMail) -> Parsed<'_> {
        MessageParser::default().parse(&composed.bytes).unwrap()
    }

    fn text<'a>(message: &'a Parsed<'_>, name: &'a str) -> &'a str {
        message.header(name).and_then(Value::as_text).unwrap()
    }

    #[test]
    fn a_mail_has_all_its_headers_and_parts() {
        let composed = compose(&mail("ann@müller.example", Some("Анна \"A\" O'Neil")));
        let message = parsed(&composed);
        assert_eq!(
            (composed.from.as_str(), composed.to.as_str(), composed.domain.as_str()),
            ("jo@xn--bcher-kva.example", "ann@xn--mller-kva.example", "xn--mller-kva.example")
        );
        assert!(!composed.needs_utf8 && composed.bytes.is_ascii());
        let to = message.to().unwrap().first().unwrap();
        assert_eq!((to.name(), to.address()), (Some("Анна \"A\" O'Neil"), Some(composed.to.as_str())));
        assert_eq!(message.from().unwrap().first().unwrap().name(), Some("Jürgen, Chef"));
        assert_eq!(message.reply_to().unwrap().first().unwrap().address(), Some("answers@example.org"));
        assert_eq!(message.subject(), Some("Grüße an Анна \"A\" O'Neil 🎂"));
        assert_eq!(message.message_id(), Some("5.abc@mailrun"));
        assert!(message.date().is_some());
        assert_eq!(text(&message, "Auto-Submitted"), "auto-generated");
        let raw = String::from_utf8(composed.bytes.clone()).unwrap();
        assert!(raw.contains(&format!("\r\nList-Unsubscribe: <{URL}>\r\n")));
        assert!(raw.contains("\r\nList-Unsubscribe-Post: List-Unsubscribe=One-Click\r\n"));
        assert!(raw.contains("multipart/alternative"));
        assert!(message.body_text(0).unwrap().contains("куда"));
        assert!(message.body_html(0).unwrap().contains("<strong>Анна \"A\" O'Neil</strong>"));
        assert!(raw.lines().all(|line| line.len() <= 998) && !raw.replace("\r\n", "").contains(['\r', '\n']));
    }

    #[test]
    fn a_name_cannot_inject_a_header() {
        for name in
            ["Ann\r\nBcc: eve@example.org", "Ann\nBcc: eve@example.org", "\"\r\n\r\nbody", "Ann\u{85}\u{2028}Bcc: x"]
        {
            let composed = compose(&mail("ann@example.org", Some(name)));
            let message = parsed(&composed);
            assert!(message.bcc().is_none());
            assert_eq!(message.to().unwrap().iter().count(), 1, "{name}");
            assert_eq!(message.to().unwrap().first().unwrap().address(), Some("ann@example.org"));
            assert_eq!(message.subject().unwrap().lines().count(), 1);
            assert!(message.message_id().is_some() && message.body_html(0).is_some());
        }
        let reason = Composer::new(&config()).unwrap().compose(&mail("ann@example.org\r\nDATA", None)).unwrap_err();
        assert!(matches!(reason, Outcome::Failed { flagged: true, .. }));
    }

    #[test]
    fn a_mail_without_an_unsubscribe_url_has_no_header_for_it() {
        let composed = compose(&Mail { unsubscribe: None, ..mail("ann@example.org", None) });
        assert!(!String::from_utf8(composed.bytes).unwrap().contains("List-Unsubscribe"));
        let hostile = Mail { unsubscribe: Some("https://x>\r\nBcc: eve".into()), ..mail("ann@example.org", None) };
        assert!(matches!(Composer::new(&config()).unwrap().compose(&hostile), Err(Outcome::Failed { .. })));
    }

    #[test]
    fn one_click_is_offered_over_https_only() {
        let url = "http://mail.example/u/abc";
        let composed = compose(&Mail { unsubscribe: Some(url.into()), ..mail("ann@example.org", None) });
        let raw = String::from_utf8(composed.bytes).unwrap();
        assert!(raw.contains(&format!("\r\nList-Unsubscribe: <{url}>\r\n")), "{raw}");
        assert!(!raw.contains("List-Unsubscribe-Post"), "{raw}");
    }

    #[test]
    fn a_non_ascii_local_part_needs_smtputf8() {
        let composed = compose(&mail("пётр@пример.рф", None));
        assert!(composed.needs_utf8);
        assert_eq!(composed.to, "пётр@xn--e1afmkfd.xn--p1ai");
    }

    #[test]
    fn a_message_that_is_too_large_fails() {
        let composer = Composer::new(&SmtpConfig { max_message_bytes: 500, ..config() }).unwrap();
        let failed = composer.compose(&mail("ann@example.org", None)).unwrap_err();
        let Outcome::Failed { reason, flagged: false } = failed else { panic!("{failed:?}") };
        assert!(reason.contains("max_message_bytes allows 500"), "{reason}");
    }

    #[test]
    fn no_line_tempts_a_server_to_change_it() {
        let body = format!("From here on\n.\n{}\nFrom https://x.org/{} to you", "long ".repeat(60), "a".repeat(300));
        let composed =
            compose(&Mail { template: Arc::new(Template::new("Hi", &body).unwrap()), ..mail("ann@x.org", None) });
        for line in String::from_utf8(composed.bytes.clone()).unwrap().split("\r\n") {
            assert!(line.len() <= 78 && !line.starts_with("From ") && !line.starts_with('.'), "{line}");
        }
        let message = parsed(&composed);
        assert!(message.body_text(0).unwrap().replace("\r\n", "\n").starts_with(&body));
        assert!(message.body_html(0).unwrap().contains("<p>From here on<br />"));
    }

    #[test]
    fn fifty_thousand_lines_arrive_unchanged() {
        let body = "a\n".repeat(49_000) + "От Ann\n";
        let composed =
            compose(&Mail { template: Arc::new(Template::new("Hi", &body).unwrap()), ..mail("ann@x.org", None) });
        assert!(parsed(&composed).body_text(0).unwrap().replace("\r\n", "\n").starts_with(&body));
        let raw = String::from_utf8(composed.bytes).unwrap();
        assert!(!raw.replace("\r\n", "").contains(['\r', '\n']));
    }

    #[test]
    fn the_signature_covers_the_unsubscribe_headers() {
        let folder = tempfile::tempdir().unwrap();
        let key_file = folder.path().join("key.pem");
        let dkim =
            |key_file: PathBuf| Some(DkimConfig { domain: "example.org".into(), selector: "s1".into(), key_file });
        let composer = || Composer::new(&SmtpConfig { dkim: dkim(key_file.clone()), ..config() });
        assert!(matches!(composer(), Err(ComposerError::Key { .. })));
        fs::write(&key_file, "no key").unwrap();
        assert!(matches!(composer(), Err(ComposerError::KeyKind { .. })));
        fs::write(&key_file, include_str!("test_key.pem")).unwrap();
        let composed = composer().unwrap().compose(&mail("ann@example.org", None)).unwrap();
        let message = parsed(&composed);
        let signature = message.header_raw("DKIM-Signature").unwrap();
        let signature = signature.to_lowercase().replace([' ', '\r', '\n', '\t'], "");
        assert!(signature.contains("d=example.org;s=s1;"), "{signature}");
        assert!(signature.contains("list-unsubscribe:list-unsubscribe-post;"), "{signature}");
        // Signing a header that is added later would break the signature.
        assert!(!signature.contains("content-type"), "{signature}");
    }

    proptest::proptest! {
        #[test]
        fn every_accepted_address_yields_a_well_formed_mail(
            entry in "([a-cA-C@.,;>\"\\\\ \t\r\n\u{85}éß():-]|[a-z]{1,5}@[a-zé]{1,5}\\.org|Bcc: |\r\n){0,12}( <\"?[a-z.,:é]{1,6}\"?@[a-zé]{1,6}\\.org>)?",
        ) {
            let Ok(mailrun_core::address::Address { email, name, .. }) = entry.parse() else { return Ok(()) };
            let Ok(composed) = Composer::new(&config()).unwrap().compose(&mail(&email, name.as_deref())) else { return Ok(()) };
            proptest::prop_assert!(!composed.to.contains(|c: char| c.is_control() || c == ' ' || c == '<'), "{}", composed.to);
            let bytes = String::from_utf8_lossy(&composed.bytes);
            let (header, _) = bytes.split_once("\r\n\r\n").unwrap();
            for line in header.split("\r\n") {
                proptest::prop_assert!(line.len() <= 998 && !line.contains(['\r', '\n']), "{}", line);
            }
            let parsed = parsed(&composed);
            proptest::prop_assert_eq!(parsed.to().unwrap().iter().count(), 1, "{}", header);
            proptest::prop_assert!(parsed.bcc().is_none() && parsed.cc().is_none(), "{}", header);
        }
    }
}
