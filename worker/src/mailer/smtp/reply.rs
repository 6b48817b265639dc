//! Replies of a mail server, and how they are shown.

use std::fmt;

use mailrun_core::reply::{Detail, normalized, statuses};

/// Longer reasons are truncated.
const MAX_REASON_CHARS: usize = 300;
/// Replaces the recipient's address where the server repeats it.
const RECIPIENT: &str = "<recipient>";

/// A reply: a code and lines of text.
///
/// `smtp_proto::ResponseReceiver` is not used: it joins lines with different codes into one reply, accepts any three digits as
/// a code, gives up after 4 KiB, and keeps only the enhanced status code of the last line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// From 200 to 599.
    pub code: u16,
    /// The text after the code, by line.
    pub lines: Vec<String>,
}

impl Reply {
    /// Parses one line: code, whether it is the last line, text. `None`: it is not a reply line.
    pub fn line(line: &str) -> Option<(u16, bool, &str)> {
        let code = line.get(..3).filter(|code| code.bytes().all(|byte| byte.is_ascii_digit()))?;
        let code: u16 = code.parse().ok().filter(|code| (200..600).contains(code))?;
        match line.as_bytes().get(3) {
            // A code without text is valid (RFC 5321, 4.2).
            None => Some((code, true, "")),
            Some(b' ') => Some((code, true, &line[4..])),
            Some(b'-') => Some((code, false, &line[4..])),
            Some(_) => None,
        }
    }

    /// Whether it is a 2xx.
    pub fn is_positive(&self) -> bool {
        (200..300).contains(&self.code)
    }

    /// The normalized reply, equal for refusals with the same reason.
    pub fn alike(&self) -> String {
        normalized(self.code, &self.lines.join("\n"))
    }
}

/// The enhanced status at the beginning of `line`, if it matches the code, and the rest of the line.
fn enhanced(code: u16, line: &str) -> Option<(Detail, &str)> {
    let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
    match statuses(word, Some(code / 100)).as_slice() {
        [detail] if word.starts_with(|c: char| c.is_ascii_digit()) => Some((*detail, rest)),
        _ => None,
    }
}

/// One line, with the enhanced status code only once.
impl fmt::Display for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.code)?;
        let first = self.lines.first().and_then(|line| enhanced(self.code, line)).map(|(detail, _)| detail);
        for (number, line) in self.lines.iter().enumerate() {
            let shown = match (number, enhanced(self.code, line)) {
                (1.., Some((detail, rest))) if Some(detail) == first => rest,
                _ => line,
            };
            if !shown.trim().is_empty() {
                write!(f, " {}", shown.trim())?;
            }
        }
        Ok(())
    }
}

/// A reason fit to be stored: one line, bounded, without control characters, and without the recipient's address.
pub fn reason(text: &str, addresses: &[&str]) -> String {
    let mut shown = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(next) = rest.chars().next() {
        let address = addresses.iter().find(|address| {
            !address.is_empty() && rest.get(..address.len()).is_some_and(|text| text.eq_ignore_ascii_case(address))
        });
        match address {
            Some(address) => {
                // `<ann@example.org>` already has brackets.
                let bracketed = shown.ends_with('<') && rest[address.len()..].starts_with('>');
                shown.push_str(if bracketed { "recipient" } else { RECIPIENT });
                rest = &rest[address.len()..];
            }
            None => {
                shown.push(if next.is_control() { ' ' } else { next });
                rest = &rest[next.len_utf8()..];
            }
        }
    }
    let mut shown = shown.split_whitespace().collect::<Vec<_>>().join(" ");
    if let Some((end, _)) = shown.char_indices().nth(MAX_REASON_CHARS) {
        shown.truncate(end);
        shown.push('…');
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(code: u16, lines: &[&str]) -> Reply {
        Reply { code, lines: lines.iter().map(|line| (*line).to_owned()).collect() }
    }

    #[test]
    fn lines_are_parsed_in_every_form_that_servers_use() {
        assert_eq!(Reply::line("250-SIZE 10"), Some((250, false, "SIZE 10")));
        assert_eq!(Reply::line("250 ok"), Some((250, true, "ok")));
        assert_eq!(Reply::line("354"), Some((354, true, "")));
        for line in ["", "25", "2x0 ok", "150 ok", "600 ok", "2500 ok", "HTTP/1.1 400", "é50 x"] {
            assert_eq!(Reply::line(line), None, "{line}");
        }
    }

    #[test]
    fn it_is_shown_on_one_line() {
        assert_eq!(reply(550, &["5.7.25 no PTR", "5.7.25 at all"]).to_string(), "550 5.7.25 no PTR at all");
        assert_eq!(reply(421, &[""]).to_string(), "421");
    }

    #[test]
    fn a_reason_is_short_and_contains_no_address() {
        let reason = |text: &str| reason(text, &["ann@example.org", "ann@xn--x.org"]);
        assert_eq!(reason("550 <Ann@Example.org>: unknown"), "550 <recipient>: unknown");
        assert_eq!(reason("no ann@xn--x.org here\r\n\tat\0all"), "no <recipient> here at all");
        assert_eq!(reason("<b>, é ann@example.com"), "<b>, é ann@example.com");
        let long = reason(&"é".repeat(1_000));
        assert_eq!(long.chars().count(), MAX_REASON_CHARS + 1);
    }

    proptest::proptest! {
        #[test]
        fn any_reply_is_stored_as_one_short_line(
            lines in proptest::collection::vec("[245][0-9]{2}[ -]?[0-9.]{0,9} ?\\PC{0,20}|[\\s\\S]{0,30}|[a-z<>@.]{0,20}ann@x\\.org>?", 0..5),
        ) {
            let read: Vec<_> = lines.iter().filter_map(|line| Reply::line(line)).collect();
            let code = read.first().map_or(550, |line| line.0);
            let reply = Reply { code, lines: read.iter().map(|line| line.2.to_owned()).collect() };
            for text in [reply.to_string(), lines.concat()] {
                let kept = reason(&text, &["ann@x.org", ""]);
                proptest::prop_assert!(!kept.contains(char::is_control) && kept.chars().count() <= MAX_REASON_CHARS + 1);
                proptest::prop_assert!(!kept.to_ascii_lowercase().contains("ann@x.org"), "{}", kept);
            }
        }
    }
}
