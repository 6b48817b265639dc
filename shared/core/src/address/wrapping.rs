//! What people and programs put around an address.

use std::borrow::Cow;

use percent_encoding::percent_decode_str;

use super::mailbox::is_invisible;

/// Pairs of them.
const WRAPPERS: [(char, char); 9] = [
    ('<', '>'),
    ('"', '"'),
    ('[', ']'),
    ('(', ')'),
    ('\u{2018}', '\u{2019}'),
    ('\u{201c}', '\u{201d}'),
    ('«', '»'),
    ('‹', '›'),
    ('`', '`'),
];

/// What a person sees of `text`.
pub(super) fn trim(text: &str) -> &str {
    text.trim_matches(|character: char| character.is_whitespace() || is_invisible(character))
}

/// An address without what is put around it.
pub(super) fn unwrap(text: &str) -> Cow<'_, str> {
    let mut text = trim(text);
    loop {
        // No mailbox begins or ends with an apostrophe; some programs put one before, or one on each side.
        let mut inner = text.trim_matches('\'');
        for (open, close) in WRAPPERS {
            inner = inner.strip_prefix(open).and_then(|inner| inner.strip_suffix(close)).unwrap_or(inner);
        }
        inner = trim(inner);
        if inner.len() == text.len() {
            break;
        }
        text = inner;
    }
    const SCHEME: &str = "mailto:";
    match text.split_at_checked(SCHEME.len()) {
        Some((scheme, link)) if scheme.eq_ignore_ascii_case(SCHEME) => {
            let address = link.split('?').next().unwrap_or_default();
            // What is no text is left as it is, and refused as an address.
            percent_decode_str(address).decode_utf8().unwrap_or(address.into())
        }
        _ => text.into(),
    }
}
