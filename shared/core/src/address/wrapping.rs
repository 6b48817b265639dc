//! Removes what people and programs put around an address.

use std::borrow::Cow;

use percent_encoding::percent_decode_str;

use super::mailbox::is_invisible;

/// Pairs of opening and closing characters.
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

/// Trims whitespace and invisible characters.
pub(super) fn trim(text: &str) -> &str {
    text.trim_matches(|character: char| character.is_whitespace() || is_invisible(character))
}

/// The address without quotes, brackets and `mailto:` around it.
pub(super) fn unwrap(text: &str) -> Cow<'_, str> {
    let mut text = trim(text);
    loop {
        // No mailbox starts or ends with an apostrophe. Some programs put one before an address, or one on each side.
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
            // If it does not decode to UTF-8, it stays as it is, and fails as an address.
            percent_decode_str(address).decode_utf8().unwrap_or(address.into())
        }
        _ => text.into(),
    }
}
