//! What follows from what is known of an attempt: the protocol's decisions, as pure functions.

use std::time::Duration;

use serde::Deserialize;

use crate::{
    claim::{Fate, Found, Owner, Withheld},
    item::ItemState,
    message::{DeadReason, ItemMessage, ItemResult},
    retry::rung,
    run::Wanted,
};

/// The reason shown for an attempt of which nobody can know whether it went out.
pub const UNKNOWN: &str = "the worker died while it was sending; the invitation may have gone out or not";
/// The reason shown when a worker gave up its claim because it had been cut off.
const CUT_OFF: &str = "the worker was cut off before it began to send";

/// The reason shown while an attempt that was claimed before its run was paused waits.
const STOPPED: &str = "not sent yet: the run was paused or cancelled";
/// The reason shown while an attempt waits for another send time.
const NOT_DUE: &str = "not sent yet: the rate limit left no send time";

/// Why an item is not sent whose person or run is not in the ledger any more.
pub const DELETED: &str = "the person or the run was deleted from the database";

/// The reasons shown for items that are skipped.
const SUPPRESSED: &str = "the address is on the list of those that nobody writes to any more";
const INVITED: &str = "already invited: another run has this person's invitation";

/// What a mailer knows of a send. It is decided where the error is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The mail server accepted it.
    Sent,
    /// It was certainly not sent, for a reason that may lie in this mail, and may pass. It costs a try.
    Retry(String),
    /// It was certainly not sent, for a reason that has nothing to do with it: the mail server is away, or wants less. It costs
    /// no try, and the lane is closed for a while.
    Later(String),
    /// It was certainly not sent, and never will be.
    Failed {
        /// Why.
        reason: String,
        /// The address itself is what is wrong: nobody should write to it again.
        bad_address: bool,
    },
    /// It was handed over, and the answer never came.
    Unknown(String),
    /// It was not handed over, since the attempt must not go on. It costs no try.
    Withdrawn(Withdrawn),
}

impl Outcome {
    /// What each is counted as.
    pub const NAMES: [&str; 6] = ["sent", "retry", "later", "failed", "unknown", "withdrawn"];

    /// Its place among [`Self::NAMES`].
    #[must_use]
    pub fn place(&self) -> usize {
        match self {
            Self::Sent => 0,
            Self::Retry(_) => 1,
            Self::Later(_) => 2,
            Self::Failed { .. } => 3,
            Self::Unknown(_) => 4,
            Self::Withdrawn(_) => 5,
        }
    }
}

/// Why an attempt must not be offered to the far side. It certainly had no effect, and costs no try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Withdrawn {
    /// The heartbeat is too old, or the ledger was replaced by an older one: the attempt may be settled already.
    CutOff,
    /// The run was paused or cancelled.
    Stopped,
    /// The rate limit leaves no send time for so long.
    NotDue(Duration),
}

/// The policy for attempts of which nobody can know whether they went out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnUnknown {
    /// Show it, and let a person decide.
    Hold,
    /// Send again, and accept that the person may get two.
    Resend,
}

/// What an attempt leaves behind: the next attempt, if there is one, and the result. Published in this order, so that a
/// crash between the two loses nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Next {
    /// The next attempt, if there is one.
    pub follow_up: Option<FollowUp>,
    /// What the ledger is told.
    pub result: ItemResult,
}

/// Where the next attempt goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FollowUp {
    /// Back to the items, at once.
    Now(ItemMessage),
    /// To a rung, for so long.
    Wait(ItemMessage, Duration),
    /// To the dead letters, for this reason, in these words.
    Dead(ItemMessage, DeadReason, String),
}

/// What the settings say of attempts that did not succeed.
#[derive(Clone, Debug)]
pub struct Rules {
    /// How long an item waits before its second, third, … try.
    pub rungs: Vec<Duration>,
    /// What follows when nobody can know whether an invitation went out.
    pub on_unknown: OnUnknown,
}

impl Rules {
    /// The rung for what is to be looked at again soon.
    #[must_use]
    pub fn shortest(&self) -> Duration {
        self.rungs.iter().min().copied().unwrap_or_default()
    }

