//! `POST /invites/count`: how many people a list names, by the reader that takes it in. The form asks when typing pauses.

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

/// What a list comes to before the ledger is asked: who was invited before is known only when it is sent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Count {
    /// Different mailboxes.
    people: i32,
    /// Entries that name a mailbox once more.
    repeated: i32,
    /// Entries that are not addresses.
    invalid: i32,
    /// The same in words.
    text: String,
}

impl Count {
    fn of(list: &str) -> Self {
        let mut count = Self::default();
        // Two of a million mailboxes have the same hash once in some ten million lists.
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
pub(crate) async fn count(Form(mut fields, room): Form) -> Result<Response, ErrorPage> {
    let list = fields.take("emails").unwrap_or_default();
    // A long list takes a second, which the runtime has not. The room is held until it is read.
    let counted = spawn_blocking(move || (Count::of(&list), room)).await;
    let (count, _room) = counted.map_err(|_| {
        ErrorPage::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "Not counted",
            "The list could not be counted. Send it as it is.",
        )
    })?;
    Ok(Json(count).into_response())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_counted_as_it_will_be_read() {
        let count = Count::of(
            "ann@bücher.example, ANN@xn--bcher-kva.example\nAnn <a@x.org> Bob <b@x.org>\nnobody\nBob (b@y.org)",
        );
        assert_eq!((count.people, count.repeated, count.invalid), (3, 1, 2));
        assert_eq!(count.text, "3 people, 1 address repeated, 2 invalid entries");
        assert_eq!(Count::of("a@x.org").text, "1 person");
        assert_eq!(Count::of("").text, "0 people");
    }
}
