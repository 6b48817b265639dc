//! The machine-readable part of delivery status notifications (RFC 3464, RFC 6533).

use super::{
    claim::Claim,
    fields::{field, fields, untyped},
};

/// Maximum recipients read from a report. Our messages have one; a mailing list behind it may report several.
const MAX_RECIPIENTS: usize = 100;

/// Whether a text is such a part without a mail around it.
pub(super) fn is_status(text: &str) -> bool {
    recipients(text).next().is_some()
}

/// The recipients whose mailbox provably does not exist.
pub(super) fn claims(status: &str) -> Vec<Claim> {
    recipients(status).take(MAX_RECIPIENTS).filter_map(|fields| claim(&fields)).collect()
}

/// The per-recipient groups of fields.
fn recipients(status: &str) -> impl Iterator<Item = Vec<(String, String)>> {
    let mut lines = status.lines();
    let groups = std::iter::from_fn(move || {
        let group = fields(&mut lines);
        (!group.is_empty()).then_some(group)
    });
    groups.flat_map(split).filter(|fields| field(fields, "Action").is_some() && !addresses(fields).is_empty())
}

/// Some servers omit the blank line between two recipients: a repeated field begins the next one.
fn split(group: Vec<(String, String)>) -> Vec<Vec<(String, String)>> {
    const STARTS: [&str; 2] = ["Original-Recipient", "Final-Recipient"];
    let mut groups: Vec<Vec<(String, String)>> = vec![Vec::new()];
    for (name, value) in group {
        let starts = STARTS.iter().any(|start| name.eq_ignore_ascii_case(start));
        if let Some(last) = groups.last_mut() {
            let is_complete =
                field(last, "Action").is_some() && STARTS.iter().any(|start| field(last, start).is_some());
            if starts && (is_complete || field(last, &name).is_some()) {
                groups.push(vec![(name, value)]);
            } else {
                last.push((name, value));
            }
        }
    }
    groups
}

/// None: the mail was delivered or is delayed, or the failure says nothing about the mailbox.
fn claim(fields: &[(String, String)]) -> Option<Claim> {
    let action = field(fields, "Action")?.split([' ', '(', ';']).next()?;
    if !action.eq_ignore_ascii_case("failed") {
        return None;
    }
    let diagnostic = field(fields, "Diagnostic-Code").map(untyped);
    Claim::bounced(addresses(fields), field(fields, "Status"), diagnostic)
}

/// The original recipient is the one in our message; the final one may be a forwarding address.
fn addresses(fields: &[(String, String)]) -> Vec<String> {
    let mut addresses = Vec::new();
    for value in ["Original-Recipient", "Final-Recipient"].into_iter().filter_map(|name| field(fields, name)) {
        let address = untyped(value).trim_matches(['<', '>', '"']);
        // A comment may follow.
        let address = address.split_whitespace().next().unwrap_or_default().trim_end_matches('>');
        for form in [address.to_owned(), decoded_xtext(address), decoded_unicode(address)] {
            if form.contains('@') && !addresses.contains(&form) {
                addresses.push(form);
            }
        }
    }
    addresses
}

/// `+2B` is a plus (RFC 3461, 4). Comparing with the message's address decides whether a plus is such a code.
fn decoded_xtext(text: &str) -> String {
    decoded(text, "+", |rest| {
        let code = rest.get(..2).filter(|code| code.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'A'..=b'F')))?;
        let byte = u8::from_str_radix(code, 16).ok().filter(u8::is_ascii_graphic)?;
        Some((char::from(byte), 2))
    })
}

/// `\x{FC}` is a ü (RFC 6533, 3).
fn decoded_unicode(text: &str) -> String {
    decoded(text, "\\x{", |rest| {
        let (code, _) = rest.split_once('}')?;
        let character = u32::from_str_radix(code, 16).ok().and_then(char::from_u32)?;
        Some((character, code.len() + 1))
    })
}

