//! Takes values and written-out links through the Markdown parser as words that mean nothing to it, and finds them again in its
//! output. So no value can be a heading, a link or a tag, and no link is cut by what it contains.

use std::collections::HashMap;

use pulldown_cmark_escape::{escape_href, escape_html, escape_html_body_text};
use uuid::Uuid;

use super::{
    Escape, Segments,
    syntax::{Field, Piece},
};

/// The words of one text.
pub struct Words<'a> {
    /// Words for the Markdown parser begin with it.
    in_markdown: String,
    /// Words for the HTML writer begin with it.
    in_html: String,
    values: Vec<&'a Piece<'a>>,
    indices: HashMap<&'a Piece<'a>, usize>,
    links: Vec<String>,
}

/// A part of a text with words in it.
#[derive(Clone, Copy)]
pub enum Part<'a> {
    Text(&'a str),
    /// An index for [`Words::value`].
    Value(usize, Escape),
    /// A link that the author wrote out, maybe with values in it.
    Link(&'a str),
}

impl<'a> Words<'a> {
    /// Words that `source` does not contain, however it is spelled: no text contains its own hash.
    pub fn new(source: &str) -> Self {
        let hash = Uuid::new_v5(&Uuid::NAMESPACE_OID, source.as_bytes()).simple();
        // Neither a tag nor an address in `<…>` has a letter that is not ASCII; HTML's escapes leave ASCII alone.
        Self {
            in_markdown: format!("é{hash}"),
            in_html: format!("z{hash}"),
            values: Vec::new(),
            indices: HashMap::new(),
            links: Vec::new(),
        }
    }

    /// The word for a value, for the Markdown parser.
    pub fn for_value(&mut self, value: &'a Piece<'a>) -> String {
        let index = *self.indices.entry(value).or_insert(self.values.len());
        if index == self.values.len() {
            self.values.push(value);
        }
        format!("{}{index}v", self.in_markdown)
    }

    /// A word for a link, for the Markdown parser.
    pub fn for_link(&mut self, url: String) -> String {
        self.links.push(url);
        format!("{}{}l", self.in_markdown, self.links.len() - 1)
    }

    /// A word for a value, for the HTML writer.
    pub fn in_html(&self, index: usize, escape: Escape) -> String {
        let kind = match escape {
            Escape::None | Escape::Html => 'v',
            Escape::Attribute => 'a',
            Escape::Href => 'h',
        };
        format!("{}{index}{kind}", self.in_html)
    }

    /// The value behind a word.
    pub fn value(&self, index: usize) -> Option<&'a Piece<'a>> {
        self.values.get(index).copied()
    }

    /// Whether a word is for the address to unsubscribe at.
    pub fn is_unsubscribe_url(&self, index: usize) -> bool {
        matches!(self.value(index), Some(Piece::Value(Field::UnsubscribeUrl)))
    }

    /// Takes a text from the Markdown parser apart at its words.
    pub fn split<'t>(&'t self, text: &'t str) -> impl Iterator<Item = Part<'t>> {
        self.split_at(&self.in_markdown, text)
    }

    fn split_at<'t>(&'t self, beginning: &'t str, text: &'t str) -> impl Iterator<Item = Part<'t>> {
        text.split(beginning).enumerate().flat_map(|(number, piece)| {
            let word = if number > 0 { self.parse(piece) } else { None };
            let (word, text) = word.map_or((None, piece), |(word, text)| (Some(word), text));
            word.into_iter().chain(Some(Part::Text(text)).filter(|_| !text.is_empty()))
        })
    }

    /// The word whose beginning was before `text`, and the text behind it.
    fn parse<'t>(&'t self, text: &'t str) -> Option<(Part<'t>, &'t str)> {
        let end = text.find(|c: char| !c.is_ascii_digit())?;
        let index: usize = text[..end].parse().ok()?;
        let part = match text.as_bytes()[end] {
            b'v' => Part::Value(index, Escape::Html),
            b'a' => Part::Value(index, Escape::Attribute),
            b'h' => Part::Value(index, Escape::Href),
            b'l' => Part::Link(self.links.get(index)?),
            _ => return None,
        };
        Some((part, &text[end + 1..]))
    }

    /// A text from the Markdown parser for the HTML writer, with its links written out again.
    pub fn to_html(&self, text: &str, escape: Escape) -> String {
        self.split(text).fold(String::with_capacity(text.len()), |mut out, part| {
            match part {
                Part::Text(text) => out.push_str(text),
                Part::Value(index, _) => out.push_str(&self.in_html(index, escape)),
                Part::Link(url) => out.push_str(&self.to_html(url, escape)),
            }
            out
        })
    }

    /// Takes HTML apart into segments.
    pub fn push_segments(&self, html: &str, segments: &mut Segments) {
        for part in self.split_at(&self.in_html, html) {
            match part {
                Part::Text(text) => segments.push_text(text),
                Part::Value(index, escape) => match self.value(index) {
                    Some(Piece::Value(field)) => segments.push_value(*field, escape),
                    Some(Piece::Text(text) | Piece::Default(text)) => segments.push_escaped(text, escape),
                    None => {}
                },
                // They are written out before.
                Part::Link(url) => segments.push_escaped(url, Escape::Html),
            }
        }
    }
}

/// Appends `text` as it must be written there.
pub fn escape(out: &mut String, text: &str, escape: Escape) {
    let written = match escape {
        Escape::None => {
            out.push_str(text);
            Ok(())
        }
        Escape::Html => escape_html_body_text(out, text),
        Escape::Attribute => escape_html(out, text),
        Escape::Href => escape_href(out, text),
    };
    debug_assert!(written.is_ok(), "a string takes everything");
}
