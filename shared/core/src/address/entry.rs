//! One entry of a list: an address with or without a name, in the forms that programs and people write.

use super::{
    Address, Invalid,
    mailbox::{self, Spelling},
    name::{self, UNDECODABLE, is_garbled},
    wrapping::{trim, unwrap},
};

/// The length at which an invalid entry is shortened for display.
const MAX_SHOWN_CHARS: usize = 80;
/// Parses an entry.
pub(super) fn parse(entry: &str) -> Result<Address, Invalid> {
    read(entry).map_err(|reason| invalid(entry, reason))
}

/// An entry that is not an address.
pub(super) fn invalid(entry: &str, reason: &'static str) -> Invalid {
    Invalid { text: shorten(entry), reason }
}

fn read(entry: &str) -> Result<Address, &'static str> {
    if is_garbled(entry) {
        return Err(UNDECODABLE);
    }
    let (name, address, comment) = parts(entry);
    let address = unwrap(address);
    let Spelling { mailbox, typed } = mailbox::read(&address)?;
    let name = match name::read(name, &mailbox)? {
        // Old mail programs put the name in parentheses, but it may be any note: an invalid one is dropped.
        None => name::read(comment, &mailbox).unwrap_or_default(),
        name => name,
    };
    let typed = (typed != mailbox).then(|| typed.into_owned());
    Ok(Address { email: mailbox.into_owned(), typed, name })
}

/// The name, the address, and the comment in parentheses after it.
fn parts(entry: &str) -> (&str, &str, &str) {
    let (entry, comment) = match comment(entry) {
        Some((before, comment)) if !before.is_empty() => (before, comment),
        _ => (entry, ""),
    };
    match entry.rsplit_once('<') {
        Some((name, address)) => (name, address.strip_suffix('>').unwrap_or(address), comment),
        None => ("", entry, comment),
    }
}

/// Splits off a comment in parentheses at the end.
fn comment(entry: &str) -> Option<(&str, &str)> {
    let inner = entry.strip_suffix(')')?;
    let mut open = 1_u32;
    let begin = inner.rfind(|character| {
        match character {
            ')' => open += 1,
            '(' => open -= 1,
            _ => {}
        }
        open == 0
    })?;
    Some((trim(&entry[..begin]), &inner[begin + 1..]))
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
