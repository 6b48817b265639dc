//! Which spellings are one mailbox: people, suppressions, unsubscribe links and bounces are compared by it.

use std::borrow::Cow;

use email_address::{EmailAddress, Error as Syntax, Options};
use unicode_normalization::{UnicodeNormalization as _, is_nfc};

/// The longest address that mail servers accept (RFC 5321, 4.5.3.1.3, less the angle brackets).
pub(super) const MAX_ADDRESS_BYTES: usize = 254;

/// An address, as its mailbox and as it was typed.
pub(super) struct Spelling<'a> {
    pub(super) mailbox: Cow<'a, str>,
    /// In NFC and without invisible characters; otherwise as it was typed.
    pub(super) typed: Cow<'a, str>,
}

/// Characters without a shape (Unicode's Default_Ignorable_Code_Point): byte order marks, soft hyphens, spaces without width,
/// marks of direction. They come along when text is copied.
pub(super) fn is_invisible(character: char) -> bool {
    matches!(
        character,
        '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}' | '\u{1160}' | '\u{17b4}' | '\u{17b5}' | '\u{180b}'..='\u{180f}'
        | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{3164}' | '\u{fe00}'..='\u{fe0f}'
        | '\u{feff}' | '\u{ffa0}' | '\u{fff0}'..='\u{fff8}' | '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}'
        | '\u{e0000}'..='\u{e0fff}'
    )
}

/// Joins letters or keeps them apart: in some scripts a part of the spelling.
pub(super) fn is_joiner(character: char) -> bool {
    matches!(character, '\u{200c}' | '\u{200d}')
}

/// Reads an address without a name.
pub(super) fn read(text: &str) -> Result<Spelling<'_>, &'static str> {
    if is_plain(text) {
        check(text)?;
        return Ok(Spelling { mailbox: text.into(), typed: text.into() });
    }
    if text.chars().any(char::is_control) {
        return Err("has a control character in it");
    }
    if text.contains(char::is_whitespace) {
        return Err("has a space in it");
    }
    let visible: String = text.chars().filter(|character| !is_invisible(*character) || is_joiner(*character)).collect();
    let text = nfc(visible);
    let (user, domain) = text.rsplit_once('@').ok_or("has no @ sign")?;
    let user = unquote(user.chars().filter(|character| !is_joiner(*character)).collect());
    let (domain, ascii) = read_domain(domain)?;
    let mailbox = format!("{}@{ascii}", nfc(user.to_lowercase()));
    check(&mailbox)?;
    Ok(Spelling { mailbox: mailbox.into(), typed: format!("{user}@{domain}").into() })
}

/// Most addresses are written like this, and are their mailbox already.
fn is_plain(text: &str) -> bool {
    let plain = |byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'@' | b'.' | b'-' | b'_' | b'+');
    text.bytes().all(plain) && !text.contains("xn--")
}

fn nfc(text: String) -> String {
    if is_nfc(&text) { text } else { text.nfc().collect() }
}

/// Quotes that protect nothing make no other mailbox (RFC 5321, 4.1.2).
fn unquote(user: String) -> String {
    let is_atom = |text: &str| {
        text.split('.').all(|atom| {
            let fits = |c: char| c.is_alphanumeric() || "!#$%&'*+-/=?^_`{|}~".contains(c);
            !atom.is_empty() && atom.chars().all(fits)
        })
    };
    match user.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')) {
        // An apostrophe at the beginning would be taken for one that is put around the address.
        Some(quoted) if is_atom(quoted) && !quoted.starts_with('\'') => quoted.to_owned(),
        _ => user,
    }
}

