//! Classifies a delivery report (RFC 3464) by its `Status` and by the reply that its diagnostic quotes.

use super::{Classified, Stage, class, text::Words, text::statuses, wait};

/// Classifies the report about one recipient. `diagnostic` is the text after the type (`smtp;`). It overrides `status`, because
/// many servers write 5.0.0 or a status of their own there.
#[must_use]
pub fn classify_report(status: Option<&str>, diagnostic: Option<&str>) -> Classified {
    let diagnostic = diagnostic.unwrap_or_default();
    let code = reply_code(diagnostic);
    // A comment may follow: `5.1.1 (bad destination mailbox address)`.
    let status = status.unwrap_or_default();
    let status_class =
        status.trim_start().chars().next().and_then(|c| c.to_digit(10)).and_then(|class| u16::try_from(class).ok());
    let quoted = statuses(diagnostic, code.map(|code| code / 100));
    let details = match quoted.as_slice() {
        [] => statuses(status, None).into_iter().filter(|detail| *detail != (0, 0)).collect(),
        _ => quoted,
    };
    let words = Words::of(diagnostic);
    let quoted_class = code.map(|code| code / 100).or_else(|| first_class(diagnostic));
    Classified {
        class: class(Stage::Content, code, &details, &words),
        // If both are present, both must be permanent: an expired message has the status 5.4.7 and quotes a 4xx reply.
        permanent: quoted_class.is_none_or(|class| class == 5)
            && status_class.is_none_or(|class| class == 5)
            && (quoted_class.is_some() || status_class.is_some()),
        wait: wait::suggested(diagnostic),
        period: wait::period(&words),
    }
}

/// The class of the first enhanced status in a text without a reply code.
fn first_class(text: &str) -> Option<u16> {
    [4, 5].into_iter().find(|class| !statuses(text, Some(*class)).is_empty())
}

/// The first reply code that a diagnostic quotes: a word of three digits from 400, or such digits followed by a hyphen.
fn reply_code(diagnostic: &str) -> Option<u16> {
    diagnostic
        .split(|c: char| {
            c.is_whitespace() || matches!(c, ';' | ':' | '(' | ')' | '<' | '>' | '"' | '\'' | '[' | ']' | ',')
        })
        .find_map(|word| {
            let digits = word.get(..3)?;
            let stands_alone = word.len() == 3 || word[3..].starts_with('-');
            let code = digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok()).flatten()?;
            ((400..600).contains(&code) && stands_alone).then_some(code)
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reply::ReplyClass;

    fn suppresses(status: &str, diagnostic: &str) -> bool {
        classify_report(Some(status), Some(diagnostic)).suppresses()
    }

    #[test]
    fn the_diagnostic_overrides_the_status() {
        for (status, diagnostic) in [
            ("5.1.1", "550 5.1.1 <a@x.org>: Recipient address rejected: User unknown"),
            ("5.0.0", "550 5.1.1 no such user"),
            ("5.0.0", "550 No such user here"),
            ("5.1.1", ""),
            ("5.1.10 (null MX)", ""),
            ("5.1.1", "unknown user: \"ann\""),
            ("5.1.1", "550 Requested action not taken: mailbox unavailable"),
            ("5.0.0", "550-5.1.1 The email account that you tried to reach does not exist.\n550 5.1.1 Learn more"),
        ] {
            assert!(suppresses(status, diagnostic), "{status} {diagnostic}");
        }
        for (status, diagnostic) in [
            ("5.0.0", ""),
            ("5.0.0", "550 Requested action not taken: mailbox unavailable"),
            ("5.0.0", "550 5.7.1 Message rejected due to local policy"),
            ("5.0.0", "552 Requested mail action aborted: exceeded storage allocation"),
            ("5.1.1", "550 5.7.1 Relaying denied"),
            ("5.1.1", "550 mailbox over quota"),
            ("5.1.1", "450 4.1.1 user unknown"),
            ("4.1.1", "user unknown"),
            ("4.4.7", "delivery time expired"),
            ("5.4.7", "450 4.1.1 <a@x.org>: unverified address: user unknown"),
            ("5.1.8", "550 5.1.8 Access denied, bad outbound sender"),
            ("5.1.7", ""),
            ("5.4.316", "550 5.4.316 Message expired, connection refused"),
            ("5.4.4", "Host or domain name not found. Name service error for name=x.org type=MX"),
            ("5.2.2", ""),
            ("5.2.1", ""),
            ("5.3.0", ""),
            ("5.7.1", "550 5.1.1 sender rejected"),
            ("", ""),
            ("nonsense", "nonsense"),
        ] {
            assert!(!suppresses(status, diagnostic), "{status} {diagnostic}");
        }
    }

    #[test]
    fn a_report_without_a_reply_code_is_classified() {
        let class = |diagnostic| classify_report(None, Some(diagnostic)).class;
        assert_eq!(class("5.1.1 user unknown"), ReplyClass::NoMailbox);
        assert_eq!(class("retry timeout exceeded"), ReplyClass::Route);
        assert!(!classify_report(None, Some("user unknown")).suppresses(), "it has neither a code nor a status");
    }
}
