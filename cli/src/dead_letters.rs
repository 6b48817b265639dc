//! `mailrun dead-letters`: what could not be sent, and sending it again.

use anyhow::{Result, bail};
use mailrun_shared::{
    config::Config,
    item::ItemState,
    store::{
        self,
        runs::{self, ReplayWish},
    },
};
use sqlx::PgPool;
use uuid::Uuid;

use crate::{
    local::Servers,
    stack::{self, running},
};

/// The ledger, and the private servers if it lives there.
pub struct Reached {
    pool: PgPool,
    _servers: Servers,
}

impl Reached {
    /// The ledger.
    #[must_use]
    pub fn pool(&self) -> &PgPool {
        &self.pool
    }
}

/// Reaches the ledger: the one that is configured, or that of the `up` running here.
///
/// # Errors
/// When there is neither.
pub async fn reach(config: &Config) -> Result<Reached> {
    let home = stack::home();
    if !config.named.database && running(&home).is_none() {
        bail!("Mailrun does not run here: start it with `mailrun up`, or set DATABASE_URL and AMQP_URL");
    }
    let servers = Servers::start(config, &home, |step| eprintln!("{step} …")).await?;
    let mut database = config.database.clone();
    database.url = servers.database_url.clone();
    Ok(Reached { pool: store::open(&database, "mailrun operator")?, _servers: servers })
}

/// Prints the dead letters by error.
///
/// # Errors
/// The database's.
pub async fn show(reached: &Reached) -> Result<()> {
    let errors = runs::dead_by_error(&reached.pool).await?;
    if errors.is_empty() {
        println!("There are no dead letters.");
    }
    for (state, error, count) in errors {
        let state = if state == ItemState::Unknown { "unknown" } else { "failed" };
        println!("{count:>10}  {state:<8}  {error}");
    }
    Ok(())
}

/// Asks for a replay. It is carried out by the workers, and seen on the runs' pages.
///
/// # Errors
/// The database's.
pub async fn replay(reached: &Reached, run_id: Option<Uuid>, error: Option<String>, unknown: bool) -> Result<()> {
    let states = vec![if unknown { ItemState::Unknown } else { ItemState::Failed }];
    let wish = ReplayWish { run_id, states, error, token: Uuid::new_v4() };
    match runs::replay(&reached.pool, &wish).await? {
        0 => println!("Nothing matches: nothing is sent again."),
        1 => println!("One run is started again."),
        count => println!("{count} runs are started again."),
    }
    Ok(())
}
