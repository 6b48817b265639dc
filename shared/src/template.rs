//! What a run says to everybody, with places for what differs from one recipient to the next.

/// An invitation's subject and text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    subject: String,
    body: String,
}

/// Why a template can't be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct TemplateError(String);

impl Template {
    /// Reads a subject and a text.
    ///
    /// # Errors
    /// What is wrong with them, for whoever wrote them.
    pub fn new(subject: &str, body: &str) -> Result<Self, TemplateError> {
        Ok(Self { subject: subject.to_owned(), body: body.to_owned() })
    }
}
