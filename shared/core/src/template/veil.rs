//! Takes values and written-out links through the Markdown parser unseen: while it reads, they are letters that mean nothing, and afterwards they are
//! shown as what they are. So no value can be a heading, a link or a tag, and no link is cut by what it contains.

/// Bytes of a value are these characters and the next 255, all of a private plane of Unicode that no text uses.
const FIRST: u32 = 0xF_0000;
/// Begins a value, so that an empty one is something to the parser too.
const BEGIN: char = '\u{F_0100}';
/// Begins and ends a link that the author wrote out.
const LINK_BEGIN: char = '\u{F_0101}';
const LINK_END: char = '\u{F_0102}';

/// The byte behind a character, if it stands for one.
fn byte(character: char) -> Option<u8> {
    u32::from(character).checked_sub(FIRST).and_then(|byte| u8::try_from(byte).ok())
}

fn is_mark(character: char) -> bool {
    matches!(character, BEGIN | LINK_BEGIN | LINK_END)
}

fn hide(text: &str) -> impl Iterator<Item = char> + '_ {
    text.bytes().filter_map(|byte| char::from_u32(FIRST + u32::from(byte)))
}

/// A value as characters without a meaning.
pub fn veil(value: &str) -> String {
    std::iter::once(BEGIN).chain(hide(value)).collect()
}

/// The same for a link that the author wrote out, which [`link`] finds again.
pub fn veil_link(url: &str) -> String {
    std::iter::once(LINK_BEGIN).chain(hide(url)).chain(std::iter::once(LINK_END)).collect()
}

/// The link that `text` begins with, and how many bytes of `text` it takes.
pub fn link(text: &str) -> Option<(String, usize)> {
    let inner = text.strip_prefix(LINK_BEGIN)?;
    let end = inner.find(LINK_END)?;
    Some((unveil(&inner[..end]), LINK_BEGIN.len_utf8() + end + LINK_END.len_utf8()))
}

/// The text with the values in it.
pub fn unveil(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    for character in text.chars() {
        match byte(character) {
            Some(byte) => bytes.push(byte),
            None if is_mark(character) => {}
            None => bytes.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    // What was veiled was text, so this replaces nothing unless a value was cut in the middle of a character.
    String::from_utf8(bytes).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned())
}

/// A text that is not itself veiled.
pub fn without_veils(text: &str) -> String {
    text.chars().filter(|character| byte(*character).is_none() && !is_mark(*character)).collect()
}
