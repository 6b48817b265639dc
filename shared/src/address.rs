//! Reads what people paste: addresses one to a line, or between commas and semicolons, with or without names. Pure and lazy: a million addresses are never held at once.

use std::{borrow::Cow, str::FromStr};

use email_address::{EmailAddress, Error as Syntax, Options};

/// The longest address that mail servers accept (RFC 5321, 4.5.3.1.3, less the angle brackets).
const MAX_ADDRESS_BYTES: usize = 254;
/// A display name is cut beyond this, so that a pasted paragraph is no name.
const MAX_NAME_CHARS: usize = 200;
/// How much of an invalid entry is shown back.
const MAX_SHOWN_CHARS: usize = 80;

/// One entry of the pasted text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The line it stands on, from 1.
    pub line: u32,
    /// What it says.
    pub parsed: Result<Address, Invalid>,
}

/// A person to invite.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// In lower case: two spellings are one person.
    pub email: String,
    /// The display name, if one was given.
    pub name: Option<String>,
}

/// An entry that is no address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invalid {
    /// The entry, cut to a length that can be shown.
    pub text: String,
    /// What is wrong with it, in plain words.
    pub reason: &'static str,
}

/// Nobody sees these, and they come along when text is copied: byte order marks, hyphens and spaces without width, marks of
/// direction.
fn is_invisible(character: char) -> bool {
    matches!(
        character,
        '\u{ad}' | '\u{200b}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}'
    )
}

/// What a person sees of `text`.
fn trim(text: &str) -> &str {
    text.trim_matches(|character: char| character.is_whitespace() || is_invisible(character))
}

/// Reads all entries of `text`, in their order. Blank lines, empty entries and what is invisible around them are nothing.
pub fn parse(text: &str) -> impl Iterator<Item = Entry> + '_ {
    text.lines()
        // A lone carriage return ends a line too: old spreadsheets write it.
        .flat_map(|line| line.split('\r'))
        .zip(1u32..)
        .flat_map(|(content, line)| entries(content).map(move |entry| Entry { line, parsed: parse_entry(entry) }))
}

/// Splits a line at commas and semicolons, but not within quotes or angle brackets.
fn entries(line: &str) -> impl Iterator<Item = &str> {
    let mut rest = Some(line);
    std::iter::from_fn(move || {
        let text = rest?;
        let (mut quoted, mut angled, mut escaped) = (false, false, false);
        let end = text.find(|character| {
            if std::mem::take(&mut escaped) {
                return false;
            }
            match character {
                '\\' if quoted => escaped = true,
                '"' => quoted = !quoted,
                '<' if !quoted => angled = true,
                '>' if !quoted => angled = false,
                ',' | ';' => return !quoted && !angled,
                _ => {}
            }
            false
        });
        // A quote or bracket that is never closed protects nothing.
        let end = end.or_else(|| if quoted || angled { text.find([',', ';']) } else { None });
        let (entry, after) = match end {
            Some(end) => (&text[..end], Some(&text[end + 1..])),
            None => (text, None),
        };
        rest = after;
        Some(trim(entry))
    })
    .flat_map(words)
    .filter(|entry| !entry.is_empty())
}

/// `a@x.org b@y.org` is two entries; `Ann <a@x.org>` is one.
fn words(entry: &str) -> impl Iterator<Item = &str> {
    let several = !entry.contains(['<', '"'])
        && entry.contains(char::is_whitespace)
        && entry.split_whitespace().all(|word| word.contains('@'));
    let (one, many) = if several { (None, Some(entry.split_whitespace())) } else { (Some(entry), None) };
    one.into_iter().chain(many.into_iter().flatten())
}

fn parse_entry(entry: &str) -> Result<Address, Invalid> {
    let (name, address) = match entry.rsplit_once('<') {
        Some((name, address)) => (clean_name(name), trim(address.strip_suffix('>').unwrap_or(address))),
        None => (None, trim(entry)),
    };
    // What is kept is what is checked: a letter may have another form in lower case than the address allows.
    let email = address.to_lowercase();
    match check(&email) {
        Ok(()) => Ok(Address { email, name }),
        Err(reason) => Err(Invalid { text: shorten(entry), reason }),
    }
}

fn check(address: &str) -> Result<(), &'static str> {
    if address.chars().any(char::is_control) {
        return Err("has a control character in it");
    }
    if address.contains(char::is_whitespace) {
        return Err("has a space in it");
    }
    if address.contains(is_invisible) {
        return Err("has an invisible character in it");
    }
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

