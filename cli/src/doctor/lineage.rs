//! Checks that the ledger and the virtual host belong together, and that the ledger is not older than the messages.

use anyhow::Result;
use mailrun_app::lineage::Foreign;
use mailrun_broker::{
    BrokerError,
    marker::{Claim, Marker},
};
use mailrun_core::epoch::BEHIND;
use mailrun_ledger::installation;

use super::{
    Target,
    queues::RabbitMq,
    report::{Finding, Report},
};

pub(super) const CHECK: &str = "installation";

pub(super) async fn examine(target: &Target, rabbitmq: Option<&RabbitMq>, report: &mut Report) -> Result<()> {
    let Some(rabbitmq) = rabbitmq else { return Ok(()) };
    let ledger = installation::read(&mut *target.pool.acquire().await?).await?;
    let marker = Marker::open(&rabbitmq.broker).await?;
    match marker.claim(ledger.id, Claim::Verify).await {
        Ok(()) => {}
        Err(BrokerError::Foreign { owner }) => {
            report.add(Finding::new(
                CHECK,
                "the virtual host belongs to another installation",
                format!("{}. Workers do not start", Foreign { id: ledger.id, owner }),
                "Set amqp.urls or AMQP_URL to this installation's own virtual host",
            ));
            return Ok(());
        }
        Err(BrokerError::Unmarked) => {
            let finding = Finding::new(
                CHECK,
                "the virtual host is not marked",
                "Nothing prevents another installation from using it",
                "Run mailrun setup",
            );
            let claim = marker.claim(ledger.id, Claim::Adopt);
            report.add(target.repair(finding, claim).await);
        }
        Err(error) => return Err(error.into()),
    }
    // Under the lock, because a starting process also reads the marker, and only one can at a time.
    let mut tx = target.pool.begin().await?;
    installation::lock(&mut tx).await?;
    let ledger = installation::read(&mut tx).await?;
    let marked = marker.read_epoch(ledger.id).await?.unwrap_or_default();
    drop(tx);
    marker.close().await;
    rabbitmq.broker.epoch().record(ledger.epochs, marked);
    if marked > ledger.epochs.present {
        report.add(Finding::new(
            CHECK,
            "the ledger is older than the messages",
            BEHIND.to_owned(),
            "Stop the workers and run mailrun restored",
        ));
    } else {
        report.fine(CHECK, "the virtual host belongs to this installation, and the ledger is current");
    }
    Ok(())
}
