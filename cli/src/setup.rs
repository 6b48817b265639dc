//! `mailrun setup`: the schema and the topology, by users who may create both.

use std::time::Duration;

use anyhow::{Context as _, Result};
use mailrun_shared::{
    broker::{Broker, wait_until_reachable},
    config::Config,
    retry::Reconnect,
    store,
};
use tracing::info;

/// The servers may be starting too.
const PATIENCE: Duration = Duration::from_secs(60);

/// Migrates the database and declares the topology. Repeating it changes nothing.
///
/// # Errors
/// When a server can't be reached within a minute, or its user has no right to.
pub async fn run(config: &Config) -> Result<()> {
    let pool = store::open(&config.database, "mailrun setup").context("database.url is not usable")?;
    wait_for_database(&pool).await.context("PostgreSQL can't be reached")?;
    store::migrate(&pool).await.context("the schema can't be brought up to date")?;
    info!("the schema is up to date");
    let broker = Broker::new(config, "mailrun setup");
    wait_until_reachable(&broker, PATIENCE).await?;
    broker.declare_topology().await.context("the queues can't be declared")?;
    info!("the queues are declared");
    Ok(())
}

async fn wait_for_database(pool: &sqlx::PgPool) -> sqlx::Result<()> {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    let mut trouble = Reconnect::default();
    loop {
        match pool.acquire().await {
            Err(error) if store::may_pass(&error) && tokio::time::Instant::now() < deadline => {
                tokio::time::sleep(trouble.next_wait()).await;
            }
            result => return result.map(drop),
        }
    }
}
