//! Reads what mail providers and mail servers report of mails that went out: bounces and complaints. Pure.

mod dsn;
mod postmark;
mod ses;

use mailrun_shared::{address::Address, store::suppressions::Reason};
use serde_json::Value;

/// What a report is about.
#[derive(Debug, PartialEq)]
pub(crate) enum Report {
    /// Nobody is to write to these any more; none, if what it reports may pass, or is good news.
    Suppress(Vec<Verdict>),
    /// Amazon SNS asks whether it may send reports here. Visiting this address says yes.
    Confirm(String),
}

/// An address that nobody is to write to any more.
#[derive(Debug, PartialEq)]
pub(crate) struct Verdict {
    /// The mailbox.
    pub(crate) email: String,
    pub(crate) reason: Reason,
    /// In the reporter's words.
    pub(crate) detail: Option<String>,
}

/// A report that can't be read.
#[derive(Debug, PartialEq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct NotUnderstood(&'static str);

/// The details of a report are cut beyond this.
const MAX_DETAIL_CHARS: usize = 500;

impl Verdict {
    /// About an address as it stands in a report, perhaps with a name. None: it is no address.
    fn new(address: &str, reason: Reason, detail: Option<&str>) -> Option<Self> {
        let Address { email, .. } = address.parse().ok()?;
        let detail = detail.map(one_line).filter(|detail| !detail.is_empty());
        Some(Self { email, reason, detail })
    }
}

fn one_line(text: &str) -> String {
    let words = text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join(" ").chars().take(MAX_DETAIL_CHARS).collect()
}

/// Reads a report by what it says; its content type only helps with a mail whose header stayed behind.
///
/// # Errors
/// Why it can't be read.
pub(crate) fn read(content_type: Option<&str>, body: &[u8]) -> Result<Report, NotUnderstood> {
    // Amazon SNS calls its JSON text/plain.
    if body.trim_ascii_start().first() == Some(&b'{') {
        let json = serde_json::from_slice(body).map_err(|_| NotUnderstood("it begins like JSON, and is none"))?;
        return read_json(&json);
    }
    dsn::read(content_type, body).map(Report::Suppress)
}

fn read_json(json: &Value) -> Result<Report, NotUnderstood> {
    if postmark::is_one(json) {
        return postmark::read(json).map(Report::Suppress);
    }
    ses::read(json)
}

/// The text at a path of keys.
fn text<'a>(json: &'a Value, path: &[&str]) -> Option<&'a str> {
    path.iter().try_fold(json, |json, key| json.get(key))?.as_str()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_no_report_is_refused() {
        for body in [
            "",
            "hello",
            "{",
            "{}",
            r#"{"Type":"Other"}"#,
            r#"{"notificationType":5}"#,
            "[1]",
            "Subject: hello\r\n\r\nhello",
        ] {
            assert!(read(None, body.as_bytes()).is_err(), "{body}");
        }
    }

    #[test]
    fn all_spellings_of_a_domain_are_one_mailbox() {
        for email in ["ann@xn--bcher-kva.example", "ann@bücher.example", "Ann@BU\u{308}CHER.example"] {
            assert_eq!(Verdict::new(email, Reason::Bounced, None).unwrap().email, "ann@xn--bcher-kva.example");
        }
    }

    #[test]
    fn a_detail_is_one_line_of_bounded_length() {
        let verdict = Verdict::new("Ann <Ann@X.org>", Reason::Bounced, Some(&"a\r\n b ".repeat(400))).unwrap();
        assert_eq!(verdict.email, "ann@x.org");
        let detail = verdict.detail.unwrap();
        assert!(detail.starts_with("a b a b") && detail.len() == MAX_DETAIL_CHARS, "{detail}");
        assert_eq!(Verdict::new("nobody", Reason::Bounced, None), None);
    }

    #[test]
    fn a_detail_has_no_character_that_can_not_be_kept() {
        let verdict = Verdict::new("a@x.org", Reason::Bounced, Some("550\0no\u{7}such user")).unwrap();
        assert_eq!(verdict.detail.as_deref(), Some("550 no such user"));
    }

    proptest! {
        #[test]
        fn a_report_of_any_json_is_understood_or_refused(
            which in 0usize..3, places in prop::collection::vec((any::<prop::sample::Index>(), prop::sample::select(&[
                "{", "}", "[", "]", ":", ",", "\"", "\\", "\\u0000", "null", "5", "\"\"", "\"x\"", "Permanent", "true", "-1e999", "é",
            ][..]), 0usize..30), 0..4),
        ) {
            let fixture = [
                include_str!("fixtures/sns_bounce.json"), include_str!("fixtures/ses_complaint.json"), include_str!("fixtures/postmark_bounce.json"),
            ][which];
            let mut body = fixture.as_bytes().to_vec();
            for (place, with, taken) in places {
                let at = place.index(body.len());
                body.splice(at..(at + taken).min(body.len()), with.bytes());
            }
            match read(Some("application/json"), &body) {
                Ok(Report::Suppress(verdicts)) => for Verdict { email, detail, .. } in verdicts {
                    prop_assert_eq!(email.parse::<Address>().unwrap().email, email);
                    prop_assert!(!detail.unwrap_or_default().contains(char::is_control));
                },
                Ok(Report::Confirm(_)) => {}
                Err(reason) => prop_assert!(!reason.to_string().is_empty()),
            }
        }
    }

    #[test]
    fn json_without_bottom_is_refused() {
        for body in [
            "{\"a\":".repeat(200_000),
            format!("{{\"Type\":\"Notification\",\"Message\":\"{}\"}}", "[".repeat(200_000)),
        ] {
            assert!(read(None, body.as_bytes()).is_err());
        }
    }
}
