//! The claims of this worker: attempts in progress, and outcomes not yet seen in the ledger.
//!
//! An outcome is remembered and repeated until it is seen applied. Results that get lost, for instance in a purged queue, cost
//! nothing as long as the worker lives.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    mem,
    time::{Duration, Instant},
};

use mailrun_core::{
    item::{ItemState, Key, Standing},
    message::ItemResult,
};
use mailrun_ledger::receipts::Receipt;

use mailrun_broker::consumer::Delivery;

/// The age at which an outcome is first compared with the ledger.
const FIRST_CHECK: Duration = Duration::from_secs(3);
/// An outcome that is not applied by then is published again. The interval then doubles.
const FIRST_REPEAT: Duration = Duration::from_secs(5);
/// The longest interval between repeats.
const LAST_REPEAT: Duration = Duration::from_secs(60);

#[derive(Debug)]
struct Claim {
    stage: Stage,
    /// The number of its receipt, which is kept until the outcome is seen applied.
    receipt: Option<i64>,
}

#[derive(Debug)]
enum Stage {
    /// In progress. All deliveries of its message wait until the outcome is published. Acks on a lost channel have no effect.
    InProgress(Vec<Delivery>),
    /// Published.
    Done { result: ItemResult, check_at: Instant, repeat_at: Instant, repeat_after: Duration },
}

/// The claims of one worker.
#[derive(Debug, Default)]
pub struct Claims {
    known: HashMap<Key, Claim>,
    /// Claims whose response was lost. They may be ours; if so, no attempt was started.
    uncertain: HashSet<Key>,
    /// By receipt number: how many outcomes still need it.
    receipts: BTreeMap<i64, usize>,
    /// The number of the newest receipt.
    last_receipt: i64,
}

/// What this worker knows about its own claim when the message arrives again.
#[derive(Debug)]
pub enum Known {
    /// It is in progress and has taken over the delivery.
    InProgress,
    /// It ended with this result.
    Done(ItemResult, Delivery),
    /// The claim's response was lost, so the attempt was certainly not started.
    Uncertain(Delivery),
    /// Nothing: its result was seen applied.
    Forgotten(Delivery),
}

impl Claims {
    pub fn begin(&mut self, key: Key, deliveries: Vec<Delivery>) {
        self.known.insert(key, Claim { stage: Stage::InProgress(deliveries), receipt: None });
    }

