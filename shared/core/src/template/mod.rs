//! The subject and text of an invitation, with placeholders for what differs between recipients. Parsed once, then only joined
//! for each recipient.
//!
//! The text is plain and may use Markdown; both parts of an invitation are made from it. Values are never Markdown, and neither
//! the text nor a value is ever HTML.

mod html;
mod links;
mod syntax;
mod words;

use std::sync::Arc;

use syntax::{Field, Piece, Present};

/// The maximum length of a rendered subject. Mail readers show fewer than a hundred characters, and a header line is limited to 998
/// bytes.
const MAX_SUBJECT_CHARS: usize = 250;

/// An invitation's subject and text.
#[derive(Clone, Debug)]
pub struct Template {
    subject: String,
    body: String,
    /// For recipients without and with a name, each without and with an unsubscribe URL. Shared if the output is the same.
    variants: [Arc<Variant>; 4],
}

/// The output for all recipients with the same fields, ready to be joined with their values.
#[derive(Debug)]
struct Variant {
    subject: Segments,
    text: Segments,
    /// The page after the start of its title.
    html: Segments,
    /// Whether an unsubscribe line is added after the text.
    footer: bool,
}

/// An output: fixed text and placeholders.
#[derive(Debug, Default)]
struct Segments(Vec<Segment>);

#[derive(Debug)]
enum Segment {
    Text(String),
    Value(Field, Escape),
}

/// How a value is escaped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Escape {
    None,
    /// For HTML text.
    Html,
    /// For an HTML attribute.
    Attribute,
    /// For the URL of a link.
    Href,
}

/// Compares the sources; the rest is derived from them.
impl PartialEq for Template {
    fn eq(&self, other: &Self) -> bool {
        (&self.subject, &self.body) == (&other.subject, &other.body)
    }
}

impl Eq for Template {}

/// Why a template is invalid, or can't be rendered for a recipient.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct TemplateError(String);

/// The recipient that a template is rendered for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recipient<'a> {
    /// The address.
    pub email: &'a str,
    /// The name. None and an empty one are the same.
    pub name: Option<&'a str>,
    /// The one-click unsubscribe URL (RFC 8058). If the text does not contain it, a line with it is added.
    pub unsubscribe_url: Option<&'a str>,
}

/// An invitation for one recipient.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendered {
    /// One line, not empty, without control characters.
    pub subject: String,
    /// The plain part.
    pub text: String,
    /// The HTML part: the same as a complete document.
    pub html: String,
}

