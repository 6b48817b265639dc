//! What a run says to everybody, with places for what differs from one recipient to the next: parsed once, joined for each.
//!
//! The text is plain and may use Markdown; from it come the two parts of an invitation. Values are never Markdown, and
//! neither the text nor a value is ever HTML.

mod html;
mod links;
mod syntax;
mod words;

use std::sync::Arc;

use syntax::{Field, Piece, Present};

/// The longest subject, rendered. Readers show less than a hundred, and a header line ends at 998 bytes.
const MAX_SUBJECT_CHARS: usize = 250;

/// An invitation's subject and text.
#[derive(Clone, Debug)]
pub struct Template {
    subject: String,
    body: String,
    /// For recipients without and with a name, each without and with an unsubscribe URL; the same one if that makes no difference.
    variants: [Arc<Variant>; 4],
}

/// The outputs for recipients with the same fields: what is left to do is to join them.
#[derive(Debug)]
struct Variant {
    subject: Segments,
    text: Segments,
    /// The page from the end of its title on.
    html: Segments,
    /// The text is followed by a line to unsubscribe with.
    footer: bool,
}

/// An output: fixed text, and places for values.
#[derive(Debug, Default)]
struct Segments(Vec<Segment>);

#[derive(Debug)]
enum Segment {
    Text(String),
    Value(Field, Escape),
}

/// How a value is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Escape {
    None,
    /// In HTML's text.
    Html,
    /// In an attribute.
    Attribute,
    /// In the address of a link.
    Href,
}

/// They are the same if they say the same.
impl PartialEq for Template {
    fn eq(&self, other: &Self) -> bool {
        (&self.subject, &self.body) == (&other.subject, &other.body)
    }
}

impl Eq for Template {}

/// Why a template can't be used, or not for this recipient.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct TemplateError(String);

/// For whom it is rendered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recipient<'a> {
    /// The address.
    pub email: &'a str,
    /// The name; none is the same as an empty one.
    pub name: Option<&'a str>,
    /// Where the recipient can say that this is enough. If the text does not use it, a line with it is added.
    pub unsubscribe_url: Option<&'a str>,
}

/// An invitation for one recipient.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendered {
    /// One line, not empty, without control characters.
    pub subject: String,
    /// The plain part.
    pub text: String,
    /// The same as a whole HTML document.
    pub html: String,
}

impl Template {
    /// Reads a subject and a text.
    ///
    /// # Errors
    /// What is wrong with them, for whoever wrote them.
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
        // A subject that is empty or too long should be known to its author now, and not to a sender in an hour.
        for name in [Some("Ann"), None] {
            for unsubscribe_url in [Some("https://example.org/unsubscribe"), None] {
                let recipient = Recipient { email: "ann@example.org", name, unsubscribe_url };
                one_line(&this.variant(&recipient).subject.join(&recipient))?;
            }
        }
        Ok(this)
    }

    /// How many bytes its subject and text have.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a subject is never empty")]
    pub fn len(&self) -> usize {
        self.subject.len() + self.body.len()
    }

    /// Writes the invitation for one recipient.
    ///
    /// # Errors
    /// When it can't be written for this one: what only some recipients meet, such as an empty subject.
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
            // Two dashes and a space begin what readers know to be no part of the text.
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
    /// Of a text that is not HTML.
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

    /// About how long it will be.
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

/// A control character in a name must not end the header that the subject stands in.
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
