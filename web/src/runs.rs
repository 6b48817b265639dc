//! `GET /runs`: all runs, newest first.

use std::{borrow::Cow, ops::RangeInclusive};

use askama::Template;
use axum::{
    extract::{Query, State},
    response::Response,
};
use chrono::{DateTime, Datelike as _, SecondsFormat, Utc};
use mailrun_ledger::runs::{self, Progress};
use serde::Deserialize;
use uuid::Uuid;

use crate::{
    Shared,
    error::{ErrorPage, html},
    view::{self, Moment},
};

/// Runs per page.
const PAGE: usize = 25;

/// PostgreSQL's range of years is smaller than chrono's.
const KNOWN_YEARS: RangeInclusive<i32> = 1..=9999;

/// A run in a list.
pub(crate) struct Row {
    pub(crate) run_id: Uuid,
    pub(crate) state: Cow<'static, str>,
    pub(crate) text: String,
    pub(crate) edges: [f64; 5],
    pub(crate) created: Moment,
}

impl Row {
    pub(crate) fn of(progress: &Progress) -> Self {
        Self {
            run_id: progress.run_id,
            state: view::state(progress),
            text: view::progress_text(&progress.counters),
            edges: view::edges(&progress.counters),
            created: Moment::new(progress.created_at, progress.now),
        }
    }
}

#[derive(Template)]
#[template(path = "runs.html")]
struct RunsPage {
    rows: Vec<Row>,
    /// Whether this is not the first page.
    older: bool,
    /// Where the next page begins.
    before: Option<String>,
}

#[derive(Deserialize)]
pub(crate) struct Paging {
    before: Option<String>,
}

/// `GET /runs`
pub(crate) async fn show(State(app): Shared, Query(paging): Query<Paging>) -> Result<Response, ErrorPage> {
    // A malformed value shows the newest runs.
    let before: Option<DateTime<Utc>> = paging.before.and_then(|before| before.parse().ok());
    let before = before.filter(|before| KNOWN_YEARS.contains(&before.year()));
    // One more than is shown, to know whether there is another page.
    let mut list = runs::list(&app.pool, before, PAGE as i64 + 1).await?;
    let more = list.len() > PAGE;
    list.truncate(PAGE);
    let last = list.last().filter(|_| more);
    let next = last.map(|last| last.created_at.to_rfc3339_opts(SecondsFormat::Micros, true));
    Ok(html(&RunsPage { rows: list.iter().map(Row::of).collect(), older: before.is_some(), before: next }))
}
