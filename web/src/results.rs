//! `GET /runs/{id}`: one run, live, and the parts of its page that a poll may replace.

use askama::Template;
use axum::{
    extract::{Path, Query, State},
    response::Response,
};
use mailrun_core::{item::ItemState, run::Phase};
use mailrun_ledger::{
    runs::{self, Progress, Trouble},
    stored::Stored,
    submit::Tally,
    sweep::{self, Repairs},
};
use serde::Deserialize;
use uuid::Uuid;

use crate::{
    App, Shared,
    error::{ErrorPage, html},
    progress::{Snapshot, load_snapshot, may_replay, replay_token},
    view::{self, Moment, Noun},
};

/// Failures per page.
const PAGE: usize = 100;

/// The query of `GET /runs/{id}` and of its parts.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct ResultsQuery {
    /// Failures after this position.
    #[serde(default)]
    after: Option<String>,
    /// The token of the requested replay.
    #[serde(default)]
    asked: Option<String>,
    /// `cancel` or `retry`: show the confirmation.
    #[serde(default)]
    confirm: Option<String>,
    /// The same form was submitted again with this rate limit: a number, or `none`.
    #[serde(default)]
    rate: Option<String>,
}

#[derive(Template)]
#[template(path = "results.html")]
struct ResultsPage {
    now: Snapshot,
    noun: Noun,
    created: Moment,
    legend: [Legend; 7],
    tally: Tally,
    more_invalid: i32,
    asked: Option<Uuid>,
    after: i32,
    confirming: Option<&'static str>,
    /// Which rate limit applies, if another one was requested.
    other_rate: Option<String>,
    actions: Actions,
    failures: Failures,
    repaired: Option<String>,
}

/// A line below the bar.
struct Legend {
    key: &'static str,
    name: &'static str,
    count: i32,
    /// Shown even if the count is 0.
    always: bool,
}

/// The actions that are possible now.
#[derive(Template)]
#[template(path = "actions.html")]
struct Actions {
    run_id: Uuid,
    noun: Noun,
    asked: bool,
    retry: Option<Replay>,
    send_again: Option<Replay>,
    pause: bool,
    resume: bool,
    cancel: bool,
    /// Whether a retry needs confirmation.
    restored: bool,
    confirming: Option<&'static str>,
    to_go: i32,
}

/// A replay that can be requested.
struct Replay {
    token: Uuid,
    count: i32,
}

/// The table of failed and unknown items.
#[derive(Template)]
#[template(path = "failures.html")]
struct Failures {
    run_id: Uuid,
    noun: Noun,
    total: i32,
    after: i32,
    list: Vec<Trouble>,
    /// The start of the next page.
    next: Option<i32>,
}

impl ResultsQuery {
    fn after(&self) -> i32 {
        self.after.as_ref().and_then(|after| after.parse().ok()).filter(|after| *after > 0).unwrap_or(0)
    }

    fn confirming(&self) -> Option<&'static str> {
        ["cancel", "retry"].into_iter().find(|action| self.confirm.as_deref() == Some(action))
    }
}

impl Actions {
    fn of(progress: &Progress, now: &Snapshot, confirming: Option<&'static str>) -> Self {
        let replay = |state| {
            may_replay(progress, state)
                .then(|| Replay { token: replay_token(progress, state), count: now.counters.of(state) })
        };
        let cancel = matches!(now.phase, Phase::Queued | Phase::Running | Phase::Paused);
        let retry = replay(ItemState::Failed);
        let confirming =
            confirming.filter(|action| if *action == "cancel" { cancel } else { retry.is_some() && progress.restored });
        Self {
            run_id: now.run_id,
            noun: Noun::of(&progress.kind),
            asked: now.asked,
            retry,
            restored: progress.restored,
            send_again: replay(ItemState::Unknown),
            pause: matches!(now.phase, Phase::Queued | Phase::Running),
            resume: now.phase == Phase::Paused && progress.later.is_none(),
            cancel,
            confirming,
            to_go: now.counters.open(),
        }
    }
}

impl Failures {
    async fn load(app: &App, progress: &Progress, now: &Snapshot, after: i32) -> Result<Self, ErrorPage> {
        let total = now.counters.of(ItemState::Failed) + now.counters.of(ItemState::Unknown);
        let mut list = match total {
            0 => Vec::new(),
            // One more than is shown, to know whether there is another page.
            _ => runs::troubles(&app.pool, now.run_id, after, PAGE as i64 + 1).await?,
        };
        let more = list.len() > PAGE;
        list.truncate(PAGE);
        let next = list.last().filter(|_| more).map(|last| last.position);
        Ok(Self { run_id: now.run_id, noun: Noun::of(&progress.kind), total, after, list, next })
    }
}

fn legend(now: &Snapshot) -> [Legend; ItemState::ALL.len()] {
    view::SHOWN.map(|state| Legend {
        key: state.name(),
        name: view::word(state),
        count: now.counters.of(state),
        always: state == ItemState::Sent,
    })
}

