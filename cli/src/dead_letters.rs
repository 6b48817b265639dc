//! `mailrun dead-letters`: what could not be sent, and sending it again.

use anyhow::Result;
use mailrun_core::item::ItemState;
use mailrun_ledger::{
    runs::{self, ReplayWish, Replayed},
    stored::Stored,
};
use uuid::Uuid;

use crate::ledger::Ledger;

/// Prints the dead letters by error.
///
/// # Errors
/// The database's.
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

/// Asks for a replay. It is carried out by the workers, and seen on the runs' pages.
///
/// # Errors
/// The database's.
pub async fn replay(
    ledger: &Ledger,
    run_id: Option<Uuid>,
    error: Option<String>,
    unknown: bool,
    restored: bool,
) -> Result<()> {
    let states = vec![if unknown { ItemState::Unknown } else { ItemState::Failed }];
    let wish = ReplayWish { run_id, states, error, token: Uuid::new_v4(), restored: restored || unknown };
    let Replayed { runs, unconfirmed } = runs::replay(&ledger.pool, &wish).await?;
    if unconfirmed > 0 {
        println!(
            "{unconfirmed} of the runs were restored from a backup: what failed in them may have been sent since. --restored \
             sends it again all the same."
        );
    }
    match runs {
        0 => println!("Nothing matches: nothing is sent again."),
        1 => println!("One run is started again."),
        count => println!("{count} runs are started again."),
    }
    Ok(())
}
