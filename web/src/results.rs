//! `GET /runs/{id}`: one run, live, and the parts of its page that a poll may replace.

use askama::Template;
use axum::{
    extract::{Path, Query, State},
    response::Response,
};
use mailrun_core::{item::ItemState, run::Phase};
use mailrun_ledger::{
    runs::{self, Progress, Summary, Trouble},
    stored::Stored,
    sweep::{self, Repairs},
};
use serde::Deserialize;
use uuid::Uuid;

use crate::{
    App, Shared,
    error::{ErrorPage, html},
    progress::{Snapshot, load_snapshot, may_replay, replay_token},
    view::{self, Moment},
};

/// Failures on one page.
const PAGE: usize = 100;

/// What the address says beyond the run.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct Wish {
    /// Failures behind this position.
    #[serde(default)]
    after: Option<String>,
    /// The token of the replay that was asked for.
    #[serde(default)]
    asked: Option<String>,
    /// `cancel` or `retry`: ask whether that is really meant.
    #[serde(default)]
    confirm: Option<String>,
    /// The same form was sent again, with this rate limit: a number, or `none`.
    #[serde(default)]
    rate: Option<String>,
}

#[derive(Template)]
#[template(path = "results.html")]
struct ResultsPage {
    now: Snapshot,
    created: Moment,
    legend: [Legend; 7],
    summary: Summary,
    more_invalid: i32,
    asked: Option<Uuid>,
    after: i32,
    confirming: Option<&'static str>,
    /// Which rate applies, if another one was wished for.
    other_rate: Option<String>,
    actions: Actions,
    troubles: Troubles,
    repaired: Option<String>,
}

/// A line below the bar.
struct Legend {
    key: &'static str,
    name: &'static str,
    count: i32,
    /// Shown even if there is none.
    always: bool,
}

/// What a person can do with the run at this moment.
#[derive(Template)]
#[template(path = "actions.html")]
struct Actions {
    run_id: Uuid,
    asked: bool,
    retry: Option<Again>,
    send_again: Option<Again>,
    pause: bool,
    resume: bool,
    cancel: bool,
    /// Whether to retry is asked first.
    restored: bool,
    confirming: Option<&'static str>,
    to_go: i32,
}

/// A replay that can be asked for.
struct Again {
    token: Uuid,
    count: i32,
}

/// What went wrong.
#[derive(Template)]
#[template(path = "troubles.html")]
struct Troubles {
    run_id: Uuid,
    total: i32,
    after: i32,
    list: Vec<Trouble>,
    /// Where the next page begins.
    next: Option<i32>,
}

impl Wish {
    fn after(&self) -> i32 {
        self.after.as_ref().and_then(|after| after.parse().ok()).filter(|after| *after > 0).unwrap_or(0)
    }

    fn confirming(&self) -> Option<&'static str> {
        ["cancel", "retry"].into_iter().find(|wish| self.confirm.as_deref() == Some(wish))
    }
}

impl Actions {
    fn of(progress: &Progress, now: &Snapshot, confirming: Option<&'static str>) -> Self {
        let again = |state| {
            may_replay(progress, state)
                .then(|| Again { token: replay_token(progress, state), count: now.counters.of(state) })
        };
        let cancel = matches!(now.phase, Phase::Queued | Phase::Running | Phase::Paused);
        let retry = again(ItemState::Failed);
        let confirming =
            confirming.filter(|wish| if *wish == "cancel" { cancel } else { retry.is_some() && progress.restored });
        Self {
            run_id: now.run_id,
            asked: now.asked,
            retry,
            restored: progress.restored,
            send_again: again(ItemState::Unknown),
            pause: matches!(now.phase, Phase::Queued | Phase::Running),
            resume: now.phase == Phase::Paused && progress.later.is_none(),
            cancel,
            confirming,
            to_go: now.counters.open(),
        }
    }
}

