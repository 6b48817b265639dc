//! Takes values through the Markdown parser unseen: while it reads, they are letters that mean nothing, and afterwards they are
//! shown as what they are. So no value can be a heading, a link or a tag, wherever it stands.

/// Bytes of a value are these characters and the next 255, all of a private plane of Unicode that no text uses.
const FIRST: u32 = 0xF_0000;
/// Begins a value, so that an empty one is something to the parser too.
const BEGIN: char = '\u{F_0100}';

/// The byte behind a character, if it stands for one.
fn byte(character: char) -> Option<u8> {
    u32::from(character).checked_sub(FIRST).and_then(|byte| u8::try_from(byte).ok())
}

/// A value as characters without a meaning.
pub fn veil(value: &str) -> String {
    let bytes = value.bytes().filter_map(|byte| char::from_u32(FIRST + u32::from(byte)));
    std::iter::once(BEGIN).chain(bytes).collect()
}

/// The text with the values in it.
pub fn unveil(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    for character in text.chars() {
        match byte(character) {
            Some(byte) => bytes.push(byte),
            None if character == BEGIN => {}
            None => bytes.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    // What was veiled was text, so this replaces nothing unless a value was cut in the middle of a character.
    String::from_utf8(bytes).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned())
}

/// A text that is not itself veiled.
pub fn without_veils(text: &str) -> String {
    text.chars().filter(|character| byte(*character).is_none() && *character != BEGIN).collect()
}
