//! Passes values and written-out links through the Markdown parser as placeholder words without any meaning to it, and finds them
//! again in its output. So a value can't become a heading, a link or a tag, and a link is not cut by what it contains.

use std::collections::HashMap;

use pulldown_cmark_escape::{escape_href, escape_html, escape_html_body_text};
use uuid::Uuid;

use super::{
    Escape, Segments,
    syntax::{Field, Piece},
};

/// The placeholder words of one text.
pub struct Words<'a> {
    /// The prefix of words for the Markdown parser.
    in_markdown: String,
    /// The prefix of words for the HTML writer.
    in_html: String,
    values: Vec<&'a Piece<'a>>,
    indices: HashMap<&'a Piece<'a>, usize>,
    links: Vec<String>,
}

/// A part of a text with placeholder words.
#[derive(Clone, Copy)]
pub enum Part<'a> {
    Text(&'a str),
    /// An index for [`Words::value`].
    Value(usize, Escape),
    /// A written-out link, possibly with values in it.
    Link(&'a str),
}

impl<'a> Words<'a> {
    /// Creates prefixes that `source` does not contain in any spelling, since no text contains its own hash.
    pub fn new(source: &str) -> Self {
        let hash = Uuid::new_v5(&Uuid::NAMESPACE_OID, source.as_bytes()).simple();
        // A non-ASCII letter can't occur in a tag or an autolink; ASCII letters and digits are not changed by HTML escaping.
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

    /// The word for a link, for the Markdown parser.
    pub fn for_link(&mut self, url: String) -> String {
        self.links.push(url);
        format!("{}{}l", self.in_markdown, self.links.len() - 1)
    }

    /// The word for a value, for the HTML writer.
    pub fn in_html(&self, index: usize, escape: Escape) -> String {
        let kind = match escape {
            Escape::None | Escape::Html => 'v',
            Escape::Attribute => 'a',
            Escape::Href => 'h',
        };
        format!("{}{index}{kind}", self.in_html)
    }

    /// The value of a word.
    pub fn value(&self, index: usize) -> Option<&'a Piece<'a>> {
        self.values.get(index).copied()
    }

    /// Whether a word stands for the unsubscribe URL.
    pub fn is_unsubscribe_url(&self, index: usize) -> bool {
        matches!(self.value(index), Some(Piece::Value(Field::UnsubscribeUrl)))
    }

    /// Splits a text from the Markdown parser at its words.
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

    /// Parses the word whose prefix was before `text`. Returns it and the text after it.
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

    /// Converts a text from the Markdown parser for the HTML writer, with its links written out again.
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

    /// Splits HTML into segments.
    pub fn push_segments(&self, html: &str, segments: &mut Segments) {
        for part in self.split_at(&self.in_html, html) {
            match part {
                Part::Text(text) => segments.push_text(text),
                Part::Value(index, escape) => match self.value(index) {
                    Some(Piece::Value(field)) => segments.push_value(*field, escape),
                    Some(Piece::Text(text) | Piece::Default(text)) => segments.push_escaped(text, escape),
                    None => {}
                },
                // Links were written out before.
                Part::Link(url) => segments.push_escaped(url, Escape::Html),
            }
        }
    }
}

/// Appends `text` with the given escaping.
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
    debug_assert!(written.is_ok(), "writing to a string can't fail");
}
