//! The circuit breaker for unexplained refusals. Pure.
//!
//! A message is suspect if it was refused permanently and the reply says neither that the mailbox does not exist nor that the
//! relay rejects us. A suspect is deferred without charging a try until it is clear whether others meet the same refusal. If
//! many do, the relay is stopped and an operator decides. If not, the message fails with the server's reply and is not offered
//! again.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    time::{Duration, Instant},
};

use mailrun_app::config::BreakerConfig;
use uuid::Uuid;

/// After this long without a reply from the relay, suspects are no longer deferred.
const QUIET: Duration = Duration::from_millis(1_500);
/// A suspect is deferred for at most this long.
const LONGEST: Duration = Duration::from_secs(600);
/// Suspects are deferred while the streak has this fraction (1/n) of the recipients that trip the breaker, or 2 if that is
/// fewer, or while the share of refusals is at least half (2/n) of what trips it.
const SUSPICIOUS_PART: usize = 4;
/// At most this many suspects are remembered. A forgotten message is offered again.
const KEPT: usize = 10_000;

/// One message that was refused for an unknown reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The same on each attempt.
    pub message_id: String,
    pub run_id: Uuid,
    pub recipient: String,
    /// The server's reply.
    pub reason: String,
    /// The normalized reply, equal for refusals with the same reason.
    pub alike: String,
}

/// A relay to stop, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trip {
    /// The relay's index.
    pub relay: usize,
    /// The counts, and the server's last reply.
    pub reason: String,
    /// The normalized replies.
    pub alike: Vec<String>,
    /// The runs whose messages were refused.
    pub runs: Vec<Uuid>,
}

/// What to do with a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Defer it without charging a try.
    Wait(String),
    /// Fail it.
    Fail(String),
}

#[derive(Debug)]
struct Suspect {
    relay: usize,
    refusal: Refusal,
    at: Instant,
}

/// The counts of one relay.
#[derive(Debug, Default)]
struct Counts {
    /// The normalized reply shared by the latest refusals, and their distinct recipients.
    streak: Option<(String, HashSet<String>)>,
    /// Whether each of the last messages was refused.
    window: VecDeque<bool>,
    refused: usize,
    /// When the relay last replied to a message.
    last: Option<Instant>,
    stopped: bool,
}

/// The breaker of all relays in this process.
#[derive(Debug)]
pub struct Breaker {
    settings: BreakerConfig,
    counts: HashMap<usize, Counts>,
    suspects: HashMap<String, Suspect>,
    /// Normalized replies that an operator attributed to the recipients.
    explained: HashSet<String>,
    /// Relays to stop, not yet taken by [`Self::take_trips`].
    trips: Vec<Trip>,
}

impl Breaker {
    pub fn new(settings: BreakerConfig) -> Self {
        Self {
            settings,
            counts: HashMap::new(),
            suspects: HashMap::new(),
            explained: HashSet::new(),
            trips: Vec::new(),
        }
    }

    /// A message was accepted, or refused for a known reason.
    pub fn answered(&mut self, relay: usize, now: Instant) {
        let counts = self.counts.entry(relay).or_default();
        counts.streak = None;
        counts.push(false, self.settings.window, now);
    }

    /// A message was refused permanently, for an unknown reason.
    pub fn refused(&mut self, relay: usize, refusal: Refusal, now: Instant) -> Decision {
        if self.settings.in_a_row == 0 || self.explained.contains(&refusal.alike) {
            self.answered(relay, now);
            return Decision::Fail(refusal.reason);
        }
        let counts = self.counts.entry(relay).or_default();
        counts.push(true, self.settings.window, now);
        match &mut counts.streak {
            Some((alike, recipients)) if *alike == refusal.alike => {
                recipients.insert(refusal.recipient.clone());
            }
            streak => *streak = Some((refusal.alike.clone(), HashSet::from([refusal.recipient.clone()]))),
        }
        let reason = refusal.reason.clone();
        if self.suspects.len() >= KEPT {
            self.suspects.retain(|_, suspect| now.duration_since(suspect.at) < LONGEST);
        }
        self.suspects.insert(refusal.message_id.clone(), Suspect { relay, refusal, at: now });
        self.check(relay, &reason);
        Decision::Wait(reason)
    }

