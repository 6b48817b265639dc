//! Splits a pasted text into lines. A quoted cell of a spreadsheet and a folded mail header may span several of them.

/// The maximum number of continuation lines of a quoted cell or a folded header.
const MAX_FURTHER: u32 = 50;

/// The lines, each with its number from 1. A joined line has the number of its first one.
pub(super) fn lines(text: &str) -> impl Iterator<Item = (u32, &str)> {
    let mut rest = text;
    let mut number = 1;
    std::iter::from_fn(move || {
        let first = number;
        let (mut line, mut after) = cut(rest)?;
        number += 1;
        while number - first <= MAX_FURTHER
            && let Some((end, further)) = continuation(line, &rest[rest.len() - after.len()..])
        {
            let taken = rest.len() - after.len() + end;
            line = strip_end(&rest[..taken]);
            after = &rest[taken..];
            number += further;
        }
        rest = after;
        Some((first, line))
    })
}

/// The number of line breaks in `text`.
pub(super) fn breaks(text: &str) -> u32 {
    let mut rest = text;
    let mut count = 0;
    while let Some(found) = rest.find(['\n', '\r']) {
        rest = &rest[found + if rest[found..].starts_with("\r\n") { 2 } else { 1 }..];
        count += 1;
    }
    count
}

/// Splits off the first line. A lone carriage return also ends a line, since old spreadsheets write it.
fn cut(text: &str) -> Option<(&str, &str)> {
    if text.is_empty() {
        return None;
    }
    Some(match text.find(['\n', '\r']) {
        Some(end) if text[end..].starts_with("\r\n") => (&text[..end], &text[end + 2..]),
        Some(end) => (&text[..end], &text[end + 1..]),
        None => (text, ""),
    })
}

fn strip_end(line: &str) -> &str {
    line.strip_suffix("\r\n").or_else(|| line.strip_suffix(['\n', '\r'])).unwrap_or(line)
}

/// How much of `after` continues the line before it, in bytes and lines.
fn continuation(line: &str, after: &str) -> Option<(usize, u32)> {
    if line.trim_end().ends_with("?=") && after.starts_with([' ', '\t']) && after.trim_start().starts_with("=?") {
        let (_, rest) = cut(after)?;
        return Some((after.len() - rest.len(), 1));
    }
    if !opens_a_cell(line) {
        return None;
    }
    let mut rest = after;
    for further in 1..=MAX_FURTHER {
        let (next, behind) = cut(rest)?;
        rest = behind;
        match closes_a_cell(next) {
            Some(true) => return Some((after.len() - rest.len(), further)),
            Some(false) => return None,
            None => {}
        }
    }
    None
}

/// Whether a quoted cell is still open at the end of the line.
fn opens_a_cell(line: &str) -> bool {
    let Some(last) = line.rfind('"') else { return false };
    if line.matches('"').count().is_multiple_of(2) {
        return false;
    }
    let before = line[..last].trim_end_matches(' ');
    before.is_empty() || before.ends_with([',', ';', '\t'])
}

/// Whether the first quote in the line closes a cell. None: the line has no quote. A doubled quote is a quote within the cell.
fn closes_a_cell(line: &str) -> Option<bool> {
    let mut rest = line;
    loop {
        let quote = rest.find('"')?;
        rest = &rest[quote + 1..];
        match rest.strip_prefix('"') {
            Some(behind) => rest = behind,
            None => {
                let behind = rest.trim_start_matches(' ');
                return Some(behind.is_empty() || behind.starts_with([',', ';', '\t']));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Vec<(u32, &str)> {
        lines(text).collect()
    }

    #[test]
    fn all_line_endings_are_recognised() {
        assert_eq!(read("a\r\nb\n\nc\rd"), [(1, "a"), (2, "b"), (3, ""), (4, "c"), (5, "d")]);
        assert_eq!(read("a\n"), [(1, "a")]);
        assert!(read("").is_empty());
        assert_eq!(breaks("a\r\nb\n\nc\rd"), 4);
    }

    #[test]
    fn a_quoted_cell_may_span_lines() {
        assert_eq!(read("a,\"b,\nc \"\"d\"\" e\",f\ng"), [(1, "a,\"b,\nc \"\"d\"\" e\",f"), (3, "g")]);
        assert_eq!(read("\"a\r\nb\"\r\nc"), [(1, "\"a\r\nb\""), (3, "c")]);
        assert_eq!(read("\"a\nb\",\"c\nd\"\ne"), [(1, "\"a\nb\",\"c\nd\""), (4, "e")]);
        // A quote that is not closed by the next one does not join lines.
        assert_eq!(read("\"a\nb\n\"c\" d").len(), 3);
        assert_eq!(read("5\" a\nb\"").len(), 2);
        assert_eq!(read(&format!("\"a\n{}b\"", "x\n".repeat(60))).len(), 62);
    }

    #[test]
    fn a_folded_header_is_one_line() {
        let text = "=?utf-8?Q?J=C3=BCr?=\r\n =?utf-8?Q?gen?= <j@x.org>\nb";
        assert_eq!(read(text), [(1, "=?utf-8?Q?J=C3=BCr?=\r\n =?utf-8?Q?gen?= <j@x.org>"), (3, "b")]);
    }
}