    /// The longest rung that is over within `time`, or the shortest of all.
    #[must_use]
    pub fn rung_within(&self, time: Duration) -> Duration {
        self.rungs.iter().filter(|rung| **rung <= time).max().copied().unwrap_or_else(|| self.shortest())
    }
}

/// After a send. `closed_for` is how long the mail server has asked to be left alone.
#[must_use]
pub fn after_send(item: ItemMessage, outcome: Outcome, closed_for: Duration, rules: &Rules) -> Next {
    match outcome {
        Outcome::Sent => Next { follow_up: None, result: item.result(ItemState::Sent, None) },
        Outcome::Retry(reason) => match rung(&rules.rungs, item.tries) {
            Some(delay) => wait(item, item.next_try(), delay, reason),
            None => dead(item, ItemState::Failed, DeadReason::Failed, reason),
        },
        // The mail server's trouble is not the address's fault: no try is charged, however long it lasts.
        Outcome::Later(reason) => wait(item, item.again(), rules.rung_within(closed_for), reason),
        Outcome::Failed { reason, bad_address } => {
            let next = dead(item, ItemState::Failed, DeadReason::Failed, reason);
            Next { result: ItemResult { bad_address, ..next.result }, ..next }
        }
        Outcome::Unknown(reason) => unclear(item, rules.on_unknown, reason),
        Outcome::Withdrawn(Withdrawn::CutOff) => after_cut_off(item),
        Outcome::Withdrawn(Withdrawn::Stopped) => wait(item, item.again(), rules.shortest(), STOPPED.into()),
        Outcome::Withdrawn(Withdrawn::NotDue(time)) => {
            wait(item, item.again(), rules.rung_within(time), NOT_DUE.into())
        }
    }
}

/// The next attempt waits on a rung.
fn wait(item: ItemMessage, next: ItemMessage, delay: Duration, reason: String) -> Next {
    Next {
        follow_up: Some(FollowUp::Wait(next, delay)),
        result: ItemResult {
            due_in_ms: Some(i64::try_from(delay.as_millis()).unwrap_or(i64::MAX)),
            // So that whoever puts the item back charges neither more nor less.
            tries: next.tries,
            ..item.result(ItemState::Retrying, Some(reason))
        },
    }
}

/// What becomes of an item whose attempt is nobody's to carry out.
#[must_use]
pub fn withheld(item: ItemMessage, why: Withheld) -> ItemResult {
    match why {
        Withheld::Cancelled => item.result(ItemState::Cancelled, None),
        Withheld::Suppressed => item.result(ItemState::Skipped, Some(SUPPRESSED.into())),
        Withheld::Invited => item.result(ItemState::Skipped, Some(INVITED.into())),
        Withheld::Deleted => item.result(ItemState::Failed, Some(DELETED.into())),
    }
}

/// After a claim that its worker gave up before it spoke to the mail server.
#[must_use]
pub fn after_cut_off(item: ItemMessage) -> Next {
    Next {
        follow_up: Some(FollowUp::Now(item.again())),
        result: ItemResult { due_in_ms: Some(0), ..item.result(ItemState::Retrying, Some(CUT_OFF.into())) },
    }
}

/// After a worker died between its claim and its report.
#[must_use]
pub fn after_death(item: ItemMessage, policy: OnUnknown) -> Next {
    unclear(item, policy, UNKNOWN.into())
}

fn unclear(item: ItemMessage, policy: OnUnknown, reason: String) -> Next {
    match policy {
        OnUnknown::Hold => dead(item, ItemState::Unknown, DeadReason::Unknown, reason),
        OnUnknown::Resend => Next {
            follow_up: Some(FollowUp::Now(item.again())),
            result: ItemResult { due_in_ms: Some(0), ..item.result(ItemState::Retrying, Some(reason)) },
        },
    }
}

/// A dead letter is the next attempt with a fresh budget, waiting for a person: moving it back is all a replay is.
fn dead(item: ItemMessage, state: ItemState, reason: DeadReason, error: String) -> Next {
    Next {
        follow_up: Some(FollowUp::Dead(item.replayed(), reason, error.clone())),
        result: item.result(state, Some(error)),
    }
}

