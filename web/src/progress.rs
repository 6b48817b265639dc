//! `GET /runs/{id}/progress`: a run's current counters from the ledger, for the results page and for programs.

use std::{borrow::Cow, time::Duration};

use axum::{
    Json,
    extract::{Path, Query, State},
    http::header,
    response::{IntoResponse, Response},
};
use chrono::TimeDelta;
use mailrun_core::{
    item::ItemState,
    run::{Counters, Phase, Wanted},
};
use mailrun_ledger::{
    invitations,
    runs::{self, Progress},
};
use moka::future::Cache;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{App, Shared, error::ErrorPage, view, view::Noun};

#[derive(Debug, Default, Deserialize)]
pub(crate) struct ProgressQuery {
    /// The token of the requested replay.
    pub(crate) asked: Option<String>,
}

/// A run's current state, as numbers and as text: the page is rendered from it, and polls update it.
#[derive(Debug, Serialize)]
pub(crate) struct Snapshot {
    pub(crate) run_id: Uuid,
    pub(crate) phase: Phase,
    /// `total`, and each state by its name.
    #[serde(flatten)]
    pub(crate) counters: Counters,
    pub(crate) elapsed_ms: i64,
    /// Items per second: currently, or on average once the run is over; null if it cannot be measured.
    pub(crate) rate: Option<f64>,
    /// Nothing changes without a person's action.
    pub(crate) over: bool,
    /// `990 successful, 10 failed of 1,000`
    pub(crate) text: String,
    /// A replay was requested and has not started.
    pub(crate) asked: bool,
    /// Settled items, in percent.
    pub(crate) percent: i64,
    /// The bar: the right edges of sent, retrying, failed, unknown, and cancelled or skipped, in percent.
    pub(crate) edges: [f64; 5],
    /// The phase's name, or a wanted state of a later version.
    pub(crate) state: Cow<'static, str>,
    pub(crate) elapsed: String,
    /// The label of `elapsed`.
    pub(crate) elapsed_of: &'static str,
    /// `rate` as text.
    pub(crate) speed: Option<String>,
    /// The time left, if it can be estimated.
    pub(crate) left: Option<String>,
    /// A sentence about the current state.
    pub(crate) note: String,
    /// A sentence about the skipped items, if any.
    pub(crate) skipped_note: Option<String>,
}

impl Snapshot {
    /// `asked` is the token of a replay that this person requested.
    pub(crate) fn of(progress: &Progress, asked: Option<&str>) -> Self {
        let (counters, phase) = (progress.counters, progress.phase());
        let over = phase.is_over();
        let asked =
            over && asked.and_then(|asked| asked.parse().ok()).is_some_and(|asked| is_outstanding(progress, asked));
        let rate = rate(progress);
        Self {
            run_id: progress.run_id,
            phase,
            counters,
            elapsed_ms: progress.elapsed().num_milliseconds(),
            rate,
            over,
            text: view::progress_text(&counters),
            asked,
            percent: view::percent(&counters),
            edges: view::edges(&counters),
            state: view::state(progress),
            elapsed: view::duration(progress.elapsed()),
            elapsed_of: match (was_replayed(progress), over) {
                (false, false) => "Elapsed",
                (false, true) => "Took",
                (true, false) => "Elapsed since retry",
                (true, true) => "Retry took",
            },
            speed: rate.map(view::rate),
            left: if phase == Phase::Running { view::time_left(counters.open(), progress.rate) } else { None },
            note: note(progress, asked),
            skipped_note: (counters.of(ItemState::Skipped) > 0).then(|| {
                let skipped = counters.of(ItemState::Skipped);
                if progress.kind == invitations::KIND {
                    let who = view::counted(skipped, "person was", "people were");
                    format!("{who} skipped: suppressed after this run was accepted.")
                } else {
                    format!("{} skipped.", view::counted(skipped, "item was", "items were"))
                }
            }),
        }
    }
}

/// A replay resets `started_at`.
fn was_replayed(progress: &Progress) -> bool {
    progress.started_at != progress.created_at
}

fn rate(progress: &Progress) -> Option<f64> {
    match progress.phase() {
        Phase::Queued | Phase::Paused => None,
        Phase::Running | Phase::Cancelling => Some(progress.rate).filter(|rate| *rate > 0.0),
        // A replay's sends cannot be told from earlier ones, and the cancelled and skipped items were not sent.
        Phase::Finished | Phase::Cancelled if was_replayed(progress) => None,
        Phase::Finished | Phase::Cancelled => {
            let settled = progress.counters.settled()
                - progress.counters.of(ItemState::Cancelled)
                - progress.counters.of(ItemState::Skipped);
            let seconds = progress.elapsed().as_seconds_f64();
            (settled > 0 && seconds > 0.0).then(|| f64::from(settled) / seconds)
        }
    }
}

/// Longer than any rate limit delays a run's next item: a run's own limit is at least one per second, and an installation's limit
/// is shared by the runs in progress.
const STALLED_AFTER: TimeDelta = TimeDelta::minutes(2);

