//! `GET /runs/{id}/progress`: a run's counters at one moment, from the ledger, for the results page and for programs.

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
use mailrun_ledger::runs::{self, Progress};
use moka::future::Cache;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{App, Shared, error::ErrorPage, view};

/// What the address says beyond the run.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct Asked {
    /// The token of the replay that was asked for.
    pub(crate) asked: Option<String>,
}

/// A run at one moment, as numbers and in words: the page is drawn from it, and later polls bring it up to date.
#[derive(Debug, Serialize)]
pub(crate) struct Snapshot {
    pub(crate) run_id: Uuid,
    pub(crate) phase: Phase,
    /// `total`, and each state by its name.
    #[serde(flatten)]
    pub(crate) counters: Counters,
    pub(crate) elapsed_ms: i64,
    /// Items a second: at present, or once it is over on average; null: that says nothing.
    pub(crate) rate: Option<f64>,
    /// Nothing changes any more without a person.
    pub(crate) over: bool,
    /// `990 successful, 10 failed of 1,000`
    pub(crate) text: String,
    /// A replay was asked for, and has not begun.
    pub(crate) asked: bool,
    /// The settled share.
    pub(crate) percent: i64,
    /// The bar: the right edges of sent, retrying, failed, unknown, and cancelled or skipped, in percent.
    pub(crate) edges: [f64; 5],
    /// The phase's name, or the word of a later version.
    pub(crate) state: Cow<'static, str>,
    /// The elapsed time.
    pub(crate) elapsed: String,
    /// What the elapsed time is the time of.
    pub(crate) elapsed_of: &'static str,
    /// The rate.
    pub(crate) speed: Option<String>,
    /// The time left, if that can be told.
    pub(crate) left: Option<String>,
    /// A sentence about what happens now.
    pub(crate) note: String,
    /// A sentence about those who were skipped, if any.
    pub(crate) skipped_note: Option<String>,
}

impl Snapshot {
    /// `asked` is the token of a replay that this person has asked for.
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
                let who = view::counted(counters.of(ItemState::Skipped), "person was", "people were");
                format!("{who} skipped: not to be written to any more since after this run was accepted.")
            }),
        }
    }
}

/// The ledger's clock starts again when a run does.
fn was_replayed(progress: &Progress) -> bool {
    progress.started_at != progress.created_at
}