    /// Decides about a message before it is offered. `None`: offer it.
    pub fn before(&mut self, message_id: &str, now: Instant) -> Option<Decision> {
        let suspect = self.suspects.get(message_id)?;
        let reason = suspect.refusal.reason.clone();
        let counts = self.counts.get(&suspect.relay)?;
        if counts.stopped {
            return Some(Decision::Wait(reason));
        }
        let is_explained = self.explained.contains(&suspect.refusal.alike);
        let is_quiet = counts.last.is_none_or(|last| now.duration_since(last) >= QUIET);
        let is_old = now.duration_since(suspect.at) >= LONGEST;
        if !is_explained && !is_quiet && !is_old && counts.is_suspicious(&suspect.refusal.alike, &self.settings) {
            return Some(Decision::Wait(reason));
        }
        self.suspects.remove(message_id);
        Some(Decision::Fail(reason))
    }

    /// The relays to stop. Call this after [`Self::refused`].
    pub fn take_trips(&mut self) -> Vec<Trip> {
        std::mem::take(&mut self.trips)
    }

    /// The relay is stopped, by this or another process.
    pub fn stopped(&mut self, relay: usize) {
        self.counts.entry(relay).or_default().stopped = true;
    }

    /// An operator has answered: the relay is used again. Its suspects are offered again, except those with an explained refusal.
    pub fn released(&mut self, relay: usize) {
        if self.counts.get(&relay).is_some_and(|counts| counts.stopped) {
            self.counts.insert(relay, Counts::default());
            let explained = &self.explained;
            self.suspects.retain(|_, suspect| suspect.relay != relay || explained.contains(&suspect.refusal.alike));
        }
    }

    /// Attributes these refusals to the recipients.
    pub fn explain(&mut self, alike: impl IntoIterator<Item = String>) {
        self.explained = alike.into_iter().collect();
    }

    fn check(&mut self, relay: usize, words: &str) {
        let Some(counts) = self.counts.get_mut(&relay).filter(|counts| !counts.stopped) else { return };
        let in_a_row = counts.streak.as_ref().map_or(0, |(_, recipients)| recipients.len());
        let (window, share) = (self.settings.window, self.settings.percent);
        let why = if in_a_row >= self.settings.in_a_row {
            format!("{in_a_row} recipients in a row were refused with the same words")
        } else if counts.window.len() >= window && counts.refused * 100 >= window * share {
            format!("{} of the last {window} recipients were refused", counts.refused)
        } else {
            return;
        };
        counts.stopped = true;
        let suspects = || self.suspects.values().filter(|suspect| suspect.relay == relay);
        let alike: HashSet<String> = suspects().map(|suspect| suspect.refusal.alike.clone()).collect();
        let runs: HashSet<Uuid> = suspects().map(|suspect| suspect.refusal.run_id).collect();
        self.trips.push(Trip {
            relay,
            reason: format!("{why}: {words}"),
            alike: alike.into_iter().collect(),
            runs: runs.into_iter().collect(),
        });
    }
}

impl Counts {
    fn push(&mut self, refused: bool, window: usize, now: Instant) {
        self.last = Some(now);
        self.window.push_back(refused);
        self.refused += usize::from(refused);
        while self.window.len() > window {
            self.refused -= usize::from(self.window.pop_front() == Some(true));
        }
    }

