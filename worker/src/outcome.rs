//! What follows from what is known of an attempt: the protocol's decisions, as pure functions.

use std::time::Duration;

use mailrun_shared::{
    broker::Outgoing,
    config::OnUnknown,
    item::ItemState,
    message::{DeadReason, ItemMessage, ItemResult},
    retry::rung,
    store::attempts::{Found, Owner},
    topology::retry_queue,
};

use crate::mailer::Outcome;

/// The reason shown for an attempt of which nobody can know whether it went out.
pub const UNKNOWN: &str = "the worker died while it was sending; the invitation may have gone out or not";
/// The reason shown when a worker gave up its claim because it had been cut off.
const CUT_OFF: &str = "the worker was cut off before it began to send";

/// What an attempt leaves behind: the next attempt, if there is one, and the result. Published in this order, so that a
/// crash between the two loses nothing.
#[derive(Clone, Debug)]
pub struct Next {
    /// The next attempt: on a rung, or among the dead letters.
    pub follow_up: Option<Outgoing>,
    /// What the ledger is told.
    pub result: ItemResult,
}

/// After a send.
#[must_use]
pub fn after_send(item: ItemMessage, outcome: Outcome, rungs: &[Duration]) -> Next {
    match outcome {
        Outcome::Sent => Next { follow_up: None, result: item.result(ItemState::Sent, None) },
        Outcome::Retry(error) => match rung(rungs, item.tries) {
            Some(delay) => Next {
                follow_up: Some(Outgoing::new(&item.next_try()).to(retry_queue(delay)).of_run(item.run_id)),
                result: ItemResult {
                    due_in_ms: Some(i64::try_from(delay.as_millis()).unwrap_or(i64::MAX)),
                    ..item.result(ItemState::Retrying, Some(error))
                },
            },
            None => dead(item, ItemState::Failed, DeadReason::Failed, error),
        },
        Outcome::Failed(error) => dead(item, ItemState::Failed, DeadReason::Failed, error),
    }
}

/// After a claim in a cancelled run.
#[must_use]
pub fn after_cancel(item: ItemMessage) -> Next {
    Next { follow_up: None, result: item.result(ItemState::Cancelled, None) }
}

/// After a claim that its worker gave up before it spoke to the mail server.
#[must_use]
pub fn after_cut_off(item: ItemMessage) -> Next {
    Next {
        follow_up: Some(Outgoing::new(&item.again()).of_run(item.run_id)),
        result: ItemResult { due_in_ms: Some(0), ..item.result(ItemState::Retrying, Some(CUT_OFF.into())) },
    }
}

/// After a worker died between its claim and its report.
#[must_use]
pub fn after_death(item: ItemMessage, policy: OnUnknown) -> Next {
    match policy {
        OnUnknown::Hold => dead(item, ItemState::Unknown, DeadReason::Unknown, UNKNOWN.into()),
        OnUnknown::Resend => Next {
            follow_up: Some(Outgoing::new(&item.again()).of_run(item.run_id)),
            result: ItemResult { due_in_ms: Some(0), ..item.result(ItemState::Retrying, Some(UNKNOWN.into())) },
        },
    }
}

/// A dead letter is the next attempt with a fresh budget, waiting for a person: moving it back is all a replay is.
fn dead(item: ItemMessage, state: ItemState, reason: DeadReason, error: String) -> Next {
    Next {
        follow_up: Some(Outgoing::new(&item.replayed()).dead(reason, &error).of_run(item.run_id)),
        result: item.result(state, Some(error)),
    }
}

/// What to do with a message whose claim was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// It names an item that doesn't exist.
    NoSuchItem,
    /// The attempt is settled or outdated.
    Outdated,
    /// This worker has the claim.
    Mine,
    /// Another worker has it, and lives: what it does will be known later.
    InOtherHands,
    /// The run is cancelled, and the attempt will never be made.
    Cancelled,
    /// Its worker died with it.
    Orphaned,
}

