//! `/u/{token}`: one-click unsubscribe URL (RFC 8058).
//!
//! Mail providers and link scanners also open it. `GET` therefore only asks; `POST` unsubscribes, from the page's button or from
//! a mail program, regardless of its body.

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

/// What the page shows. The address is masked, because a link may be passed on.
enum Answer {
    /// Show the button.
    Ask(String),
    /// Unsubscribed now.
    Done(String),
    /// Suppressed before.
    Before(String),
    /// The link belongs to a test send.
    Test,
    /// The invitation is deleted, so its recipient is not known.
    Gone,
    /// The link is not valid.
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
                    info!(item_id, before = invited.suppressed.is_some(), "recipient unsubscribed");
                    Answer::Done(masked(&invited.email))
                }
            }
        }
    };
    Ok(answer.into_response())
}

/// The invitation that a link identifies.
struct Target {
    /// None: an earlier version created the link, which identifies only the item.
    run_id: Option<Uuid>,
    item_id: i64,
}

/// The link's target, or the final answer.
async fn target(app: &App, conn: &mut PgConnection, token: &str) -> sqlx::Result<Result<Target, Answer>> {
    Ok(match ids(app).await?.links.read(token) {
        None => Err(Answer::NoSuchLink),
        Some(Token::Test) => Err(Answer::Test),
        Some(Token::Item(named)) => Ok(Target { run_id: Some(named.run_id), item_id: named.item_id }),
        // After a restore, the number may belong to another person.
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
    fn masks_an_address_recognisably() {
        assert_eq!(masked("ann.lee@example.org"), "a…@example.org");
        assert_eq!(masked("ärgernis@пример.рф"), "ä…@пример.рф");
        assert_eq!(masked("ann@xn--bcher-kva.example"), "a…@bücher.example");
        assert_eq!(masked(r#""a@b"@x.org"#), "\"…@x.org");
    }
}
