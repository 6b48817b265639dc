//! Parses pasted addresses: one per line, or separated by commas and semicolons, with or without names. Pure and lazy, so a
//! million addresses are never held at once.
//!
//! Anything ambiguous becomes an invalid entry, which the page shows, and never an invitation.

mod entry;
mod lines;
mod mailbox;
mod name;
mod split;
mod wrapping;

use std::{borrow::Cow, str::FromStr};

/// One entry of the pasted text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its line number, from 1.
    pub line: u32,
    /// The address, or why it is invalid.
    pub parsed: Result<Address, Invalid>,
}

/// A person to invite.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// The mailbox, which identifies the person whatever the spelling. See [`mailbox()`].
    pub email: String,
    /// How it was typed, if different from the mailbox: in NFC and without invisible characters.
    pub typed: Option<String>,
    /// The display name, if one was given.
    pub name: Option<String>,
}

/// An entry that is not an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invalid {
    /// The entry, shortened for display.
    pub text: String,
    /// What is wrong with it, as the end of a sentence about it.
    pub reason: &'static str,
}

/// The mailbox of an address without a name. People, suppressions, unsubscribe links and bounces are matched by it.
///
/// It is in NFC and lower case, with the domain in ASCII form and without invisible characters. The function is idempotent.
///
/// # Errors
/// What is wrong with the address.
pub fn mailbox(address: &str) -> Result<String, &'static str> {
    let address = wrapping::unwrap(address);
    mailbox::read(&address).map(|spelling| spelling.mailbox.into_owned())
}

/// A mailbox for display: the domain in Unicode, and a text in place of a tombstone.
#[must_use]
pub fn shown(mailbox: &str) -> Cow<'_, str> {
    if is_tombstone(mailbox) { "erased person".into() } else { mailbox::shown(mailbox) }
}

/// Parses all entries of `text`, in their order. Blank lines, empty entries and invisible characters around entries are skipped.
pub fn parse(text: &str) -> impl Iterator<Item = Entry> + '_ {
    lines::lines(text).flat_map(|(first, line)| {
        split::entries(line).map(move |split| {
            let text = split.unwrap_or_else(|(text, _)| text);
            // Both are slices of the same text.
            let before = text.as_ptr().addr().saturating_sub(line.as_ptr().addr()).min(line.len());
            let parsed = split.map_err(|(text, reason)| entry::invalid(text, reason)).and_then(entry::parse);
            Entry { line: first + lines::breaks(&line[..before]), parsed }
        })
    })
}

impl FromStr for Address {
    type Err = Invalid;

    /// Parses a single entry, `ann@example.org` or `Ann <ann@example.org>`.
    fn from_str(text: &str) -> Result<Self, Invalid> {
        entry::parse(wrapping::trim(text))
    }
}

/// The prefix of the tombstones of erased people. No address starts with it, since a tombstone contains no @.
pub const ERASED: &str = "erased:";

