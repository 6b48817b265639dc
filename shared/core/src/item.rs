//! An item's state, and the join that makes counting safe: a pure function that merges a reported state into the known one.

use std::hash::{Hash, Hasher};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// The state of an item, in order of rank.
///
/// The order is part of the protocol: of two reports about the same attempt, the greater one wins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ItemState {
    /// To be sent.
    Pending,
    /// An attempt failed for a reason that may pass; another one follows.
    Retrying,
    /// Will not be sent.
    Cancelled,
    /// Will not be sent: the address was suppressed.
    Skipped,
    /// Possibly sent: the relay's reply was lost, or the worker died while it waited for the reply.
    Unknown,
    /// Out of tries, or refused permanently.
    Failed,
    /// Accepted by the relay. Final.
    Sent,
}

impl ItemState {
    /// Every state, by rank.
    pub const ALL: [Self; 7] =
        [Self::Pending, Self::Retrying, Self::Cancelled, Self::Skipped, Self::Unknown, Self::Failed, Self::Sent];

    /// Its name in the ledger and in messages.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Retrying => "retrying",
            Self::Cancelled => "cancelled",
            Self::Skipped => "skipped",
            Self::Unknown => "unknown",
            Self::Failed => "failed",
            Self::Sent => "sent",
        }
    }

    /// Whether the item still has to be sent in the current pass.
    #[must_use]
    pub fn is_open(self) -> bool {
        matches!(self, Self::Pending | Self::Retrying)
    }
}

/// Identifies an attempt, and so a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// The run. An item with the same number in another run belongs to another ledger.
    pub run_id: Uuid,
    /// The item.
    pub item_id: i64,
    /// The attempt, from 1.
    pub attempt: i32,
}

/// Hashes without the run, since senders look attempts up many times for each send. Items of one ledger differ in their number.
impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_i64(self.item_id);
        state.write_i32(self.attempt);
    }
}

/// An item's state together with the attempt that it is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Standing {
    /// The attempt, from 1.
    pub attempt: i32,
    /// The state after it.
    pub state: ItemState,
}

impl Standing {
    /// The standing of a new item.
    pub const NEW: Self = Self { attempt: 1, state: ItemState::Pending };

    /// The order of the join: `sent` wins, then the later attempt, then the higher rank.
    fn rank(self) -> (bool, i32, ItemState) {
        if self.state == ItemState::Sent {
            // All reports of `sent` are equal, whichever attempt they name, so the first one stays.
            (true, 0, self.state)
        } else {
            (false, self.attempt, self.state)
        }
    }

    /// Whether a message that asks for `attempt` may still be carried out.
    ///
    /// The `WHERE` clause of the claim in `attempts` in the crate `mailrun-ledger` is the same condition in SQL.
    #[must_use]
    pub fn allows(self, attempt: i32) -> bool {
        match self.state {
            ItemState::Sent => false,
            ItemState::Pending => self.attempt <= attempt,
            _ => self.attempt < attempt,
        }
    }

    /// Whether a report of `other` adds nothing new.
    #[must_use]
    pub fn covers(self, other: Self) -> bool {
        self.rank() >= other.rank()
    }
}

/// How applied results change a run's counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CounterDelta([i32; ItemState::ALL.len()]);

impl CounterDelta {
    /// The change in the number of items in `state`.
    #[must_use]
    pub fn of(&self, state: ItemState) -> i32 {
        self.0[state as usize]
    }

    /// The difference between two sets of counts.
    pub(crate) fn between(from: [i32; ItemState::ALL.len()], to: [i32; ItemState::ALL.len()]) -> Self {
        let mut delta = Self(to);
        for (change, from) in delta.0.iter_mut().zip(from) {
            *change -= from;
        }
        delta
    }

    /// Adds another change to this one.
    pub fn add(&mut self, other: Self) {
        for (mine, theirs) in self.0.iter_mut().zip(other.0) {
            *mine += theirs;
        }
    }

    fn moved(from: ItemState, to: ItemState) -> Self {
        let mut delta = Self::default();
        delta.0[from as usize] -= 1;
        delta.0[to as usize] += 1;
        delta
    }
}

/// Joins a reported standing into the known one.
///
/// Commutative, associative and idempotent: reports may come late, twice or in any order, through any number of progress workers,
/// and the result is the same. The delta keeps the counters equal to a count of the items if both are written in one
/// transaction.
#[must_use]
pub fn merge(current: Standing, incoming: Standing) -> (Standing, CounterDelta) {
    if current.covers(incoming) {
        (current, CounterDelta::default())
    } else {
        (incoming, CounterDelta::moved(current.state, incoming.state))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn standing() -> impl Strategy<Value = Standing> {
        (1..6i32, prop::sample::select(&ItemState::ALL[..])).prop_map(|(attempt, state)| Standing { attempt, state })
    }

    fn state_of(reports: &[Standing]) -> ItemState {
        reports.iter().fold(Standing::NEW, |known, report| merge(known, *report).0).state
    }

    proptest! {
        #[test]
        fn order_and_duplicates_do_not_matter(
            (reports, shuffled) in prop::collection::vec(standing(), 0..12).prop_flat_map(|reports| {
                let doubled: Vec<_> = reports.iter().chain(&reports).copied().collect();
                (Just(reports), Just(doubled).prop_shuffle())
            })
        ) {
            prop_assert_eq!(state_of(&reports), state_of(&shuffled));
        }

        #[test]
        fn counters_equal_counts_after_every_result(
            results in prop::collection::vec((0..5usize, standing()), 0..60)
        ) {
            let mut items = [Standing::NEW; 5];
            let mut counters = [0; ItemState::ALL.len()];
            counters[ItemState::Pending as usize] = 5;
            for (index, result) in results {
                let (next, delta) = merge(items[index], result);
                items[index] = next;
                for state in ItemState::ALL {
                    counters[state as usize] += delta.of(state);
                    let count = items.iter().filter(|item| item.state == state).count();
                    prop_assert_eq!(counters[state as usize], i32::try_from(count).unwrap());
                }
            }
        }

        #[test]
        fn a_sent_item_never_changes_again(report in standing(), attempt in 1..6i32) {
            let sent = Standing { attempt, state: ItemState::Sent };
            prop_assert_eq!(merge(sent, report), (sent, CounterDelta::default()));
        }

        #[test]
        fn a_replay_reopens_any_item_that_is_not_sent(known in standing()) {
            let replayed = Standing { attempt: known.attempt + 1, state: ItemState::Pending };
            let (next, _) = merge(known, replayed);
            prop_assert_eq!(next == replayed, known.state != ItemState::Sent);
        }

        #[test]
        fn a_reported_attempt_is_not_allowed_again(known in standing(), report in standing()) {
            let (next, _) = merge(known, report);
            if report.state != ItemState::Pending {
                prop_assert!(!next.allows(report.attempt));
            }
        }
    }
}
