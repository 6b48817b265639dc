//! What a person may do with a run: send again what failed, pause, resume, cancel. Each is written to the ledger, and answered with the run's page.

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

/// A wish that means nothing any more is no error: the page shows why.
fn answer(run_id: Uuid, granted: Granted) -> Result<Redirect, ErrorPage> {
    match granted {
        Granted::Yes | Granted::NotNow => Ok(to_run(run_id)),
        Granted::NoSuchRun => Err(ErrorPage::no_such_run()),
    }
}

/// `GET` on any of these addresses: somebody loads it again after a login or from the history.
pub(crate) async fn back_to_run(Path(id): Path<String>) -> Result<Redirect, ErrorPage> {
    Ok(to_run(run_id(&id)?))
}

/// `POST /runs/{id}/pause`
pub(crate) async fn pause(State(app): Shared, Path(id): Path<String>) -> Result<Redirect, ErrorPage> {
    let run_id = run_id(&id)?;
    let granted = runs::set_paused(&app.pool, run_id, true).await?;
    info!(%run_id, ?granted, "a pause is asked for");
    answer(run_id, granted)
}

/// `POST /runs/{id}/resume`
pub(crate) async fn resume(State(app): Shared, Path(id): Path<String>) -> Result<Redirect, ErrorPage> {
    let run_id = run_id(&id)?;
    let granted = runs::set_paused(&app.pool, run_id, false).await?;
    app.outbox.notify_one();
    info!(%run_id, ?granted, "resuming is asked for");
    answer(run_id, granted)
}

/// `POST /runs/{id}/cancel`
pub(crate) async fn cancel(State(app): Shared, Path(id): Path<String>) -> Result<Redirect, ErrorPage> {
    let run_id = run_id(&id)?;
    let granted = runs::cancel(&app.pool, run_id).await?;
    app.outbox.notify_one();
    info!(%run_id, ?granted, "a cancellation is asked for");
    answer(run_id, granted)
}

/// `POST /runs/{id}/retry`, with the `states` to send again and the `token` that makes a second click the same wish.
pub(crate) async fn retry(
    State(app): Shared,
    Path(id): Path<String>,
    Form(fields, _room): Form,
) -> Result<Redirect, ErrorPage> {
    let (Some(states), Some(token)) =
        (fields.get("states").and_then(parse_states), fields.get("token").and_then(|token| token.parse::<Uuid>().ok()))
    else {
        return Err(ErrorPage::new(
            StatusCode::UNPROCESSABLE_ENTITY,
            "The form is incomplete",
            "It names what to send again (states: failed, unknown or both) and a token. Press the button on the run's page.",
        ));
    };
    let progress = load(&app, &id).await?;
    let run_id = progress.run_id;
    // What failed before the backup was taken may have been sent since. What is unknown says so on its button.
    let restored = fields.get("restored").is_some_and(|restored| restored == "yes") || states == [ItemState::Unknown];
    if progress.restored && !restored {
        return Ok(Redirect::to(&format!("/runs/{run_id}?confirm=retry#confirm")));
    }
    // Who asks for a retry wants it to be sent, even if the run was paused while it ended.
    if progress.wanted == Wanted::Paused && progress.phase().is_over() {
        runs::set_paused(&app.pool, run_id, false).await?;
    }
    let wish = ReplayWish { run_id: Some(run_id), states, error: None, token, restored };
    let replayed = runs::replay(&app.pool, &wish).await?;
    app.outbox.notify_one();
    info!(%run_id, begins = replayed.runs > 0, "a replay is asked for");
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
    fn only_failed_and_unknown_can_be_sent_again() {
        assert_eq!(parse_states("failed"), Some(vec![ItemState::Failed]));
        assert_eq!(parse_states("failed, unknown"), Some(vec![ItemState::Failed, ItemState::Unknown]));
        assert_eq!(parse_states("sent"), None);
        assert_eq!(parse_states(""), None);
    }
}
