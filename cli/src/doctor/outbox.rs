//! The outbox: whether what was committed is handed to RabbitMQ.

use std::time::Duration;

use anyhow::{Context as _, Result};
use mailrun_broker::Outgoing;
use mailrun_core::message::DeadReason;
use mailrun_ledger::outbox::{self, Waiting};

use super::{
    Patient, are,
    queues::Conveyor,
    report::{Finding, Report},
};

pub(super) const CHECK: &str = "outbox";
/// The relay looks every second.
const LATE: Duration = Duration::from_secs(10);
/// Messages looked at.
const MOST: i64 = 10_000;

/// A message that should be published by now, and how: or why it can't be.
struct Overdue {
    id: i64,
    message: Outgoing,
    /// None: it can be read.
    unreadable: Option<String>,
}

impl Overdue {
    fn new(waiting: Waiting) -> Self {
        let Waiting { id, kind, message } = waiting;
        let body = message.to_string().into_bytes();
        match Outgoing::read(&kind, message) {
            Ok(message) => Self { id, message, unreadable: None },
            Err(error) => {
                let why = error.to_string();
                let message = Outgoing::raw("", kind, body).dead(DeadReason::Poison, &why);
                Self { id, message, unreadable: Some(why) }
            }
        }
    }
}

/// Looks at it.
///
/// # Errors
/// The database's.
pub(super) async fn examine(patient: &Patient, conveyor: Option<&Conveyor>, report: &mut Report) -> Result<()> {
    let overdue = outbox::overdue(&mut *patient.pool.acquire().await?, LATE, MOST).await?;
    let (late, unreadable): (Vec<_>, Vec<_>) =
        overdue.into_iter().map(Overdue::new).partition(|overdue| overdue.unreadable.is_none());
    if late.is_empty() && unreadable.is_empty() {
        report.fine(CHECK, "nothing waits for longer than it has to");
    }
    if !late.is_empty() {
        let finding = Finding::new(
            CHECK,
            format!("{} not handed over", are(late.len(), "message", "messages")),
            format!(
                "Runs or tests that were accepted more than {} s ago have not been told to RabbitMQ, so they don't begin; \
                 nothing is lost. The relay, which does that, is a part of mailrun web",
                LATE.as_secs()
            ),
            "--fix hands them over now; see that mailrun web runs and reaches RabbitMQ, or the next ones wait as well",
        );
        report.add(patient.mend(finding, hand_over(patient, conveyor, late)).await);
    }
    if !unreadable.is_empty() {
        let finding = not_understood(&unreadable);
        report.add(patient.mend(finding, hand_over(patient, conveyor, unreadable)).await);
    }
    Ok(())
}

fn not_understood(unreadable: &[Overdue]) -> Finding {
    let why = unreadable.first().and_then(|overdue| overdue.unreadable.as_deref()).unwrap_or_default();
    let ids: Vec<String> = unreadable.iter().take(5).map(|overdue| overdue.id.to_string()).collect();
    Finding::new(
        CHECK,
        format!("{} not understood", are(unreadable.len(), "message", "messages")),
        format!(
            "This version can't read rows of the outbox (id {}): {why}. Others are not held up by them. A run that such a row \
             was to begin is begun by the sweeper all the same; a wish to retry or to cancel has to be uttered again",
            ids.join(", ")
        ),
        "--fix moves them to mailrun.dead, as poison, where they can be looked at. If a newer Mailrun wrote them, use that one \
         instead, and they go out by themselves",
    )
}

/// Publishes them as the relay would, those that can't be read as dead letters, and marks them once that is confirmed.
async fn hand_over(patient: &Patient, conveyor: Option<&Conveyor>, overdue: Vec<Overdue>) -> Result<()> {
    let publisher = conveyor.and_then(|conveyor| conveyor.publisher.as_ref()).context("RabbitMQ takes no messages")?;
    let mut tx = patient.pool.begin().await?;
    let ids: Vec<i64> = overdue.iter().map(|overdue| overdue.id).collect();
    // The others are being published at this moment, or are by now.
    let locked = outbox::lock(&mut tx, &ids).await?;
    let messages = overdue.into_iter().filter(|overdue| locked.contains(&overdue.id)).map(|overdue| overdue.message);
    publisher.publish_soon(messages.collect()).await?;
    outbox::mark_published(&mut tx, &locked).await?;
    Ok(tx.commit().await?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_cannot_be_read_becomes_a_dead_letter_as_it_is() {
        let waiting = |kind: &str| Waiting {
            id: 7,
            kind: kind.into(),
            message: json!({ "run_id": "00000000-0000-0000-0000-000000000007" }),
        };
        assert_eq!(Overdue::new(waiting("mailrun.run.v1")).unreadable, None);
        let strange = Overdue::new(waiting("mailrun.run.v9"));
        assert_eq!(strange.unreadable.as_deref(), Some("its type is not known"));
        assert_eq!(strange.message.properties().kind().as_ref().unwrap().as_str(), "mailrun.run.v9");
        assert!(not_understood(&[strange]).what.contains("(id 7): its type is not known."));
    }
}