/// What to do with a message whose claim was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// It names an item that doesn't exist in this run: it is another ledger's.
    NoSuchItem,
    /// The item is in a state of a later version: the message waits for a worker that understands it.
    Later,
    /// The attempt is settled or outdated.
    Outdated,
    /// This worker has the claim.
    Mine,
    /// Another worker has it, and lives: what it does will be known later.
    InOtherHands,
    /// The run is paused: the message is dropped, and put back when the run goes on. `reopen`: the ledger shows the item as
    /// settled, and would not put it back; so it has to be shown as pending.
    Paused {
        /// Whether the item is settled.
        reopen: bool,
    },
    /// The attempt will never be made.
    Withheld(Withheld),
    /// Its worker died after the mail server had accepted the mail.
    Accepted,
    /// Its worker died with it.
    Orphaned,
}

/// Why a claim was refused. `me` is this worker.
#[must_use]
pub fn refused(found: Option<&Found>, me: i64) -> Refused {
    let Some(found) = found else { return Refused::NoSuchItem };
    let Some(standing) = found.standing else { return Refused::Later };
    if !standing.allows(found.key.attempt) {
        return Refused::Outdated;
    }
    match found.owner {
        Some(Owner::Nobody(why)) => Refused::Withheld(why),
        Some(Owner::Worker { id, .. }) if id == me => Refused::Mine,
        Some(Owner::Worker { fate: Fate::Alive, .. }) => Refused::InOtherHands,
        Some(Owner::Worker { fate: Fate::Accepted, .. }) => Refused::Accepted,
        Some(Owner::Worker { fate: Fate::Dead, .. }) => Refused::Orphaned,
        None if found.wanted == Some(Wanted::Paused) => Refused::Paused { reopen: !standing.state.is_open() },
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
    /// It will never be sent: say so again.
    Withhold(Withheld),
    /// It was sent, and its worker died: say so for it.
    Confirm,
    /// Its worker died with it.
    Bury,
}

/// What is wrong with an overdue item, by the claim of the attempt it waits for.
#[must_use]
pub fn repair(owner: Option<Owner>) -> Repair {
    match owner {
        None => Repair::PutBack,
        Some(Owner::Nobody(why)) => Repair::Withhold(why),
        Some(Owner::Worker { fate: Fate::Alive, .. }) => Repair::Leave,
        Some(Owner::Worker { fate: Fate::Accepted, .. }) => Repair::Confirm,
        Some(Owner::Worker { fate: Fate::Dead, .. }) => Repair::Bury,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::item::Standing;

    fn rules() -> Rules {
        Rules { rungs: vec![Duration::from_millis(250), Duration::from_secs(1)], on_unknown: OnUnknown::Hold }
    }

    fn item(attempt: i32, tries: i16) -> ItemMessage {
        ItemMessage { run_id: uuid::Uuid::from_u128(1), item_id: 5, attempt, tries, replays: 0 }
    }

    #[test]
    fn an_item_climbs_the_rungs_and_then_dies() {
        let down = || Outcome::Retry("down".into());
        let first = after_send(item(1, 1), down(), Duration::ZERO, &rules());
        assert_eq!((first.result.state, first.result.due_in_ms), (ItemState::Retrying, Some(250)));
        assert!(first.follow_up.is_some());
        assert_eq!(first.result.tries, 2, "the try that it waits for");
        assert_eq!(after_send(item(2, 2), down(), Duration::ZERO, &rules()).result.due_in_ms, Some(1000));
        assert_eq!(after_send(item(3, 3), down(), Duration::ZERO, &rules()).result.state, ItemState::Failed);
        let refused = Outcome::Failed { reason: "no".into(), bad_address: true };
        let refused = after_send(item(1, 1), refused, Duration::ZERO, &rules()).result;
        assert!(refused.state == ItemState::Failed && refused.bad_address);
        assert!(after_send(item(1, 1), Outcome::Sent, Duration::ZERO, &rules()).follow_up.is_none());
    }

    #[test]
    fn the_mail_servers_trouble_costs_no_try() {
        let later = |tries| {
            after_send(item(9, tries), Outcome::Later("421 busy".into()), Duration::from_secs(60), &rules()).result
        };
        assert_eq!((later(1).state, later(1).tries, later(1).due_in_ms), (ItemState::Retrying, 1, Some(1000)));
        // Even the last one of the budget.
        assert_eq!((later(3).state, later(3).tries), (ItemState::Retrying, 3));
    }

    #[test]
    fn an_attempt_that_was_never_offered_costs_no_try() {
        for withdrawn in [Withdrawn::CutOff, Withdrawn::Stopped, Withdrawn::NotDue(Duration::from_secs(2))] {
            let next = after_send(item(4, 3), Outcome::Withdrawn(withdrawn), Duration::ZERO, &rules());
            assert_eq!((next.result.state, next.result.tries), (ItemState::Retrying, 3));
            let (FollowUp::Now(again) | FollowUp::Wait(again, _)) = next.follow_up.unwrap() else { panic!() };
            assert_eq!((again.attempt, again.tries), (5, 3));
        }
    }

    #[test]
    fn a_lost_answer_is_held_or_resent_as_the_policy_says() {
        let lost = || Outcome::Unknown("dropped".into());
        assert_eq!(after_send(item(1, 1), lost(), Duration::ZERO, &rules()).result.state, ItemState::Unknown);
        let resend = Rules { on_unknown: OnUnknown::Resend, ..rules() };
        assert_eq!(after_send(item(1, 1), lost(), Duration::ZERO, &resend).result.state, ItemState::Retrying);
    }

    #[test]
    fn a_dead_worker_is_held_or_resent_as_the_policy_says() {
        assert_eq!(after_death(item(1, 1), OnUnknown::Hold).result.state, ItemState::Unknown);
        assert_eq!(after_death(item(1, 1), OnUnknown::Resend).result.state, ItemState::Retrying);
    }

    #[test]
    fn a_refused_claim_is_looked_into() {
        let key = item(2, 1).key();
        let wanted = Some(Wanted::Running);
        let found = |state, attempt, owner| Found { key, standing: Some(Standing { attempt, state }), wanted, owner };
        let worker = |id, fate| Some(Owner::Worker { id, fate });
        let why = |state, attempt, owner| refused(Some(&found(state, attempt, owner)), 7);
        assert_eq!(refused(None, 7), Refused::NoSuchItem);
        assert_eq!(why(ItemState::Sent, 1, worker(7, Fate::Alive)), Refused::Outdated);
        assert_eq!(why(ItemState::Failed, 2, worker(8, Fate::Dead)), Refused::Outdated);
        assert_eq!(why(ItemState::Pending, 2, worker(7, Fate::Alive)), Refused::Mine);
        assert_eq!(why(ItemState::Retrying, 1, worker(8, Fate::Alive)), Refused::InOtherHands);
        assert_eq!(why(ItemState::Pending, 2, worker(8, Fate::Accepted)), Refused::Accepted);
        assert_eq!(why(ItemState::Retrying, 1, worker(8, Fate::Dead)), Refused::Orphaned);
        let nobody = |why| Some(Owner::Nobody(why));
        for withheld in [Withheld::Cancelled, Withheld::Suppressed] {
            assert_eq!(why(ItemState::Pending, 2, nobody(withheld)), Refused::Withheld(withheld));
        }
        assert_eq!(why(ItemState::Pending, 2, None), Refused::InOtherHands);
        let paused = |state, owner| refused(Some(&Found { wanted: Some(Wanted::Paused), ..found(state, 1, owner) }), 7);
        assert_eq!(paused(ItemState::Retrying, None), Refused::Paused { reopen: false });
        assert_eq!(paused(ItemState::Failed, None), Refused::Paused { reopen: true }, "a dead letter moved by hand");
        assert_eq!(paused(ItemState::Retrying, worker(8, Fate::Dead)), Refused::Orphaned);
    }

    #[test]
    fn the_sweeper_buries_only_what_a_dead_worker_held() {
        let worker = |fate| Some(Owner::Worker { id: 1, fate });
        assert_eq!(
            [Fate::Alive, Fate::Accepted, Fate::Dead].map(|fate| repair(worker(fate))),
            [Repair::Leave, Repair::Confirm, Repair::Bury]
        );
        assert_eq!(
            [None, Some(Owner::Nobody(Withheld::Suppressed))].map(repair),
            [Repair::PutBack, Repair::Withhold(Withheld::Suppressed)]
        );
    }
}
