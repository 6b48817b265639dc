//! Error pages: what happened and what to do next, in plain words.

use std::borrow::Cow;

use askama::Template;
use axum::{
    http::{HeaderValue, StatusCode, header},
    response::{Html, IntoResponse, Response},
};
use mailrun_ledger::{may_pass, submit::NotSubmitted};
use tracing::{error, warn};

/// PostgreSQL's code for a table that is not there.
const UNDEFINED_TABLE: &str = "42P01";

/// A page instead of the one that was asked for. Its response carries it as an extension, so that a router of JSON routes can
/// write it in another form.
#[derive(Clone, Debug)]
pub(crate) struct ErrorPage {
    status: StatusCode,
    title: &'static str,
    message: Cow<'static, str>,
}

#[derive(Template)]
#[template(path = "error.html")]
struct Page<'a> {
    code: u16,
    title: &'a str,
    message: &'a str,
}

impl ErrorPage {
    pub(crate) fn new(status: StatusCode, title: &'static str, message: impl Into<Cow<'static, str>>) -> Self {
        Self { status, title, message: message.into() }
    }

    pub(crate) fn no_such_run() -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            "No such run",
            "There is no run at this address. It may be mistyped; all runs are in the list.",
        )
    }

    /// For a submission: the person must know whether the list is safe, and what is not certain is not said.
    pub(crate) fn not_taken(failed: &NotSubmitted) -> Self {
        let page = Self::from_database(&failed.error);
        let (title, rest) = match (failed.nothing_kept, page.status) {
            (true, StatusCode::SERVICE_UNAVAILABLE) => (
                "Your list was not taken",
                "Nothing was kept: go back and send it again in a moment. Sending it twice invites nobody twice.",
            ),
            (true, _) => ("Your list was not taken", "Nothing was kept."),
            (false, _) => (
                "Not known whether your list was taken",
                "It is not known whether the list was accepted. Send it again: nobody will be mailed twice.",
            ),
        };
        let message = if failed.nothing_kept { format!("{} {rest}", page.message) } else { rest.to_owned() };
        Self { title, message: message.into(), ..page }
    }

    pub(crate) fn from_database(error: &sqlx::Error) -> Self {
        if error.as_database_error().and_then(sqlx::error::DatabaseError::code).as_deref() == Some(UNDEFINED_TABLE) {
            error!(%error, "the database has no schema; run `mailrun setup`");
            return Self::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "Not set up yet",
                "The database has no tables yet: run `mailrun setup` once.",
            );
        }
        if may_pass(error) {
            warn!(%error, "the database does not answer");
            return Self::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "The database does not answer",
                "The database can't be reached at the moment. Runs that were accepted are safe in it.",
            );
        }
        error!(%error, "a query failed");
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "Something went wrong",
            "This is an error of ours. It is in the log; trying again may help.",
        )
    }

    /// What happened, in sentences.
    pub(crate) fn message(&self) -> &str {
        &self.message
    }

    #[cfg(test)]
    pub(crate) fn status(&self) -> StatusCode {
        self.status
    }
}

impl From<sqlx::Error> for ErrorPage {
    fn from(error: sqlx::Error) -> Self {
        Self::from_database(&error)
    }
}

impl IntoResponse for ErrorPage {
    fn into_response(self) -> Response {
        let page = Page { code: self.status.as_u16(), title: self.title, message: &self.message };
        let mut response = (self.status, html(&page)).into_response();
        response.extensions_mut().insert(self);
        response
    }
}

/// Renders a page. Pages show the moment, so they are asked for anew; the form may come back from the history, with its
/// token, but a page is never shared.
pub(crate) fn html(page: &impl Template) -> Response {
    match page.render() {
        Ok(text) => {
            ([(header::CACHE_CONTROL, HeaderValue::from_static("private, no-cache"))], Html(text)).into_response()
        }
        Err(error) => {
            error!(%error, "a template failed");
            (StatusCode::INTERNAL_SERVER_ERROR, "This is an error of ours. It is in the log.").into_response()
        }
    }
}

pub(crate) async fn not_found() -> ErrorPage {
    ErrorPage::new(StatusCode::NOT_FOUND, "Page not found", "There is no page at this address. It may be mistyped.")
}

pub(crate) async fn method_not_allowed() -> ErrorPage {
    ErrorPage::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "Method not allowed",
        "This address does not support the request's method.",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_was_kept_is_said_only_when_it_is_certain() {
        let lost = || sqlx::Error::Io(std::io::ErrorKind::ConnectionReset.into());
        let certain = ErrorPage::not_taken(&NotSubmitted::before_commit(lost()));
        assert!(certain.message.contains("Nothing was kept"), "{certain:?}");
        let unknown = ErrorPage::not_taken(&lost().into());
        assert!(!unknown.message.contains("Nothing was kept"), "{unknown:?}");
        assert!(
            unknown
                .message
                .contains("It is not known whether the list was accepted. Send it again: nobody will be mailed twice.")
        );
        assert_eq!(
            (certain.status, unknown.status),
            (StatusCode::SERVICE_UNAVAILABLE, StatusCode::SERVICE_UNAVAILABLE)
        );
    }
}
