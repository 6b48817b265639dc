//! Checks that a process's ledger and virtual host belong together: the same installation, and a ledger that is not older than
//! the messages.

use std::{sync::Arc, time::Duration};

use sqlx::PgPool;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use uuid::Uuid;

use mailrun_broker::{
    Broker, BrokerError,
    marker::{Claim, Marker},
};
use mailrun_core::{epoch::BEHIND, retry::Reconnect};
use mailrun_ledger::{
    in_time,
    installation::{self, Installation},
};

/// How often the ledger is read.
const READ_EVERY: Duration = Duration::from_secs(1);
/// The health key while the virtual host belongs to another installation.
const OWNER: &str = "RabbitMQ";

/// The virtual host belongs to another installation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the RabbitMQ virtual host belongs to another Mailrun installation{}, not to the one in this database ({id}). Give each \
     installation a virtual host of its own; if the other one no longer exists, run `mailrun setup --take-over`",
    owner.map(|owner| format!(" ({owner})")).unwrap_or_default()
)]
pub struct Foreign {
    /// The installation of this ledger.
    pub id: Uuid,
    /// The installation that owns the virtual host, if the broker names it.
    pub owner: Option<Uuid>,
}

#[derive(Debug, thiserror::Error)]
enum LineageError {
    #[error("PostgreSQL: {0}")]
    Ledger(#[from] sqlx::Error),
    #[error(transparent)]
    Broker(BrokerError),
    #[error(transparent)]
    Foreign(#[from] Foreign),
}

/// Keeps [`Broker::epoch`] up to date until `stop`. It compares the ledger with the broker once and begins this process's epoch.
/// Then it reads the ledger every second, or when a message requests it, and begins a new epoch every minute. Consumers, the
/// sweeper and the outbox publisher wait for the first comparison.
///
/// # Errors
/// The virtual host belongs to another installation. The process must end.
pub async fn keep(
    pool: &PgPool,
    broker: &Arc<Broker>,
    limit: Duration,
    stop: &CancellationToken,
) -> Result<(), Foreign> {
    let mut retry = Reconnect::default();
    let mut failed = false;
    let id = loop {
        // A separate task, so that it always runs to completion: lapin logs an error if a connection is dropped while it is being
        // established.
        let begun = tokio::spawn({
            let (pool, broker) = (pool.clone(), Arc::clone(broker));
            async move { in_time(limit * 4, begin(&pool, &broker)).await }
        });
        let Some(begun) = stop.run_until_cancelled(begun).await else { return Ok(()) };
        match begun {
            Ok(Ok(id)) => break id,
            Ok(Err(LineageError::Foreign(foreign))) => return Err(foreign),
            Ok(Err(error)) if !failed => {
                warn!(%error, "can't compare the ledger with the broker, trying again");
                failed = true;
            }
            // Logged already; or a panic, which is logged where it happened.
            Ok(Err(_)) | Err(_) => {}
        }
        if stop.run_until_cancelled(sleep(retry.next_wait())).await.is_none() {
            return Ok(());
        }
    };
    let epoch = broker.epoch();
    if epoch.is_behind() {
        error!("{BEHIND}");
    }
    let mut marked = !epoch.is_behind();
    loop {
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = sleep(READ_EVERY) => {}
            () = epoch.asked() => {}
        }
        let latest = epoch.latest();
        let read = async { installation::read(&mut *pool.acquire().await?).await };
        let read = in_time(limit, read).await;
        broker.health().database_answers(read.is_ok());
        let Ok(installation) = read else { continue };
        if epoch.record(installation.epochs, latest) {
            if epoch.is_behind() { error!("{BEHIND}") } else { info!("the ledger is current again") }
        }
        let is_marked = marked && !installation.is_due;
        if is_marked || !epoch.is_current() {
            continue;
        }
        marked = false;
        match begin_due(pool, broker, limit, id, installation).await {
            Ok(()) => marked = true,
            Err(LineageError::Foreign(foreign)) => return Err(foreign),
            Err(error) => warn!(%error, "can't store the new epoch on the broker, trying again"),
        }
    }
}

/// Compares ledger and broker, and begins this process's epoch unless the ledger is behind. The lock serialises processes that
/// start together, since only one at a time can read the marker's epoch.
async fn begin(pool: &PgPool, broker: &Broker) -> Result<Uuid, LineageError> {
    let mut tx = pool.begin().await?;
    installation::lock(&mut tx).await?;
    let installation = installation::read(&mut tx).await?;
    let marker = claim(broker, installation.id).await?;
    if let Some(marked) = marker.read_epoch(installation.id).await.map_err(LineageError::Broker)? {
        broker.epoch().observe(marked);
    }
    let latest = broker.epoch().latest();
    if installation.epochs.present < latest {
        broker.epoch().record(installation.epochs, latest);
        return Ok(installation.id);
    }
    let mut epochs = installation.epochs;
    epochs.present = installation::begin_epoch(&mut tx).await?;
    tx.commit().await?;
    broker.epoch().record(epochs, latest);
    // After the commit, since the marker must never be ahead of the ledger. If this fails, the next epoch is stored.
    marker.write_epoch(installation.id, epochs.present).await.map_err(LineageError::Broker)?;
    marker.close().await;
    Ok(installation.id)
}

/// Begins the next epoch, unless another process already has, and stores it on the broker.
async fn begin_due(
    pool: &PgPool,
    broker: &Broker,
    limit: Duration,
    id: Uuid,
    installation: Installation,
) -> Result<(), LineageError> {
    let present = installation.epochs.present;
    let next = async { installation::begin_epoch_after(&mut *pool.acquire().await?, present).await };
    if let Some(next) = in_time(limit, next).await? {
        let marker = claim(broker, id).await?;
        marker.write_epoch(id, next).await.map_err(LineageError::Broker)?;
        marker.close().await;
    }
    Ok(())
}

async fn claim(broker: &Broker, id: Uuid) -> Result<Marker, LineageError> {
    let claim = if broker.declares_topology() { Claim::Adopt } else { Claim::Verify };
    let marker = Marker::open(broker).await.map_err(LineageError::Broker)?;
    match marker.claim(id, claim).await {
        Ok(()) => {
            broker.health().fine(OWNER);
            Ok(marker)
        }
        Err(BrokerError::Foreign { owner }) => {
            let foreign = Foreign { id, owner };
            broker.health().trouble(OWNER, foreign.to_string());
            Err(foreign.into())
        }
        Err(error) => Err(LineageError::Broker(error)),
    }
}