/// Whether this is a tombstone instead of an address.
#[must_use]
pub fn is_tombstone(email: &str) -> bool {
    email.starts_with(ERASED)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{
        mailbox::{MAX_ADDRESS_BYTES, is_invisible},
        name::MAX_NAME_CHARS,
        *,
    };

    fn emails(text: &str) -> Vec<String> {
        parse(text).map(|entry| entry.parsed.unwrap().email).collect()
    }

    fn reason(text: &str) -> &'static str {
        text.parse::<Address>().unwrap_err().reason
    }

    #[test]
    fn all_separators_are_recognised() {
        let text = "\u{feff}a@x.org\r\nB@X.org, c@x.org;d@x.org\n\n  \n,;\ne@x.org f@x.org\rg@x.org";
        assert_eq!(emails(text), ["a@x.org", "b@x.org", "c@x.org", "d@x.org", "e@x.org", "f@x.org", "g@x.org"]);
    }

    #[test]
    fn names_are_kept_and_may_contain_separators() {
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
        let text = "Пётр@пример.рф\nmüller@bücher.example";
        assert_eq!(emails(text), ["пётр@xn--e1afmkfd.xn--p1ai", "müller@xn--bcher-kva.example"]);
    }

    #[test]
    fn an_unclosed_quote_affects_only_one_entry() {
        let entries: Vec<_> = parse("\"oops <a@x.org, b@x.org").collect();
        assert_eq!(entries.len(), 2);
        assert_eq!(entries[1].parsed.as_ref().unwrap().email, "b@x.org");
    }

    #[test]
    fn invisible_characters_do_not_make_another_person() {
        let text = "\u{feff}a@x.org\n\u{feff}b@x.org\u{200b}, \u{200e}<\u{200b}c@x.org\u{ad}>\n\u{feff}\n";
        assert_eq!(emails(text), ["a@x.org", "b@x.org", "c@x.org"]);
        assert_eq!(emails("a\u{200b}b@x.org"), ["ab@x.org"]);
        // In lower case this is an i with a second dot, which is not allowed in an address.
        assert_eq!(reason("İ@x.org"), "is not an email address");
    }

    /// One text per entry: the address as typed with its name, or a question mark if it is invalid.
    fn read(text: &str) -> Vec<String> {
        let say = |entry: Entry| match entry.parsed {
            Ok(Address { email, typed, name: Some(name) }) => format!("{name} = {}", typed.unwrap_or(email)),
            Ok(Address { email, typed, name: None }) => typed.unwrap_or(email),
            Err(_) => "?".to_owned(),
        };
        parse(text).map(say).collect()
    }

    #[test]
    fn adjacent_people_are_separate_entries() {
        for (text, people) in [
            ("Ann Lee <ann@x.org> Bob Ray <bob@y.org>", &["Ann Lee = ann@x.org", "Bob Ray = bob@y.org"][..]),
            ("<ann@x.org> <bob@y.org>", &["ann@x.org", "bob@y.org"]),
            (
                "\"Lee, Ann\" <ann@x.org> \"Ray\" <bob@y.org>, c@x.org",
                &["Lee, Ann = ann@x.org", "Ray = bob@y.org", "c@x.org"],
            ),
            ("Ann <ann@x.org> bob@y.org", &["Ann = ann@x.org", "bob@y.org"]),
            ("Ann <ann@x.org>Bob <bob@y.org>", &["Ann = ann@x.org", "Bob = bob@y.org"]),
            ("Ann <ann@x.org, Bob <bob@y.org>", &["Ann = ann@x.org", "Bob = bob@y.org"]),
            ("Ann <ann@x.org> Sales", &["Ann = ann@x.org", "?"]),
            ("To: Ann <ann@x.org>, bob@y.org", &["Ann = ann@x.org", "bob@y.org"]),
        ] {
            assert_eq!(read(text), people, "{text}");
        }
    }

    #[test]
    fn a_name_never_contains_another_address() {
        for text in [
            "bob@y.org Ann <ann@x.org>",
            "\"bob@y.org\" <ann@x.org>",
            "Ann <Sales> <ann@x.org>",
            "\"Ann > Bob\" <ann@x.org>",
            "Ann @work <ann@x.org>",
            "=?utf-8?Q?bob=40y.org?= <ann@x.org>",
        ] {
            assert_eq!(read(text), ["?"], "{text}");
        }
        assert_eq!(read("'zoe@x.org' <Zoe@x.org>; \"'max@x.org'\" <'max@x.org'>"), ["Zoe@x.org", "max@x.org"]);
        assert_eq!(read("kim@x.org<mailto:kim@x.org>"), ["kim@x.org"]);
    }

    #[test]
    fn a_comma_belongs_to_the_name_before_an_address() {
        // A name's limit counts characters, not bytes.
        let long = "Ж".repeat(190);
        for (text, people) in [
            ("Ann Lee, PhD <ann@x.org>", &["Ann Lee, PhD = ann@x.org"][..]),
            ("Lee, Ann <ann@x.org>; Ray, Bob <bob@y.org>", &["Lee, Ann = ann@x.org", "Ray, Bob = bob@y.org"]),
            ("Lee, Ann <ann@x.org>, Ray, Bob, Jr. <bob@y.org>", &["Lee, Ann = ann@x.org", "Ray, Bob, Jr. = bob@y.org"]),
            ("c@x.org, Ann Lee, MD, PhD <ann@x.org>", &["c@x.org", "Ann Lee, MD, PhD = ann@x.org"]),
            ("\"Lee, Ann\", PhD <ann@x.org>", &["Lee, Ann, PhD = ann@x.org"]),
            ("=?utf-8?Q?Lee,_Ann?= <ann@x.org>", &["Lee, Ann = ann@x.org"]),
            ("nobody; Ann <ann@x.org>", &["?", "Ann = ann@x.org"]),
            (&format!("{long}, Пётр <ann@x.org>"), &[&format!("{long}, Пётр = ann@x.org")]),
            ("a, b, c, d, e, Ann <ann@x.org>", &["?", "?", "?", "?", "?", "Ann = ann@x.org"]),
        ] {
            assert_eq!(read(text), people, "{text}");
        }
    }

    #[test]
    fn an_address_in_a_note_is_not_invited() {
        for (text, people) in [
            ("Zoe <zoe@x.org> (ask bob@y.org, kim@y.org)", &["Zoe = zoe@x.org"][..]),
            ("zoe@x.org (boss@y.org)", &["zoe@x.org"]),
            ("zoe@x.org (see <boss@y.org>; kim@y.org)", &["zoe@x.org"]),
            ("Zoe <zoe@x.org>, ask boss@y.org", &["Zoe = zoe@x.org", "?"]),
            ("Zoe <zoe@x.org>, \"met 2019, boss@y.org\"", &["Zoe = zoe@x.org", "?"]),
            ("zoe@x.org,\"met 2019,\nboss@y.org\nkim@y.org\"", &["zoe@x.org", "?"]),
            ("Bob,Ray,boss@y.org,Friends,,bob@x.org,,", &["?"]),
            ("zoe@x.org ask boss@y.org", &["?"]),
            ("ann@x.org ::: ann.lee@y.org", &["?"]),
        ] {
            assert_eq!(read(text), people, "{text}");
        }
    }

    #[test]
    fn any_wrapping_is_removed() {
        for (text, person) in [
            ("mailto:ann@x.org", "ann@x.org"),
            ("Ann <mailto:ann@x.org>", "Ann = ann@x.org"),
            ("MAILTO:bob%2Bx@y.org?subject=Hello", "bob+x@y.org"),
            ("[zoe@x.org]", "zoe@x.org"),
            ("(kim@x.org)", "kim@x.org"),
            ("'max@x.org'", "max@x.org"),
            ("\"eve@x.org\"", "eve@x.org"),
            ("lou@x.org (Lou Lee)", "Lou Lee = lou@x.org"),
            ("\u{201c}ida@x.org\u{201d}", "ida@x.org"),
            ("<'ina@x.org'>", "ina@x.org"),
        ] {
            assert_eq!(read(text), [person], "{text}");
        }
    }

    #[test]
    fn undecodable_text_is_reported() {
        for text in
            ["J\u{fffd}rgen <j@x.org>", "j\u{fffd}@x.org", "J\u{81}rgen <j@x.org>", "=?utf-8?Q?J=FCrgen?= <j@x.org>"]
        {
            assert_eq!(reason(text), "has characters that could not be decoded: save the list as UTF-8", "{text}");
        }
    }

    #[test]
    fn spellings_of_a_mailbox_are_one_person_shown_as_typed() {
        let text = "ann@bücher.example\nann@xn--bcher-kva.example\nANN@BÜCHER.EXAMPLE\nann@bu\u{308}cher.example\na\u{ad}nn@bücher.example";
        assert_eq!(emails(text), ["ann@xn--bcher-kva.example"; 5]);
        assert_eq!(read(text)[..3], ["ann@bücher.example", "ann@xn--bcher-kva.example", "ANN@BÜCHER.EXAMPLE"]);
        assert_eq!(mailbox("<Ann@X.org>"), Ok("ann@x.org".to_owned()));
        assert_eq!(mailbox("Ann"), Err("has no @ sign"));
    }

    #[test]
    fn an_entry_has_its_line_number() {
        let lines = |text| parse(text).map(|entry| entry.line).collect::<Vec<_>>();
        assert_eq!(lines("a@x.org, b@x.org\r\n\n\"c,\nd\";e@x.org\nf@x.org"), [1, 1, 3, 4, 5]);
    }

    fn valid() -> impl Strategy<Value = String> {
        "[a-z0-9]{1,12}(\\.[a-z0-9]{1,6})?@[a-z]{1,10}\\.(org|example|co\\.uk)"
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_without_a_panic_and_lines_are_in_order(text in "\\PC*|[\\s\\S]{0,200}") {
            let mut last = 1;
            for entry in parse(&text) {
                prop_assert!(entry.line >= last);
                last = entry.line;
                match entry.parsed {
                    Ok(address) => prop_assert_eq!(mailbox(&address.email), Ok(address.email)),
                    Err(invalid) => prop_assert!(!invalid.text.chars().any(char::is_control)),
                }
            }
        }

        #[test]
        fn an_accepted_address_is_valid_everywhere_else(
            text in "([a-cA-C@.,;<>\"\\\\ \t\r\n\u{feff}\u{200b}\u{85}éİß()\\[\\]:\\-]|@x\\.org|\"a b\"){0,24}"
        ) {
            for Address { email, name, typed } in parse(&text).filter_map(|entry| entry.parsed.ok()) {
                // On the wire: RCPT TO:<…>, and a header.
                prop_assert!(!email.contains(|c: char| c.is_control() || c.is_whitespace() || is_invisible(c)), "{email:?}");
                prop_assert!(!email.contains('<') && (!email.contains('>') || email.starts_with('"')), "{email:?}");
                prop_assert!(email.len() <= MAX_ADDRESS_BYTES);
                prop_assert!(name.iter().all(|name| !name.contains(char::is_control) && name.chars().count() <= MAX_NAME_CHARS));
                let again: Vec<_> = parse(&email).map(|entry| entry.parsed).collect();
                prop_assert_eq!(again, [Ok(Address { email: email.clone(), typed: None, name: None })]);
                if let Some(typed) = typed {
                    prop_assert_eq!(mailbox(&typed), Ok(email));
                }
            }
        }

        #[test]
        fn line_endings_and_a_byte_order_mark_do_not_change_a_list(
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
                let parsed = Ok(Address { email: email.clone(), typed: None, name: name.clone() });
                expected.push(Entry { line: u32::try_from(lines.len()).unwrap(), parsed });
                lines.push("nobody".into());
                let parsed = Err(Invalid { text: "nobody".into(), reason: "has no @ sign" });
                expected.push(Entry { line: u32::try_from(lines.len()).unwrap(), parsed });
            }
            let text = format!("{}{}{}", if bom { "\u{feff}" } else { "" }, lines.join(end), if last { end } else { "" });
            prop_assert_eq!(parse(&text).collect::<Vec<_>>(), expected);
        }

        #[test]
        fn every_valid_address_is_found_with_any_separator(
            list in prop::collection::vec((valid(), prop::sample::select(&["\n", ", ", ";", "\r\n", "\n\n", " ; "][..])), 0..20)
        ) {
            let text: String = list.iter().flat_map(|(email, separator)| [email.as_str(), separator]).collect();
            let expected: Vec<_> = list.iter().map(|(email, _)| email.clone()).collect();
            prop_assert_eq!(emails(&text), expected);
        }

        #[test]
        fn case_and_name_do_not_make_another_person(email in valid(), name in "[A-Za-z ]{0,20}") {
            let spelled: Address = format!("{name} <{}>", email.to_uppercase()).parse().unwrap();
            prop_assert_eq!(spelled.email, email);
        }
    }
}
