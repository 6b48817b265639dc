//! `/u/{token}`: the link in every mail with which its recipient says that this is enough (RFC 8058).
//!
//! Mail providers and link scanners come by as well. So `GET` only asks; `POST` is the answer, of the page's button or of a
//! mail program's own, and whatever its body says.

use askama::Template;
use axum::{
    extract::{Path, State},
    http::StatusCode,
    response::{IntoResponse, Response},
};
use mailrun_core::{address::shown, unsubscribe::Token};
use mailrun_ledger::{
    signing,
    suppressions::{self, Reason},
};
use sqlx::PgConnection;
use tracing::info;
use uuid::Uuid;

use crate::{
    App, Shared,
    error::{ErrorPage, html},
    ids::ids,
};

#[derive(Template)]
#[template(path = "unsubscribe.html")]
struct Page {
    answer: Answer,
}

/// What the link's holder is told. An address is masked: a link may be passed on.
enum Answer {
    /// Press the button.
    Ask(String),
    /// It is done.
    Done(String),
    /// It was done before, or was not called for.
    Before(String),
    /// The link came with a test.
    Test,
    /// The invitation is deleted, and with it the knowledge of whom it went to.
    Gone,
    /// The link is not one of ours.
    NoSuchLink,
}

impl IntoResponse for Answer {
    fn into_response(self) -> Response {
        let status = match self {
            Self::Ask(_) | Self::Done(_) | Self::Before(_) | Self::Test => StatusCode::OK,
            Self::Gone => StatusCode::GONE,
            Self::NoSuchLink => StatusCode::NOT_FOUND,
        };
        (status, html(&Page { answer: self })).into_response()
    }
}

/// `GET /u/{token}`
pub(crate) async fn show(State(app): Shared, Path(token): Path<String>) -> Result<Response, ErrorPage> {
    let mut conn = app.pool.acquire().await?;
    let answer = match target(&app, &mut conn, &token).await? {
        Err(answer) => answer,
        Ok(Target { run_id, item_id }) => match suppressions::invited(&mut conn, run_id, item_id).await? {
            None => Answer::Gone,
            Some(invited) if invited.suppressed.is_some() => Answer::Before(masked(&invited.email)),
            Some(invited) => Answer::Ask(masked(&invited.email)),
        },
    };
    Ok(answer.into_response())
}

/// `POST /u/{token}`
pub(crate) async fn unsubscribe(State(app): Shared, Path(token): Path<String>) -> Result<Response, ErrorPage> {
    let mut conn = app.pool.acquire().await?;
    let answer = match target(&app, &mut conn, &token).await? {
        Err(answer) => answer,
        Ok(Target { run_id, item_id }) => {
            match suppressions::suppress_item(&mut conn, run_id, item_id, Reason::Unsubscribed).await? {
                None => Answer::Gone,
                Some(invited) => {
                    info!(item_id, before = invited.suppressed.is_some(), "somebody has unsubscribed");
                    Answer::Done(masked(&invited.email))
                }
            }
        }
    };
    Ok(answer.into_response())
}

/// The invitation that a link belongs to.
struct Target {
    /// None: the link was made by an earlier version, and names the item only.
    run_id: Option<Uuid>,
    item_id: i64,
}

/// What a link is for, or what is to be answered at once.
async fn target(app: &App, conn: &mut PgConnection, token: &str) -> sqlx::Result<Result<Target, Answer>> {
    Ok(match ids(app).await?.links.read(token) {
        None => Err(Answer::NoSuchLink),
        Some(Token::Test) => Err(Answer::Test),
        Some(Token::Item(named)) => Ok(Target { run_id: Some(named.run_id), item_id: named.item_id }),
        // The number may be another person's by now.
        Some(Token::Former(_)) if signing::was_restored(conn).await? => Err(Answer::Gone),
        Some(Token::Former(item_id)) => Ok(Target { run_id: None, item_id }),
    })
}

/// `a…@example.org`
fn masked(email: &str) -> String {
    match shown(email).rsplit_once('@') {
        Some((name, domain)) => format!("{}…@{domain}", name.chars().next().unwrap_or('…')),
        None => "…".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_masked_but_recognised_by_its_owner() {
        assert_eq!(masked("ann.lee@example.org"), "a…@example.org");
        assert_eq!(masked("ärgernis@пример.рф"), "ä…@пример.рф");
        assert_eq!(masked("ann@xn--bcher-kva.example"), "a…@bücher.example");
        assert_eq!(masked(r#""a@b"@x.org"#), "\"…@x.org");
    }
}
