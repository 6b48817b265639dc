//! Splits a line into entries: at commas and semicolons, and between adjacent people.

use std::{collections::VecDeque, ops::Range};

use super::{
    name::{MAX_NAME_CHARS, closing_quote},
    wrapping::trim,
};

/// The maximum number of comma-separated parts of a name: `Ann Lee, PhD, MBA <ann@example.com>`.
const MAX_NAME_PARTS: usize = 4;
/// The error for a row with several addresses among other cells.
const SEVERAL: &str = "has several addresses among other text: it is not clear whom to invite";
/// Headers that people copy from mail programs.
const HEADERS: [&str; 5] = ["to:", "cc:", "bcc:", "from:", "reply-to:"];

/// An entry, or the line and why it is invalid.
pub(super) type Split<'a> = Result<&'a str, (&'a str, &'static str)>;

/// The entries of a line, in their order. Only empty ones are skipped.
pub(super) fn entries(line: &str) -> impl Iterator<Item = Split<'_>> {
    let line = without_header(line);
    let row = is_row(line);
    let whole = row.then(|| Err((trim(line), SEVERAL)));
    let mut entries = Entries { pieces: Pieces::of(if row { "" } else { line }), ready: VecDeque::new() };
    whole.into_iter().chain(std::iter::from_fn(move || entries.next()).map(Ok))
}

fn without_header(line: &str) -> &str {
    let text = line.trim_start();
    let end = text.find(':').map_or(0, |colon| colon + 1);
    let is_header = HEADERS.iter().any(|header| text[..end].eq_ignore_ascii_case(header));
    // If the text continues without a space, the colon is part of something else, such as an address.
    if is_header && text[end..].starts_with([' ', '\t']) { &text[end..] } else { line }
}

/// Whether it is the row of a table with several bare addresses and other cells. Some of the addresses may be part of a note.
fn is_row(line: &str) -> bool {
    if line.matches('@').take(2).count() < 2 || !line.contains([',', ';']) {
        return false;
    }
    let (mut addresses, mut texts, mut held) = (0, 0, 0);
    for piece in Pieces::of(line) {
        match piece.kind {
            Kind::Text if piece.text.contains(char::is_alphanumeric) => {
                held += 1;
                if piece.end != End::Comma {
                    texts += held;
                    held = 0;
                }
            }
            Kind::Empty | Kind::Text => {}
            // The text before it was the start of its name.
            Kind::Named => held = 0,
            Kind::Bare => {
                addresses += usize::from(!piece.text.contains(char::is_whitespace));
                texts += held;
                held = 0;
            }
        }
    }
    addresses > 1 && texts + held > 0
}

struct Entries<'a> {
    pieces: Pieces<'a>,
    ready: VecDeque<&'a str>,
}

impl<'a> Entries<'a> {
    fn next(&mut self) -> Option<&'a str> {
        // Texts that may be parts of a name that continues after the comma.
        let mut held: Vec<Piece<'a>> = Vec::new();
        loop {
            if let Some(entry) = self.ready.pop_front() {
                return Some(entry);
            }
            let Some(piece) = self.pieces.next() else {
                self.ready.extend(held.drain(..).map(|piece| piece.text));
                return self.ready.pop_front();
            };
            match piece.kind {
                Kind::Text if piece.end == End::Comma && held.len() < MAX_NAME_PARTS => {
                    held.push(piece);
                    continue;
                }
                Kind::Empty if piece.end == End::Comma => continue,
                Kind::Named
                    if let Some(first) = held.first()
                        && self.pieces.fits_a_name(first.at..piece.at + piece.name_bytes) =>
                {
                    let end = piece.at + piece.text.len();
                    self.ready.push_back(&self.pieces.line[first.at..end]);
                    held.clear();
                    continue;
                }
                _ => {}
            }
            self.ready.extend(held.drain(..).map(|piece| piece.text));
            match piece.kind {
                Kind::Empty => {}
                Kind::Bare => self.ready.extend(words(piece.text)),
                Kind::Text | Kind::Named => self.ready.push_back(piece.text),
            }
        }
    }
}

/// Splits `a@x.org b@y.org` into two entries.
fn words(entry: &str) -> impl Iterator<Item = &str> {
    let several = !entry.contains(['<', '"', '('])
        && entry.contains(char::is_whitespace)
        && entry.split_whitespace().all(|word| word.contains('@'));
    let (one, many) = if several { (None, Some(entry.split_whitespace())) } else { (Some(entry), None) };
    one.into_iter().chain(many.into_iter().flatten())
}

/// The kind of a piece of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Empty,
    /// Not an address; possibly part of a name.
    Text,
    /// Contains an @ sign outside of angle brackets.
    Bare,
    /// Ends with an address in angle brackets.
    Named,
}

/// What ends a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Comma,
    Semicolon,
    /// Another person follows.
    Person,
    Line,
}