/// The domain as typed and as mail servers know it.
fn read_domain(domain: &str) -> Result<(Cow<'_, str>, String), &'static str> {
    let lower = domain.to_ascii_lowercase();
    if domain.is_ascii() && !lower.contains("xn--") {
        return Ok((domain.into(), lower));
    }
    if let Ok(ascii) = idna::domain_to_ascii(domain) {
        return Ok((domain.into(), ascii));
    }
    // A joiner where the script has no use for it is as invisible as the others.
    let visible: String = domain.chars().filter(|character| !is_joiner(*character)).collect();
    match idna::domain_to_ascii(&visible) {
        Ok(ascii) => Ok((visible.into(), ascii)),
        // Its code stands for nothing that can be written, but a server may know it.
        Err(_) if visible.is_ascii() => Ok((visible.into(), lower)),
        Err(_) => Err("has a domain that is not valid"),
    }
}

fn check(address: &str) -> Result<(), &'static str> {
    if address.len() > MAX_ADDRESS_BYTES {
        return Err("is longer than 254 characters");
    }
    let options = Options::default().with_required_tld().without_display_text().without_domain_literal();
    EmailAddress::parse_with_options(address, options).map_err(|error| match error {
        Syntax::MissingSeparator => "has no @ sign",
        Syntax::LocalPartEmpty => "has nothing before the @ sign",
        Syntax::LocalPartTooLong => "has more than 64 characters before the @ sign",
        Syntax::DomainEmpty => "has nothing after the @ sign",
        Syntax::DomainTooLong | Syntax::SubDomainTooLong => "has a domain that is too long",
        Syntax::DomainTooFew => "has a domain without a dot",
        Syntax::DomainInvalidSeparator | Syntax::SubDomainEmpty => "has a misplaced dot in its domain",
        Syntax::UnbalancedQuotes => "has an unclosed quote",
        _ => "is not an email address",
    })?;
    Ok(())
}

/// A mailbox as a person reads it: the domain in its own script.
pub(super) fn shown(mailbox: &str) -> Cow<'_, str> {
    let Some((user, domain)) = mailbox.rsplit_once('@').filter(|(_, domain)| domain.contains("xn--")) else {
        return mailbox.into();
    };
    match idna::domain_to_unicode(domain) {
        (domain, Ok(())) => format!("{user}@{domain}").into(),
        _ => mailbox.into(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn mailbox(text: &str) -> String {
        read(text).unwrap_or_else(|reason| panic!("{text} {reason}")).mailbox.into_owned()
    }

    #[test]
    fn all_spellings_of_a_mailbox_are_one() {
        for spelling in [
            "ann@bücher.example",
            "ann@xn--bcher-kva.example",
            "ANN@BÜCHER.EXAMPLE",
            "ann@XN--BCHER-KVA.example",
            "ann@bu\u{308}cher.example",
            "a\u{200b}nn\u{feff}@bü\u{ad}cher.example",
            "ann\u{200d}@bücher\u{200c}.example",
            "an\u{fe0f}n\u{2063}@bücher。example",
            "\"ann\"@bücher.example",
            "ann@b\u{ff55}\u{308}cher.example",
        ] {
            assert_eq!(mailbox(spelling), "ann@xn--bcher-kva.example", "{spelling}");
        }
        assert_eq!(mailbox("Ju\u{308}rgen@x.org"), mailbox("JÜRGEN@x.org"));
        // Without its joiner this domain is another one.
        assert_eq!(mailbox("a@نامه\u{200c}ای.com"), "a@xn--mgba3gch31f060k.com");
        assert_ne!(mailbox("\"a..b\"@x.org"), mailbox("ab@x.org"));
    }

    #[test]
    fn it_is_shown_as_typed_and_readable() {
        assert_eq!(read("Ann@Bu\u{308}cher.Example\u{200b}").ok().unwrap().typed, "Ann@Bücher.Example");
        assert_eq!(shown("ann@xn--bcher-kva.example"), "ann@bücher.example");
        assert_eq!(shown("ann@example.org"), "ann@example.org");
        assert_eq!(mailbox("a@xn--0.org"), "a@xn--0.org");
    }

    proptest! {
        #[test]
        fn a_mailbox_is_its_own_mailbox(
            text in "([a-zA-Z0-9.+_-]|[éßÜσΣςİı]|e\u{301}|\u{200b}|\u{200d}|[а-яА-Я]|\"){1,12}@([a-zA-Z0-9-]|[éÜßς]|u\u{308}|xn--|\u{ad}|。|\\.){1,12}\\.(org|example|рф)"
        ) {
            let Ok(Spelling { mailbox, typed }) = read(&text) else { return Ok(()) };
            let again = read(&mailbox).map(|again| (again.mailbox.into_owned(), again.typed.into_owned()));
            prop_assert_eq!(again, Ok((mailbox.to_string(), mailbox.to_string())));
            prop_assert_eq!(read(&typed).map(|again| again.mailbox.into_owned()), Ok(mailbox.to_string()));
            prop_assert!(mailbox.rsplit_once('@').unwrap().1.is_ascii());
            prop_assert!(!mailbox.contains(is_invisible));
        }
    }
}
