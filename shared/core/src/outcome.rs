//! The protocol's decisions as pure functions: what follows an attempt, a refused claim, or an overdue item.

use std::time::Duration;

use serde::Deserialize;

use crate::{
    claim::{Fate, Found, Owner, Withheld},
    item::ItemState,
    message::{DeadReason, ItemMessage, ItemResult},
    retry::rung,
    run::Wanted,
};

/// The reason shown for an attempt whose worker died.
pub const UNKNOWN: &str = "the worker died during the attempt; it is unknown whether it had an effect";
/// The reason shown when a worker gave up its claim because it had been cut off.
const CUT_OFF: &str = "the worker was cut off before it began to send";

/// The reason shown while an attempt that was claimed before its run was paused waits.
const STOPPED: &str = "not sent yet: the run was paused or cancelled";
/// The reason shown while an attempt waits for another send time.
const NOT_DUE: &str = "not sent yet: the rate limit left no send time";

/// The reason shown for an item whose person, run or data is no longer in the ledger.
pub const DELETED: &str = "the person, the run or the data of this item was deleted";

/// The outcome of an attempt, decided where the error is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The remote side accepted the item.
    Sent,
    /// Certainly no effect; the reason may lie in this item and may pass. Charges a try.
    Retry(String),
    /// Certainly no effect, for a reason that has nothing to do with the item: the remote side is down or busy. Charges no try.
    /// The item waits until the job's gate opens.
    Later(String),
    /// Certainly no effect, and retrying is pointless.
    Failed {
        /// Why.
        reason: String,
        /// Passed on to the job when the item is counted. For invitations: the mailbox does not exist.
        flagged: bool,
    },
    /// The item was handed over and no reply came.
    Unknown(String),
    /// The attempt was not allowed to proceed. Certainly no effect, and charges no try.
    Withdrawn(Withdrawn),
}

impl Outcome {
    /// A permanent failure with nothing for the job to note.
    #[must_use]
    pub fn failed(reason: impl Into<String>) -> Self {
        Self::Failed { reason: reason.into(), flagged: false }
    }

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

/// Why an attempt must not proceed. It certainly had no effect, and charges no try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Withdrawn {
    /// The heartbeat is too old, or the ledger was replaced by an older one: the attempt may be settled already.
    CutOff,
    /// The run was paused or cancelled.
    Stopped,
    /// The rate limit leaves no send time for so long.
    NotDue(Duration),
}

/// What follows an attempt whose effect is unknown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnUnknown {
    /// Show it, and let a person decide.
    Hold,
    /// Send again, and accept that the person may get two.
    Resend,
}

/// What follows an attempt: the next one, if any, and the result. They are published in this order, so a crash between the two
/// loses nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Next {
    /// The next attempt, if any.
    pub follow_up: Option<FollowUp>,
    /// The result for the ledger.
    pub result: ItemResult,
}

/// Where the next attempt goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FollowUp {
    /// Back to the item queue, at once.
    Now(ItemMessage),
    /// To the retry queue with this delay.
    Wait(ItemMessage, Duration),
    /// To the dead letters, with this reason and error.
    Dead(ItemMessage, DeadReason, String),
}

/// What follows an attempt that did not succeed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RetryPolicy {
    /// How long an item waits before its second, third, … try. Each delay has a queue, so all jobs share those of the settings.
    pub delays: Vec<Duration>,
    /// The number of tries after which the item fails, if that is fewer than the delays allow.
    pub tries: Option<i16>,
    /// What follows when it cannot be known whether the attempt had an effect.
    pub on_unknown: OnUnknown,
    /// Whether an item that fails or becomes unknown leaves a dead letter.
    pub dead_letters: bool,
    /// Whether the remote side accepts an immediate second try within the same attempt.
    pub repeats_at_once: bool,
}

impl RetryPolicy {
    /// As many tries as there are delays, and one more; dead letters; no immediate repetition.
    #[must_use]
    pub fn new(delays: Vec<Duration>, on_unknown: OnUnknown) -> Self {
        Self { delays, tries: None, on_unknown, dead_letters: true, repeats_at_once: false }
    }

    /// The shortest delay.
    #[must_use]
    pub fn shortest(&self) -> Duration {
        self.delays.iter().min().copied().unwrap_or_default()
    }

    /// The longest delay that is over within `time`, or the shortest of all.
    #[must_use]
    pub fn delay_within(&self, time: Duration) -> Duration {
        self.delays.iter().filter(|delay| **delay <= time).max().copied().unwrap_or_else(|| self.shortest())
    }

    /// How long an item waits after its try number `tries`; none: the budget is spent.
    fn delay_after(&self, tries: i16) -> Option<Duration> {
        if self.tries.is_some_and(|most| tries >= most) { None } else { rung(&self.delays, tries) }
    }
}