/// The notice for someone who submitted the same form again with another rate limit; none: the limit is the same.
fn other_rate(requested: &str, limit: Option<i32>) -> Option<String> {
    let requested = match requested {
        "none" => None,
        requested => Some(requested.parse::<i32>().ok().filter(|requested| *requested > 0)?),
    };
    let words = |limit: Option<i32>| match limit {
        Some(limit) => format!("the rate limit {} a second", view::grouped(limit)),
        None => "no rate limit".to_owned(),
    };
    (requested != limit).then(|| {
        format!(
            "This list was accepted before with {}, which still applies. Submitting it again with {} changed nothing.",
            words(limit),
            words(requested)
        )
    })
}

/// What the sweeper did for the run, as a sentence; none: nothing was repaired.
fn repaired(repairs: Repairs) -> Option<String> {
    let counted = |count, one, many| view::counted(i32::try_from(count).unwrap_or(i32::MAX), one, many);
    let Repairs { driven, put_back, buried, told_again } = repairs;
    let repairs = [
        (driven + put_back, "republished", "missing message", "missing messages"),
        (buried, "gave up", "attempt of a dead worker", "attempts of dead workers"),
        (told_again, "settled", "item with a lost result", "items with a lost result"),
    ];
    let repairs = repairs.into_iter().filter(|repair| repair.0 > 0);
    let repairs: Vec<String> =
        repairs.map(|(count, did, one, many)| format!("{did} {}", counted(count, one, many))).collect();
    (!repairs.is_empty()).then(|| format!("The sweeper {}.", repairs.join(", ")))
}

/// `GET /runs/{id}`
pub(crate) async fn show(
    State(app): Shared,
    Path(id): Path<String>,
    Query(query): Query<ResultsQuery>,
) -> Result<Response, ErrorPage> {
    let (progress, now) = load_snapshot(&app, &id, query.asked.as_deref()).await?;
    let tally = runs::tally(&app.pool, progress.run_id).await?.ok_or_else(ErrorPage::no_such_run)?;
    let other_rate = match query.rate.as_deref() {
        Some(requested) => other_rate(requested, runs::rate_limit(&app.pool, progress.run_id).await?),
        None => None,
    };
    let actions = Actions::of(&progress, &now, query.confirming());
    let failures = Failures::load(&app, &progress, &now, query.after()).await?;
    let shown = i32::try_from(tally.invalid_entries.len()).unwrap_or(i32::MAX);
    Ok(html(&ResultsPage {
        noun: actions.noun,
        created: Moment::new(progress.created_at, progress.now),
        legend: legend(&now),
        more_invalid: tally.invalid - shown,
        tally,
        asked: query.asked.as_ref().and_then(|asked| asked.parse().ok()),
        after: query.after(),
        confirming: actions.confirming,
        other_rate,
        actions,
        failures,
        repaired: repaired(sweep::repairs(&app.pool, progress.run_id).await?),
        now,
    }))
}

/// `GET /runs/{id}/actions`: the buttons, for polling.
pub(crate) async fn actions(
    State(app): Shared,
    Path(id): Path<String>,
    Query(query): Query<ResultsQuery>,
) -> Result<Response, ErrorPage> {
    let (progress, now) = load_snapshot(&app, &id, query.asked.as_deref()).await?;
    Ok(html(&Actions::of(&progress, &now, query.confirming())))
}

/// `GET /runs/{id}/troubles`: the table of failures, for polling.
pub(crate) async fn failures(
    State(app): Shared,
    Path(id): Path<String>,
    Query(query): Query<ResultsQuery>,
) -> Result<Response, ErrorPage> {
    let (progress, now) = load_snapshot(&app, &id, query.asked.as_deref()).await?;
    Ok(html(&Failures::load(&app, &progress, &now, query.after()).await?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resubmission_with_another_rate_says_which_one_applies() {
        assert_eq!(other_rate("50", Some(50)), None);
        assert_eq!(other_rate("none", None), None);
        assert_eq!(other_rate("<b>", Some(50)), None, "a malformed query");
        let note = other_rate("1000", Some(50)).unwrap();
        assert!(note.contains("with the rate limit 50 a second, which still applies"), "{note}");
        assert!(note.contains("again with the rate limit 1,000 a second changed nothing"), "{note}");
        assert!(other_rate("none", Some(50)).unwrap().contains("again with no rate limit"));
    }

    #[test]
    fn describes_the_repairs_of_the_sweeper() {
        assert_eq!(repaired(Repairs::default()), None);
        let repairs = Repairs { driven: 1, put_back: 1_200, buried: 1, told_again: 0 };
        let sentence = "The sweeper republished 1,201 missing messages, gave up 1 attempt of a dead worker.";
        assert_eq!(repaired(repairs).as_deref(), Some(sentence));
    }
}
