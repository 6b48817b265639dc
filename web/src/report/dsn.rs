//! Delivery status notifications (RFC 3464), as mail servers send them to a sender's address.

use mail_parser::{MessageParser, MimeHeaders as _};
use mailrun_shared::store::suppressions::Reason;

use super::{NotUnderstood, Verdict};

/// A mail may hold a mail, which may hold a mail: each level has a Content-Type, and is let go of by recursion. A bounce, with the mail
/// that it is about, has a handful.
const MAX_PARTS: usize = 200;

pub(super) fn read(content_type: Option<&str>, body: &[u8]) -> Result<Vec<Verdict>, NotUnderstood> {
    const FIELD: &[u8] = b"content-type";
    if body.windows(FIELD.len()).filter(|bytes| bytes.eq_ignore_ascii_case(FIELD)).nth(MAX_PARTS).is_some() {
        return Err(NotUnderstood("it has more than 200 parts"));
    }
    let status =
        status_of(content_type, body).ok_or(NotUnderstood("it is neither JSON nor a delivery status notification"))?;
    Ok(recipients(&status).filter_map(|fields| verdict(&fields)).collect())
}

/// The part that machines read: that of the mail, or the whole body if it is nothing else.
fn status_of(content_type: Option<&str>, body: &[u8]) -> Option<String> {
    // A mail that a program has taken apart: its first header went into the request's.
    let reunited =
        content_type.filter(|kind| is_multipart(kind) && body.trim_ascii_start().starts_with(b"--")).map(|kind| {
            let mut mail = format!("Content-Type: {}\r\n\r\n", kind.replace(['\r', '\n'], " ")).into_bytes();
            mail.extend_from_slice(body);
            mail
        });
    let mail = MessageParser::default().parse(reunited.as_deref().unwrap_or(body));
    let part = mail.as_ref().and_then(|mail| {
        mail.parts.iter().find(|part| {
            part.content_type().is_some_and(|kind| {
                kind.ctype().eq_ignore_ascii_case("message")
                    && kind.subtype().is_some_and(|kind| {
                        kind.eq_ignore_ascii_case("delivery-status")
                            || kind.eq_ignore_ascii_case("global-delivery-status")
                    })
            })
        })
    });
    match part {
        Some(part) => Some(String::from_utf8_lossy(part.contents()).into_owned()),
        None => {
            let text = std::str::from_utf8(body).ok()?;
            recipients(text).next().is_some().then(|| text.to_owned())
        }
    }
}

fn is_multipart(content_type: &str) -> bool {
    content_type.trim_start().get(..10).is_some_and(|start| start.eq_ignore_ascii_case("multipart/"))
}

/// The groups of fields that speak of a recipient.
fn recipients(status: &str) -> impl Iterator<Item = Vec<(&str, String)>> {
    let mut lines = status.lines();
    std::iter::from_fn(move || {
        let mut fields: Vec<(&str, String)> = Vec::new();
        for line in lines.by_ref() {
            if line.trim().is_empty() {
                if !fields.is_empty() {
                    return Some(fields);
                }
            } else if line.starts_with([' ', '\t']) {
                if let Some((_, value)) = fields.last_mut() {
                    value.push(' ');
                    value.push_str(line.trim());
                }
            } else if let Some((name, value)) = line.split_once(':') {
                fields.push((name.trim(), value.trim().to_owned()));
            }
        }
        (!fields.is_empty()).then_some(fields)
    })
    .filter(|fields| field(fields, "Final-Recipient").is_some() && field(fields, "Action").is_some())
}

fn field<'a>(fields: &'a [(&str, String)], name: &str) -> Option<&'a str> {
    fields.iter().find(|field| field.0.eq_ignore_ascii_case(name)).map(|field| field.1.as_str())
}

/// None: the mail was delivered, is delayed, or what hinders it says nothing about the address.
fn verdict(fields: &[(&str, String)]) -> Option<Verdict> {
    let failed = field(fields, "Action")?.eq_ignore_ascii_case("failed");
    if !failed || !is_about_the_address(field(fields, "Status")?) {
        return None;
    }
    let detail = field(fields, "Diagnostic-Code").map(untyped).or_else(|| field(fields, "Status"));
    // The original one is the one we wrote to; the final one may be what it is forwarded to.
    ["Original-Recipient", "Final-Recipient"]
        .into_iter()
        .filter_map(|name| field(fields, name))
        .find_map(|recipient| Verdict::new(&decode_xtext(untyped(recipient)), Reason::Bounced, detail))
}

/// Whether a status (RFC 3463) means that mail to this address will never arrive, whoever sends what.
fn is_about_the_address(status: &str) -> bool {
    // A comment may follow: `5.1.1 (bad destination mailbox address)`.
    let mut numbers = status.split([' ', '(']).next().unwrap_or_default().split('.');
    let (class, subject, detail) = (numbers.next(), numbers.next(), numbers.next());
    class == Some("5")
        && match (subject, detail) {
            // The mailbox is full, or takes no mail of this size.
            (Some("2"), Some("2" | "3")) | (Some("3"), Some("4")) => false,
            // The content, and policy: they speak of the mail and of its sender, and a block would take everybody.
            (Some("6" | "7"), _) => false,
            (Some(_), Some(_)) => true,
            _ => false,
        }
}

/// `rfc822; ann@example.org` without its type.
fn untyped(value: &str) -> &str {
    value.split_once(';').map_or(value, |(_, value)| value).trim()
}

