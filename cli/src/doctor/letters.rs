//! The dead letters: whether those on the queue still mean something. The ledger is the truth, and the queue its view for the
//! management console: a letter that is missing is no loss, since a replay works from the ledger.

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
    Patient, are, grouped,
    queues::Conveyor,
    report::{Finding, Report},
    unfinished,
};

pub(super) const CHECK: &str = "dead letters";
/// Letters looked at; on a queue with more, the first ones.
const MOST: u32 = 20_000;
/// RabbitMQ hands them out within this time.
const LONGEST_LOOK: Duration = Duration::from_secs(120);
/// Items looked up together.
const BATCH: usize = 1_000;

/// An item and an attempt.
type Key = (i64, i32);

/// What the letters on the queue are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Sorted {
    /// The item was sent after all, or sent again, or its run is pruned: the letter does nothing.
    outdated: HashSet<Key>,
    /// Items that wait in a letter for a person.
    waiting: HashSet<i64>,
    /// Of runs that go on, or have just ended: the pump may be about to take them off.
    unsettled: usize,
}

/// Looks at them.
///
/// # Errors
/// A server's.
pub(super) async fn examine(patient: &Patient, conveyor: Option<&Conveyor>, report: &mut Report) -> Result<()> {
    let Troubled { failed, unknown } = audit::troubled(&mut *patient.pool.acquire().await?).await?;
    let in_ledger =
        format!("in the ledger, {} failed and {} unknown", mailrun_web::grouped(failed), mailrun_web::grouped(unknown));
    let troubled = usize::try_from(failed + unknown).unwrap_or_default();
    if unknown > 0 {
        report.remark(
            CHECK,
            format!(
                "{} unknown: nobody can know whether the mail went out. A person decides: Send again on the run's page sends \
                 it, perhaps a second time",
                are(usize::try_from(unknown).unwrap_or_default(), "invitation", "invitations")
            ),
        );
    }
    let Some(conveyor) = conveyor else {
        report.remark(CHECK, format!("the queue can't be looked at; {in_ledger}"));
        return Ok(());
    };
    let letters = timeout(LONGEST_LOOK, read(conveyor)).await.context("RabbitMQ did not hand them out in time")??;
    let Letters { all, poison, readable } = letters;
    let subjects = subjects(patient, &readable).await?;
    let sorted = sort(&readable, &subjects);
    if sorted.outdated.is_empty() {
        report.fine(CHECK, format!("{} on the queue; {in_ledger}", grouped(all as usize)));
    } else {
        let finding = outdated(sorted.outdated.len());
        report.add(patient.mend(finding, remove(conveyor, &sorted.outdated)).await);
    }
    if poison > 0 {
        report.remark(
            CHECK,
            format!(
                "{} no invitation of anybody's: nobody understands it, or RabbitMQ had to deliver it too often, and what it \
                 says was said again. x-mailrun-error or x-death in the management console tells, and there it can be taken off",
                are(poison, "message", "messages")
            ),
        );
    }
    let seen_all = all <= MOST;
    let missing = troubled.saturating_sub(sorted.waiting.len());
    if seen_all && missing > 0 && sorted.unsettled == 0 && unfinished(patient).await?.is_empty() {
        let of = are(missing, "failed or unknown invitation", "failed or unknown invitations");
        report.remark(CHECK, format!("{of} not on the queue, which is no loss: Retry works from the ledger"));
    }
    if !seen_all {
        report.remark(CHECK, format!("only the first {} letters were looked at", grouped(MOST as usize)));
    }
    Ok(())
}

struct Letters {
    all: u32,
    poison: usize,
    readable: Vec<Key>,
}

/// Reads the queue. Nothing is acknowledged, so all of it is back when the channel ends.
async fn read(conveyor: &Conveyor) -> Result<Letters> {
    let channel = conveyor.channel().await?;
    // The topology's check has told that it is missing.
    let Ok(all) = depth(&channel, DEAD).await else { return Ok(Letters { all: 0, poison: 0, readable: Vec::new() }) };
    let mut letters = Letters { all, poison: 0, readable: Vec::new() };
    for _ in 0..all.min(MOST) {
        let Some(letter) = channel.basic_get(DEAD.into(), BasicGetOptions::default()).await? else { break };
        match key(&letter.delivery) {
            Some(key) => letters.readable.push(key),
            None => letters.poison += 1,
        }
    }
    channel.close(200, "looked".into()).await?;
    Ok(letters)
}

/// None: nobody can understand it.
fn key(letter: &Delivery) -> Option<Key> {
    if header_text(letter, REASON_HEADER).as_deref() == Some(DeadReason::Poison.as_str()) {
        return None;
    }
    let kind = letter.properties.kind().as_ref().map(lapin::types::ShortString::as_str);
    let item: ItemMessage = decode(kind, &letter.data).ok()?;
    Some((item.item_id, item.attempt))
}

async fn subjects(patient: &Patient, letters: &[Key]) -> Result<HashMap<i64, Subject>> {
    let mut conn = patient.pool.acquire().await?;
    let mut subjects = HashMap::new();
    for letters in letters.chunks(BATCH) {
        let ids: Vec<i64> = letters.iter().map(|(item_id, _)| *item_id).collect();
        let found = audit::subjects(&mut conn, &ids, patient.stalled_after()).await?;
        subjects.extend(found.into_iter().map(|subject| (subject.item_id, subject)));
    }
    Ok(subjects)
}

/// A letter is its item's next attempt, so it is outdated when that attempt is not allowed any more.
fn sort(letters: &[Key], subjects: &HashMap<i64, Subject>) -> Sorted {
    let mut sorted = Sorted::default();
    for (item_id, attempt) in letters {
        match subjects.get(item_id) {
            // What a later version keeps a letter for is not known here.
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
        format!("{} outdated", are(count, "letter", "letters")),
        "Their invitations were sent after all, or were retried since, or belong to runs that are pruned. They do no harm: \
         when somebody moves them to mailrun.items, nothing is sent",
        "--fix takes them off the queue",
    )
}

async fn remove(conveyor: &Conveyor, outdated: &HashSet<Key>) -> Result<()> {
    let publisher = conveyor.publisher.as_ref().context("RabbitMQ takes no messages")?;
    let goes = |letter: &Delivery| key(letter).is_some_and(|key| outdated.contains(&key));
    let fate = |letter: &Delivery| if goes(letter) { Fate::Goes } else { Fate::Stays };
    let Walked { changed, left } = walk_over(&conveyor.broker, publisher, fate).await?;
    ensure!(left == 0, "{changed} are off the queue, and {left} letters were not reached: run it again");
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
    fn a_letter_is_outdated_when_its_attempt_will_not_be_made() {
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
        // The third was retried since, and has two letters; the sixth is pruned.
        let letters = [(1, 2), (2, 2), (3, 2), (3, 3), (4, 2), (5, 2), (6, 2), (7, 2)];
        let sorted = sort(&letters, &subjects);
        assert_eq!(sorted.outdated, HashSet::from([(2, 2), (3, 2), (6, 2)]));
        assert_eq!(sorted.waiting, HashSet::from([1, 3, 5]));
        assert_eq!(sorted.unsettled, 2);
    }
}