/// Whether items are due and none was settled recently. Deferred items are not due.
fn is_stalled(progress: &Progress) -> bool {
    progress.counters.of(ItemState::Pending) > 0 && progress.now - progress.updated_at > STALLED_AFTER
}

fn note(progress: &Progress, asked: bool) -> String {
    let counters = progress.counters;
    let Noun { one, many, .. } = Noun::of(&progress.kind);
    match progress.phase() {
        _ if progress.later.is_some() => {
            "A newer version of Mailrun handles this run. Nothing new is sent until all processes are upgraded."
                .to_owned()
        }
        _ if asked => "Retry requested. It starts in a moment.".to_owned(),
        Phase::Running | Phase::Queued if progress.held_up.is_some() => format!(
            "Sending is paused: the relay is not accepting mail ({}). It resumes automatically; nothing is lost.",
            progress.held_up.as_deref().unwrap_or_default()
        ),
        Phase::Running | Phase::Queued if is_stalled(progress) => format!(
            "Nothing has been sent for {}, and no rate limit or pause explains it. An operator can run “mailrun doctor” to see \
             why. Nothing is lost.",
            view::duration(progress.now - progress.updated_at)
        ),
        Phase::Queued => {
            "Accepted. Sending starts automatically. You can close this page and come back later.".to_owned()
        }
        Phase::Running => "Sending continues if you close this page.".to_owned(),
        Phase::Paused => match &progress.held_up {
            Some(reason) => {
                format!("Nothing new is sent until you resume. The relay is not accepting mail ({reason}).")
            }
            None => "Nothing new is sent until you resume.".to_owned(),
        },
        Phase::Cancelling => "Sends in progress are completed first.".to_owned(),
        Phase::Cancelled => "Cancelled. What was sent before is not affected.".to_owned(),
        Phase::Finished if counters.of(ItemState::Sent) == counters.total => match counters.total {
            1 => format!("The {one} was sent."),
            total => format!("All {} {many} were sent.", view::grouped(total)),
        },
        Phase::Finished => match (counters.of(ItemState::Failed), counters.of(ItemState::Unknown)) {
            (0, 0) => "Finished.".to_owned(),
            (_, 0) => format!("Finished. You can retry the failed {many}."),
            (0, _) => format!("Finished. It is unknown whether some {many} were sent."),
            _ => format!("Finished. Some {many} need your decision."),
        },
    }
}

/// Whether the items in `state` can be replayed.
pub(crate) fn may_replay(progress: &Progress, state: ItemState) -> bool {
    let count = progress.counters.of(state);
    count > 0 && progress.phase().is_over() && progress.wanted != Wanted::Cancelled
}

/// Identifies the replay of the items in `state` at this moment: requesting it twice, in one tab or in two, requests one replay.
/// Once it has started, the token changes.
pub(crate) fn replay_token(progress: &Progress, state: ItemState) -> Uuid {
    let counters = progress.counters;
    // Not `finished_at`: a replay that fails at once, within one batch of results, never reopens the run.
    let moved_us = progress.updated_at.timestamp_micros();
    let name = format!(
        "{state:?} {moved_us} {} {} {}",
        counters.of(ItemState::Sent),
        counters.of(ItemState::Failed),
        counters.of(ItemState::Unknown)
    );
    Uuid::new_v5(&progress.run_id, name.as_bytes())
}

fn is_outstanding(progress: &Progress, asked: Uuid) -> bool {
    [ItemState::Failed, ItemState::Unknown]
        .into_iter()
        .any(|state| may_replay(progress, state) && replay_token(progress, state) == asked)
}

/// One run's progress, by the id in a path.
pub(crate) async fn load(app: &App, id: &str) -> Result<Progress, ErrorPage> {
    let run_id = id.parse().map_err(|_| ErrorPage::no_such_run())?;
    runs::progress(&app.pool, run_id).await?.ok_or_else(ErrorPage::no_such_run)
}

/// The recent progress of the watched runs.
pub(crate) type Watched = Cache<Uuid, Option<Progress>>;

/// Capacity.
const WATCHED_RUNS: u64 = 10_000;
/// The poll interval of the page (`LIVE` in `results.js`): each poll shows the progress since the last one, and all viewers of a
/// run together cost the database as much as one.
const FRESH_FOR: Duration = Duration::from_millis(300);

pub(crate) fn watched() -> Watched {
    Cache::builder().max_capacity(WATCHED_RUNS).time_to_live(FRESH_FOR).build()
}

/// One run's progress, at most [`FRESH_FOR`] old.
async fn watch(app: &App, id: &str) -> Result<Progress, ErrorPage> {
    let run_id: Uuid = id.parse().map_err(|_| ErrorPage::no_such_run())?;
    let progress = app.watched.try_get_with(run_id, runs::progress(&app.pool, run_id)).await;
    // Concurrent callers share one error.
    progress.map_err(|error| ErrorPage::from_database(&error))?.ok_or_else(ErrorPage::no_such_run)
}

/// The progress and its snapshot. `asked` is the token of a replay that this person requested.
pub(crate) async fn load_snapshot(app: &App, id: &str, asked: Option<&str>) -> Result<(Progress, Snapshot), ErrorPage> {
    let progress = load(app, id).await?;
    let snapshot = Snapshot::of(&progress, asked);
    Ok((progress, snapshot))
}