/// Why a claim was refused. `me` is this worker.
#[must_use]
pub fn refused(found: Option<&Found>, me: i64) -> Refused {
    let Some(found) = found else { return Refused::NoSuchItem };
    if !found.standing.allows(found.number) {
        return Refused::Outdated;
    }
    match found.owner {
        Some(Owner::Nobody) => Refused::Cancelled,
        Some(Owner::Worker { id, .. }) if id == me => Refused::Mine,
        Some(Owner::Worker { alive: true, .. }) => Refused::InOtherHands,
        Some(Owner::Worker { alive: false, .. }) => Refused::Orphaned,
        // The holder's transaction ended in between: the next claim will tell.
        None => Refused::InOtherHands,
    }
}

/// What the sweeper does for an item that is released, open and overdue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Its message is missing: publish it again.
    PutBack,
    /// Its worker lives, and will report.
    Leave,
    /// The run is cancelled: say so again.
    Cancel,
    /// Its worker died with it.
    Bury,
}

/// What is wrong with an overdue item, by the claim of the attempt it waits for.
#[must_use]
pub fn repair(owner: Option<Owner>) -> Repair {
    match owner {
        None => Repair::PutBack,
        Some(Owner::Nobody) => Repair::Cancel,
        Some(Owner::Worker { alive: true, .. }) => Repair::Leave,
        Some(Owner::Worker { alive: false, .. }) => Repair::Bury,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mailrun_shared::item::Standing;

    const RUNGS: [Duration; 2] = [Duration::from_millis(250), Duration::from_secs(1)];

    fn item(attempt: i32, tries: i16) -> ItemMessage {
        ItemMessage { run_id: uuid::Uuid::from_u128(1), item_id: 5, attempt, tries, replays: 0 }
    }

    #[test]
    fn an_item_climbs_the_rungs_and_then_dies() {
        let down = || Outcome::Retry("down".into());
        let first = after_send(item(1, 1), down(), &RUNGS);
        assert_eq!((first.result.state, first.result.due_in_ms), (ItemState::Retrying, Some(250)));
        assert!(first.follow_up.is_some());
        assert_eq!(after_send(item(2, 2), down(), &RUNGS).result.due_in_ms, Some(1000));
        assert_eq!(after_send(item(3, 3), down(), &RUNGS).result.state, ItemState::Failed);
        assert_eq!(after_send(item(1, 1), Outcome::Failed("no".into()), &RUNGS).result.state, ItemState::Failed);
        assert!(after_send(item(1, 1), Outcome::Sent, &RUNGS).follow_up.is_none());
    }

    #[test]
    fn a_dead_worker_is_held_or_resent_as_the_policy_says() {
        assert_eq!(after_death(item(1, 1), OnUnknown::Hold).result.state, ItemState::Unknown);
        assert_eq!(after_death(item(1, 1), OnUnknown::Resend).result.state, ItemState::Retrying);
    }

    #[test]
    fn a_refused_claim_is_looked_into() {
        let found =
            |state, attempt, owner| Found { item_id: 5, number: 2, standing: Standing { attempt, state }, owner };
        let worker = |id, alive| Some(Owner::Worker { id, alive });
        let why = |state, attempt, owner| refused(Some(&found(state, attempt, owner)), 7);
        assert_eq!(refused(None, 7), Refused::NoSuchItem);
        assert_eq!(why(ItemState::Sent, 1, worker(7, true)), Refused::Outdated);
        assert_eq!(why(ItemState::Failed, 2, worker(8, false)), Refused::Outdated);
        assert_eq!(why(ItemState::Pending, 2, worker(7, true)), Refused::Mine);
        assert_eq!(why(ItemState::Retrying, 1, worker(8, true)), Refused::InOtherHands);
        assert_eq!(why(ItemState::Retrying, 1, worker(8, false)), Refused::Orphaned);
        assert_eq!(why(ItemState::Pending, 2, Some(Owner::Nobody)), Refused::Cancelled);
        assert_eq!(why(ItemState::Pending, 2, None), Refused::InOtherHands);
    }

    #[test]
    fn the_sweeper_buries_only_what_a_dead_worker_held() {
        let worker = |alive| Some(Owner::Worker { id: 1, alive });
        assert_eq!(
            [None, worker(true), worker(false), Some(Owner::Nobody)].map(repair),
            [Repair::PutBack, Repair::Leave, Repair::Bury, Repair::Cancel]
        );
    }
}