impl Troubles {
    async fn load(app: &App, now: &Snapshot, after: i32) -> Result<Self, ErrorPage> {
        let total = now.counters.of(ItemState::Failed) + now.counters.of(ItemState::Unknown);
        let mut list = match total {
            0 => Vec::new(),
            // One more than is shown tells whether there is another page.
            _ => runs::troubles(&app.pool, now.run_id, after, PAGE as i64 + 1).await?,
        };
        let more = list.len() > PAGE;
        list.truncate(PAGE);
        let next = list.last().filter(|_| more).map(|last| last.position);
        Ok(Self { run_id: now.run_id, total, after, list, next })
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

/// What is said to someone who has sent the same form again with another rate limit; none: the limit is the same.
fn other_rate(wished: &str, limit: Option<i32>) -> Option<String> {
    let wished = match wished {
        "none" => None,
        wished => Some(wished.parse::<i32>().ok().filter(|wished| *wished > 0)?),
    };
    let words = |limit: Option<i32>| match limit {
        Some(limit) => format!("the rate limit {} a second", view::grouped(limit)),
        None => "no rate limit".to_owned(),
    };
    (wished != limit).then(|| {
        format!(
            "This list had been accepted before, with {}, which still applies. Sending it again with {} changed nothing.",
            words(limit),
            words(wished)
        )
    })
}

/// What the sweeper did for the run, in a sentence; none: nothing had to be done.
fn repaired(repairs: Repairs) -> Option<String> {
    let counted = |count, one, many| view::counted(i32::try_from(count).unwrap_or(i32::MAX), one, many);
    let Repairs { driven, put_back, buried, told_again } = repairs;
    let deeds = [
        (driven + put_back, "put back", "missing message", "missing messages"),
        (buried, "gave up", "attempt of a dead worker", "attempts of dead workers"),
        (
            told_again,
            "settled",
            "invitation of which nobody had told the end",
            "invitations of which nobody had told the end",
        ),
    ];
    let deeds = deeds.into_iter().filter(|deed| deed.0 > 0);
    let deeds: Vec<String> =
        deeds.map(|(count, did, one, many)| format!("{did} {}", counted(count, one, many))).collect();
    (!deeds.is_empty()).then(|| format!("The sweeper {}.", deeds.join(", ")))
}

/// `GET /runs/{id}`
pub(crate) async fn show(
    State(app): Shared,
    Path(id): Path<String>,
    Query(wish): Query<Wish>,
) -> Result<Response, ErrorPage> {
    let (progress, now) = load_snapshot(&app, &id, wish.asked.as_deref()).await?;
    let summary = runs::summary(&app.pool, progress.run_id).await?.ok_or_else(ErrorPage::no_such_run)?;
    let other_rate = match wish.rate.as_deref() {
        Some(wished) => other_rate(wished, runs::rate_limit(&app.pool, progress.run_id).await?),
        None => None,
    };
    let actions = Actions::of(&progress, &now, wish.confirming());
    let troubles = Troubles::load(&app, &now, wish.after()).await?;
    let shown = i32::try_from(summary.invalid_entries.len()).unwrap_or(i32::MAX);
    Ok(html(&ResultsPage {
        created: Moment::new(progress.created_at, progress.now),
        legend: legend(&now),
        more_invalid: summary.invalid - shown,
        summary,
        asked: wish.asked.as_ref().and_then(|asked| asked.parse().ok()),
        after: wish.after(),
        confirming: actions.confirming,
        other_rate,
        actions,
        troubles,
        repaired: repaired(sweep::repairs(&app.pool, progress.run_id).await?),
        now,
    }))
}

/// `GET /runs/{id}/actions`: the buttons, for the page's script.
pub(crate) async fn actions(
    State(app): Shared,
    Path(id): Path<String>,
    Query(wish): Query<Wish>,
) -> Result<Response, ErrorPage> {
    let (progress, now) = load_snapshot(&app, &id, wish.asked.as_deref()).await?;
    Ok(html(&Actions::of(&progress, &now, wish.confirming())))
}

/// `GET /runs/{id}/troubles`: the table of failures, for the page's script.
pub(crate) async fn troubles(
    State(app): Shared,
    Path(id): Path<String>,
    Query(wish): Query<Wish>,
) -> Result<Response, ErrorPage> {
    let (_, now) = load_snapshot(&app, &id, wish.asked.as_deref()).await?;
    Ok(html(&Troubles::load(&app, &now, wish.after()).await?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_form_sent_again_with_another_rate_says_which_one_applies() {
        assert_eq!(other_rate("50", Some(50)), None);
        assert_eq!(other_rate("none", None), None);
        assert_eq!(other_rate("<b>", Some(50)), None, "an address that was tampered with");
        let note = other_rate("1000", Some(50)).unwrap();
        assert!(note.contains("with the rate limit 50 a second, which still applies"), "{note}");
        assert!(note.contains("again with the rate limit 1,000 a second changed nothing"), "{note}");
        assert!(other_rate("none", Some(50)).unwrap().contains("again with no rate limit"));
    }

    #[test]
    fn what_the_sweeper_did_is_a_sentence() {
        assert_eq!(repaired(Repairs::default()), None);
        let repairs = Repairs { driven: 1, put_back: 1_200, buried: 1, told_again: 0 };
        let sentence = "The sweeper put back 1,201 missing messages, gave up 1 attempt of a dead worker.";
        assert_eq!(repaired(repairs).as_deref(), Some(sentence));
    }
}
