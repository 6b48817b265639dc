//! `mailrun setup`: the schema, a role for each process, and the topology, by users who may create them.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use mailrun_shared::{
    broker::Broker,
    config::Config,
    retry::Reconnect,
    store::{
        self,
        grants::{self, Granted},
    },
};
use tokio::time::{Instant, sleep};
use tracing::info;

/// The servers may be starting too.
const PATIENCE: Duration = Duration::from_secs(60);

/// Migrates the database, grants each process what it writes, and declares the topology. Repeating it changes nothing.
///
/// # Errors
/// When a server can't be reached within a minute, or its user has no right to.
pub async fn run(config: &Config) -> Result<()> {
    let pool = store::open(&config.database, "mailrun setup").context("database.url is not usable")?;
    patiently(async || pool.acquire().await.map(drop), store::may_pass).await.context("PostgreSQL can't be reached")?;
    store::migrate(&pool).await.context("the schema can't be brought up to date")?;
    info!("the schema is up to date");
    match grants::grant(&pool, &config.database.roles).await.context("the roles can't be made")? {
        Granted::Yes => info!("the roles have their rights"),
        Granted::MayNotCreateRoles if config.database.roles.is_used() => {
            bail!("the roles can't be made: database.url names a user without the right to create roles (CREATEROLE)");
        }
        Granted::MayNotCreateRoles => {
            info!("the roles were not made: this user may not create roles; all processes use one user");
        }
    }
    let broker = Broker::new(config, "mailrun setup");
    patiently(async || broker.declare_topology().await, |_| true).await.context("the queues can't be declared")?;
    info!("the queues are declared");
    Ok(())
}

/// Tries again while the reason may pass and there is patience left.
async fn patiently<T, E>(attempt: impl AsyncFn() -> Result<T, E>, may_pass: impl Fn(&E) -> bool) -> Result<T, E> {
    let deadline = Instant::now() + PATIENCE;
    let mut trouble = Reconnect::default();
    loop {
        match attempt().await {
            Err(error) if may_pass(&error) && Instant::now() < deadline => sleep(trouble.next_wait()).await,
            result => return result,
        }
    }
}
