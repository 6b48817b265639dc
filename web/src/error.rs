//! Error pages: what happened, and what to do next.

use std::borrow::Cow;

use askama::Template;
use axum::{
    http::{HeaderValue, StatusCode, header},
    response::{Html, IntoResponse, Response},
};
use mailrun_ledger::{may_pass, submit::NotSubmitted};
use tracing::{error, warn};

/// PostgreSQL's error code for a missing table.
const UNDEFINED_TABLE: &str = "42P01";

/// An error instead of the requested page. Its response carries it as an extension, so that JSON routes can write it as a
/// problem.
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
            "There is no run at this address. Check it for typing errors, or choose a run from the list of runs.",
        )
    }

    /// For a failed submission. It says that the list was not accepted only when that is certain.
    pub(crate) fn not_submitted(failed: &NotSubmitted) -> Self {
        let page = Self::from_database(&failed.error);
        let (title, rest) = match (failed.nothing_kept, page.status) {
            (true, StatusCode::SERVICE_UNAVAILABLE) => (
                "Your list was not accepted",
                "Nothing was saved: go back and send it again in a moment. Sending it twice invites nobody twice.",
            ),
            (true, _) => ("Your list was not accepted", "Nothing was saved."),
            (false, _) => (
                "Unknown whether your list was accepted",
                "It is not known whether the list was accepted. Send it again: nobody will be mailed twice.",
            ),
        };
        let message = if failed.nothing_kept { format!("{} {rest}", page.message) } else { rest.to_owned() };
        Self { title, message: message.into(), ..page }
    }

    pub(crate) fn from_database(error: &sqlx::Error) -> Self {
        if error.as_database_error().and_then(sqlx::error::DatabaseError::code).as_deref() == Some(UNDEFINED_TABLE) {
            error!(%error, "the database has no schema, run `mailrun setup`");
            return Self::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "Database not set up",
                "The database has no tables. Run `mailrun setup`.",
            );
        }
        if may_pass(error) {
            warn!(%error, "database unavailable");
            return Self::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "Database unavailable",
                "The database is not responding. Accepted runs are safe.",
            );
        }
        error!(%error, "query failed");
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "Internal error",
            "Mailrun failed to handle this request. Details are in the log; trying again may help.",
        )
    }

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

/// Renders a page. Pages show the current state, so browsers must revalidate them; the form may come back from the history
/// with its token, but is never shared between users.
pub(crate) fn html(page: &impl Template) -> Response {
    match page.render() {
        Ok(text) => {
            ([(header::CACHE_CONTROL, HeaderValue::from_static("private, no-cache"))], Html(text)).into_response()
        }
        Err(error) => {
            error!(%error, "rendering failed");
            (StatusCode::INTERNAL_SERVER_ERROR, "Internal error. Details are in the log.").into_response()
        }
    }
}

pub(crate) async fn not_found() -> ErrorPage {
    ErrorPage::new(
        StatusCode::NOT_FOUND,
        "Page not found",
        "There is no page at this address. Check it for typing errors.",
    )
}

pub(crate) async fn method_not_allowed() -> ErrorPage {
    ErrorPage::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "Method not allowed",
        "This address does not support the request's HTTP method.",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_that_nothing_was_saved_only_when_certain() {
        let lost = || sqlx::Error::Io(std::io::ErrorKind::ConnectionReset.into());
        let certain = ErrorPage::not_submitted(&NotSubmitted::before_commit(lost()));
        assert!(certain.message.contains("Nothing was saved"), "{certain:?}");
        let unknown = ErrorPage::not_submitted(&lost().into());
        assert!(!unknown.message.contains("Nothing was saved"), "{unknown:?}");
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