    /// Whether refusals like this one may still trip the breaker.
    fn is_suspicious(&self, alike: &str, settings: &BreakerConfig) -> bool {
        let streak = self.streak.as_ref().is_some_and(|(same, recipients)| {
            same == alike && recipients.len() * SUSPICIOUS_PART >= settings.in_a_row.min(SUSPICIOUS_PART * 2)
        });
        let share = self.refused * 100 * SUSPICIOUS_PART / 2 >= self.window.len() * settings.percent;
        streak || share
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(number: usize, text: &str) -> Refusal {
        Refusal {
            message_id: format!("<{number}>"),
            run_id: Uuid::from_u128(7),
            recipient: format!("{number}@example.org"),
            reason: format!("550 {text} {number}"),
            alike: text.into(),
        }
    }

    fn breaker() -> (Breaker, Instant) {
        (Breaker::new(BreakerConfig::default()), Instant::now())
    }

    fn wait(number: usize, text: &str) -> Decision {
        Decision::Wait(format!("550 {text} {number}"))
    }

    #[test]
    fn twenty_identical_refusals_in_a_row_stop_the_relay_and_fail_no_message() {
        let (mut breaker, now) = breaker();
        for number in 0..19 {
            assert_eq!(breaker.refused(0, refusal(number, "no"), now), wait(number, "no"));
        }
        // A repeated recipient counts once.
        breaker.refused(0, refusal(3, "no"), now);
        assert_eq!(breaker.take_trips(), []);
        breaker.refused(0, refusal(19, "no"), now);
        let trips = breaker.take_trips();
        assert_eq!(trips.len(), 1);
        assert_eq!((trips[0].alike.as_slice(), trips[0].runs.len()), (["no".to_owned()].as_slice(), 1));
        assert!(trips[0].reason.contains("20 recipients in a row") && trips[0].reason.contains("550 no 19"));
        let later = now + Duration::from_secs(3_600);
        assert!((0..20).all(|number| breaker.before(&format!("<{number}>"), later) == Some(wait(number, "no"))));
        // Answered "it was us": they are offered again.
        breaker.released(0);
        assert!((0..20).all(|number| breaker.before(&format!("<{number}>"), later).is_none()));
    }

    #[test]
    fn refusals_explained_by_the_recipient_fail_without_another_offer() {
        let (mut breaker, now) = breaker();
        for number in 0..20 {
            breaker.refused(0, refusal(number, "no"), now);
        }
        breaker.explain(["no".to_owned()]);
        breaker.released(0);
        for number in 0..20 {
            assert_eq!(breaker.before(&format!("<{number}>"), now), Some(Decision::Fail(format!("550 no {number}"))));
        }
        assert_eq!(breaker.refused(0, refusal(99, "no"), now), Decision::Fail("550 no 99".into()));
    }

    #[test]
    fn an_accepted_message_ends_the_streak_and_a_single_refusal_fails() {
        let (mut breaker, now) = breaker();
        for round in 0..10 {
            for number in 0..19 {
                breaker.refused(0, refusal(100 * round + number, "no"), now);
            }
            for _ in 0..40 {
                breaker.answered(0, now);
            }
        }
        assert_eq!(breaker.take_trips(), []);
        let (mut breaker, now) = self::breaker();
        for _ in 0..50 {
            breaker.answered(0, now);
        }
        breaker.refused(0, refusal(1, "no"), now);
        breaker.answered(0, now);
        assert_eq!(breaker.before("<1>", now), Some(Decision::Fail("550 no 1".into())));
        assert_eq!(breaker.before("<1>", now), None, "it is forgotten");
    }

    #[test]
    fn refusing_half_of_the_last_two_hundred_stops_the_relay_whatever_the_replies() {
        let (mut breaker, now) = breaker();
        for number in 0..199 {
            if number % 2 == 0 {
                assert_eq!(
                    breaker.refused(0, refusal(number, &format!("no{}", number % 7)), now),
                    wait(number, &format!("no{}", number % 7))
                );
                assert!(matches!(breaker.before(&format!("<{number}>"), now), Some(Decision::Wait(_))));
            } else {
                breaker.answered(0, now);
            }
        }
        assert_eq!(breaker.take_trips(), []);
        breaker.refused(0, refusal(500, "no"), now);
        let trips = breaker.take_trips();
        assert_eq!(trips.len(), 1);
        assert!(trips[0].reason.contains("101 of the last 200"), "{}", trips[0].reason);
    }

    #[test]
    fn a_small_run_ends_without_an_operator() {
        let (mut breaker, now) = breaker();
        for number in 0..5 {
            breaker.refused(0, refusal(number, "no"), now);
        }
        assert!(matches!(breaker.before("<1>", now), Some(Decision::Wait(_))));
        for number in 0..5 {
            let decision = breaker.before(&format!("<{number}>"), now + QUIET);
            assert!(matches!(decision, Some(Decision::Fail(_))), "{decision:?}");
        }
    }

    #[test]
    fn each_relay_is_counted_separately() {
        let (mut breaker, now) = breaker();
        for number in 0..15 {
            breaker.refused(0, refusal(number, "no"), now);
            breaker.refused(1, refusal(100 + number, "no"), now);
        }
        assert_eq!(breaker.take_trips(), []);
    }
}
