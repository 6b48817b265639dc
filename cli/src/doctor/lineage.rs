//! Whether the ledger and the virtual host belong together, and whether the ledger is older than the messages.

use anyhow::Result;
use mailrun_app::lineage::Foreign;
use mailrun_broker::{
    BrokerError,
    marker::{Claim, Marker},
};
use mailrun_core::epoch::BEHIND;
use mailrun_ledger::installation;

use super::{
    Patient,
    queues::Conveyor,
    report::{Finding, Report},
};

pub(super) const CHECK: &str = "installation";

/// Compares the two.
///
/// # Errors
/// A server's.
pub(super) async fn examine(patient: &Patient, conveyor: Option<&Conveyor>, report: &mut Report) -> Result<()> {
    let Some(conveyor) = conveyor else { return Ok(()) };
    let ledger = installation::read(&mut *patient.pool.acquire().await?).await?;
    let marker = Marker::open(&conveyor.broker).await?;
    match marker.claim(ledger.id, Claim::Verify).await {
        Ok(()) => {}
        Err(BrokerError::Foreign { owner }) => {
            report.add(Finding::new(
                CHECK,
                "the virtual host belongs to another installation",
                format!("{}. Workers refuse to start", Foreign { id: ledger.id, owner }),
                "Set amqp.urls or AMQP_URL to a virtual host of this installation's own",
            ));
            return Ok(());
        }
        Err(BrokerError::Unmarked) => {
            let finding = Finding::new(
                CHECK,
                "the virtual host is not marked",
                "nothing keeps another installation from using it too",
                "Run mailrun setup",
            );
            let claim = marker.claim(ledger.id, Claim::Adopt);
            report.add(patient.mend(finding, claim).await);
        }
        Err(error) => return Err(error.into()),
    }
    // Under the lock: a process that starts reads the marker too, and only one can at a time.
    let mut tx = patient.pool.begin().await?;
    installation::lock(&mut tx).await?;
    let ledger = installation::read(&mut tx).await?;
    let marked = marker.read_epoch(ledger.id).await?.unwrap_or_default();
    drop(tx);
    marker.close().await;
    conveyor.broker.epoch().record(ledger.epochs, marked);
    if marked > ledger.epochs.present {
        report.add(Finding::new(
            CHECK,
            "the ledger is older than the messages",
            BEHIND.to_owned(),
            "Stop the workers and run mailrun restored",
        ));
    } else {
        report.fine(CHECK, "the virtual host is this installation's, and the ledger is current");
    }
    Ok(())
}
