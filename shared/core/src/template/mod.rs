//! What a run says to everybody, with places for what differs from one recipient to the next: read once, rendered for each.
//!
//! The text is plain and may use Markdown; from it come the two parts of an invitation. Values are never Markdown, and
//! neither the text nor a value is ever HTML.

mod html;
mod links;
mod veil;

use minijinja::{AutoEscape, Environment, Error, ErrorKind, UndefinedBehavior, Value, context, syntax::SyntaxConfig};

/// The names that may stand between `{{` and `}}`.
const PLACEHOLDERS: [&str; 3] = ["name", "email", "unsubscribe_url"];
/// What may stand between `{%` and `%}`. Loops and variables could make a text of any size out of a line.
const STATEMENTS: [&str; 4] = ["if", "elif", "else", "endif"];
/// Steps that a rendering may take; a text with a hundred placeholders takes about a thousand.
const FUEL: u64 = 1_000_000;
/// The engine reads what stands in a tag by recursion, so a long one could use up the stack.
const MAX_TAG_BYTES: usize = 500;
/// Each is one level deeper for the engine, and it sets no limit of its own.
const MAX_ELIFS: usize = 50;
/// The longest subject, rendered. Readers show less than a hundred, and a header line ends at 998 bytes.
const MAX_SUBJECT_CHARS: usize = 250;

/// The names under which the environment holds the parts.
const SUBJECT: &str = "subject";
const TEXT: &str = "text";
const HTML: &str = "html";

/// An invitation's subject and text.
#[derive(Clone, Debug)]
pub struct Template {
    subject: String,
    body: String,
    compiled: Environment<'static>,
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
        let mut compiled = Environment::empty();
        compiled.set_undefined_behavior(UndefinedBehavior::Strict);
        compiled.set_fuel(Some(FUEL));
        compiled.set_syntax(
            SyntaxConfig::builder().keep_trailing_newline(true).build().map_err(|error| explain(TEXT, &error))?,
        );
        compiled.set_auto_escape_callback(|_| AutoEscape::None);
        compiled.add_filter("default", or_default);
        compiled.set_formatter(|out, state, value| {
            let value = value.to_string();
            out.write_str(&if state.name() == HTML { veil::veil(&value) } else { value })?;
            Ok(())
        });
        for (part, source) in [(SUBJECT, subject), (TEXT, body), (HTML, body)] {
            only_short_tags(part, source)?;
            only_conditions(part, source)?;
            let source = if part == HTML { veil::without_veils(source) } else { source.to_owned() };
            compiled.add_template_owned(part, source.clone()).map_err(|error| explain(part, &error))?;
            only_placeholders(&compiled, part, &source)?;
        }
        let this = Self { subject: subject.to_owned(), body: body.to_owned(), compiled };
        // Whatever is wrong with it should be known to its author now, and not to a sender in an hour.
        for (name, unsubscribe_url) in [
            (Some("Ann"), Some("https://example.org/unsubscribe")),
            (Some("Ann"), None),
            (None, Some("https://example.org/unsubscribe")),
            (None, None),
        ] {
            this.render(&Recipient { email: "ann@example.org", name, unsubscribe_url })?;
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
        let values = context! {
            email => recipient.email,
            name => recipient.name.unwrap_or_default(),
            unsubscribe_url => recipient.unsubscribe_url.unwrap_or_default(),
        };
        let render = |part: &'static str| {
            let template = self.compiled.get_template(part).and_then(|template| template.render(values.clone()));
            template.map_err(|error| explain(part, &error))
        };
        let subject = one_line(&render(SUBJECT)?)?;
        let mut text = render(TEXT)?;
        let footer = recipient.unsubscribe_url.filter(|url| !text.contains(url));
        let html = html::page(&subject, &render(HTML)?, recipient.unsubscribe_url, footer);
        if let Some(url) = footer {
            // Two dashes and a space begin what readers know to be no part of the text.
            text = format!("{}\n\n-- \nUnsubscribe: {url}\n", text.trim_end());
        }
        Ok(Rendered { subject, text, html })
    }
}