/// Replaces each `mark` and the text after it that `decode` accepts. Anything else is left unchanged.
fn decoded(text: &str, mark: &str, decode: impl Fn(&str) -> Option<(char, usize)>) -> String {
    let mut decoded = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(place) = rest.find(mark) {
        decoded.push_str(&rest[..place]);
        rest = &rest[place + mark.len()..];
        match decode(rest) {
            Some((character, taken)) => {
                decoded.push(character);
                rest = &rest[taken..];
            }
            None => decoded.push_str(mark),
        }
    }
    decoded.push_str(rest);
    decoded
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::report::{Report, Returned, read};

    const POSTFIX: &str = include_str!("fixtures/postfix.eml");

    fn claims_of(content_type: &str, body: &str) -> Vec<Claim> {
        match read(Some(content_type), body.as_bytes()).unwrap() {
            Report::Mail(Returned { claims, .. }) => claims,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_permanent_failure_names_the_original_recipient() {
        let claims = claims_of("message/rfc822", POSTFIX);
        assert_eq!(claims.len(), 1);
        assert!(claims[0].is_about("nobody+list@example.org") && claims[0].is_about("forwarded@example.net"));
        assert!(!claims[0].is_about("nobody@example.org"));
        let detail = claims[0].detail.as_deref().unwrap();
        assert_eq!(detail, "550 5.1.1 <forwarded@example.net>: Recipient address rejected: User unknown");
    }

    #[test]
    fn parses_detached_parts_and_other_line_ends() {
        let crlf = POSTFIX.replace('\n', "\r\n");
        assert_eq!(claims_of("text/plain", &crlf), claims_of("message/rfc822", POSTFIX));
        let (_, body) = POSTFIX.split_once("\n\n").unwrap();
        let kind = r#"multipart/report; report-type=delivery-status; boundary="A1B2C3.1764000000/mx.example.com""#;
        assert_eq!(claims_of(kind, &body[body.find("--A1B2").unwrap()..]), claims_of("message/rfc822", POSTFIX));
        let piped = format!("From MAILER-DAEMON  Mon Nov 24 16:00:01 2025\n{POSTFIX}");
        assert_eq!(claims_of("message/rfc822", &piped), claims_of("message/rfc822", POSTFIX));
        let status = "Reporting-MTA: dns; mx\n\nFinal-Recipient: rfc822; a@x.org\nAction: failed\nStatus: 5.1.1\n";
        assert!(claims_of("text/plain", status)[0].is_about("a@x.org"));
    }

    #[test]
    fn separates_recipients_without_a_blank_line_between_them() {
        let status = "Final-Recipient: rfc822; a@x.org\nAction: failed\nStatus: 5.1.1\n\
             Original-Recipient: rfc822;c@x.org\nFinal-Recipient: rfc822; b@x.org\nAction: failed\nStatus: 5.7.1\n\
             Final-Recipient: rfc822; d@x.org\nAction: delayed\nStatus: 4.1.1\n";
        let claims = claims(status);
        assert!(claims.len() == 1 && claims[0].addresses == ["a@x.org"], "{claims:?}");
    }

    #[test]
    fn compares_an_address_in_all_its_encodings() {
        let about = |value: &str, email| {
            let status =
                format!("Original-Recipient: {value}\nFinal-Recipient: rfc822; x@y.org\nAction: failed\nStatus: 5.1.1");
            claims(&status)[0].is_about(email)
        };
        assert!(about("rfc822;a+2Bb+3Dc@x.org", "a+b=c@x.org"));
        // A tag that looks like an xtext code.
        assert!(about("rfc822; a+40@x.org", "a+40@x.org"));
        assert!(about("RFC822;<A@X.org>", "a@x.org"));
        assert!(about("rfc822; a@x.org (Ann)", "a@x.org"));
        assert!(about(r"utf-8; j\x{FC}rgen@example.com", "jürgen@example.com"));
        assert!(about("UTF-8;jürgen@bücher.example", "jürgen@xn--bcher-kva.example"));
        assert!(about("rfc822; ann@xn--bcher-kva.example", "ann@bücher.example"));
        assert!(about("utf-8; a\\x{nothing}@x.org", "x@y.org"));
        assert!(!about("rfc822; b@x.org", "a@x.org"));
    }

    #[test]
    fn text_with_a_semicolon_need_not_have_a_type() {
        assert_eq!(untyped("smtp; 550 no; never"), "550 no; never");
        assert_eq!(untyped("550 5.7.1 rejected; no such user"), "550 5.7.1 rejected; no such user");
    }

    proptest! {
        #[test]
        fn no_input_panics(content_type in "\\PC{0,40}", body in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = read(Some(&content_type), &body);
        }

        #[test]
        fn a_truncated_or_garbled_mail_yields_at_most_its_claims(
            from in 0usize..POSTFIX.len(), to in 0usize..POSTFIX.len(), with in prop::collection::vec(any::<u8>(), 0..20), end: bool,
        ) {
            let (from, to) = (from.min(to), if end { POSTFIX.len() } else { from.max(to) });
            let mut mail = POSTFIX.as_bytes().to_vec();
            mail.splice(from..to, with);
            if let Ok(Report::Mail(Returned { claims, .. })) = read(Some("message/rfc822"), &mail) {
                prop_assert!(claims.len() <= 2);
                for claim in claims {
                    prop_assert!(!claim.detail.unwrap_or_default().contains(char::is_control));
                }
            }
        }

        #[test]
        fn decoding_any_address_terminates(text in "([+\\\\x{}0-9A-Fa-z@é]|\\+2B|\\\\x\\{FC\\}){0,30}") {
            let _ = (decoded_xtext(&text), decoded_unicode(&text));
        }
    }

    #[test]
    fn nested_mails_are_bounded() {
        let parts =
            ["Content-Type: message/rfc822\r\n\r\n", "Content-Type: multipart/mixed; boundary=a\r\n\r\n--a\r\n"];
        for part in parts {
            assert!(read(None, part.repeat(200).as_bytes()).is_err());
            let refused = read(None, part.repeat(50_000).as_bytes()).unwrap_err();
            assert_eq!(refused.to_string(), "it has more than 200 parts");
        }
    }
}