/// `GET /runs/{id}/progress`
pub(crate) async fn show(
    State(app): Shared,
    Path(id): Path<String>,
    Query(query): Query<ProgressQuery>,
) -> Result<Response, ErrorPage> {
    let snapshot = Snapshot::of(&watch(&app, &id).await?, query.asked.as_deref());
    Ok(([(header::CACHE_CONTROL, "no-store")], Json(snapshot)).into_response())
}

#[cfg(test)]
mod tests {
    use super::*;
    use chrono::Utc;

    fn finished(sent: i32, failed: i32, unknown: i32) -> Progress {
        let now = Utc::now();
        Progress {
            run_id: Uuid::from_u128(7),
            kind: invitations::KIND.to_owned(),
            created_at: now - TimeDelta::seconds(10),
            wanted: Wanted::Running,
            later: None,
            counters: Counters::of_items(&[
                (ItemState::Sent, sent),
                (ItemState::Failed, failed),
                (ItemState::Unknown, unknown),
            ]),
            started_at: now - TimeDelta::seconds(10),
            updated_at: now,
            finished_at: Some(now),
            rate: 0.0,
            restored: false,
            held_up: None,
            now,
        }
    }

    #[test]
    fn reports_a_stalled_run() {
        let mut progress = finished(5, 0, 0);
        progress.counters = Counters::of_items(&[(ItemState::Sent, 5), (ItemState::Pending, 4)]);
        assert!(!note(&progress, false).contains("Nothing has been sent"));
        progress.now += TimeDelta::minutes(3);
        assert!(note(&progress, false).starts_with("Nothing has been sent for 3 min"), "{}", note(&progress, false));
        progress.wanted = Wanted::Paused;
        assert_eq!(note(&progress, false), "Nothing new is sent until you resume.");
        progress.later = Some("drafted".into());
        assert!(note(&progress, false).contains("newer version"));
        assert_eq!(Snapshot::of(&progress, None).state, "drafted");
        progress.later = None;
        progress.wanted = Wanted::Running;
        progress.held_up = Some("421 busy".into());
        assert!(note(&progress, false).contains("421 busy"));
        progress.held_up = None;
        progress.counters = Counters::of_items(&[(ItemState::Sent, 5), (ItemState::Retrying, 4)]);
        assert!(!note(&progress, false).contains("Nothing has been sent"), "they wait for their next try");
    }

    #[test]
    fn calls_the_items_of_a_run_by_their_name() {
        let mut progress = finished(1, 2, 0);
        assert_eq!(note(&progress, false), "Finished. You can retry the failed invitations.");
        progress.kind = "calls".to_owned();
        assert_eq!(note(&progress, false), "Finished. You can retry the failed items.");
    }

    #[test]
    fn a_second_click_requests_the_same_replay_and_a_later_failure_another() {
        let first = finished(990, 10, 0);
        let token = replay_token(&first, ItemState::Failed);
        assert_eq!(token, replay_token(&first, ItemState::Failed));
        assert_ne!(token, replay_token(&first, ItemState::Unknown));
        let failed_again = Progress { updated_at: first.now + TimeDelta::seconds(1), ..first };
        assert_ne!(token, replay_token(&failed_again, ItemState::Failed));
    }

    #[test]
    fn a_replay_is_outstanding_until_it_begins() {
        let mut progress = finished(990, 10, 0);
        let token = replay_token(&progress, ItemState::Failed).to_string();
        assert!(Snapshot::of(&progress, Some(&token)).asked);
        assert!(!Snapshot::of(&progress, Some("nonsense")).asked);
        progress.counters = Counters::of_items(&[(ItemState::Sent, 990), (ItemState::Pending, 10)]);
        progress.finished_at = None;
        assert!(!Snapshot::of(&progress, Some(&token)).asked);
    }

    #[test]
    fn only_runs_that_are_over_and_not_cancelled_can_be_replayed() {
        let progress = finished(990, 10, 0);
        assert!(may_replay(&progress, ItemState::Failed));
        assert!(!may_replay(&progress, ItemState::Unknown));
        assert!(!may_replay(&Progress { wanted: Wanted::Cancelled, ..progress.clone() }, ItemState::Failed));
        let mut running = progress;
        running.counters =
            Counters::of_items(&[(ItemState::Sent, 990), (ItemState::Failed, 10), (ItemState::Pending, 1)]);
        assert!(!may_replay(&running, ItemState::Failed));
    }

    #[test]
    fn shows_the_average_only_where_it_is_meaningful() {
        let progress = finished(990, 10, 0);
        assert_eq!(Snapshot::of(&progress, None).speed.as_deref(), Some("100 a second"));
        let replayed = Progress { started_at: progress.now - TimeDelta::seconds(1), ..progress };
        assert_eq!(Snapshot::of(&replayed, None).speed, None);
        assert_eq!(Snapshot::of(&replayed, None).elapsed_of, "Retry took");
    }
}