/// After an attempt. `closed_for` is how long the job's gate stays closed.
#[must_use]
pub fn after_send(item: ItemMessage, outcome: Outcome, closed_for: Duration, policy: &RetryPolicy) -> Next {
    match outcome {
        Outcome::Sent => Next { follow_up: None, result: item.result(ItemState::Sent, None) },
        Outcome::Retry(reason) => match policy.delay_after(item.tries) {
            Some(delay) => wait(item, item.next_try(), delay, reason),
            None => dead(item, ItemState::Failed, DeadReason::Failed, reason, policy),
        },
        // Not the item's fault: no try is charged, however long it lasts.
        Outcome::Later(reason) => wait(item, item.again(), policy.delay_within(closed_for), reason),
        Outcome::Failed { reason, flagged } => {
            let next = dead(item, ItemState::Failed, DeadReason::Failed, reason, policy);
            Next { result: ItemResult { flagged, ..next.result }, ..next }
        }
        Outcome::Unknown(reason) => unclear(item, reason, policy),
        Outcome::Withdrawn(Withdrawn::CutOff) => after_cut_off(item),
        Outcome::Withdrawn(Withdrawn::Stopped) => wait(item, item.again(), policy.shortest(), STOPPED.into()),
        Outcome::Withdrawn(Withdrawn::NotDue(time)) => {
            wait(item, item.again(), policy.delay_within(time), NOT_DUE.into())
        }
    }
}

/// The next attempt waits on a retry queue.
fn wait(item: ItemMessage, next: ItemMessage, delay: Duration, reason: String) -> Next {
    Next {
        follow_up: Some(FollowUp::Wait(next, delay)),
        result: ItemResult {
            due_in_ms: Some(i64::try_from(delay.as_millis()).unwrap_or(i64::MAX)),
            // So that a republished message charges neither more nor less.
            tries: next.tries,
            ..item.result(ItemState::Retrying, Some(reason))
        },
    }
}

/// The result of an attempt that will never be made. `reasons` are the job's, by code.
#[must_use]
pub fn withheld(item: ItemMessage, why: Withheld, reasons: &[(u8, &str)]) -> ItemResult {
    match why {
        Withheld::Cancelled => item.result(ItemState::Cancelled, None),
        Withheld::Deleted => item.result(ItemState::Failed, Some(DELETED.into())),
        Withheld::ByJob(code) => {
            let reason = reasons.iter().find(|(of, _)| *of == code).map(|(_, reason)| (*reason).to_owned());
            item.result(ItemState::Skipped, Some(reason.unwrap_or_else(|| format!("withheld by its job, code {code}"))))
        }
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
pub fn after_death(item: ItemMessage, policy: &RetryPolicy) -> Next {
    unclear(item, UNKNOWN.into(), policy)
}

fn unclear(item: ItemMessage, reason: String, policy: &RetryPolicy) -> Next {
    match policy.on_unknown {
        OnUnknown::Hold => dead(item, ItemState::Unknown, DeadReason::Unknown, reason, policy),
        OnUnknown::Resend => Next {
            follow_up: Some(FollowUp::Now(item.again())),
            result: ItemResult { due_in_ms: Some(0), ..item.result(ItemState::Retrying, Some(reason)) },
        },
    }
}

/// A dead letter is the next attempt with a fresh budget, so replaying it is moving it back to the items.
fn dead(item: ItemMessage, state: ItemState, reason: DeadReason, error: String, policy: &RetryPolicy) -> Next {
    let letter = || FollowUp::Dead(item.replayed(), reason, error.clone());
    Next { follow_up: policy.dead_letters.then(letter), result: item.result(state, Some(error)) }
}

/// What to do with a message whose claim was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// It names an item that does not exist in this run: the message belongs to another ledger.
    NoSuchItem,
    /// The item is in a state of a later version: the message waits for a worker of that version.
    Later,
    /// The attempt is settled or outdated.
    Outdated,
    /// This worker has the claim.
    Mine,
    /// Another live worker has the claim and will report its result.
    InOtherHands,
    /// The run is paused: the message is dropped, and republished when the run resumes. `reopen`: the ledger shows the item as
    /// settled and would not republish it, so it must be shown as pending first.
    Paused {
        /// Whether the item is settled.
        reopen: bool,
    },
    /// No worker will make the attempt.
    Withheld(Withheld),
    /// Its worker died after the remote side had accepted the item: there is a receipt.
    Accepted,
    /// Its worker died, and it is unknown whether the attempt had an effect.
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
        // The holder's transaction ended between claim and query: the next claim decides.
        None => Refused::InOtherHands,
    }
}

/// What the sweeper does for an item that is released, open and overdue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Its message is missing: republish it.
    PutBack,
    /// Its worker is alive and will report.
    Leave,
    /// No worker will make the attempt: report that again.
    Withhold(Withheld),
    /// It was sent and its worker died: report that for the worker.
    Confirm,
    /// Its worker died without a receipt: give the claim up.
    Bury,
}