    /// Claims are about to be requested, perhaps again. If a message for one of them arrives in the meantime, it is retried later.
    /// Returns those whose earlier response was lost: if they are refused now, they are still uncertain.
    pub fn requesting<'a>(&mut self, keys: impl IntoIterator<Item = &'a Key>) -> Vec<Key> {
        keys.into_iter().filter(|key| self.uncertain.remove(key)).copied().collect()
    }

    /// Claims were requested, and the response was lost.
    pub fn answer_lost(&mut self, keys: impl IntoIterator<Item = Key>) {
        self.uncertain.extend(keys);
    }

    /// A message arrived for an attempt that this worker has claimed before.
    pub fn redelivered(&mut self, key: Key, delivery: Delivery) -> Known {
        match self.known.get_mut(&key).map(|claim| &mut claim.stage) {
            Some(Stage::InProgress(deliveries)) => {
                deliveries.push(delivery);
                Known::InProgress
            }
            Some(Stage::Done { result, .. }) => Known::Done(result.clone(), delivery),
            None if self.uncertain.remove(&key) => Known::Uncertain(delivery),
            None => Known::Forgotten(delivery),
        }
    }

    /// An attempt's result was published. Returns the deliveries to acknowledge.
    pub fn done(&mut self, key: Key, result: ItemResult, now: Instant) -> Vec<Delivery> {
        let done = Stage::Done {
            result,
            check_at: now + FIRST_CHECK,
            repeat_at: now + FIRST_REPEAT,
            repeat_after: FIRST_REPEAT,
        };
        let claim = self.known.entry(key).or_insert(Claim { stage: Stage::InProgress(Vec::new()), receipt: None });
        match mem::replace(&mut claim.stage, done) {
            Stage::InProgress(deliveries) => deliveries,
            Stage::Done { .. } => Vec::new(),
        }
    }

    /// A new receipt for these attempts.
    pub fn receipt(&mut self, keys: &[Key]) -> Receipt {
        if keys.is_empty() {
            return Receipt::default();
        }
        self.last_receipt += 1;
        self.receipts.insert(self.last_receipt, keys.len());
        let (item_ids, attempts) = keys.iter().map(|key| (key.item_id, key.attempt)).unzip();
        Receipt { number: self.last_receipt, item_ids, attempts }
    }

    /// What was sent and has no receipt, though the ledger has not been seen to know it: it needs one when the worker ends.
    pub fn without_receipt(&self) -> Vec<Key> {
        let is_sent = |stage: &Stage| matches!(stage, Stage::Done { result, .. } if result.state == ItemState::Sent);
        let known = self.known.iter();
        known.filter(|(_, claim)| claim.receipt.is_none() && is_sent(&claim.stage)).map(|(key, _)| *key).collect()
    }

    /// It is written.
    pub fn receipt_written(&mut self, number: i64, keys: &[Key]) {
        for key in keys {
            match self.known.get_mut(key) {
                Some(claim) => claim.receipt = Some(number),
                None => self.forget(Some(number)),
            }
        }
    }

    /// It is unknown whether the receipt was written. The next claim stores a new one.
    pub fn receipt_lost(&mut self, number: i64) {
        self.receipts.remove(&number);
    }

    /// Receipts with smaller numbers are no longer needed.
    pub fn first_needed_receipt(&self) -> i64 {
        self.receipts.keys().next().map_or(self.last_receipt + 1, |number| *number)
    }

    /// Up to `limit` outcomes that are due to be compared with the ledger.
    pub fn to_check(&self, now: Instant, limit: usize) -> Vec<Key> {
        self.known
            .iter()
            .filter(|(_, claim)| matches!(claim.stage, Stage::Done { check_at, .. } if check_at <= now))
            .map(|(key, _)| *key)
            .take(limit)
            .collect()
    }

    /// The item's standing in the ledger: forgets the outcome if it is applied. Otherwise returns the result if a repeat is due.
    pub fn checked(&mut self, key: Key, standing: Option<Standing>, now: Instant) -> Option<ItemResult> {
        let claim = self.known.get_mut(&key)?;
        let Stage::Done { result, check_at, repeat_at, repeat_after } = &mut claim.stage else { return None };
        let reported = Standing { attempt: result.attempt, state: result.state };
        // The item no longer exists, so there is nothing to report to.
        if standing.is_none_or(|standing| standing.covers(reported)) {
            let receipt = claim.receipt;
            self.known.remove(&key);
            self.forget(receipt);
            return None;
        }
        *check_at = now + FIRST_CHECK;
        if *repeat_at > now {
            return None;
        }
        *repeat_after = (*repeat_after * 2).min(LAST_REPEAT);
        *repeat_at = now + *repeat_after;
        Some(result.clone())
    }

    /// The ledger does not show the outcome in a known state yet: checks again later.
    pub fn check_later(&mut self, key: Key, now: Instant) {
        if let Some(Stage::Done { check_at, .. }) = self.known.get_mut(&key).map(|claim| &mut claim.stage) {
            *check_at = now + LAST_REPEAT;
        }
    }

    /// One outcome no longer needs this receipt.
    fn forget(&mut self, receipt: Option<i64>) {
        if let Some(number) = receipt
            && let Some(needed) = self.receipts.get_mut(&number)
        {
            *needed -= 1;
            if *needed == 0 {
                self.receipts.remove(&number);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mailrun_core::message::ItemMessage;
    use uuid::Uuid;

    fn key(item_id: i64) -> Key {
        Key { run_id: Uuid::from_u128(1), item_id, attempt: 1 }
    }

    fn sent() -> ItemResult {
        let item =
            ItemMessage { run_id: Uuid::from_u128(1), item_id: 5, attempt: 1, tries: 1, replays: 0, impersonal: false };
        item.result(ItemState::Sent, None)
    }

    #[test]
    fn a_receipt_is_needed_until_the_last_of_its_outcomes_is_applied() {
        let (mut claims, now) = (Claims::default(), Instant::now());
        let applied = Some(Standing { attempt: 1, state: ItemState::Sent });
        let keys = [key(5), key(6), key(7)];
        keys.iter().for_each(|key| claims.begin(*key, Vec::new()));
        let first = claims.receipt(&keys[..2]);
        assert_eq!(first, Receipt { number: 1, item_ids: vec![5, 6], attempts: vec![1, 1] });
        assert_eq!(claims.first_needed_receipt(), 1, "it may already be on disk");
        claims.receipt_written(1, &keys[..2]);
        let lost = claims.receipt(&keys[2..]).number;
        claims.receipt_lost(lost);
        let third = claims.receipt(&keys[2..]).number;
        claims.receipt_written(third, &keys[2..]);
        for key in keys {
            claims.done(key, sent(), now);
        }
        for (key, needed) in [(keys[0], 1), (keys[1], third), (keys[2], third + 1)] {
            claims.checked(key, applied, now);
            assert_eq!(claims.first_needed_receipt(), needed);
        }
        assert_eq!(claims.receipt(&[]), Receipt::default(), "no receipt for no attempts");
    }

    #[test]
    fn sent_outcomes_not_seen_applied_need_a_last_receipt() {
        let (mut claims, now) = (Claims::default(), Instant::now());
        [5, 6, 7, 8].into_iter().for_each(|item_id| claims.begin(key(item_id), Vec::new()));
        let receipt = claims.receipt(&[key(5)]);
        claims.receipt_written(receipt.number, &[key(5)]);
        for (item_id, state) in [(5, ItemState::Sent), (6, ItemState::Sent), (7, ItemState::Failed)] {
            claims.done(key(item_id), ItemResult { state, ..sent() }, now);
        }
        assert_eq!(claims.without_receipt(), [key(6)]);
    }

    #[test]
    fn an_outcome_is_repeated_until_it_is_seen_applied() {
        let (mut claims, now, key) = (Claims::default(), Instant::now(), key(5));
        claims.begin(key, Vec::new());
        assert!(claims.to_check(now + LAST_REPEAT, 9).is_empty());
        claims.done(key, sent(), now);
        assert!(claims.to_check(now, 9).is_empty());
        assert_eq!(claims.to_check(now + FIRST_CHECK, 9), [key]);

        let open = Some(Standing::NEW);
        assert_eq!(claims.checked(key, open, now + FIRST_CHECK), None);
        assert_eq!(claims.checked(key, open, now + FIRST_REPEAT), Some(sent()));
        assert_eq!(claims.checked(key, open, now + FIRST_REPEAT + FIRST_CHECK), None);

        // In a state of a later version: the result waits on a queue, and stays remembered.
        claims.check_later(key, now + FIRST_REPEAT);
        assert!(claims.to_check(now + LAST_REPEAT, 9).is_empty());
        assert_eq!(claims.to_check(now + LAST_REPEAT + FIRST_REPEAT, 9), [key]);

        let applied = Some(Standing { attempt: 1, state: ItemState::Sent });
        assert_eq!(claims.checked(key, applied, now + LAST_REPEAT), None);
        assert!(claims.to_check(now + LAST_REPEAT * 9, 9).is_empty());
    }
}
