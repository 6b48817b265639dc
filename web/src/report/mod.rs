//! Parses the bounce and complaint reports of mail providers and mail servers. Pure functions.

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
    claim::{ReportError, ReportedAddress},
    mail::Returned,
};

#[derive(Debug, PartialEq)]
pub(crate) enum Report {
    /// A mail provider's report about addresses. Empty if it is temporary or a success.
    Provider(Vec<ReportedAddress>),
    /// A mail to the bounce address. Anyone can write to it.
    Mail(Returned),
    /// A message of Amazon SNS, not yet verified.
    Sns(Box<Envelope>),
}

/// Whether a report is JSON. Amazon SNS sends JSON as text/plain.
pub(crate) fn is_json(body: &[u8]) -> bool {
    body.trim_ascii_start().first() == Some(&b'{')
}

/// Parses a report by its content; the content type only matters for a mail whose header was separated from it.
pub(crate) fn read(content_type: Option<&str>, body: &[u8]) -> Result<Report, ReportError> {
    if is_json(body) {
        let json = serde_json::from_slice(body).map_err(|_| ReportError("it is malformed JSON"))?;
        return read_json(json);
    }
    mail::read(content_type, body).map(Report::Mail)
}

fn read_json(json: Value) -> Result<Report, ReportError> {
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
    fn refuses_other_content() {
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
    fn normalises_internationalised_domains() {
        for email in ["ann@xn--bcher-kva.example", "ann@bücher.example", "Ann@BU\u{308}CHER.example"] {
            assert_eq!(ReportedAddress::new(email, Reason::Bounced, None).unwrap().email, "ann@xn--bcher-kva.example");
        }
    }

    #[test]
    fn a_detail_is_one_bounded_line() {
        let reported = ReportedAddress::new("Ann <Ann@X.org>", Reason::Bounced, Some(&"a\r\n b ".repeat(400))).unwrap();
        assert_eq!(reported.email, "ann@x.org");
        let detail = reported.detail.unwrap();
        assert!(detail.starts_with("a b a b") && detail.len() == MAX_DETAIL_CHARS, "{detail}");
        assert_eq!(ReportedAddress::new("nobody", Reason::Bounced, None), None);
    }

    #[test]
    fn a_detail_has_no_control_characters() {
        let reported = ReportedAddress::new("a@x.org", Reason::Bounced, Some("550\0no\u{7}such user")).unwrap();
        assert_eq!(reported.detail.as_deref(), Some("550 no such user"));
    }

    #[test]
    fn the_server_reply_overrides_the_provider() {
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
        fn any_json_report_is_parsed_or_refused(
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
            let reported = match read(Some("application/json"), &body) {
                Ok(Report::Provider(reported)) => Ok(reported),
                Ok(Report::Sns(envelope)) => envelope.reported(),
                Ok(Report::Mail(returned)) => { prop_assert_eq!(returned.claims, []); Ok(Vec::new()) }
                Err(reason) => Err(reason),
            };
            match reported {
                Ok(reported) => for ReportedAddress { email, detail, .. } in reported {
                    prop_assert_eq!(email.parse::<Address>().unwrap().email, email);
                    prop_assert!(!detail.unwrap_or_default().contains(char::is_control));
                },
                Err(reason) => prop_assert!(!reason.to_string().is_empty()),
            }
        }
    }

    #[test]
    fn refuses_deeply_nested_json() {
        assert!(read(None, "{\"a\":".repeat(200_000).as_bytes()).is_err());
    }
}
