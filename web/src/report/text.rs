//! Human-readable bounces: those of qmail (QSBMF), Exim, and similar ones.
//!
//! They name each address at the beginning of a line, followed by the other server's reply. The returned message comes after a
//! separator line.

use mail_parser::{Address as Addresses, Message};
use mailrun_core::address::Address;

use super::claim::Claim;

/// Maximum addresses read from a bounce.
const MAX_ADDRESSES: usize = 100;
/// A server's reply is truncated to this length.
const MAX_DIAGNOSTIC_BYTES: usize = 4_000;
/// The status of a failure that a server does not describe further: permanent, cause unknown (RFC 3463, 3.1).
const NO_CAUSE: &str = "5.0.0";

/// The local parts that bounces are sent from.
const SENDERS: [&str; 6] = ["mailer-daemon", "postmaster", "maildaemon", "mail-daemon", "mdaemon", "mailerdaemon"];
/// Phrases of delay notices: the mail may still arrive.
const DELAYED: [&str; 13] = [
    "delayed mail",
    "message delayed",
    "mail delayed",
    "delivery delayed",
    "delivery status notification (delay)",
    "this is a warning message only",
    "delivery attempts will continue",
    "no action is required on your part",
    "has not yet been delivered",
    "not been delivered yet",
    "still being retried",
    "will keep trying",
    "not need to resend",
];
/// Phrases in a dashed line that precedes the returned message.
const COPY: [&str; 8] = [
    "copy of",
    "original message",
    "unsent message",
    "message follows",
    "message header",
    "headers of",
    "header of",
    "returned message",
];
/// Commands before a recipient is named.
const BEFORE_RECIPIENT: [&str; 7] =
    ["mail from", "sender verify", "ehlo", "helo", "initial connection", "server greeting", "starttls"];
/// Commands about a recipient or the message.
const WITH_RECIPIENT: [&str; 3] = ["rcpt to", "end of data", "data command"];

/// The addresses that a bounce says do not exist. Empty if it is not a bounce, or proves nothing about a mailbox.
pub(super) fn claims(mail: &Message<'_>) -> Vec<Claim> {
    let failed = mail.header_raw("X-Failed-Recipients");
    let text = mail.body_text(0).unwrap_or_default();
    let text = before_copy(&text);
    if (failed.is_none() && !is_from_a_server(mail)) || is_delayed(mail.subject().unwrap_or_default(), &text) {
        return Vec::new();
    }
    let mut failures = failures(&text);
    if failures.is_empty() {
        // Exim also names them in the header.
        let addresses: Vec<_> =
            failed.into_iter().flat_map(|list| list.split(',')).map(|one| one.trim().to_owned()).collect();
        if !addresses.is_empty() {
            failures.push(Failure { addresses, lines: text.lines().map(str::to_owned).collect() });
        }
    }
    failures.into_iter().filter_map(Failure::claim).collect()
}

/// Whether the envelope sender is empty or the sender is a mail server.
fn is_from_a_server(mail: &Message<'_>) -> bool {
    let is_empty = mail.header_raw("Return-Path").is_some_and(|path| path.trim() == "<>");
    let senders = [mail.from(), mail.sender()].into_iter().flatten().flat_map(Addresses::iter);
    let mut names =
        senders.filter_map(|sender| sender.address.as_deref()?.split('@').next().map(str::to_ascii_lowercase));
    is_empty || names.any(|name| SENDERS.contains(&name.as_str()))
}

fn is_delayed(subject: &str, text: &str) -> bool {
    let (subject, text) = (subject.to_lowercase(), text.to_lowercase());
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    (subject.contains("warning") && subject.contains("delayed"))
        || DELAYED.iter().any(|phrase| subject.contains(phrase) || text.contains(phrase))
}

/// The lines before the returned message.
fn before_copy(text: &str) -> String {
    let is_copy = |line: &str| {
        let dashed = line.trim_start().starts_with("---");
        let line = line.to_lowercase();
        (dashed && COPY.iter().any(|words| line.contains(words)))
            || line.starts_with("received: ")
            || line.starts_with("return-path: ")
            || line.starts_with("message-id: ")
    };
    text.lines().take_while(|line| !is_copy(line)).collect::<Vec<_>>().join("\n")
}

/// What a bounce says about an address.
#[derive(Debug, Default, PartialEq)]
struct Failure {
    /// The address, and the one that it was generated from.
    addresses: Vec<String>,
    lines: Vec<String>,
}

/// The addresses at the beginning of lines, each with the lines that follow it.
fn failures(text: &str) -> Vec<Failure> {
    let mut failures: Vec<Failure> = Vec::new();
    for line in text.lines() {
        if let Some((address, rest)) = leading_address(line) {
            if failures.len() == MAX_ADDRESSES {
                break;
            }
            failures.push(Failure { addresses: vec![address], lines: vec![rest.to_owned()] });
        } else if let Some(failure) = failures.last_mut() {
            if let Some((_, source)) = line.split_once("generated from ") {
                failure.addresses.push(source.trim_end_matches([')', ' ', ':']).to_owned());
            } else {
                failure.lines.push(line.to_owned());
            }
        }
    }
    if failures.len() > 1 {
        for failure in &mut failures {
            failure.end_at_blank_line();
        }
    }
    failures
}

