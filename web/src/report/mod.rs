//! Reads what mail providers and mail servers report of mails that went out: bounces and complaints. Pure.

mod arf;
mod claim;
mod dsn;
mod fields;
mod mail;
mod postmark;
mod ses;
pub(crate) mod sns;
mod text;

#[cfg(test)]
mod samples;

use serde_json::Value;

use self::sns::Envelope;
pub(crate) use self::{
    claim::{NotUnderstood, Verdict},
    mail::Returned,
};

/// What a report is about.
#[derive(Debug, PartialEq)]
pub(crate) enum Report {
    /// What a mail provider says of addresses; none, if it may pass, or is good news.
    Provider(Vec<Verdict>),
    /// A mail that came to the bounce address. Anybody can write there.
    Mail(Returned),
    /// A message of Amazon SNS, which is to be verified.
    Sns(Box<Envelope>),
}

/// Whether a report is JSON. Amazon SNS calls its own text/plain.
pub(crate) fn is_json(body: &[u8]) -> bool {
    body.trim_ascii_start().first() == Some(&b'{')
}

/// Reads a report by what it says; its content type only helps with a mail whose header stayed behind.
///
/// # Errors
/// Why it can't be read.
pub(crate) fn read(content_type: Option<&str>, body: &[u8]) -> Result<Report, NotUnderstood> {
    if is_json(body) {
        let json = serde_json::from_slice(body).map_err(|_| NotUnderstood("it begins like JSON, and is none"))?;
        return read_json(json);
    }
    mail::read(content_type, body).map(Report::Mail)
}

fn read_json(json: Value) -> Result<Report, NotUnderstood> {
    if postmark::is_one(&json) {
        postmark::read(&json).map(Report::Provider)
    } else if sns::is_one(&json) {
        sns::read(json).map(|envelope| Report::Sns(Box::new(envelope)))
    } else {
        ses::read(&json).map(Report::Provider)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use mailrun_core::address::Address;
    use mailrun_ledger::suppressions::Reason;

    use super::{
        claim::{MAX_DETAIL_CHARS, is_about_the_mailbox},
        *,
    };

    #[test]
    fn what_is_no_report_is_refused() {
        for body in [
            "",
            "hello",
            "{",
            "{}",
            r#"{"Type":"Other"}"#,
            r#"{"Type":"Notification"}"#,
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

    #[test]
    fn what_a_server_said_overrides_the_provider() {
        for (status, diagnostic) in [
            (None, None),
            (Some(""), Some(" ")),
            (Some("5.1.1"), Some("smtp; 550 5.1.1 <jane@example.com>... User")),
            (None, Some("smtp;550 5.1.1 The email account that you tried to reach does not exist.")),
            (None, Some("The server was unable to deliver your message (ex: unknown user, mailbox not found).")),
        ] {
            assert!(is_about_the_mailbox(status, diagnostic), "{status:?} {diagnostic:?}");
        }
        for (status, diagnostic) in [
            (Some("5.7.1"), Some("smtp; 550 5.7.1 Message rejected due to local policy")),
            (None, Some("smtp;554 5.7.1 Service unavailable; client host blocked using a block list")),
            (Some("5.2.2"), Some("smtp; 552 5.2.2 mailbox full")),
            (Some("4.4.7"), Some("smtp; 421 connection timed out")),
            (Some("5.1.8"), None),
        ] {
            assert!(!is_about_the_mailbox(status, diagnostic), "{status:?} {diagnostic:?}");
        }
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
            let verdicts = match read(Some("application/json"), &body) {
                Ok(Report::Provider(verdicts)) => Ok(verdicts),
                Ok(Report::Sns(envelope)) => envelope.verdicts(),
                Ok(Report::Mail(returned)) => { prop_assert_eq!(returned.claims, []); Ok(Vec::new()) }
                Err(reason) => Err(reason),
            };
            match verdicts {
                Ok(verdicts) => for Verdict { email, detail, .. } in verdicts {
                    prop_assert_eq!(email.parse::<Address>().unwrap().email, email);
                    prop_assert!(!detail.unwrap_or_default().contains(char::is_control));
                },
                Err(reason) => prop_assert!(!reason.to_string().is_empty()),
            }
        }
    }

    #[test]
    fn json_without_bottom_is_refused() {
        assert!(read(None, "{\"a\":".repeat(200_000).as_bytes()).is_err());
    }
}
