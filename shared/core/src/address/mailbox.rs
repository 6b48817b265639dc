//! Which spellings are the same mailbox. People, suppressions, unsubscribe links and bounces are matched by it.

use std::borrow::Cow;

use email_address::{EmailAddress, Error as Syntax, Options};
use unicode_normalization::{UnicodeNormalization as _, is_nfc};

/// The longest address in SMTP (RFC 5321, 4.5.3.1.3, without the angle brackets).
pub(super) const MAX_ADDRESS_BYTES: usize = 254;

/// An address as its mailbox and as it was typed.
pub(super) struct Spelling<'a> {
    pub(super) mailbox: Cow<'a, str>,
    /// As typed, but in NFC and without invisible characters.
    pub(super) typed: Cow<'a, str>,
}

/// Invisible characters (Unicode's Default_Ignorable_Code_Point): byte order marks, soft hyphens, zero-width spaces, direction
/// marks. They are often copied along with text.
pub(super) fn is_invisible(character: char) -> bool {
    matches!(
        character,
        '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}' | '\u{1160}' | '\u{17b4}' | '\u{17b5}' | '\u{180b}'..='\u{180f}'
        | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{3164}' | '\u{fe00}'..='\u{fe0f}'
        | '\u{feff}' | '\u{ffa0}' | '\u{fff0}'..='\u{fff8}' | '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}'
        | '\u{e0000}'..='\u{e0fff}'
    )
}

/// Joins letters or keeps them apart. In some scripts it is part of the spelling.
pub(super) fn is_joiner(character: char) -> bool {
    matches!(character, '\u{200c}' | '\u{200d}')
}

/// Parses an address without a name.
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

/// A fast path for the most common form, which is its own mailbox.
fn is_plain(text: &str) -> bool {
    let plain = |byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'@' | b'.' | b'-' | b'_' | b'+');
    text.bytes().all(plain) && !text.contains("xn--")
}

fn nfc(text: String) -> String {
    if is_nfc(&text) { text } else { text.nfc().collect() }
}

/// Removes quotes that are not needed, since they do not change the mailbox (RFC 5321, 4.1.2).
fn unquote(user: String) -> String {
    let is_atom = |text: &str| {
        text.split('.').all(|atom| {
            let fits = |c: char| c.is_alphanumeric() || "!#$%&'*+-/=?^_`{|}~".contains(c);
            !atom.is_empty() && atom.chars().all(fits)
        })
    };
    match user.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')) {
        // A leading apostrophe would later be taken for a quote around the address.
        Some(quoted) if is_atom(quoted) && !quoted.starts_with('\'') => quoted.to_owned(),
        _ => user,
    }
}

/// The domain as typed and in ASCII form.
fn read_domain(domain: &str) -> Result<(Cow<'_, str>, String), &'static str> {
    let lower = domain.to_ascii_lowercase();
    if domain.is_ascii() && !lower.contains("xn--") {
        return Ok((domain.into(), lower));
    }
    if let Ok(ascii) = idna::domain_to_ascii(domain) {
        return Ok((domain.into(), ascii));
    }
    // Without use in this script, a joiner is just an invisible character.
    let visible: String = domain.chars().filter(|character| !is_joiner(*character)).collect();
    match idna::domain_to_ascii(&visible) {
        Ok(ascii) => Ok((visible.into(), ascii)),
        // The punycode decodes to nothing valid, but the domain may exist nevertheless.
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

/// A mailbox for display, with the domain in Unicode.
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
    fn all_spellings_of_a_mailbox_are_equal() {
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
        // Without its joiner this is another domain.
        assert_eq!(mailbox("a@نامه\u{200c}ای.com"), "a@xn--mgba3gch31f060k.com");
        assert_ne!(mailbox("\"a..b\"@x.org"), mailbox("ab@x.org"));
    }

    #[test]
    fn a_mailbox_is_shown_readably() {
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