/// `<ann@example.org>: host … said`, `  ann@example.org`: the address, and the rest of the line.
fn leading_address(line: &str) -> Option<(String, &str)> {
    let line = line.trim_start_matches([' ', '\t', '*', '-', '>', '\u{b7}', '\u{2022}']);
    let (word, rest) = line.split_at(line.find(char::is_whitespace).unwrap_or(line.len()));
    let is_marked =
        word.starts_with('<') || word.ends_with(':') || rest.trim().is_empty() || rest.trim().starts_with('(');
    let address = word.trim_end_matches([':', ',', ';', '.']).trim_start_matches('<').trim_end_matches('>');
    let address = address.trim_matches(['\'', '"']);
    if !is_marked || !address.contains('@') || address.contains(['<', '>', ':']) {
        return None;
    }
    address.parse::<Address>().ok()?;
    Some((address.to_owned(), rest.trim()))
}

impl Failure {
    /// With several addresses, text after a blank line belongs to none or to all of them.
    fn end_at_blank_line(&mut self) {
        let begin = usize::from(self.lines.first().is_some_and(String::is_empty));
        if let Some(end) = self.lines.iter().skip(begin).position(|line| line.trim().is_empty()) {
            self.lines.truncate(begin + end);
        }
    }

    fn claim(self) -> Option<Claim> {
        let said = self.lines.join(" ");
        let mut end = said.len().min(MAX_DIAGNOSTIC_BYTES);
        while !said.is_char_boundary(end) {
            end -= 1;
        }
        let said = said[..end].split_whitespace().collect::<Vec<_>>().join(" ");
        let reply = reply_at(&said);
        if is_answer_before_recipient(&said, reply.unwrap_or(said.len())) {
            return None;
        }
        Claim::bounced(self.addresses, Some(NO_CAUSE), Some(&said[reply.unwrap_or(0)..]))
    }
}

/// Where the other server's reply begins: a three-digit failure code that stands alone.
fn reply_at(said: &str) -> Option<usize> {
    let bytes = said.as_bytes();
    let is_word =
        |byte: Option<&u8>| byte.is_some_and(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-'));
    (0..bytes.len().saturating_sub(2)).find(|&place| {
        matches!(bytes[place], b'4' | b'5')
            && bytes[place + 1..place + 3].iter().all(u8::is_ascii_digit)
            && !(place > 0 && is_word(bytes.get(place - 1)))
            && matches!(bytes.get(place + 3), None | Some(b' ' | b'-'))
    })
}

/// Whether the reply came before a recipient was named, so that it is about the sender.
fn is_answer_before_recipient(said: &str, reply: usize) -> bool {
    let said = said.to_ascii_lowercase();
    let (before, after) = said.split_at(reply);
    let last = |commands: &[&str]| commands.iter().filter_map(|command| before.rfind(command)).max();
    if let Some((_, command)) = after.rsplit_once("in reply to ") {
        return BEFORE_RECIPIENT.iter().any(|known| command.starts_with(known));
    }
    last(&BEFORE_RECIPIENT) > last(&WITH_RECIPIENT)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn finds_an_address_at_the_beginning_of_a_line() {
        let found = |line| leading_address(line).map(|(address, rest)| (address, rest.to_owned()));
        let ann = |rest: &str| Some(("ann@example.org".to_owned(), rest.to_owned()));
        assert_eq!(found("<ann@example.org>: host mx said: 550"), ann("host mx said: 550"));
        assert_eq!(found("  ann@example.org"), ann(""));
        assert_eq!(found("    * ann@example.org:"), ann(""));
        assert_eq!(
            found("ann@example.org (generated from list@example.org)"),
            ann("(generated from list@example.org)")
        );
        for line in ["", "Hello", "ann@example.org wrote:", "RCPT TO:<ann@example.org>:", "@", "a@", "<mailto:a@x.org>"]
        {
            assert_eq!(found(line), None, "{line}");
        }
    }

    #[test]
    fn finds_a_reply_code_that_stands_alone() {
        let reply = |said: &'static str| reply_at(said).map(|place| &said[place..]);
        assert_eq!(reply("Remote host said: 550 5.1.1 no such user"), Some("550 5.1.1 no such user"));
        assert_eq!(reply("host mx [192.0.2.5]: 550-no"), Some("550-no"));
        assert_eq!(reply("id 4550 or 10.550.1.1 or 550.1 or 5502"), None);
    }

    #[test]
    fn a_reply_to_the_sender_is_not_about_the_recipient() {
        let before = |said: &str| is_answer_before_recipient(said, reply_at(said).unwrap_or(said.len()));
        assert!(before(
            "SMTP error from remote mail server after MAIL FROM:<b@x.org> SIZE=1: host mx: 550 no such user"
        ));
        assert!(before("host mx said: 550 unknown user (in reply to MAIL FROM command)"));
        assert!(!before("host mx said: 550 unknown user (in reply to RCPT TO command)"));
        assert!(!before(">>> MAIL From:<b@x.org> <<< 250 ok >>> RCPT To:<a@x.org> <<< 550 unknown user"));
        assert!(!before("550 unknown user"));
    }

    proptest! {
        #[test]
        fn any_text_is_parsed(text in "([a-z@.<>:() \\n-]|5[0-9]{2}|a@x\\.org|généré|\\n){0,60}") {
            for failure in failures(&before_copy(&text)) {
                let _ = failure.claim();
            }
        }
    }
}
