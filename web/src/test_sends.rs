//! `POST /tests` and `GET /tests/{id}`: test mails and their results.

use askama::Template;
use axum::{
    extract::{Path, State},
    http::StatusCode,
    response::{IntoResponse, Redirect, Response},
};
use mailrun_core::{
    address::{Address, Invalid, shown},
    item::ItemState,
};
use mailrun_ledger::{
    in_time,
    stored::Stored,
    submit::NotSubmitted,
    suppressions::Reason,
    test_mails::{self, NewTest, Submitted, Test},
};
use tracing::info;
use uuid::Uuid;

use crate::{
    Shared,
    body::Form,
    error::{ErrorPage, html},
    form::{Problems, Typed, refused},
    text,
};

#[derive(Template)]
#[template(path = "test.html")]
struct TestPage {
    test_id: Uuid,
    test: Test,
    /// The recipient, as it is shown.
    email: String,
    /// Whether the mailer is simulated.
    simulated: bool,
}

/// `POST /tests`: the form's second button.
pub(crate) async fn ask(State(app): Shared, Form(mut fields, _memory): Form) -> Result<Response, ErrorPage> {
    let typed = Typed::take(&app, &mut fields);
    let text = text::check_aside(&typed.subject, &typed.body).await;
    let to = match typed.test_email.parse() {
        Ok(Address { email, .. }) => Ok(email),
        Err(_) if typed.test_email.trim().is_empty() => Err("Enter the address for the test.".to_owned()),
        Err(Invalid { reason, .. }) => Err(format!("This {reason}.")),
    };
    let to = match to {
        Ok(to) if text.is_empty() => to,
        to => return Ok(refused(&app, &typed, Problems { text, test: to.err(), ..Problems::default() }).await),
    };
    let test = NewTest { email: &to, subject: &typed.subject, body: &typed.body };
    let submitted =
        async { test_mails::submit_test(&app.pool, test).await.map_err(|NotSubmitted { error, .. }| error) };
    match in_time(app.answer_timeout, submitted).await? {
        Submitted::Accepted(test_id) => {
            app.outbox.notify_one();
            info!(%test_id, "test accepted");
            Ok(Redirect::to(&format!("/tests/{test_id}")).into_response())
        }
        Submitted::Suppressed(reason) => {
            let test = Some(suppressed(&reason));
            Ok(refused(&app, &typed, Problems { test, ..Problems::default() }).await)
        }
    }
}

fn suppressed(reason: &Stored<Reason>) -> String {
    format!("This address is on the suppression list: it {}.", Reason::words_of(reason))
}

/// `GET /tests/{id}`
pub(crate) async fn show(State(app): Shared, Path(id): Path<String>) -> Result<Response, ErrorPage> {
    let found = match id.parse() {
        Ok(test_id) => test_mails::read(&app.pool, test_id).await?.map(|test| (test_id, test)),
        Err(_) => None,
    };
    let (test_id, test) = found.ok_or_else(|| {
        ErrorPage::new(
            StatusCode::NOT_FOUND,
            "No such test",
            "There is no test at this address. Check it for typing errors. Tests are deleted after a day.",
        )
    })?;
    let email = test.email.as_deref().map_or_else(|| "[erased]".to_owned(), |email| shown(email).into_owned());
    Ok(html(&TestPage { test_id, test, email, simulated: app.simulated }))
}
