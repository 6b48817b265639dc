//! The display name next to an address, as used in the greeting.

use std::borrow::Cow;

use mail_parser::parsers::MessageStream;
use unicode_normalization::UnicodeNormalization as _;

use super::{
    mailbox::{self, is_invisible, is_joiner},
    wrapping::unwrap,
};

/// The length at which a display name is cut, so that a pasted paragraph does not become a name.
pub(super) const MAX_NAME_CHARS: usize = 200;
/// Programs write it in place of characters that they could not decode.
const REPLACEMENT: char = '\u{fffd}';

/// The error for text that was decoded with the wrong encoding.
pub(super) const UNDECODABLE: &str = "has characters that could not be decoded: save the list as UTF-8";
/// The error for a name that may contain another person's address.
const NAME_WITH_ADDRESS: &str = "has @, < or > in its name: it is not clear who is meant";

/// Whether a text was decoded with the wrong encoding: it contains replacement characters, or control characters that are letters
/// in Windows code pages.
pub(super) fn is_garbled(text: &str) -> bool {
    text.contains(|c| c == REPLACEMENT || (matches!(c, '\u{80}'..='\u{9f}') && c != '\u{85}'))
}

/// The name in `raw`, next to the address `mailbox`. None if it is empty or repeats the address.
pub(super) fn read(raw: &str, mailbox: &str) -> Result<Option<String>, &'static str> {
    let raw = raw.trim().trim_end_matches(',').trim_end();
    if raw.is_empty() {
        return Ok(None);
    }
    let unquoted = unquote(raw);
    let name = decode_words(&unquoted)?;
    let name: String = name
        .nfc()
        .filter(|character| !is_noise(*character))
        // Control characters in a name would end up in a mail header.
        .map(|character| if character.is_control() { ' ' } else { character })
        .collect();
    let name = name.trim();
    if name.contains(['@', '<', '>']) {
        let address = mailbox::read(unwrap(name).as_ref()).map(|spelling| spelling.mailbox == mailbox);
        return if address == Ok(true) { Ok(None) } else { Err(NAME_WITH_ADDRESS) };
    }
    // Some programs put every name in apostrophes.
    let name = match name.strip_prefix('\'').and_then(|rest| rest.strip_suffix('\'')) {
        Some(inner) => inner,
        None => name,
    };
    let name: String = name.trim().chars().take(MAX_NAME_CHARS).collect();
    let name = name.trim_end();
    Ok((!name.is_empty()).then(|| name.to_owned()))
}

/// Invisible characters, except those that belong to a spelling: joiners, variation selectors and flag tags.
fn is_noise(character: char) -> bool {
    let spells = is_joiner(character) || matches!(character, '\u{fe00}'..='\u{fe0f}' | '\u{e0020}'..='\u{e01ef}');
    is_invisible(character) && !spells
}

/// Removes the quotes of a name that starts with a quoted part; a title may follow: `"Lee, Ann", PhD`.
fn unquote(raw: &str) -> Cow<'_, str> {
    let Some(rest) = raw.strip_prefix('"') else { return raw.into() };
    let Some(end) = closing_quote(rest) else { return raw.into() };
    let after = rest[end + 1..].trim_start();
    if !(after.is_empty() || after.starts_with(',')) {
        return raw.into();
    }
    let quoted = &rest[..end];
    match (quoted.contains('\\'), after.is_empty()) {
        (false, true) => quoted.into(),
        _ => format!("{}{after}", unescape(quoted)).into(),
    }
}

/// The offset of the quote that closes a quoted text, given the text after the opening quote.
pub(super) fn closing_quote(text: &str) -> Option<usize> {
    let mut escaped = false;
    text.find(|character| {
        let is_close = !escaped && character == '"';
        escaped = !escaped && character == '\\';
        is_close
    })
}