/// `+2B` is a plus (RFC 3461); a plus that is none of these stands for itself, as it does in real life.
fn decode_xtext(text: &str) -> String {
    let mut decoded = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(place) = rest.find('+') {
        decoded.push_str(&rest[..place]);
        let code = rest
            .get(place + 1..place + 3)
            .filter(|code| code.bytes().all(|byte| byte.is_ascii_digit() || (b'A'..=b'F').contains(&byte)));
        match code.and_then(|code| u8::from_str_radix(code, 16).ok()).filter(|byte| matches!(byte, b'+' | b'=')) {
            Some(byte) => {
                decoded.push(char::from(byte));
                rest = &rest[place + 3..];
            }
            None => {
                decoded.push('+');
                rest = &rest[place + 1..];
            }
        }
    }
    decoded.push_str(rest);
    decoded
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{self, Report};
    use proptest::prelude::*;

    const POSTFIX: &str = include_str!("fixtures/postfix.eml");

    fn verdicts(content_type: &str, body: &str) -> Vec<Verdict> {
        match report::read(Some(content_type), body.as_bytes()).unwrap() {
            Report::Suppress(verdicts) => verdicts,
            Report::Confirm(url) => panic!("a confirmation: {url}"),
        }
    }

    #[test]
    fn a_failure_for_good_suppresses_whom_we_wrote_to() {
        let verdicts = verdicts("message/rfc822", POSTFIX);
        assert_eq!(verdicts.len(), 1);
        assert_eq!((verdicts[0].email.as_str(), verdicts[0].reason), ("nobody+list@example.org", Reason::Bounced));
        let detail = verdicts[0].detail.as_deref().unwrap();
        assert_eq!(detail, "550 5.1.1 <forwarded@example.net>: Recipient address rejected: User unknown");
    }

    #[test]
    fn the_same_taken_apart_or_with_other_line_ends() {
        let crlf = POSTFIX.replace('\n', "\r\n");
        assert_eq!(verdicts("text/plain", &crlf), verdicts("message/rfc822", POSTFIX));
        let (_, body) = POSTFIX.split_once("\n\n").unwrap();
        let kind = r#"multipart/report; report-type=delivery-status; boundary="A1B2C3.1764000000/mx.example.com""#;
        assert_eq!(verdicts(kind, &body[body.find("--A1B2").unwrap()..]), verdicts("message/rfc822", POSTFIX));
        let piped = format!("From MAILER-DAEMON  Mon Nov 24 16:00:01 2025\n{POSTFIX}");
        assert_eq!(verdicts("message/rfc822", &piped), verdicts("message/rfc822", POSTFIX));
        let status = "Reporting-MTA: dns; mx\n\nFinal-Recipient: rfc822; a@x.org\nAction: failed\nStatus: 5.1.1\n";
        assert_eq!(verdicts("text/plain", status)[0].email, "a@x.org");
    }

    #[test]
    fn what_may_pass_suppresses_nobody() {
        assert_eq!(verdicts("message/rfc822", &POSTFIX.replace("Action: failed", "Action: delayed")), []);
        for status in ["4.1.1", "4.4.7", "2.0.0", "5.2.2", "5.7.1", "5.6.0", "5.3.4", "nonsense", "5", ""] {
            let mail = POSTFIX.replace("Status: 5.1.1", &format!("Status: {status}"));
            assert_eq!(verdicts("message/rfc822", &mail), [], "{status}");
        }
        for status in ["5.1.10 (null MX)", "5.0.0", "5.2.1", "5.4.4", "5.5.0"] {
            let mail = POSTFIX.replace("Status: 5.1.1", &format!("Status: {status}"));
            assert_eq!(verdicts("message/rfc822", &mail).len(), 1, "{status}");
        }
    }

    #[test]
    fn an_encoded_address_is_decoded() {
        assert_eq!(decode_xtext("a+2Bb+3Dc@x.org"), "a+b=c@x.org");
        assert_eq!(decode_xtext("a+list@x.org+"), "a+list@x.org+");
        // Somebody's tag that looks like a code.
        assert_eq!(decode_xtext("a+40@x.org"), "a+40@x.org");
    }

    proptest! {
        #[test]
        fn whatever_comes_nothing_panics(content_type in "\\PC{0,40}", body in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = report::read(Some(&content_type), &body);
        }
    }

    proptest! {
        #[test]
        fn a_mail_that_is_cut_or_garbled_suppresses_nobody_else(
            from in 0usize..POSTFIX.len(), to in 0usize..POSTFIX.len(), with in prop::collection::vec(any::<u8>(), 0..20), end: bool,
        ) {
            let (from, to) = (from.min(to), if end { POSTFIX.len() } else { from.max(to) });
            let mut mail = POSTFIX.as_bytes().to_vec();
            mail.splice(from..to, with);
            if let Ok(Report::Suppress(verdicts)) = report::read(Some("message/rfc822"), &mail) {
                prop_assert!(verdicts.len() <= 2);
                for verdict in verdicts {
                    prop_assert!(!verdict.detail.unwrap_or_default().contains(char::is_control));
                }
            }
        }
    }

    #[test]
    fn a_mail_within_a_mail_within_a_mail_ends() {
        let parts =
            ["Content-Type: message/rfc822\r\n\r\n", "Content-Type: multipart/mixed; boundary=a\r\n\r\n--a\r\n"];
        for part in parts {
            assert!(report::read(None, part.repeat(MAX_PARTS).as_bytes()).is_err());
            let refused = report::read(None, part.repeat(50_000).as_bytes()).unwrap_err();
            assert_eq!(refused.to_string(), "it has more than 200 parts");
        }
    }
}
