//! The actions on a run: replay, pause, resume, cancel. Each is written to the ledger and answered with the run's page.

use axum::{
    extract::{Path, State},
    http::StatusCode,
    response::Redirect,
};
use mailrun_core::{item::ItemState, run::Wanted};
use mailrun_ledger::runs::{self, Granted, ReplayWish};
use tracing::info;
use uuid::Uuid;

use crate::{Shared, body::Form, error::ErrorPage, progress::load};

fn run_id(id: &str) -> Result<Uuid, ErrorPage> {
    id.parse().map_err(|_| ErrorPage::no_such_run())
}

fn to_run(run_id: Uuid) -> Redirect {
    Redirect::to(&format!("/runs/{run_id}"))
}

/// A request that no longer applies is not an error: the page shows the current state.
fn answer(run_id: Uuid, granted: Granted) -> Result<Redirect, ErrorPage> {
    match granted {
        Granted::Yes | Granted::NotNow => Ok(to_run(run_id)),
        Granted::NoSuchRun => Err(ErrorPage::no_such_run()),
    }
}

/// `GET` on any of these addresses, after a login or from the browser's history.
pub(crate) async fn back_to_run(Path(id): Path<String>) -> Result<Redirect, ErrorPage> {
    Ok(to_run(run_id(&id)?))
}

/// `POST /runs/{id}/pause`
pub(crate) async fn pause(State(app): Shared, Path(id): Path<String>) -> Result<Redirect, ErrorPage> {
    let run_id = run_id(&id)?;
    let granted = runs::set_paused(&app.pool, run_id, true).await?;
    info!(%run_id, ?granted, "pause requested");
    answer(run_id, granted)
}

/// `POST /runs/{id}/resume`
pub(crate) async fn resume(State(app): Shared, Path(id): Path<String>) -> Result<Redirect, ErrorPage> {
    let run_id = run_id(&id)?;
    let granted = runs::set_paused(&app.pool, run_id, false).await?;
    app.outbox.notify_one();
    info!(%run_id, ?granted, "resume requested");
    answer(run_id, granted)
}

/// `POST /runs/{id}/cancel`
pub(crate) async fn cancel(State(app): Shared, Path(id): Path<String>) -> Result<Redirect, ErrorPage> {
    let run_id = run_id(&id)?;
    let granted = runs::cancel(&app.pool, run_id).await?;
    app.outbox.notify_one();
    info!(%run_id, ?granted, "cancellation requested");
    answer(run_id, granted)
}

/// `POST /runs/{id}/retry`, with the `states` to replay and the `token` that makes a second click the same request.
pub(crate) async fn retry(
    State(app): Shared,
    Path(id): Path<String>,
    Form(fields, _memory): Form,
) -> Result<Redirect, ErrorPage> {
    let (Some(states), Some(token)) =
        (fields.get("states").and_then(parse_states), fields.get("token").and_then(|token| token.parse::<Uuid>().ok()))
    else {
        return Err(ErrorPage::new(
            StatusCode::UNPROCESSABLE_ENTITY,
            "Incomplete form",
            "The fields \u{201c}states\u{201d} (failed, unknown or both) and \u{201c}token\u{201d} are required. Use the button on the run's page.",
        ));
    };
    let progress = load(&app, &id).await?;
    let run_id = progress.run_id;
    // Items that failed before the backup may have been sent since. For unknown items, the button itself says so.
    let restored = fields.get("restored").is_some_and(|restored| restored == "yes") || states == [ItemState::Unknown];
    if progress.restored && !restored {
        return Ok(Redirect::to(&format!("/runs/{run_id}?confirm=retry#confirm")));
    }
    // A retry also resumes a run that was paused when it finished.
    if progress.wanted == Wanted::Paused && progress.phase().is_over() {
        runs::set_paused(&app.pool, run_id, false).await?;
    }
    let request = ReplayWish { run_id: Some(run_id), states, error: None, token, restored };
    let replayed = runs::replay(&app.pool, &request).await?;
    app.outbox.notify_one();
    info!(%run_id, begins = replayed.runs > 0, "replay requested");
    Ok(Redirect::to(&format!("/runs/{run_id}?asked={token}")))
}

/// `failed`, `unknown` or `failed,unknown`
fn parse_states(text: &str) -> Option<Vec<ItemState>> {
    text.split(',')
        .map(|state| match state.trim() {
            "failed" => Some(ItemState::Failed),
            "unknown" => Some(ItemState::Unknown),
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_failed_and_unknown_items_can_be_replayed() {
        assert_eq!(parse_states("failed"), Some(vec![ItemState::Failed]));
        assert_eq!(parse_states("failed, unknown"), Some(vec![ItemState::Failed, ItemState::Unknown]));
        assert_eq!(parse_states("sent"), None);
        assert_eq!(parse_states(""), None);
    }
}
