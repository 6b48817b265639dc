//! What this worker has claimed: attempts under way, and outcomes that the ledger has not been seen to know yet.
//!
//! An outcome is remembered until it is seen applied, and repeated until then: so results that are lost on the way, by a
//! purged queue for instance, cost nothing while the worker lives.

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

/// An outcome is looked up in the ledger when it is this old.
const FIRST_LOOK: Duration = Duration::from_secs(3);
/// An outcome that is not applied by then is published again, and then after twice the time.
const FIRST_REPEAT: Duration = Duration::from_secs(5);
/// But never less often than this.
const LAST_REPEAT: Duration = Duration::from_secs(60);

#[derive(Debug)]
struct Claim {
    stage: Stage,
    /// The number of its receipt, which is needed until the outcome is seen applied.
    receipt: Option<i64>,
}

#[derive(Debug)]
enum Stage {
    /// Under way. Every delivery of its message waits for the outcome to be published; those of a lost channel are
    /// acknowledged in vain.
    UnderWay(Vec<Delivery>),
    /// Published.
    Done { result: ItemResult, look_at: Instant, repeat_at: Instant, repeat_after: Duration },
}

/// The claims of one worker.
#[derive(Debug, Default)]
pub struct Claims {
    known: HashMap<Key, Claim>,
    /// Perhaps claimed: the database was asked, and its answer got lost. If they are ours, nobody has begun to send them.
    in_vain: HashSet<Key>,
    /// How many outcomes need each receipt.
    receipts: BTreeMap<i64, usize>,
    /// The last receipt's number.
    last_receipt: i64,
}

/// What this worker knows of a claim that a message asks for again.
#[derive(Debug)]
pub enum Known {
    /// It is under way, and has taken over the delivery.
    UnderWay,
    /// It is done, with this result.
    Done(ItemResult, Delivery),
    /// It was claimed in vain, and certainly not sent.
    InVain(Delivery),
    /// Nothing: it was done, and seen applied.
    Forgotten(Delivery),
}

impl Claims {
    /// An attempt begins.
    pub fn begin(&mut self, key: Key, deliveries: Vec<Delivery>) {
        self.known.insert(key, Claim { stage: Stage::UnderWay(deliveries), receipt: None });
    }