impl Template {
    /// Parses a subject and a text.
    ///
    /// # Errors
    /// The first mistake, as a message to the author.
    pub fn new(subject: &str, body: &str) -> Result<Self, TemplateError> {
        if subject.trim().is_empty() {
            return Err(TemplateError("the subject is empty".into()));
        }
        if subject.chars().any(char::is_control) {
            return Err(TemplateError("the subject is one line, without control characters".into()));
        }
        let (subject_source, body_source) = (syntax::parse(subject, true)?, syntax::parse(body, false)?);
        let mut compiled: Vec<([Vec<Piece<'_>>; 2], bool, Arc<Variant>)> = Vec::new();
        let variants = [0, 1, 2, 3].map(|index| {
            let present = Present { name: index & 1 != 0, unsubscribe_url: index & 2 != 0 };
            let pieces = [subject_source.pieces(present), body_source.pieces(present)];
            let footer = present.unsubscribe_url && !pieces[1].contains(&Piece::Value(Field::UnsubscribeUrl));
            if let Some((.., same)) = compiled.iter().find(|(p, f, _)| (p, *f) == (&pieces, footer)) {
                return Arc::clone(same);
            }
            let variant = Arc::new(Variant {
                subject: Segments::of(&pieces[0]),
                text: Segments::of(&pieces[1]),
                html: html::page(body, &pieces[1], footer),
                footer,
            });
            compiled.push((pieces, footer, Arc::clone(&variant)));
            variant
        });
        let this = Self { subject: subject.to_owned(), body: body.to_owned(), variants };
        // The author should learn of an empty or overlong subject now, instead of the sender an hour later.
        for name in [Some("Ann"), None] {
            for unsubscribe_url in [Some("https://example.org/unsubscribe"), None] {
                let recipient = Recipient { email: "ann@example.org", name, unsubscribe_url };
                one_line(&this.variant(&recipient).subject.join(&recipient))?;
            }
        }
        Ok(this)
    }

    /// The size of subject and text in bytes.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a subject is never empty")]
    pub fn len(&self) -> usize {
        self.subject.len() + self.body.len()
    }

    /// Renders the invitation for one recipient.
    ///
    /// # Errors
    /// The subject is empty or too long with this recipient's values.
    pub fn render(&self, recipient: &Recipient<'_>) -> Result<Rendered, TemplateError> {
        let variant = self.variant(recipient);
        let subject = one_line(&variant.subject.join(recipient))?;
        let mut text = variant.text.join(recipient);
        let mut html = String::with_capacity(html::HEAD.len() + 2 * subject.len() + variant.html.bytes());
        html.push_str(html::HEAD);
        words::escape(&mut html, &subject, Escape::Html);
        variant.html.join_to(&mut html, recipient);
        if let Some(url) = recipient.unsubscribe_url.filter(|_| variant.footer) {
            text.truncate(text.trim_end().len());
            // Two dashes and a space start a signature (RFC 3676, 4.3).
            text.extend(["\n\n-- \nUnsubscribe: ", url, "\n"]);
        }
        Ok(Rendered { subject, text, html })
    }

    fn variant(&self, recipient: &Recipient<'_>) -> &Variant {
        let is_present = |value: Option<&str>| usize::from(value.is_some_and(|value| !value.is_empty()));
        &self.variants[is_present(recipient.name) + 2 * is_present(recipient.unsubscribe_url)]
    }
}

impl Segments {
    /// For plain text.
    fn of(pieces: &[Piece<'_>]) -> Self {
        let mut segments = Self::default();
        for piece in pieces {
            match piece {
                Piece::Text(text) | Piece::Default(text) => segments.push_text(text),
                Piece::Value(field) => segments.push_value(*field, Escape::None),
            }
        }
        segments
    }

    fn push_text(&mut self, text: &str) {
        self.push_escaped(text, Escape::None);
    }

    fn push_escaped(&mut self, text: &str, escape: Escape) {
        if let Some(Segment::Text(last)) = self.0.last_mut() {
            words::escape(last, text, escape);
        } else {
            let mut escaped = String::new();
            words::escape(&mut escaped, text, escape);
            self.0.push(Segment::Text(escaped));
        }
    }

    fn push_value(&mut self, field: Field, escape: Escape) {
        self.0.push(Segment::Value(field, escape));
    }

    /// The approximate size of the output.
    fn bytes(&self) -> usize {
        self.0.iter().map(|segment| if let Segment::Text(text) = segment { text.len() } else { 64 }).sum()
    }

    fn join(&self, recipient: &Recipient<'_>) -> String {
        let mut out = String::with_capacity(self.bytes());
        self.join_to(&mut out, recipient);
        out
    }

    fn join_to(&self, out: &mut String, recipient: &Recipient<'_>) {
        for segment in &self.0 {
            match segment {
                Segment::Text(text) => out.push_str(text),
                Segment::Value(field, escape) => words::escape(out, recipient.value(*field), *escape),
            }
        }
    }
}

impl Recipient<'_> {
    fn value(&self, field: Field) -> &str {
        match field {
            Field::Name => self.name.unwrap_or_default(),
            Field::Email => self.email,
            Field::UnsubscribeUrl => self.unsubscribe_url.unwrap_or_default(),
        }
    }
}

/// Replaces control characters, so that a name can't end the subject's header line.
fn one_line(subject: &str) -> Result<String, TemplateError> {
    let blank = |character: char| if character.is_control() { ' ' } else { character };
    let subject = subject.trim().chars().map(blank).collect::<String>();
    match subject.trim() {
        "" => Err(TemplateError("the subject is empty for a recipient without a name".into())),
        subject if subject.chars().count() > MAX_SUBJECT_CHARS => {
            Err(TemplateError(format!("the subject has more than {MAX_SUBJECT_CHARS} characters")))
        }
        subject => Ok(subject.to_owned()),
    }
}

#[cfg(test)]
mod tests;
