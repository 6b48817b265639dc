//! `mailrun setup`: creates the schema, a role for each process, and the topology, by users with the right to create them.

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

/// How long to retry: the servers may be starting too.
const RETRY_FOR: Duration = Duration::from_secs(60);

/// Migrates the database, grants each process its rights, declares the topology, and marks the virtual host as this
/// installation's. Repeating it changes nothing. `take_over`: even if another installation marked it, which must no longer exist.
pub async fn run(config: &Config, take_over: bool) -> Result<()> {
    let pool = mailrun_ledger::open(&config.database, "mailrun setup").context("invalid database.url")?;
    retry(async || pool.acquire().await.map(drop), mailrun_ledger::may_pass)
        .await
        .context("cannot connect to PostgreSQL")?;
    mailrun_ledger::migrate(&pool).await.context("migrating the schema failed")?;
    info!("schema up to date");
    match grants::grant(&pool, &config.database.roles).await.context("creating the roles failed")? {
        Granted::Yes => info!("rights granted to the roles"),
        Granted::MayNotCreateRoles if config.database.roles.is_used() => {
            bail!("cannot create the roles: the user of database.url lacks CREATEROLE");
        }
        Granted::MayNotCreateRoles => {
            info!("roles not created, this user lacks CREATEROLE: all processes use one user");
        }
    }
    let broker = config.broker("mailrun setup");
    retry(async || broker.declare_topology().await, |_| true).await.context("declaring the queues failed")?;
    info!("queues declared");
    broker.delete_former_queues().await.context("deleting the queues of earlier versions failed")?;
    let id = installation::read(&mut *pool.acquire().await?).await?.id;
    let claim = if take_over { Claim::TakeOver } else { Claim::Adopt };
    match retry(async || mark(&broker, id, claim).await, |error| !is_foreign(error)).await {
        Err(BrokerError::Foreign { owner }) => return Err(Foreign { id, owner }.into()),
        claimed => claimed.context("marking the virtual host failed")?,
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

/// Retries temporary errors for [`RETRY_FOR`].
async fn retry<T, E>(attempt: impl AsyncFn() -> Result<T, E>, may_pass: impl Fn(&E) -> bool) -> Result<T, E> {
    let deadline = Instant::now() + RETRY_FOR;
    let mut reconnect = Reconnect::default();
    loop {
        match attempt().await {
            Err(error) if may_pass(&error) && Instant::now() < deadline => sleep(reconnect.next_wait()).await,
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    /// Setup must know the mailer to declare the queues, and so must the web server.
    #[test]
    fn all_our_containers_read_the_same_settings() {
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
