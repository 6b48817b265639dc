//! `mailrun setup`: the schema and the topology, by users who may create both.

use std::time::Duration;

use anyhow::{Context as _, Result};
use mailrun_shared::{broker::Broker, config::Config, retry::Reconnect, store};
use tokio::time::{Instant, sleep};
use tracing::info;

/// The servers may be starting too.
const PATIENCE: Duration = Duration::from_secs(60);

/// Migrates the database and declares the topology. Repeating it changes nothing.
///
/// # Errors
/// When a server can't be reached within a minute, or its user has no right to.
pub async fn run(config: &Config) -> Result<()> {
    let pool = store::open(&config.database, "mailrun setup").context("database.url is not usable")?;
    patiently(async || pool.acquire().await.map(drop), store::may_pass).await.context("PostgreSQL can't be reached")?;
    store::migrate(&pool).await.context("the schema can't be brought up to date")?;
    info!("the schema is up to date");
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

#[cfg(test)]
mod tests {
    /// Who declares the queues has to know the mailer, and so have the pages.
    #[test]
    fn every_container_of_ours_reads_the_same_settings() {
        let compose = include_str!("../../docker-compose.yml");
        let (_, common) = compose.split_once("x-mailrun: &mailrun\n").unwrap();
        let (common, _) = common.split_once("\nx-").unwrap();
        assert!(common.contains("  env_file:\n    - path: mailrun.env\n      required: false\n"), "{common}");
        for service in ["setup", "web", "fan-out", "worker", "progress"] {
            let (_, settings) = compose.split_once(&format!("\n  {service}:\n")).unwrap();
            assert!(settings.starts_with("    <<: *mailrun\n"), "{service}");
        }
    }
}
