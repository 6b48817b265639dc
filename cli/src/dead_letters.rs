//! `mailrun dead-letters`: shows and replays failed and unknown invitations.

use anyhow::Result;
use mailrun_core::item::ItemState;
use mailrun_ledger::{
    runs::{self, ReplayWish, Replayed},
    stored::Stored,
};
use uuid::Uuid;

use crate::ledger::Ledger;

/// Prints the dead letters, grouped by error.
pub async fn show(ledger: &Ledger) -> Result<()> {
    let errors = runs::dead_by_error(&ledger.pool).await?;
    if errors.is_empty() {
        println!("There are no dead letters.");
    }
    for (state, error, count) in errors {
        let state = match state {
            Stored::Known(ItemState::Unknown) => "unknown",
            Stored::Known(_) => "failed",
            Stored::Later(ref word) => word,
        };
        println!("{count:>10}  {state:<8}  {error}");
    }
    Ok(())
}

/// Requests a replay. Workers carry it out; the runs' pages show it.
pub async fn replay(
    ledger: &Ledger,
    run_id: Option<Uuid>,
    error: Option<String>,
    unknown: bool,
    restored: bool,
) -> Result<()> {
    let states = vec![if unknown { ItemState::Unknown } else { ItemState::Failed }];
    let request = ReplayWish { run_id, states, error, token: Uuid::new_v4(), restored: restored || unknown };
    let Replayed { runs, unconfirmed } = runs::replay(&ledger.pool, &request).await?;
    if unconfirmed > 0 {
        println!(
            "{unconfirmed} of the runs were restored from a backup: their failed invitations may have been sent since. Use \
            --restored to send them again."
        );
    }
    match runs {
        0 => println!("No invitations match; nothing was replayed."),
        1 => println!("Replaying 1 run."),
        count => println!("Replaying {count} runs."),
    }
    Ok(())
}