    /// Claims are asked for, again perhaps: whoever meets one of them meanwhile looks again later.
    /// Returns those whose answer got lost before; if they are refused now, it says the same as then.
    pub fn asking<'a>(&mut self, keys: impl IntoIterator<Item = &'a Key>) -> Vec<Key> {
        keys.into_iter().filter(|key| self.in_vain.remove(key)).copied().collect()
    }

    /// Claims were asked for, but the answer got lost.
    pub fn answer_lost(&mut self, keys: impl IntoIterator<Item = Key>) {
        self.in_vain.extend(keys);
    }

    /// A message asks for an attempt that this worker has claimed before.
    pub fn meet(&mut self, key: Key, delivery: Delivery) -> Known {
        match self.known.get_mut(&key).map(|claim| &mut claim.stage) {
            Some(Stage::UnderWay(deliveries)) => {
                deliveries.push(delivery);
                Known::UnderWay
            }
            Some(Stage::Done { result, .. }) => Known::Done(result.clone(), delivery),
            None if self.in_vain.remove(&key) => Known::InVain(delivery),
            None => Known::Forgotten(delivery),
        }
    }

    /// An attempt's result is published: returns the deliveries to acknowledge.
    pub fn done(&mut self, key: Key, result: ItemResult, now: Instant) -> Vec<Delivery> {
        let done = Stage::Done {
            result,
            look_at: now + FIRST_LOOK,
            repeat_at: now + FIRST_REPEAT,
            repeat_after: FIRST_REPEAT,
        };
        let claim = self.known.entry(key).or_insert(Claim { stage: Stage::UnderWay(Vec::new()), receipt: None });
        match mem::replace(&mut claim.stage, done) {
            Stage::UnderWay(deliveries) => deliveries,
            Stage::Done { .. } => Vec::new(),
        }
    }

    /// A receipt for these, to be written now.
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

    /// Nobody knows whether it is written: another one will be.
    pub fn receipt_lost(&mut self, number: i64) {
        self.receipts.remove(&number);
    }

    /// Receipts before this one are of no use any more.
    pub fn first_needed_receipt(&self) -> i64 {
        self.receipts.keys().next().map_or(self.last_receipt + 1, |number| *number)
    }

    /// Up to `limit` outcomes that it is time to look up in the ledger.
    pub fn to_look_up(&self, now: Instant, limit: usize) -> Vec<Key> {
        self.known
            .iter()
            .filter(|(_, claim)| matches!(claim.stage, Stage::Done { look_at, .. } if look_at <= now))
            .map(|(key, _)| *key)
            .take(limit)
            .collect()
    }

    /// The ledger's word on an outcome: forgets it if it is applied. Otherwise returns it when it is time to repeat it.
    pub fn looked_up(&mut self, key: Key, standing: Option<Standing>, now: Instant) -> Option<ItemResult> {
        let claim = self.known.get_mut(&key)?;
        let Stage::Done { result, look_at, repeat_at, repeat_after } = &mut claim.stage else { return None };
        let reported = Standing { attempt: result.attempt, state: result.state };
        // An item that no longer exists can't be told anything.
        if standing.is_none_or(|standing| standing.covers(reported)) {
            let receipt = claim.receipt;
            self.known.remove(&key);
            self.forget(receipt);
            return None;
        }
        *look_at = now + FIRST_LOOK;
        if *repeat_at > now {
            return None;
        }
        *repeat_after = (*repeat_after * 2).min(LAST_REPEAT);
        *repeat_at = now + *repeat_after;
        Some(result.clone())
    }

    /// The ledger says nothing yet on an outcome: it is looked up again later.
    pub fn look_again(&mut self, key: Key, now: Instant) {
        if let Some(Stage::Done { look_at, .. }) = self.known.get_mut(&key).map(|claim| &mut claim.stage) {
            *look_at = now + LAST_REPEAT;
        }
    }

    /// One outcome less needs this receipt.
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
        assert_eq!(claims.first_needed_receipt(), 1, "it may be on disk already");
        claims.receipt_written(1, &keys[..2]);
        let lost = claims.receipt(&keys[2..]).number;
        claims.receipt_lost(lost);
        let third = claims.receipt(&keys[2..]).number;
        claims.receipt_written(third, &keys[2..]);
        for key in keys {
            claims.done(key, sent(), now);
        }
        for (key, needed) in [(keys[0], 1), (keys[1], third), (keys[2], third + 1)] {
            claims.looked_up(key, applied, now);
            assert_eq!(claims.first_needed_receipt(), needed);
        }
        assert_eq!(claims.receipt(&[]), Receipt::default(), "nothing is written for nothing");
    }

    #[test]
    fn at_the_end_a_receipt_is_missing_for_what_was_sent_and_is_not_seen_applied() {
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
        assert!(claims.to_look_up(now + LAST_REPEAT, 9).is_empty());
        claims.done(key, sent(), now);
        assert!(claims.to_look_up(now, 9).is_empty());
        assert_eq!(claims.to_look_up(now + FIRST_LOOK, 9), [key]);

        let open = Some(Standing::NEW);
        assert_eq!(claims.looked_up(key, open, now + FIRST_LOOK), None);
        assert_eq!(claims.looked_up(key, open, now + FIRST_REPEAT), Some(sent()));
        assert_eq!(claims.looked_up(key, open, now + FIRST_REPEAT + FIRST_LOOK), None);

        // In a state of a later version: the result waits on a queue, and what is remembered stays.
        claims.look_again(key, now + FIRST_REPEAT);
        assert!(claims.to_look_up(now + LAST_REPEAT, 9).is_empty());
        assert_eq!(claims.to_look_up(now + LAST_REPEAT + FIRST_REPEAT, 9), [key]);

        let applied = Some(Standing { attempt: 1, state: ItemState::Sent });
        assert_eq!(claims.looked_up(key, applied, now + LAST_REPEAT), None);
        assert!(claims.to_look_up(now + LAST_REPEAT * 9, 9).is_empty());
    }
}
