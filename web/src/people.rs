//! `POST /people/erase`: erases a person. The form is on the page of the suppression list.

use axum::{extract::State, http::StatusCode, response::Redirect};
use mailrun_core::address::Address;
use mailrun_ledger::{in_time, people};
use tracing::info;

use crate::{Shared, body::Form, error::ErrorPage};

/// `POST /people/erase`, with the `email`. The answer does not reveal whether the person was known.
pub(crate) async fn erase(State(app): Shared, Form(mut fields, _memory): Form) -> Result<Redirect, ErrorPage> {
    let Ok(Address { email, .. }) = fields.take("email").unwrap_or_default().parse() else {
        return Err(ErrorPage::new(
            StatusCode::UNPROCESSABLE_ENTITY,
            "Not an email address",
            "Nobody was erased. Go back and enter the whole address.",
        ));
    };
    let erase = async { people::erase(&mut *app.pool.acquire().await?, &email).await };
    let erased = in_time(people::LONGEST, erase).await?;
    info!(known = erased.known, texts = erased.texts, "person erased");
    Ok(Redirect::to("/suppressions?done=erased"))
}
