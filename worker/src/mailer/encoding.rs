//! Encodes the parts of a mail so that no server on the way has a reason to change them.

use lettre::message::{Body, header::ContentTransferEncoding};

/// The longest line that no program wraps (RFC 5322 2.1.1, RFC 2045 6.7).
const MAX_LINE_BYTES: usize = 76;

/// Encodes a text as a body part. Text that is safe as it is stays readable.
pub fn encode(text: &str) -> Body {
    // lettre inserts missing CRs one at a time, each time moving the rest of the text.
    let text = with_crlf(text);
    if text.split("\r\n").all(is_left_alone) {
        return Body::dangerous_pre_encoded(text.into_bytes(), ContentTransferEncoding::SevenBit);
    }
    let quoted = ContentTransferEncoding::QuotedPrintable;
    let body = match Body::new(text.clone()) {
        body if body.encoding() == ContentTransferEncoding::Base64 => return body,
        body if body.encoding() == quoted => body.into_vec(),
        // Quoted-printable can encode any text.
        _ => Body::new_with_encoding(text, quoted).map_or_else(|text| text, Body::into_vec),
    };
    Body::dangerous_pre_encoded(protect(&body), quoted)
}

/// Normalizes line ends to CRLF, as SMTP requires.
fn with_crlf(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + text.len() / 16);
    for line in text.split_inclusive('\n') {
        match line.strip_suffix('\n') {
            Some(line) => {
                out.push_str(line.strip_suffix('\r').unwrap_or(line));
                out.push_str("\r\n");
            }
            None => out.push_str(line),
        }
    }
    out
}

/// Whether every server forwards a line unchanged. Mailbox files escape *From* at its beginning, SMTP doubles a leading dot, and
/// trailing spaces get lost.
fn is_left_alone(line: &str) -> bool {
    line.len() <= MAX_LINE_BYTES
        && line.bytes().all(|byte| byte == b'\t' || (b' '..=b'~').contains(&byte))
        && !line.ends_with([' ', '\t'])
        && !is_marked(line.as_bytes())
}

fn is_marked(line: &[u8]) -> bool {
    line.starts_with(b"From") || line.starts_with(b".")
}

/// Escapes the first character of lines that a server might change. The text is quoted-printable.
fn protect(encoded: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(encoded.len() + encoded.len() / 16);
    for line in encoded.split_inclusive(|byte| *byte == b'\n') {
        match line.first() {
            Some(first) if is_marked(line) => {
                out.extend_from_slice(format!("={first:02X}").as_bytes());
                // This adds two bytes. A line that gets too long is broken right after them, which does not change the text.
                if line.trim_ascii_end().len() + 2 > MAX_LINE_BYTES {
                    out.extend_from_slice(b"=\r\n");
                    // The rest could need escaping as well.
                    out.extend(protect(&line[1..]));
                } else {
                    out.extend_from_slice(&line[1..]);
                }
            }
            _ => out.extend_from_slice(line),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use mail_parser::decoders::quoted_printable::quoted_printable_decode;
    use proptest::prelude::*;

    use super::*;

    fn lines(body: &Body) -> Vec<&[u8]> {
        body.as_ref().split(|byte| *byte == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line)).collect()
    }

    fn is_safe(body: &Body) -> bool {
        body.as_ref().is_ascii()
            && lines(body).iter().all(|line| line.len() <= MAX_LINE_BYTES && !is_marked(line) && !line.ends_with(b" "))
    }

    fn decoded(body: &Body) -> String {
        match body.encoding() {
            ContentTransferEncoding::QuotedPrintable => {
                String::from_utf8(quoted_printable_decode(body.as_ref()).unwrap()).unwrap()
            }
            ContentTransferEncoding::SevenBit => String::from_utf8(body.as_ref().to_vec()).unwrap(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_leading_from_survives_a_mailbox_file() {
        for text in ["From here on", "a\nFrom: b\n", ".", "a\n.\nb", ".hidden", &format!("From {}", "x".repeat(300))] {
            let body = encode(text);
            assert_eq!(body.encoding(), ContentTransferEncoding::QuotedPrintable, "{text}");
            assert!(is_safe(&body), "{text}");
            assert_eq!(decoded(&body), text.replace('\n', "\r\n"));
        }
        // The rest of a broken long line begins a line as well.
        for shift in 0..90 {
            let text = format!("{}From me .to you From.", "x".repeat(shift)).repeat(9);
            assert!(is_safe(&encode(&text)), "{shift}");
            assert_eq!(decoded(&encode(&text)), text);
        }
    }

    #[test]
    fn a_plain_text_stays_readable() {
        for text in ["Hello Ann,\n\ncome!\n", "", "\n", "a From b\n"] {
            assert_eq!(encode(text).encoding(), ContentTransferEncoding::SevenBit);
            assert_eq!(decoded(&encode(text)), text.replace('\n', "\r\n"));
        }
        for text in ["a \nb", &"x".repeat(77), "one é in a plain text", "a\u{7f}"] {
            assert_eq!(encode(text).encoding(), ContentTransferEncoding::QuotedPrintable, "{text}");
        }
        assert_eq!(encode("привет, как дела").encoding(), ContentTransferEncoding::Base64);
    }

    proptest! {
        #[test]
        fn every_text_arrives_unchanged(text in "(From |\\.|[a-zA-Z =]|\t|\r\n|\n|é|word ){0,200}") {
            let body = encode(&text);
            if body.encoding() == ContentTransferEncoding::Base64 {
                return Ok(());
            }
            prop_assert!(is_safe(&body), "{:?}", String::from_utf8_lossy(body.as_ref()));
            prop_assert_eq!(decoded(&body), text.replace("\r\n", "\n").replace('\n', "\r\n"));
        }
    }
}
