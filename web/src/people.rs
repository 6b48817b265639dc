//! `POST /people/erase`: erasing a person. The form is on the page of the suppression list.

use axum::{extract::State, http::StatusCode, response::Redirect};
use mailrun_core::address::Address;
use mailrun_ledger::{in_time, people};
use tracing::info;

use crate::{Shared, body::Form, error::ErrorPage};

/// `POST /people/erase`, with the `email`. Whether the person was known here is not said: it is erased in either case.
pub(crate) async fn erase(State(app): Shared, Form(mut fields, _room): Form) -> Result<Redirect, ErrorPage> {
    let Ok(Address { email, .. }) = fields.take("email").unwrap_or_default().parse() else {
        return Err(ErrorPage::new(
            StatusCode::UNPROCESSABLE_ENTITY,
            "This is not an email address",
            "Nobody was erased. Go back and enter the whole address.",
        ));
    };
    let erase = async { people::erase(&mut *app.pool.acquire().await?, &email).await };
    let erased = in_time(people::LONGEST, erase).await?;
    info!(known = erased.known, texts = erased.texts, "a person is erased");
    Ok(Redirect::to("/suppressions?done=erased"))
}
