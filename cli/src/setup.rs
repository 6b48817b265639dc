//! `mailrun setup`: the schema, a role for each process, and the topology, by users who may create them.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use mailrun_app::{config::Config, lineage::Foreign};
use mailrun_broker::{
    Broker, BrokerError,
    marker::{Claim, Marker},
};
use mailrun_core::retry::Reconnect;
use mailrun_ledger::{
    self,
    grants::{self, Granted},
    installation,
};
use tokio::time::{Instant, sleep};
use tracing::info;
use uuid::Uuid;

/// The servers may be starting too.
const PATIENCE: Duration = Duration::from_secs(60);

/// Migrates the database, grants each process what it writes, declares the topology, and marks the virtual host as this
/// installation's. Repeating it changes nothing. `take_over`: also if it was marked by another installation, which no longer
/// exists.
///
/// # Errors
/// When a server can't be reached within a minute, its user has no right to, or the virtual host belongs to another
/// installation.
pub async fn run(config: &Config, take_over: bool) -> Result<()> {
    let pool = mailrun_ledger::open(&config.database, "mailrun setup").context("database.url is not usable")?;
    patiently(async || pool.acquire().await.map(drop), mailrun_ledger::may_pass)
        .await
        .context("PostgreSQL can't be reached")?;
    mailrun_ledger::migrate(&pool).await.context("the schema can't be brought up to date")?;
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
    let broker = config.broker("mailrun setup");
    patiently(async || broker.declare_topology().await, |_| true).await.context("the queues can't be declared")?;
    info!("the queues are declared");
    let id = installation::read(&mut *pool.acquire().await?).await?.id;
    let claim = if take_over { Claim::TakeOver } else { Claim::Adopt };
    match patiently(async || mark(&broker, id, claim).await, |error| !is_foreign(error)).await {
        Err(BrokerError::Foreign { owner }) => return Err(Foreign { id, owner }.into()),
        claimed => claimed.context("the virtual host can't be marked")?,
    }
    Ok(())
}

async fn mark(broker: &Broker, id: Uuid, claim: Claim) -> Result<(), BrokerError> {
    let marker = Marker::open(broker).await?;
    let marked = marker.claim(id, claim).await;
    marker.close().await;
    marked
}

fn is_foreign(error: &BrokerError) -> bool {
    matches!(error, BrokerError::Foreign { .. })
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