/// `{{ name | default("there") }}`: an empty value counts as none, since a recipient without a name has an empty one.
fn or_default(value: &Value, other: Option<Value>) -> Value {
    if value.is_true() { value.clone() } else { other.unwrap_or_else(|| Value::from("")) }
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

/// Where a mistake is, in words.
fn place(part: &str, line: usize) -> String {
    if part == SUBJECT { "the subject".into() } else { format!("line {line} of the text") }
}

/// What one line of text could do to the process that reads it: a tag without an end to its depth, or one that multiplies a
/// word by a billion. Tags begin and end here where the engine says so.
fn only_short_tags(part: &str, source: &str) -> Result<(), TemplateError> {
    let mut at = 0;
    while let Some(found) = source[at..].find('{') {
        at += found;
        let (begin, end) = match source.get(at..at + 2) {
            Some("{{") => ("{{", "}}"),
            Some("{%") => ("{%", "%}"),
            Some("{#") => {
                at = source[at..].find("#}").map_or(source.len(), |end| at + end + 2);
                continue;
            }
            _ => {
                at += 1;
                continue;
            }
        };
        let place = || place(part, source[..at].matches('\n').count() + 1);
        let tag = &source[at + 2..];
        let (mut quote, mut escaped) = (None, false);
        let mut length = tag.len();
        for (index, character) in tag.char_indices() {
            match quote {
                _ if std::mem::take(&mut escaped) => {}
                Some(_) if character == '\\' => escaped = true,
                Some(open) if character == open => quote = None,
                Some(_) => {}
                None if tag[index..].starts_with(end) => {
                    length = index;
                    break;
                }
                None if matches!(character, '\'' | '"') => quote = Some(character),
                None if matches!(character, '*' | '{') => {
                    return Err(TemplateError(format!("{} has {character} after {begin}", place())));
                }
                None => {}
            }
        }
        if length > MAX_TAG_BYTES {
            return Err(TemplateError(format!("{} has more than {MAX_TAG_BYTES} characters after {begin}", place())));
        }
        at += 2 + length;
    }
    Ok(())
}

fn only_conditions(part: &str, source: &str) -> Result<(), TemplateError> {
    let mut elifs = 0;
    for (number, line) in (1..).zip(source.lines()) {
        for statement in line.split("{%").skip(1) {
            let statement = statement.trim_start_matches(['-', '+']).trim_start();
            let word: String = statement.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            if !STATEMENTS.contains(&word.as_str()) {
                let place = place(part, number);
                return Err(TemplateError(format!(
                    "{place} has {{% {word} %}}; only if, elif, else and endif are known"
                )));
            }
            elifs += usize::from(word == "elif");
            if elifs > MAX_ELIFS {
                return Err(TemplateError(format!(
                    "{} has more than {MAX_ELIFS} times {{% elif %}}",
                    place(part, number)
                )));
            }
        }
    }
    Ok(())
}

/// Looks at all names, also those that the trial renderings don't come by.
fn only_placeholders(compiled: &Environment<'_>, part: &str, source: &str) -> Result<(), TemplateError> {
    let names = compiled.get_template(part).map_err(|error| explain(part, &error))?.undeclared_variables(false);
    let mut unknown: Vec<_> = names.into_iter().filter(|name| !PLACEHOLDERS.contains(&name.as_str())).collect();
    unknown.sort();
    let Some(name) = unknown.first() else { return Ok(()) };
    let uses = |line: &str| line.split("{{").skip(1).chain(line.split("{%").skip(1)).any(|after| after.contains(name));
    let line = source.lines().position(uses).map_or(1, |index| index + 1);
    let place = place(part, line);
    Err(TemplateError(format!("{place} has the placeholder {name}; known are name, email and unsubscribe_url")))
}

/// The engine's words, without its jargon.
fn explain(part: &str, error: &Error) -> TemplateError {
    let place = place(part, error.line().unwrap_or(1));
    let detail = error.detail().unwrap_or_default();
    TemplateError(match error.kind() {
        ErrorKind::SyntaxError => format!("{place} is not understood: {detail}"),
        ErrorKind::UnknownFilter | ErrorKind::UnknownFunction | ErrorKind::UnknownTest | ErrorKind::UnknownMethod => {
            format!("{place} is not understood: {detail}; the only filter is default")
        }
        ErrorKind::UndefinedError => format!("{place} uses a value that does not exist"),
        ErrorKind::OutOfFuel => format!("{place} takes too long to write"),
        _ => format!("{place} can't be written: {error}"),
    })
}

#[cfg(test)]
mod tests;
