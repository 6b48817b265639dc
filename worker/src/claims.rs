//! What this worker has claimed: attempts under way, and outcomes that the ledger has not been seen to know yet.
//!
//! An outcome is remembered until it is seen applied, and repeated until then: so results that are lost on the way, by a
//! purged queue for instance, cost nothing while the worker lives.

use std::{
    collections::{HashMap, HashSet},
    time::{Duration, Instant},
};

use mailrun_shared::{item::Standing, message::ItemResult};

use crate::consumer::Delivery;

/// An item and the number of the attempt.
pub type Key = (i64, i32);

/// An outcome is looked up in the ledger when it is this old.
const FIRST_LOOK: Duration = Duration::from_secs(3);
/// An outcome that is not applied by then is published again, and then after twice the time.
const FIRST_REPEAT: Duration = Duration::from_secs(5);
/// But never less often than this.
const LAST_REPEAT: Duration = Duration::from_secs(60);

#[derive(Debug)]
enum Claim {
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
        self.known.insert(key, Claim::UnderWay(deliveries));
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
        match self.known.get_mut(&key) {
            Some(Claim::UnderWay(deliveries)) => {
                deliveries.push(delivery);
                Known::UnderWay
            }
            Some(Claim::Done { result, .. }) => Known::Done(result.clone(), delivery),
            None if self.in_vain.remove(&key) => Known::InVain(delivery),
            None => Known::Forgotten(delivery),
        }
    }

    /// An attempt's result is published: returns the deliveries to acknowledge.
    pub fn done(&mut self, key: Key, result: ItemResult, now: Instant) -> Vec<Delivery> {
        let done = Claim::Done {
            result,
            look_at: now + FIRST_LOOK,
            repeat_at: now + FIRST_REPEAT,
            repeat_after: FIRST_REPEAT,
        };
        match self.known.insert(key, done) {
            Some(Claim::UnderWay(deliveries)) => deliveries,
            Some(Claim::Done { .. }) | None => Vec::new(),
        }
    }

    /// Up to `limit` outcomes that it is time to look up in the ledger.
    pub fn to_look_up(&self, now: Instant, limit: usize) -> Vec<Key> {
        self.known
            .iter()
            .filter(|(_, claim)| matches!(claim, Claim::Done { look_at, .. } if *look_at <= now))
            .map(|(key, _)| *key)
            .take(limit)
            .collect()
    }

    /// The ledger's word on an outcome: forgets it if it is applied. Otherwise returns it when it is time to repeat it.
    pub fn looked_up(&mut self, key: Key, standing: Option<Standing>, now: Instant) -> Option<ItemResult> {
        let Some(Claim::Done { result, look_at, repeat_at, repeat_after }) = self.known.get_mut(&key) else {
            return None;
        };
        let reported = Standing { attempt: result.attempt, state: result.state };
        // An item that no longer exists can't be told anything.
        if standing.is_none_or(|standing| standing.covers(reported)) {
            self.known.remove(&key);
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use mailrun_shared::{item::ItemState, message::ItemMessage};

    fn sent() -> ItemResult {
        let item = ItemMessage { run_id: uuid::Uuid::from_u128(1), item_id: 5, attempt: 1, tries: 1, replays: 0 };
        item.result(ItemState::Sent, None)
    }

    #[test]
    fn an_outcome_is_repeated_until_it_is_seen_applied() {
        let (mut claims, now, key) = (Claims::default(), Instant::now(), (5, 1));
        claims.begin(key, Vec::new());
        assert!(claims.to_look_up(now + LAST_REPEAT, 9).is_empty());
        claims.done(key, sent(), now);
        assert!(claims.to_look_up(now, 9).is_empty());
        assert_eq!(claims.to_look_up(now + FIRST_LOOK, 9), [key]);

        let open = Some(Standing::NEW);
        assert_eq!(claims.looked_up(key, open, now + FIRST_LOOK), None);
        assert_eq!(claims.looked_up(key, open, now + FIRST_REPEAT), Some(sent()));
        assert_eq!(claims.looked_up(key, open, now + FIRST_REPEAT + FIRST_LOOK), None);

        let applied = Some(Standing { attempt: 1, state: ItemState::Sent });
        assert_eq!(claims.looked_up(key, applied, now + LAST_REPEAT), None);
        assert!(claims.to_look_up(now + LAST_REPEAT * 9, 9).is_empty());
    }
}