#[derive(Debug)]
struct Piece<'a> {
    text: &'a str,
    /// Its offset in the line.
    at: usize,
    kind: Kind,
    end: End,
    /// The number of bytes before the angle bracket.
    name_bytes: usize,
}

/// The pieces of a line. Text within quotes, angle brackets or parentheses is not split, unless they are never closed.
struct Pieces<'a> {
    line: &'a str,
    at: Option<usize>,
    /// No further quote, or parenthesis, is closed.
    open_quote: bool,
    open_comment: bool,
}

impl<'a> Pieces<'a> {
    fn of(line: &'a str) -> Self {
        Self { line, at: Some(0), open_quote: false, open_comment: false }
    }

    fn fits_a_name(&self, name: Range<usize>) -> bool {
        self.line[name].chars().take(MAX_NAME_CHARS + 1).count() <= MAX_NAME_CHARS
    }

    /// The offset after the quote that closes the one before `at`.
    fn behind_quote(&mut self, at: usize) -> Option<usize> {
        let closing = if self.open_quote { None } else { closing_quote(&self.line[at..]) };
        self.open_quote |= closing.is_none();
        Some(at + closing? + 1)
    }

    fn behind_comment(&mut self, at: usize) -> Option<usize> {
        let closing = if self.open_comment { None } else { self.line[at..].find(')') };
        self.open_comment |= closing.is_none();
        Some(at + closing? + 1)
    }

    /// The offset after the angle bracket that closes the one before `at`, unless another one opens first.
    fn behind_angle(&self, at: usize) -> Option<usize> {
        let next = at + self.line[at..].find(['<', '>'])?;
        self.line[next..].starts_with('>').then_some(next + 1)
    }

    /// The end of the person whose address ends at `at`, including notes in parentheses and punctuation. None: another person
    /// follows.
    fn end_of_person(&mut self, mut at: usize) -> (usize, Option<End>) {
        let mut end = at;
        loop {
            let rest = &self.line[at..];
            at += rest.len() - rest.trim_start().len();
            match self.line[at..].chars().next() {
                None => return (end, Some(End::Line)),
                Some(',') => return (end, Some(End::Comma)),
                Some(';') => return (end, Some(End::Semicolon)),
                Some('(') if let Some(behind) = self.behind_comment(at + 1) => (at, end) = (behind, behind),
                Some(mark) if !mark.is_alphanumeric() && !matches!(mark, '"' | '<' | '\'' | '(') => {
                    at += mark.len_utf8();
                }
                Some(_) => return (end, None),
            }
        }
    }
}

impl<'a> Iterator for Pieces<'a> {
    type Item = Piece<'a>;

    fn next(&mut self) -> Option<Piece<'a>> {
        let start = self.at?;
        let mut at = start;
        loop {
            let Some(found) = self.line[at..].find([',', ';', '"', '<', '(']).map(|found| at + found) else {
                self.at = None;
                return Some(plain(self.line, start, self.line.len(), End::Line));
            };
            at = found + 1;
            match self.line.as_bytes()[found] {
                b'"' => at = self.behind_quote(at).unwrap_or(at),
                b'(' => at = self.behind_comment(at).unwrap_or(at),
                b'<' => {
                    let Some(behind) = self.behind_angle(at) else { continue };
                    if !self.line[at..behind].contains('@') {
                        at = behind;
                        continue;
                    }
                    let (end, stop) = self.end_of_person(behind);
                    self.at = match stop {
                        Some(End::Line) => None,
                        Some(_) => self.line[end..].find([',', ';']).map(|mark| end + mark + 1),
                        None => Some(end),
                    };
                    let text = &self.line[start..end];
                    let begin = start + offset(text);
                    return Some(Piece {
                        text: trim(text),
                        at: begin,
                        kind: Kind::Named,
                        end: stop.unwrap_or(End::Person),
                        name_bytes: found.saturating_sub(begin),
                    });
                }
                mark => {
                    self.at = Some(at);
                    let end = if mark == b',' { End::Comma } else { End::Semicolon };
                    return Some(plain(self.line, start, found, end));
                }
            }
        }
    }
}

/// A piece without an address in angle brackets.
fn plain(line: &str, start: usize, end: usize, stop: End) -> Piece<'_> {
    let text = &line[start..end];
    let shown = trim(text);
    let kind = match shown {
        "" => Kind::Empty,
        shown if shown.contains('@') => Kind::Bare,
        _ => Kind::Text,
    };
    Piece { text: shown, at: start + offset(text), kind, end: stop, name_bytes: shown.len() }
}

/// The number of bytes that trimming removes from the start of `text`.
fn offset(text: &str) -> usize {
    text.len() - text.trim_start_matches(|c: char| trim(c.encode_utf8(&mut [0; 4])).is_empty()).len()
}
