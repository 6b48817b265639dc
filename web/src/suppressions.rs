//! `/suppressions`: the addresses that nobody writes to any more, and putting one on the list or taking it off.

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

/// Addresses on one page.
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
    /// What was just done.
    notice: Option<&'static str>,
    /// What was typed, if it was refused.
    typed: String,
    problem: Option<String>,
    /// Runs whose suppressions are held.
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

/// What the address says.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct Wish {
    /// Those that are older than the one with this number.
    before: Option<String>,
    /// What was just done.
    done: Option<String>,
}

impl Wish {
    fn notice(&self) -> Option<&'static str> {
        Some(match self.done.as_deref()? {
            "added" => "Added. Nobody writes to it any more, not even in runs that are under way.",
            "known" => "It is on the list already, with the reason it has there.",
            "erased" => "Erased. What workers are sending at this moment goes out, and nothing more is sent there.",
            "removed" => "Taken off the list. It can be invited again.",
            "since" => "Taken off the list. These addresses can be invited again.",
            "no-moment" => "Enter since when: for instance 2026-11-28T14:30, or 2h.",
            "accepted" => "Suppressed. These addresses receive no more mail.",
            "rejected" => "Not suppressed. These addresses receive mail.",
            _ => return None,
        })
    }
}

/// `GET /suppressions`
pub(crate) async fn show(State(app): Shared, Query(wish): Query<Wish>) -> Result<Response, ErrorPage> {
    let before = wish.before.as_ref().and_then(|before| before.parse().ok());
    Ok(html(&page(&app, before, wish.notice()).await?))
}

async fn page(app: &App, before: Option<i64>, notice: Option<&'static str>) -> sqlx::Result<SuppressionsPage> {
    // One more than is shown tells whether there is another page.
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
        Reason::Complained => "Called a mail spam",
        Reason::Bounced => "Does not exist",
        Reason::Asked => "Added by hand",
    }
    .into()
}

/// `POST /suppressions`, with the `email` to add.
pub(crate) async fn add(State(app): Shared, Form(mut fields, _room): Form) -> Result<Response, ErrorPage> {
    let typed = fields.take("email").unwrap_or_default();
    let email = match typed.parse() {
        Ok(Address { email, .. }) => email,
        Err(Invalid { reason, .. }) => {
            let problem = match typed.trim() {
                "" => "Enter the address that nobody shall write to.".to_owned(),
                _ => format!("This {reason}."),
            };
            let page = SuppressionsPage { typed, problem: Some(problem), ..page(&app, None, None).await? };
            return Ok((StatusCode::UNPROCESSABLE_ENTITY, html(&page)).into_response());
        }
    };
    let new = suppressions::suppress(&mut *app.pool.acquire().await?, &email, Reason::Asked, None).await?;
    info!(new, "an address is put on the list of suppressions");
    Ok(Redirect::to(if new { "/suppressions?done=added" } else { "/suppressions?done=known" }).into_response())
}

/// `POST /suppressions/{number}/remove`. One that is gone already is what was wished for.
pub(crate) async fn remove(State(app): Shared, Path(number): Path<String>) -> Result<Redirect, ErrorPage> {
    if let Ok(number) = number.parse() {
        let removed = suppressions::remove_number(&mut *app.pool.acquire().await?, number).await?;
        info!(number, removed, "an address is taken off the list of suppressions");
    }
    Ok(Redirect::to("/suppressions?done=removed"))
}

/// `POST /suppressions/remove`, with a `reason` and `since`: takes off what was suppressed for that reason since then.
pub(crate) async fn remove_since(State(app): Shared, Form(fields, _room): Form) -> Result<Redirect, ErrorPage> {
    let reason = fields.get("reason").and_then(|reason| reason.parse::<Reason>().ok());
    let since = fields.get("since").and_then(|since| since::parse(since, Utc::now()));
    let (Some(reason), Some(since)) = (reason, since) else { return Ok(Redirect::to("/suppressions?done=no-moment")) };
    let removed = suppressions::remove_since(&mut *app.pool.acquire().await?, reason, since).await?;
    info!(?reason, %since, removed, "addresses are taken off the list of suppressions");
    Ok(Redirect::to("/suppressions?done=since"))
}

/// `POST /suppressions/held/{run_id}`, with `decision`: `accept` or `reject`.
pub(crate) async fn decide(
    State(app): Shared,
    Path(run_id): Path<String>,
    Form(fields, _room): Form,
) -> Result<Redirect, ErrorPage> {
    let accepted = match fields.get("decision") {
        Some("accept") => true,
        Some("reject") => false,
        _ => return Ok(Redirect::to("/suppressions")),
    };
    if let Ok(run_id) = run_id.parse() {
        let decided = held_suppressions::decide(&mut *app.pool.acquire().await?, run_id, accepted).await?;
        info!(%run_id, accepted, ?decided, "held suppressions are decided");
    }
    Ok(Redirect::to(if accepted { "/suppressions?done=accepted" } else { "/suppressions?done=rejected" }))
}

/// `GET` on the same address: somebody loads it again after a login or from the history.
pub(crate) async fn back_to_list() -> Redirect {
    Redirect::to("/suppressions")
}