fn clean_name(name: &str) -> Option<String> {
    let name = name.trim();
    let name = match name.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')) {
        Some(quoted) if quoted.contains('\\') => Cow::Owned(unescape(quoted)),
        Some(quoted) => Cow::Borrowed(quoted),
        None => Cow::Borrowed(name),
    };
    // A control character in a name would end up in a mail header.
    let name: String = name
        .chars()
        .map(|character| if character.is_control() { ' ' } else { character })
        .take(MAX_NAME_CHARS)
        .collect();
    let name = name.trim();
    (!name.is_empty()).then(|| name.to_owned())
}

fn unescape(quoted: &str) -> String {
    let mut characters = quoted.chars();
    std::iter::from_fn(|| match characters.next()? {
        '\\' => characters.next(),
        character => Some(character),
    })
    .collect()
}

fn shorten(entry: &str) -> String {
    let mut shown: String = entry
        .chars()
        .take(MAX_SHOWN_CHARS)
        .map(|character| if character.is_control() { '\u{fffd}' } else { character })
        .collect();
    if entry.chars().nth(MAX_SHOWN_CHARS).is_some() {
        shown.push('…');
    }
    shown
}

impl FromStr for Address {
    type Err = Invalid;

    /// Reads a single entry, `ann@example.org` or `Ann <ann@example.org>`.
    fn from_str(text: &str) -> Result<Self, Invalid> {
        parse_entry(trim(text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn emails(text: &str) -> Vec<String> {
        parse(text).map(|entry| entry.parsed.unwrap().email).collect()
    }

    fn reason(text: &str) -> &'static str {
        text.parse::<Address>().unwrap_err().reason
    }

    #[test]
    fn every_way_of_separating_addresses_is_read() {
        let text = "\u{feff}a@x.org\r\nB@X.org, c@x.org;d@x.org\n\n  \n,;\ne@x.org f@x.org\rg@x.org";
        assert_eq!(emails(text), ["a@x.org", "b@x.org", "c@x.org", "d@x.org", "e@x.org", "f@x.org", "g@x.org"]);
    }

    #[test]
    fn names_are_kept_and_may_hold_separators() {
        let text = r#"Ann Lee <Ann@x.org>; "Lee, Bob \"B\"" <bob@x.org>, <c@x.org>"#;
        let people: Vec<_> = parse(text).map(|entry| entry.parsed.unwrap()).collect();
        let names: Vec<_> = people.iter().map(|person| person.name.as_deref()).collect();
        assert_eq!(names, [Some("Ann Lee"), Some(r#"Lee, Bob "B""#), None]);
        assert_eq!(people[0].email, "ann@x.org");
    }

    #[test]
    fn invalid_entries_name_their_line_and_the_reason() {
        let entries: Vec<_> = parse("ok@x.org\n\nnobody, also ok@x.org\n").collect();
        assert_eq!(entries.iter().map(|entry| entry.line).collect::<Vec<_>>(), [1, 3, 3]);
        assert_eq!(entries[1].parsed.as_ref().unwrap_err().reason, "has no @ sign");
        assert_eq!(entries[2].parsed.as_ref().unwrap_err().reason, "has a space in it");
        assert_eq!(reason("@x.org"), "has nothing before the @ sign");
        assert_eq!(reason("a@"), "has nothing after the @ sign");
        assert_eq!(reason("a@localhost"), "has a domain without a dot");
        assert_eq!(reason("a\0@x.org"), "has a control character in it");
        assert_eq!(reason(&format!("{}@x.org", "a".repeat(65))), "has more than 64 characters before the @ sign");
        assert_eq!(reason(&format!("a@{}.org", "x.".repeat(150))), "is longer than 254 characters");
    }

    #[test]
    fn addresses_in_any_script_are_accepted() {
        assert_eq!(emails("Пётр@пример.рф\nmüller@bücher.example"), ["пётр@пример.рф", "müller@bücher.example"]);
    }

    #[test]
    fn an_unclosed_quote_spoils_one_entry_only() {
        let entries: Vec<_> = parse("\"oops <a@x.org, b@x.org").collect();
        assert_eq!(entries.len(), 2);
        assert_eq!(entries[1].parsed.as_ref().unwrap().email, "b@x.org");
    }

    #[test]
    fn what_nobody_sees_makes_no_other_person() {
        let text = "\u{feff}a@x.org\n\u{feff}b@x.org\u{200b}, \u{200e}<\u{200b}c@x.org\u{ad}>\n\u{feff}\n";
        assert_eq!(emails(text), ["a@x.org", "b@x.org", "c@x.org"]);
        assert_eq!(reason("a\u{200b}b@x.org"), "has an invisible character in it");
        // In lower case this is an i with a second dot, which is no letter of an address.
        assert_eq!(reason("İ@x.org"), "is not an email address");
    }

    fn valid() -> impl Strategy<Value = String> {
        "[a-z0-9]{1,12}(\\.[a-z0-9]{1,6})?@[a-z]{1,10}\\.(org|example|co\\.uk)"
    }

    proptest! {
        #[test]
        fn whatever_is_pasted_nothing_panics_and_lines_are_in_order(text in "\\PC*|[\\s\\S]{0,200}") {
            let mut last = 1;
            for entry in parse(&text) {
                prop_assert!(entry.line >= last);
                last = entry.line;
                match entry.parsed {
                    Ok(address) => prop_assert_eq!(check(&address.email), Ok(())),
                    Err(invalid) => prop_assert!(!invalid.text.chars().any(char::is_control)),
                }
            }
        }

        #[test]
        fn an_accepted_address_is_one_wherever_it_is_read_again(
            text in "([a-cA-C@.,;<>\"\\\\ \t\r\n\u{feff}\u{200b}\u{85}éİß()\\[\\]:\\-]|@x\\.org|\"a b\"){0,24}"
        ) {
            for Address { email, name } in parse(&text).filter_map(|entry| entry.parsed.ok()) {
                // On the wire: RCPT TO:<…>, and a header.
                prop_assert!(!email.contains(|c: char| c.is_control() || c.is_whitespace() || is_invisible(c)), "{email:?}");
                prop_assert!(!email.contains('<') && (!email.contains('>') || email.starts_with('"')), "{email:?}");
                prop_assert!(email.len() <= MAX_ADDRESS_BYTES);
                prop_assert!(name.iter().all(|name| !name.contains(char::is_control) && name.chars().count() <= MAX_NAME_CHARS));
                let again: Vec<_> = parse(&email).map(|entry| entry.parsed).collect();
                prop_assert_eq!(again, [Ok(Address { email, name: None })]);
            }
        }

        #[test]
        fn a_list_is_the_same_however_a_file_is_written(
            list in prop::collection::vec((valid(), prop::option::of("[A-Z][a-z]{0,8}( [A-Z][a-z;,]{0,8})?"), 0usize..3), 0..20),
            bom: bool, quoted: bool, end in prop::sample::select(&["\n", "\r\n", "\r"][..]), last: bool,
        ) {
            let mut expected = Vec::new();
            let mut lines = Vec::new();
            for (email, name, blank) in &list {
                lines.extend(std::iter::repeat_n(String::new(), *blank));
                lines.push(match name {
                    Some(name) if quoted || name.contains([',', ';']) => format!("\"{name}\" <{email}>"),
                    Some(name) => format!("{name} <{email}>"),
                    None => email.clone(),
                });
                let parsed = Ok(Address { email: email.clone(), name: name.clone() });
                expected.push(Entry { line: u32::try_from(lines.len()).unwrap(), parsed });
                lines.push("nobody".into());
                let parsed = Err(Invalid { text: "nobody".into(), reason: "has no @ sign" });
                expected.push(Entry { line: u32::try_from(lines.len()).unwrap(), parsed });
            }
            let text = format!("{}{}{}", if bom { "\u{feff}" } else { "" }, lines.join(end), if last { end } else { "" });
            prop_assert_eq!(parse(&text).collect::<Vec<_>>(), expected);
        }

        #[test]
        fn every_valid_address_is_found_whatever_separates_them(
            list in prop::collection::vec((valid(), prop::sample::select(&["\n", ", ", ";", "\r\n", "\n\n", " ; "][..])), 0..20)
        ) {
            let text: String = list.iter().flat_map(|(email, separator)| [email.as_str(), separator]).collect();
            let expected: Vec<_> = list.iter().map(|(email, _)| email.clone()).collect();
            prop_assert_eq!(emails(&text), expected);
        }

        #[test]
        fn case_and_name_make_no_other_person(email in valid(), name in "[A-Za-z ]{0,20}") {
            let spelled: Address = format!("{name} <{}>", email.to_uppercase()).parse().unwrap();
            prop_assert_eq!(spelled.email, email);
        }
    }
}
