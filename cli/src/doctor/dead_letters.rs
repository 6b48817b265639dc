//! Checks whether the messages on the dead-letter queue are still valid. The ledger is the source of truth, and the queue its view
//! for the management console: a missing dead letter is no loss, because a replay works from the ledger.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use lapin::{message::Delivery, options::BasicGetOptions};
use mailrun_broker::dead_letters::{Fate, Walked, header_text, walk_over};
use mailrun_broker::{REASON_HEADER, depth};
use mailrun_core::message::{DeadReason, ItemMessage, decode};
use mailrun_core::queue::DEAD;
use mailrun_ledger::audit::{self, Subject, Troubled};
use tokio::time::timeout;

use super::{
    Target, are, grouped,
    queues::RabbitMq,
    report::{Finding, Report},
    unfinished,
};

pub(super) const CHECK: &str = "dead letters";
/// Maximum dead letters checked; of a longer queue, the first ones.
const MAX_CHECKED: u32 = 20_000;
/// Time limit for reading the queue.
const TIMEOUT: Duration = Duration::from_secs(120);
/// Items looked up per query.
const BATCH: usize = 1_000;

/// An item and an attempt.
type Key = (i64, i32);

/// The dead letters by validity.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Sorted {
    /// The item was sent or retried since, or its run is pruned: the message has no effect.
    outdated: HashSet<Key>,
    /// Items whose dead letter waits for a person.
    waiting: HashSet<i64>,
    /// Of runs that are in progress or have just finished: fan-out may be about to remove them.
    unsettled: usize,
}

pub(super) async fn examine(target: &Target, rabbitmq: Option<&RabbitMq>, report: &mut Report) -> Result<()> {
    let Troubled { failed, unknown } = audit::troubled(&mut *target.pool.acquire().await?).await?;
    let in_ledger =
        format!("in the ledger, {} failed and {} unknown", mailrun_web::grouped(failed), mailrun_web::grouped(unknown));
    let expected = usize::try_from(failed + unknown).unwrap_or_default();
    if unknown > 0 {
        report.remark(
            CHECK,
            format!(
                "{} unknown: it cannot be established whether the mail was sent. A person decides: “Send … again” on the run's page \
                sends it, perhaps a second time",
                are(usize::try_from(unknown).unwrap_or_default(), "invitation", "invitations")
            ),
        );
    }
    let Some(rabbitmq) = rabbitmq else {
        report.remark(CHECK, format!("the queue cannot be read; {in_ledger}"));
        return Ok(());
    };
    let contents = timeout(TIMEOUT, read(rabbitmq)).await.context("reading the queue timed out")??;
    let QueueContents { all, poison, readable } = contents;
    let subjects = subjects(target, &readable).await?;
    let sorted = sort(&readable, &subjects);
    if sorted.outdated.is_empty() {
        report.fine(CHECK, format!("{} on the queue; {in_ledger}", grouped(all as usize)));
    } else {
        let finding = outdated(sorted.outdated.len());
        report.add(target.repair(finding, remove(rabbitmq, &sorted.outdated)).await);
    }
    if poison > 0 {
        report.remark(
            CHECK,
            format!(
                "{} poison: it could not be parsed, or it exceeded the delivery limit and its work was republished. See \
                x-mailrun-error or x-death in the management console, where it can be removed",
                are(poison, "message", "messages")
            ),
        );
    }
    let seen_all = all <= MAX_CHECKED;
    let missing = expected.saturating_sub(sorted.waiting.len());
    if seen_all && missing > 0 && sorted.unsettled == 0 && unfinished(target).await?.is_empty() {
        let of = are(missing, "failed or unknown invitation", "failed or unknown invitations");
        report.remark(CHECK, format!("{of} not on the queue, which is no loss: a replay works from the ledger"));
    }
    if !seen_all {
        report.remark(CHECK, format!("only the first {} dead letters were checked", grouped(MAX_CHECKED as usize)));
    }
    Ok(())
}

struct QueueContents {
    all: u32,
    poison: usize,
    readable: Vec<Key>,
}