fn unescape(quoted: &str) -> String {
    let mut characters = quoted.chars();
    std::iter::from_fn(|| match characters.next()? {
        '\\' => characters.next(),
        character => Some(character),
    })
    .collect()
}

/// Decodes the encoded words (RFC 2047) that stand for non-ASCII characters in mail headers: `=?utf-8?Q?J=C3=BCrgen?=`.
fn decode_words(name: &str) -> Result<Cow<'_, str>, &'static str> {
    let has_words = |name: &str| name.find("=?").is_some_and(|begin| name[begin + 2..].contains("?="));
    if !has_words(name) {
        return Ok(name.into());
    }
    // The decoder expects the line break at the end of a header.
    let header = format!("{name}\n");
    let decoded = MessageStream::new(header.as_bytes()).parse_unstructured();
    match decoded.as_text() {
        Some(decoded) if !has_words(decoded) && !is_garbled(decoded) => Ok(decoded.to_owned().into()),
        _ => Err(UNDECODABLE),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(raw: &str) -> Result<Option<String>, &'static str> {
        read(raw, "ann@example.org")
    }

    #[test]
    fn encoded_words_are_decoded() {
        for (raw, decoded) in [
            ("=?utf-8?Q?J=C3=BCrgen_Gro=C3=9F?=", "Jürgen Groß"),
            ("\"=?UTF-8?B?SsO8cmdlbg==?=\"", "Jürgen"),
            ("=?iso-8859-1?q?Ren=E9e?= Lee", "Renée Lee"),
            ("=?utf-8?Q?J=C3=BCr?= =?utf-8?Q?gen?=", "Jürgen"),
            ("=?utf-8?Q?Lee,_Ann?=", "Lee, Ann"),
            ("=?windows-1252?Q?Ren=E9_=8Aek?=", "René Šek"),
            ("=?gb2312?B?zfXOsA==?=", "王伟"),
            ("=?iso-2022-jp?B?GyRCRURDZhsoQg==?=", "田中"),
        ] {
            assert_eq!(name(raw), Ok(Some(decoded.to_owned())), "{raw}");
        }
        for raw in ["=?utf-8?Q?J=FCrgen?=", "=?utf-8?X?abc?=", "a =?utf-8?Q?J=C3?= b"] {
            assert_eq!(name(raw), Err(UNDECODABLE), "{raw}");
        }
        assert_eq!(name("=?utf-8?Q?bob=40example.org?="), Err(NAME_WITH_ADDRESS));
        assert_eq!(name("a =? b"), Ok(Some("a =? b".to_owned())));
    }

    #[test]
    fn quotes_and_apostrophes_are_not_part_of_a_name() {
        for (raw, read) in [
            (r#""Lee, Ann \"A\"""#, r#"Lee, Ann "A""#),
            (r#""Lee, Ann", PhD"#, "Lee, Ann, PhD"),
            (r#"Ann "A" Lee"#, r#"Ann "A" Lee"#),
            ("'Ann Lee'", "Ann Lee"),
            ("Ann O'Neil", "Ann O'Neil"),
            ("Lee,", "Lee"),
            ("Ju\u{308}rgen", "Jürgen"),
            ("A\u{200b}nn\u{202e}", "Ann"),
            ("👩\u{200d}💻", "👩\u{200d}💻"),
        ] {
            assert_eq!(name(raw), Ok(Some(read.to_owned())), "{raw}");
        }
    }

    #[test]
    fn an_address_is_not_a_name() {
        for raw in [
            "ann@example.org",
            "'Ann@Example.org'",
            "\"ann@example.org\"",
            "\"'ann@example.org'\"",
            "mailto:ann@example.org",
        ] {
            assert_eq!(name(raw), Ok(None), "{raw}");
        }
        for raw in ["bob@example.org", "Ann <", "Ann > Lee", "Bob bob@example.org", "Ann (bob@example.org)"] {
            assert_eq!(name(raw), Err(NAME_WITH_ADDRESS), "{raw}");
        }
    }
}
