//! Decides whether a refusal that may be about us concerns the relay or only its recipient. Pure.
//!
//! If a recipient is refused again while others get their mail, the refusal is about that recipient: it costs a try and pauses
//! nothing.

use std::{
    collections::{HashMap, HashSet},
    hash::{DefaultHasher, Hash as _, Hasher as _},
};

/// A deferral concerns the relay once this many recipients in a row, at two or more domains, were deferred.
const DEFERRED_IN_A_ROW: usize = 3;
/// At most this many refused recipients are remembered; then the older half is dropped.
const KEPT: usize = 10_000;

/// The refusals of one relay.
#[derive(Debug, Default)]
pub struct Blame {
    /// How many messages the relay has accepted.
    accepted: u64,
    /// By recipient (hashed): the value of `accepted` at the last refusal.
    refused: HashMap<u64, u64>,
    /// Recipients and domains (hashed) deferred since the last accepted message.
    deferred: HashSet<(u64, u64)>,
}

impl Blame {
    /// A message was accepted.
    pub fn accepted(&mut self, recipient: &str) {
        self.accepted += 1;
        self.refused.remove(&hash(recipient));
        self.deferred.clear();
    }

    /// A recipient was refused with a reply that is about us. Returns whether that concerns the relay.
    pub fn refused(&mut self, recipient: &str) -> bool {
        let recipient = hash(recipient);
        if self.refused.len() >= KEPT {
            let accepted = self.accepted;
            self.refused.retain(|_, at| *at + KEPT as u64 / 2 > accepted);
        }
        if self.refused.len() >= KEPT {
            self.refused.clear();
        }
        match self.refused.insert(recipient, self.accepted) {
            // If the count has grown, others got their mail since.
            Some(before) => before == self.accepted,
            None => true,
        }
    }

    /// A recipient was deferred with a reply that may be about us. Returns whether that concerns the relay.
    pub fn deferred(&mut self, recipient: &str, domain: &str) -> bool {
        let is_alone = self.refused.get(&hash(recipient)).is_some_and(|before| *before < self.accepted);
        self.refused(recipient);
        if is_alone {
            return false;
        }
        if self.deferred.len() < KEPT {
            self.deferred.insert((hash(recipient), hash(domain)));
        }
        let domains: HashSet<u64> = self.deferred.iter().map(|(_, domain)| *domain).collect();
        self.deferred.len() >= DEFERRED_IN_A_ROW && domains.len() > 1
    }
}

fn hash(text: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recipient_refused_again_while_others_succeed_does_not_concern_the_relay() {
        let mut blame = Blame::default();
        assert!(blame.refused("ann"));
        assert!(blame.refused("ann"), "no other message was accepted since");
        blame.accepted("bob");
        assert!(!blame.refused("ann"));
        assert!(blame.refused("zoe"));
        blame.accepted("ann");
        assert!(blame.refused("ann"));
    }

    #[test]
    fn a_deferral_concerns_the_relay_only_at_several_domains() {
        let mut blame = Blame::default();
        for number in 0..10 {
            assert!(!blame.deferred(&format!("{number}@one.example"), "one.example"));
        }
        assert!(blame.deferred("a@two.example", "two.example"));
        // A probe meets the same deferral.
        assert!(blame.deferred("a@two.example", "two.example"));
        blame.accepted("bob@one.example");
        assert!(!blame.deferred("a@two.example", "two.example"), "only this recipient is affected");
        assert!(!blame.deferred("c@three.example", "three.example"));
        assert!(!blame.deferred("d@four.example", "four.example"));
        assert!(blame.deferred("e@four.example", "four.example"));
    }

    #[test]
    fn one_recipient_alone_never_concerns_the_relay() {
        let mut blame = Blame::default();
        for _ in 0..100 {
            assert!(!blame.deferred("a@one.example", "one.example"));
        }
    }

    #[test]
    fn the_number_of_remembered_recipients_is_bounded() {
        let mut blame = Blame::default();
        for number in 0..3 * KEPT {
            blame.refused(&number.to_string());
        }
        assert!(blame.refused.len() <= KEPT);
    }
}