/// Reads the queue. Nothing is acknowledged, so all messages return when the channel closes.
async fn read(rabbitmq: &RabbitMq) -> Result<QueueContents> {
    let channel = rabbitmq.channel().await?;
    // The topology check has reported the missing queue.
    let Ok(all) = depth(&channel, DEAD).await else {
        return Ok(QueueContents { all: 0, poison: 0, readable: Vec::new() });
    };
    let mut contents = QueueContents { all, poison: 0, readable: Vec::new() };
    for _ in 0..all.min(MAX_CHECKED) {
        let Some(dead_letter) = channel.basic_get(DEAD.into(), BasicGetOptions::default()).await? else { break };
        match key(&dead_letter.delivery) {
            Some(key) => contents.readable.push(key),
            None => contents.poison += 1,
        }
    }
    channel.close(200, "done".into()).await?;
    Ok(contents)
}

/// None: the message cannot be parsed.
fn key(dead_letter: &Delivery) -> Option<Key> {
    if header_text(dead_letter, REASON_HEADER).as_deref() == Some(DeadReason::Poison.as_str()) {
        return None;
    }
    let kind = dead_letter.properties.kind().as_ref().map(lapin::types::ShortString::as_str);
    let item: ItemMessage = decode(kind, &dead_letter.data).ok()?;
    Some((item.item_id, item.attempt))
}

async fn subjects(target: &Target, dead_letters: &[Key]) -> Result<HashMap<i64, Subject>> {
    let mut conn = target.pool.acquire().await?;
    let mut subjects = HashMap::new();
    for batch in dead_letters.chunks(BATCH) {
        let ids: Vec<i64> = batch.iter().map(|(item_id, _)| *item_id).collect();
        let found = audit::subjects(&mut conn, &ids, target.stalled_after()).await?;
        subjects.extend(found.into_iter().map(|subject| (subject.item_id, subject)));
    }
    Ok(subjects)
}

/// A dead letter holds its item's next attempt, so it is outdated when that attempt is no longer allowed.
fn sort(dead_letters: &[Key], subjects: &HashMap<i64, Subject>) -> Sorted {
    let mut sorted = Sorted::default();
    for (item_id, attempt) in dead_letters {
        match subjects.get(item_id) {
            // The item's state is of a later version, so its dead letter is left.
            Some(Subject { standing: None, .. }) => sorted.unsettled += 1,
            Some(Subject { standing: Some(standing), .. }) if standing.allows(*attempt) => {
                sorted.waiting.insert(*item_id);
            }
            Some(subject) if !subject.quiet => sorted.unsettled += 1,
            _ => drop(sorted.outdated.insert((*item_id, *attempt))),
        }
    }
    sorted
}

fn outdated(count: usize) -> Finding {
    Finding::new(
        CHECK,
        format!("{} outdated", are(count, "dead letter", "dead letters")),
        "Their invitations were sent or retried since, or belong to pruned runs. They are harmless: moving them to mailrun.items \
        sends nothing",
        "--fix removes them from the queue",
    )
}

async fn remove(rabbitmq: &RabbitMq, outdated: &HashSet<Key>) -> Result<()> {
    let publisher = rabbitmq.publisher.as_ref().context("RabbitMQ accepts no messages")?;
    let removes = |dead_letter: &Delivery| key(dead_letter).is_some_and(|key| outdated.contains(&key));
    let fate = |dead_letter: &Delivery| if removes(dead_letter) { Fate::Goes } else { Fate::Stays };
    let Walked { changed, left } = walk_over(&rabbitmq.broker, publisher, fate).await?;
    ensure!(left == 0, "{changed} dead letters were removed and {left} were not reached: run it again");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use mailrun_core::item::{
        ItemState::{Failed, Pending, Sent, Unknown},
        Standing,
    };

    #[test]
    fn a_dead_letter_is_outdated_when_its_attempt_is_not_allowed() {
        let subject = |item_id, attempt, state, quiet| {
            (item_id, Subject { item_id, standing: Some(Standing { attempt, state }), quiet })
        };
        let subjects = HashMap::from([
            subject(1, 1, Failed, true),
            subject(2, 1, Sent, true),
            subject(3, 2, Unknown, true),
            subject(4, 1, Sent, false),
            subject(5, 1, Pending, false),
            // In a state of a later version.
            (7, Subject { item_id: 7, standing: None, quiet: true }),
        ]);
        // The third was retried since and has two dead letters; the sixth is pruned.
        let dead_letters = [(1, 2), (2, 2), (3, 2), (3, 3), (4, 2), (5, 2), (6, 2), (7, 2)];
        let sorted = sort(&dead_letters, &subjects);
        assert_eq!(sorted.outdated, HashSet::from([(2, 2), (3, 2), (6, 2)]));
        assert_eq!(sorted.waiting, HashSet::from([1, 3, 5]));
        assert_eq!(sorted.unsettled, 2);
    }
}
