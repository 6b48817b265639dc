//! `POST /invites/count`: counts the people in a list, with the parser that submission uses. The form calls it when typing pauses.

use std::{
    collections::HashSet,
    hash::{BuildHasher, RandomState},
};

use axum::{
    Json,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use mailrun_core::address;
use serde::Serialize;
use tokio::task::spawn_blocking;

use crate::{body::Form, error::ErrorPage, view::counted};

/// The result of parsing a list. Whether a person was invited before is only known on submission.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Count {
    /// Distinct mailboxes.
    people: i32,
    /// Entries that repeat a mailbox.
    repeated: i32,
    /// Entries that are not addresses.
    invalid: i32,
    /// For the form.
    text: String,
}

impl Count {
    fn of(list: &str) -> Self {
        let mut count = Self::default();
        // Among a million mailboxes, two have the same hash about once in ten million lists.
        let (hasher, mut known) = (RandomState::new(), HashSet::new());
        for entry in address::parse(list) {
            match entry.parsed {
                Ok(address) if known.insert(hasher.hash_one(&address.email)) => count.people += 1,
                Ok(_) => count.repeated += 1,
                Err(_) => count.invalid += 1,
            }
        }
        count.text = count.words();
        count
    }

    fn words(&self) -> String {
        let mut text = counted(self.people, "person", "people");
        if self.repeated > 0 {
            text += &format!(", {} repeated", counted(self.repeated, "address", "addresses"));
        }
        if self.invalid > 0 {
            text += &format!(", {}", counted(self.invalid, "invalid entry", "invalid entries"));
        }
        text
    }
}

/// `POST /invites/count`, with the form's `emails`.
pub(crate) async fn count(Form(mut fields, memory): Form) -> Result<Response, ErrorPage> {
    let list = fields.take("emails").unwrap_or_default();
    // Parsing a long list takes up to a second, so it must not block the runtime. The memory stays reserved until then.
    let counted = spawn_blocking(move || (Count::of(&list), memory)).await;
    let (count, _memory) = counted.map_err(|_| {
        ErrorPage::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "Counting failed",
            "The list could not be counted. You can send it anyway.",
        )
    })?;
    Ok(Json(count).into_response())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_a_list_like_the_submission() {
        let count = Count::of(
            "ann@bücher.example, ANN@xn--bcher-kva.example\nAnn <a@x.org> Bob <b@x.org>\nnobody\nBob (b@y.org)",
        );
        assert_eq!((count.people, count.repeated, count.invalid), (3, 1, 2));
        assert_eq!(count.text, "3 people, 1 address repeated, 2 invalid entries");
        assert_eq!(Count::of("a@x.org").text, "1 person");
        assert_eq!(Count::of("").text, "0 people");
    }
}
