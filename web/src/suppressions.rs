//! `/suppressions`: the suppression list, with adding and removing addresses.

use std::borrow::Cow;

use askama::Template;
use axum::{
    extract::{Path, Query, State},
    http::StatusCode,
    response::{IntoResponse, Redirect, Response},
};
use chrono::Utc;
use mailrun_core::{
    address::{Address, Invalid, shown},
    since,
};
use mailrun_ledger::{
    held_suppressions::{self, Review},
    stored::Stored,
    suppressions::{self, Reason, Suppression},
};
use serde::Deserialize;
use tracing::info;
use uuid::Uuid;

use crate::{
    App, Shared,
    body::Form,
    error::{ErrorPage, html},
    view::{self, Moment},
};

/// Addresses per page.
const PAGE: usize = 50;
#[derive(Template)]
#[template(path = "suppressions.html")]
struct SuppressionsPage {
    count: String,
    rows: Vec<Row>,
    /// Whether this is not the first page.
    older: bool,
    /// Where the next page begins.
    before: Option<i64>,
    /// The result of the last action.
    notice: Option<&'static str>,
    /// The refused input.
    typed: String,
    problem: Option<String>,
    /// Runs whose suppressions are held for review.
    held: Vec<Held>,
}

struct Held {
    run_id: Uuid,
    addresses: i64,
    detail: String,
    since: Moment,
}

struct Row {
    number: i64,
    email: String,
    why: Cow<'static, str>,
    detail: Option<String>,
    since: Moment,
}

/// The query of `GET /suppressions`.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct ListQuery {
    /// Entries older than the one with this number.
    before: Option<String>,
    /// The last action.
    done: Option<String>,
}

impl ListQuery {
    fn notice(&self) -> Option<&'static str> {
        Some(match self.done.as_deref()? {
            "added" => "Added. It receives no more mail, including from runs in progress.",
            "known" => "Already on the list. Its reason was not changed.",
            "erased" => {
                "Erased. Mails being sent at this moment are still delivered; no more are sent to this address."
            }
            "removed" => "Removed from the list. The address can be invited again.",
            "since" => "Removed from the list. These addresses can be invited again.",
            "no-moment" => "Enter a time in Since, for example 2026-11-28T14:30 or 2h.",
            "accepted" => "Suppressed. These addresses receive no more mail.",
            "rejected" => "Not suppressed. These addresses can receive mail.",
            _ => return None,
        })
    }
}

/// `GET /suppressions`
pub(crate) async fn show(State(app): Shared, Query(query): Query<ListQuery>) -> Result<Response, ErrorPage> {
    let before = query.before.as_ref().and_then(|before| before.parse().ok());
    Ok(html(&page(&app, before, query.notice()).await?))
}

async fn page(app: &App, before: Option<i64>, notice: Option<&'static str>) -> sqlx::Result<SuppressionsPage> {
    // One more than is shown, to know whether there is another page.
    let mut list = suppressions::list(&app.pool, before, PAGE as i64 + 1).await?;
    let more = list.len() > PAGE;
    list.truncate(PAGE);
    let next = list.last().filter(|_| more).map(|last| last.number);
    let now = Utc::now();
    let row = |Suppression { number, email, reason, detail, created_at }| Row {
        number,
        email: shown(&email).into_owned(),
        why: why(reason),
        detail,
        since: Moment::new(created_at, now),
    };
    Ok(SuppressionsPage {
        count: view::grouped(suppressions::count(&app.pool).await?),
        rows: list.into_iter().map(row).collect(),
        older: before.is_some(),
        before: next,
        notice,
        typed: String::new(),
        problem: None,
        held: held_suppressions::open_reviews(&mut *app.pool.acquire().await?)
            .await?
            .into_iter()
            .map(|Review { run_id, held_at, addresses, detail }| Held {
                run_id,
                addresses,
                detail: detail.unwrap_or_default(),
                since: Moment::new(held_at, now),
            })
            .collect(),
    })
}

fn why(reason: Stored<Reason>) -> Cow<'static, str> {
    let reason = match reason {
        Stored::Known(reason) => reason,
        Stored::Later(word) => return word.into(),
    };
    match reason {
        Reason::Unsubscribed => "Unsubscribed",
        Reason::Complained => "Reported spam",
        Reason::Bounced => "Does not exist",
        Reason::Asked => "Added manually",
    }
    .into()
}

/// `POST /suppressions`, with the `email` to add.
pub(crate) async fn add(State(app): Shared, Form(mut fields, _memory): Form) -> Result<Response, ErrorPage> {
    let typed = fields.take("email").unwrap_or_default();
    let email = match typed.parse() {
        Ok(Address { email, .. }) => email,
        Err(Invalid { reason, .. }) => {
            let problem = match typed.trim() {
                "" => "Enter an address.".to_owned(),
                _ => format!("This {reason}."),
            };
            let page = SuppressionsPage { typed, problem: Some(problem), ..page(&app, None, None).await? };
            return Ok((StatusCode::UNPROCESSABLE_ENTITY, html(&page)).into_response());
        }
    };
    let new = suppressions::suppress(&mut *app.pool.acquire().await?, &email, Reason::Asked, None).await?;
    info!(new, "address suppressed");
    Ok(Redirect::to(if new { "/suppressions?done=added" } else { "/suppressions?done=known" }).into_response())
}

/// `POST /suppressions/{number}/remove`. A missing entry is not an error.
pub(crate) async fn remove(State(app): Shared, Path(number): Path<String>) -> Result<Redirect, ErrorPage> {
    if let Ok(number) = number.parse() {
        let removed = suppressions::remove_number(&mut *app.pool.acquire().await?, number).await?;
        info!(number, removed, "suppression removed");
    }
    Ok(Redirect::to("/suppressions?done=removed"))
}

/// `POST /suppressions/remove`, with a `reason` and `since`: removes what was suppressed for that reason since then.
pub(crate) async fn remove_since(State(app): Shared, Form(fields, _memory): Form) -> Result<Redirect, ErrorPage> {
    let reason = fields.get("reason").and_then(|reason| reason.parse::<Reason>().ok());
    let since = fields.get("since").and_then(|since| since::parse(since, Utc::now()));
    let (Some(reason), Some(since)) = (reason, since) else { return Ok(Redirect::to("/suppressions?done=no-moment")) };
    let removed = suppressions::remove_since(&mut *app.pool.acquire().await?, reason, since).await?;
    info!(?reason, %since, removed, "suppressions removed");
    Ok(Redirect::to("/suppressions?done=since"))
}

/// `POST /suppressions/held/{run_id}`, with `decision`: `accept` or `reject`.
pub(crate) async fn decide(
    State(app): Shared,
    Path(run_id): Path<String>,
    Form(fields, _memory): Form,
) -> Result<Redirect, ErrorPage> {
    let accepted = match fields.get("decision") {
        Some("accept") => true,
        Some("reject") => false,
        _ => return Ok(Redirect::to("/suppressions")),
    };
    if let Ok(run_id) = run_id.parse() {
        let decided = held_suppressions::decide(&mut *app.pool.acquire().await?, run_id, accepted).await?;
        info!(%run_id, accepted, ?decided, "held suppressions decided");
    }
    Ok(Redirect::to(if accepted { "/suppressions?done=accepted" } else { "/suppressions?done=rejected" }))
}

/// `GET` on the same address, after a login or from the browser's history.
pub(crate) async fn back_to_list() -> Redirect {
    Redirect::to("/suppressions")
}
