//! Checks the text of an invitation before anything is written.

use std::{fmt::Display, panic::resume_unwind};

use mailrun_core::template::Template;
use tokio::task::spawn_blocking;

/// Mail programs truncate longer subjects.
const MAX_SUBJECT_CHARS: usize = 200;
/// Some mail programs truncate longer mails.
const MAX_BODY_BYTES: usize = 100_000;
/// Checking a longer text takes milliseconds.
const LONG_BODY_BYTES: usize = 16 * 1024;

/// The message for a text that was decoded wrongly before it arrived here.
const UNDECODABLE: &str =
    "The text contains characters that could not be decoded (\u{fffd}). Replace them with the correct ones.";

/// The errors beside each field.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct TextProblems {
    pub(crate) subject: Option<String>,
    pub(crate) body: Option<String>,
}

impl TextProblems {
    pub(crate) fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Normalises line ends: forms submit CRLF.
pub(crate) fn with_plain_line_ends(text: &str) -> String {
    text.replace("\r\n", "\n").replace('\r', "\n")
}

/// The same as [`check`], off the runtime if the text is long, because it is rendered several times.
pub(crate) async fn check_aside(subject: &str, body: &str) -> TextProblems {
    if body.len() <= LONG_BODY_BYTES {
        return check(subject, body);
    }
    let (subject, body) = (subject.to_owned(), body.to_owned());
    match spawn_blocking(move || check(&subject, &body)).await {
        Ok(problems) => problems,
        Err(error) => resume_unwind(error.into_panic()),
    }
}

/// Checks a subject and a text with their placeholders.
pub(crate) fn check(subject: &str, body: &str) -> TextProblems {
    TextProblems { subject: check_subject(subject), body: check_body(body) }
}

fn check_subject(subject: &str) -> Option<String> {
    if subject.trim().is_empty() {
        return Some("Enter a subject.".to_owned());
    }
    if subject.chars().any(char::is_control) {
        return Some("The subject must be one line without control characters.".to_owned());
    }
    if subject.contains(char::REPLACEMENT_CHARACTER) {
        return Some(UNDECODABLE.to_owned());
    }
    if subject.chars().count() > MAX_SUBJECT_CHARS {
        return Some(format!("The subject is too long: at most {MAX_SUBJECT_CHARS} characters."));
    }
    // The text is valid, so an error is the subject's.
    Template::new(subject, "-").err().map(sentence)
}

fn check_body(body: &str) -> Option<String> {
    if body.trim().is_empty() {
        return Some("Enter a message.".to_owned());
    }
    // PostgreSQL cannot store it.
    if body.contains('\0') {
        return Some("The message contains a NUL character. Remove it.".to_owned());
    }
    if body.contains(char::REPLACEMENT_CHARACTER) {
        return Some(UNDECODABLE.to_owned());
    }
    if body.len() > MAX_BODY_BYTES {
        return Some("The message is too long: at most 100 kB.".to_owned());
    }
    Template::new("-", body).err().map(sentence)
}

/// Turns an error text into a sentence.
fn sentence(error: impl Display) -> String {
    let text = error.to_string();
    let mut characters = text.chars();
    let first: String = characters.next().into_iter().flat_map(char::to_uppercase).collect();
    format!("{first}{}.", characters.as_str().trim_end_matches('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_errors_for_each_field() {
        assert!(check("Hello", "Come!").is_empty());
        let both = check(" ", "\n");
        assert!(both.subject.is_some() && both.body.is_some());
        assert!(check("a\nb", "Come!").subject.is_some_and(|problem| problem.contains("one line")));
        assert!(check("Hello", "a\0b").body.is_some_and(|problem| problem.contains("NUL")));
        assert_eq!(check(&"ä".repeat(200), "Come!"), TextProblems::default());
        assert!(check(&"ä".repeat(201), "Come!").subject.is_some_and(|problem| problem.contains("200")));
        let garbled = check("J\u{fffd}rgen", "Gr\u{fffd}n");
        assert!(garbled.subject.is_some_and(|problem| problem.contains("decoded")) && garbled.body.is_some());
        assert_eq!(check("Hello", &"x".repeat(100_000)), TextProblems::default());
        assert!(check("Hello", &"x".repeat(100_001)).body.is_some_and(|problem| problem.contains("100 kB")));
    }

    #[test]
    fn reports_a_wrong_placeholder_in_its_field() {
        assert!(check("{{ name | default(\"friend\") }}", "{{ email }} {{ unsubscribe_url }}").is_empty());
        let wrong = check("Hello {{ nmae }}", "Come!");
        assert_eq!(wrong.body, None);
        assert!(wrong.subject.is_some_and(|problem| problem.starts_with("The subject has the placeholder nmae")));
        let wrong = check("Hello", "Come,\n{{ nmae }}!");
        assert_eq!(wrong.subject, None);
        assert!(wrong.body.is_some_and(|problem| problem.starts_with("Line 2 of the text has the placeholder nmae")));
    }

    #[test]
    fn an_error_becomes_a_sentence() {
        assert_eq!(sentence("line 2 of the text is odd"), "Line 2 of the text is odd.");
        assert_eq!(sentence("it ends."), "It ends.");
    }

    #[test]
    fn normalises_line_ends() {
        assert_eq!(with_plain_line_ends("a\r\nb\rc\n"), "a\nb\nc\n");
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_accepted_or_explained(subject in "[\\s\\S]{0,30}", body in "([\\s\\S]|\\{\\{|\\}\\}|\\{% if |%\\}|name){0,30}") {
            let TextProblems { subject: about_subject, body: about_body } = check(&subject, &with_plain_line_ends(&body));
            proptest::prop_assert!(about_subject.is_some() || !subject.contains(char::is_control));
            proptest::prop_assert!(about_body.is_some() || !body.contains('\0'));
            for problem in [about_subject, about_body].into_iter().flatten() {
                proptest::prop_assert!(problem.ends_with('.') && problem.len() > 2, "{}", problem);
            }
        }
    }
}