fn rate(progress: &Progress) -> Option<f64> {
    match progress.phase() {
        Phase::Queued | Phase::Paused => None,
        Phase::Running | Phase::Cancelling => Some(progress.rate).filter(|rate| *rate > 0.0),
        // What a replay has sent can't be told from what was sent before it, and the cancelled and the skipped were not sent.
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

/// Longer than any limit makes a run wait for its next item: a run's own limit is one a second at least, and an installation's
/// is shared by the runs that are in progress.
const STALLED_AFTER: TimeDelta = TimeDelta::minutes(2);

/// Whether the run has items that are due, and none was settled for long. Items that wait for a retry are not due.
fn is_stalled(progress: &Progress) -> bool {
    progress.counters.of(ItemState::Pending) > 0 && progress.now - progress.updated_at > STALLED_AFTER
}

fn note(progress: &Progress, asked: bool) -> String {
    let counters = progress.counters;
    match progress.phase() {
        _ if progress.later.is_some() => {
            "A newer version of Mailrun handles this run. Nothing new is sent until all processes are upgraded."
                .to_owned()
        }
        _ if asked => "Asked to send again. It starts in a moment.".to_owned(),
        Phase::Running | Phase::Queued if progress.held_up.is_some() => format!(
            "The mail server takes nothing at the moment ({}). Nobody loses an invitation for it: sending goes on by itself.",
            progress.held_up.as_deref().unwrap_or_default()
        ),
        Phase::Running | Phase::Queued if is_stalled(progress) => format!(
            "Nothing has been sent for {}, and no rate limit or pause explains it. An operator can run “mailrun doctor” to see \
             why. Nothing is lost.",
            view::duration(progress.now - progress.updated_at)
        ),
        Phase::Queued => {
            "Accepted and safe. Sending starts by itself; you can close this page and come back.".to_owned()
        }
        Phase::Running => "You can close this page and come back: sending goes on.".to_owned(),
        Phase::Paused => match &progress.held_up {
            Some(reason) => {
                format!("Nothing new is sent until you resume. The relay is not accepting mail ({reason}).")
            }
            None => "Nothing new is sent until you resume.".to_owned(),
        },
        Phase::Cancelling => "What is being sent right now is still finished.".to_owned(),
        Phase::Cancelled => "Cancelled. What had been sent before stays sent.".to_owned(),
        Phase::Finished if counters.of(ItemState::Sent) == counters.total => match counters.total {
            1 => "The invitation is on its way.".to_owned(),
            total => format!("All {} invitations are on their way.", view::grouped(total)),
        },
        Phase::Finished => match (counters.of(ItemState::Failed), counters.of(ItemState::Unknown)) {
            (0, 0) => "Finished.".to_owned(),
            (_, 0) => "Finished. What failed can be sent again.".to_owned(),
            (0, _) => "Finished. For some invitations, nobody knows whether they went out.".to_owned(),
            _ => "Finished. Some invitations need your decision.".to_owned(),
        },
    }
}

/// Whether a person may ask for the items in `state` again.
pub(crate) fn may_replay(progress: &Progress, state: ItemState) -> bool {
    let count = progress.counters.of(state);
    count > 0 && progress.phase().is_over() && progress.wanted != Wanted::Cancelled
}

/// Names the replay of the items in `state` as they stand now: whoever asks for it twice, in one tab or in two, asks for
/// one replay. Once it has begun, the name is another.
pub(crate) fn replay_token(progress: &Progress, state: ItemState) -> Uuid {
    let counters = progress.counters;
    // Not when it finished: a replay that fails at once, within one batch of results, never reopens the run.
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

/// One run's progress, by the id in an address.
pub(crate) async fn load(app: &App, id: &str) -> Result<Progress, ErrorPage> {
    let run_id = id.parse().map_err(|_| ErrorPage::no_such_run())?;
    runs::progress(&app.pool, run_id).await?.ok_or_else(ErrorPage::no_such_run)
}

/// The runs that are watched, as they were a moment ago.
pub(crate) type Watched = Cache<Uuid, Option<Progress>>;

/// Runs remembered at most.
const WATCHED_RUNS: u64 = 10_000;
/// As long as the page waits between two polls (`LIVE` in `results.js`): so everybody who watches a run sees it move with each
/// poll, and all of them together cost the database as much as one.
const FRESH_FOR: Duration = Duration::from_millis(300);

/// Nobody is watched yet.
pub(crate) fn watched() -> Watched {
    Cache::builder().max_capacity(WATCHED_RUNS).time_to_live(FRESH_FOR).build()
}

/// One run's progress, at most a moment old.
async fn watch(app: &App, id: &str) -> Result<Progress, ErrorPage> {
    let run_id: Uuid = id.parse().map_err(|_| ErrorPage::no_such_run())?;
    let progress = app.watched.try_get_with(run_id, runs::progress(&app.pool, run_id)).await;
    // All who wait share one error.
    progress.map_err(|error| ErrorPage::from_database(&error))?.ok_or_else(ErrorPage::no_such_run)
}

/// The same, with what is shown of it. `asked` is the token of a replay that this person has asked for.
pub(crate) async fn load_snapshot(app: &App, id: &str, asked: Option<&str>) -> Result<(Progress, Snapshot), ErrorPage> {
    let progress = load(app, id).await?;
    let snapshot = Snapshot::of(&progress, asked);
    Ok((progress, snapshot))
}

/// `GET /runs/{id}/progress`
pub(crate) async fn show(
    State(app): Shared,
    Path(id): Path<String>,
    Query(query): Query<Asked>,
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
    fn a_run_that_has_not_progressed_for_long_says_so() {
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
    fn a_second_click_asks_for_the_same_replay_and_a_later_failure_for_another() {
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
    fn only_what_is_over_and_not_cancelled_can_be_replayed() {
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
    fn the_average_is_told_once_it_means_something() {
        let progress = finished(990, 10, 0);
        assert_eq!(Snapshot::of(&progress, None).speed.as_deref(), Some("100 a second"));
        let replayed = Progress { started_at: progress.now - TimeDelta::seconds(1), ..progress };
        assert_eq!(Snapshot::of(&replayed, None).speed, None);
        assert_eq!(Snapshot::of(&replayed, None).elapsed_of, "Retry took");
    }
}