/// The repair of an overdue item, from the claim of the attempt that it waits for.
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

    fn policy() -> RetryPolicy {
        RetryPolicy::new(vec![Duration::from_millis(250), Duration::from_secs(1)], OnUnknown::Hold)
    }

    fn item(attempt: i32, tries: i16) -> ItemMessage {
        ItemMessage { run_id: uuid::Uuid::from_u128(1), item_id: 5, attempt, tries, replays: 0, impersonal: false }
    }

    #[test]
    fn an_item_waits_each_delay_and_then_fails() {
        let down = || Outcome::Retry("down".into());
        let first = after_send(item(1, 1), down(), Duration::ZERO, &policy());
        assert_eq!((first.result.state, first.result.due_in_ms), (ItemState::Retrying, Some(250)));
        assert!(first.follow_up.is_some());
        assert_eq!(first.result.tries, 2, "the try that it waits for");
        assert_eq!(after_send(item(2, 2), down(), Duration::ZERO, &policy()).result.due_in_ms, Some(1000));
        assert_eq!(after_send(item(3, 3), down(), Duration::ZERO, &policy()).result.state, ItemState::Failed);
        let refused = Outcome::Failed { reason: "no".into(), flagged: true };
        let refused = after_send(item(1, 1), refused, Duration::ZERO, &policy()).result;
        assert!(refused.state == ItemState::Failed && refused.flagged);
        assert!(after_send(item(1, 1), Outcome::Sent, Duration::ZERO, &policy()).follow_up.is_none());
    }

    #[test]
    fn a_job_may_have_fewer_tries_and_no_dead_letters() {
        let once = RetryPolicy { tries: Some(1), dead_letters: false, ..policy() };
        let next = after_send(item(1, 1), Outcome::Retry("down".into()), Duration::ZERO, &once);
        assert_eq!((next.result.state, next.follow_up), (ItemState::Failed, None));
        assert_eq!(after_death(item(1, 1), &once).follow_up, None);
        let later = after_send(item(1, 1), Outcome::Later("closed".into()), Duration::ZERO, &once);
        assert_eq!((later.result.state, later.result.tries), (ItemState::Retrying, 1));
    }

    #[test]
    fn a_withheld_item_shows_its_jobs_reason() {
        let result = |why| withheld(item(1, 1), why, &[(7, "already done")]);
        assert_eq!(result(Withheld::Cancelled).state, ItemState::Cancelled);
        assert_eq!(result(Withheld::Deleted).state, ItemState::Failed);
        assert_eq!(result(Withheld::ByJob(7)).state, ItemState::Skipped);
        assert_eq!(result(Withheld::ByJob(7)).error.as_deref(), Some("already done"));
        assert!(result(Withheld::ByJob(8)).error.unwrap().contains('8'), "a reason of a later version");
    }

    #[test]
    fn the_mail_servers_trouble_costs_no_try() {
        let later = |tries| {
            after_send(item(9, tries), Outcome::Later("421 busy".into()), Duration::from_secs(60), &policy()).result
        };
        assert_eq!((later(1).state, later(1).tries, later(1).due_in_ms), (ItemState::Retrying, 1, Some(1000)));
        // Even the last one of the budget.
        assert_eq!((later(3).state, later(3).tries), (ItemState::Retrying, 3));
    }

    #[test]
    fn an_attempt_that_was_never_offered_costs_no_try() {
        for withdrawn in [Withdrawn::CutOff, Withdrawn::Stopped, Withdrawn::NotDue(Duration::from_secs(2))] {
            let next = after_send(item(4, 3), Outcome::Withdrawn(withdrawn), Duration::ZERO, &policy());
            assert_eq!((next.result.state, next.result.tries), (ItemState::Retrying, 3));
            let (FollowUp::Now(again) | FollowUp::Wait(again, _)) = next.follow_up.unwrap() else { panic!() };
            assert_eq!((again.attempt, again.tries), (5, 3));
        }
    }

    #[test]
    fn a_lost_answer_is_held_or_resent_as_the_policy_says() {
        let lost = || Outcome::Unknown("dropped".into());
        assert_eq!(after_send(item(1, 1), lost(), Duration::ZERO, &policy()).result.state, ItemState::Unknown);
        let resend = RetryPolicy { on_unknown: OnUnknown::Resend, ..policy() };
        assert_eq!(after_send(item(1, 1), lost(), Duration::ZERO, &resend).result.state, ItemState::Retrying);
    }

    #[test]
    fn a_dead_worker_is_held_or_resent_as_the_policy_says() {
        assert_eq!(after_death(item(1, 1), &policy()).result.state, ItemState::Unknown);
        let resend = RetryPolicy { on_unknown: OnUnknown::Resend, ..policy() };
        assert_eq!(after_death(item(1, 1), &resend).result.state, ItemState::Retrying);
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
        for withheld in [Withheld::Cancelled, Withheld::ByJob(1)] {
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
            [None, Some(Owner::Nobody(Withheld::ByJob(1)))].map(repair),
            [Repair::PutBack, Repair::Withhold(Withheld::ByJob(1))]
        );
    }
}
