//! The outbox: whether committed messages are published to RabbitMQ.

use std::time::Duration;

use anyhow::{Context as _, Result};
use mailrun_broker::Outgoing;
use mailrun_core::message::DeadReason;
use mailrun_ledger::outbox::{self, Waiting};

use super::{
    Target, are,
    queues::RabbitMq,
    report::{Finding, Report},
};

pub(super) const CHECK: &str = "outbox";
/// The outbox publisher polls every second.
const LATE: Duration = Duration::from_secs(10);
/// Maximum messages checked.
const MAX_CHECKED: i64 = 10_000;

/// A message that should have been published, or that cannot be parsed.
struct Overdue {
    id: i64,
    message: Outgoing,
    /// Why it cannot be parsed.
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

pub(super) async fn examine(target: &Target, rabbitmq: Option<&RabbitMq>, report: &mut Report) -> Result<()> {
    let overdue = outbox::overdue(&mut *target.pool.acquire().await?, LATE, MAX_CHECKED).await?;
    let (late, unreadable): (Vec<_>, Vec<_>) =
        overdue.into_iter().map(Overdue::new).partition(|overdue| overdue.unreadable.is_none());
    if late.is_empty() && unreadable.is_empty() {
        report.fine(CHECK, "no messages are overdue");
    }
    if !late.is_empty() {
        let finding = Finding::new(
            CHECK,
            format!("{} not published", are(late.len(), "message", "messages")),
            format!(
                "Runs or tests accepted more than {} s ago have not been published to RabbitMQ, so they do not start; nothing \
                is lost. The outbox publisher is part of mailrun web",
                LATE.as_secs()
            ),
            "--fix publishes them now; check that mailrun web runs and can reach RabbitMQ",
        );
        report.add(target.repair(finding, publish(target, rabbitmq, late)).await);
    }
    if !unreadable.is_empty() {
        let finding = cannot_be_parsed(&unreadable);
        report.add(target.repair(finding, publish(target, rabbitmq, unreadable)).await);
    }
    Ok(())
}

fn cannot_be_parsed(unreadable: &[Overdue]) -> Finding {
    let why = unreadable.first().and_then(|overdue| overdue.unreadable.as_deref()).unwrap_or_default();
    let ids: Vec<String> = unreadable.iter().take(5).map(|overdue| overdue.id.to_string()).collect();
    Finding::new(
        CHECK,
        format!("{} not parsable", are(unreadable.len(), "message", "messages")),
        format!(
            "This version cannot parse rows of the outbox (id {}): {why}. Others are not held up by them. The sweeper starts a \
            run whose start is such a row; a retry or a cancellation must be requested again",
            ids.join(", ")
        ),
        "--fix moves them to mailrun.dead as poison, where they can be inspected. If a newer Mailrun wrote them, run that \
        version instead, and it publishes them",
    )
}

/// Publishes them like the outbox publisher, those that cannot be parsed as dead letters, and marks them once confirmed.
async fn publish(target: &Target, rabbitmq: Option<&RabbitMq>, overdue: Vec<Overdue>) -> Result<()> {
    let publisher =
        rabbitmq.and_then(|rabbitmq| rabbitmq.publisher.as_ref()).context("RabbitMQ accepts no messages")?;
    let mut tx = target.pool.begin().await?;
    let ids: Vec<i64> = overdue.iter().map(|overdue| overdue.id).collect();
    // The others have just been or are being published.
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
    fn an_unparsable_row_becomes_a_dead_letter_unchanged() {
        let waiting = |kind: &str| Waiting {
            id: 7,
            kind: kind.into(),
            message: json!({ "run_id": "00000000-0000-0000-0000-000000000007" }),
        };
        assert_eq!(Overdue::new(waiting("mailrun.run.v1")).unreadable, None);
        let unparsable = Overdue::new(waiting("mailrun.run.v9"));
        assert_eq!(unparsable.unreadable.as_deref(), Some("its type is not known"));
        assert_eq!(unparsable.message.properties().kind().as_ref().unwrap().as_str(), "mailrun.run.v9");
        assert!(cannot_be_parsed(&[unparsable]).what.contains("(id 7): its type is not known."));
    }
}
