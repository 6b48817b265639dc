//! The circuit breaker for refusals that nobody can explain. Pure.
//!
//! A message that is refused for good, with words that say neither that the mailbox does not exist nor that the relay refuses us, is
//! suspect: it is put off without charging a try until it is clear whether others meet the same. If many do, the relay is stopped
//! and an operator decides; if not, the message fails with the server's words, without being offered again.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    time::{Duration, Instant},
};

use mailrun_app::config::BreakerConfig;
use uuid::Uuid;

/// While nothing was sent for so long, a suspect waits for nothing.
const QUIET: Duration = Duration::from_millis(1_500);
/// No suspect waits for longer.
const LONGEST: Duration = Duration::from_secs(600);
/// A streak or a share below this part of what trips the breaker is no reason to wait.
const SUSPICIOUS_PART: usize = 4;
/// So many suspects are remembered; what is forgotten is offered again.
const KEPT: usize = 10_000;

/// A refused message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The message, the same on each attempt.
    pub message_id: String,
    /// Its run.
    pub run_id: Uuid,
    /// Its recipient.
    pub recipient: String,
    /// The server's words.
    pub reason: String,
    /// What they have in common with others.
    pub alike: String,
}

/// Why a relay is stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trip {
    /// The number of the relay.
    pub relay: usize,
    /// What was counted, and the server's words.
    pub reason: String,
    /// What the refusals have in common.
    pub alike: Vec<String>,
    /// The runs whose messages were refused.
    pub runs: Vec<Uuid>,
}

/// What to do with a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It waits, and costs no try.
    Wait(String),
    /// It fails.
    Fail(String),
}

#[derive(Debug)]
struct Suspect {
    relay: usize,
    refusal: Refusal,
    at: Instant,
}

/// What is counted of one relay.
#[derive(Debug, Default)]
struct Counts {
    /// What the last refusals have in common, and whom they hit.
    streak: Option<(String, HashSet<String>)>,
    /// The last messages: whether each was refused.
    window: VecDeque<bool>,
    refused: usize,
    /// When the last message was answered.
    last: Option<Instant>,
    stopped: bool,
}

/// The breaker of all relays of a process.
#[derive(Debug)]
pub struct Breaker {
    settings: BreakerConfig,
    counts: HashMap<usize, Counts>,
    suspects: HashMap<String, Suspect>,
    /// Refusals that an operator called the recipients' fault.
    explained: HashSet<String>,
    /// Messages that were refused so.
    trips: Vec<Trip>,
}

impl Breaker {
    /// Nothing is counted yet.
    pub fn new(settings: BreakerConfig) -> Self {
        Self {
            settings,
            counts: HashMap::new(),
            suspects: HashMap::new(),
            explained: HashSet::new(),
            trips: Vec::new(),
        }
    }

    /// A message was accepted, or refused for a reason that is known.
    pub fn answered(&mut self, relay: usize, now: Instant) {
        let counts = self.counts.entry(relay).or_default();
        counts.streak = None;
        counts.push(false, self.settings.window, now);
    }

    /// A message was refused for good, and nobody knows why.
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

    /// What to do with a message before it is offered. None: offer it.
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

    /// Relays that have to be stopped: to be asked after [`Self::refused`].
    pub fn take_trips(&mut self) -> Vec<Trip> {
        std::mem::take(&mut self.trips)
    }

    /// The relay is stopped, here or by another process.
    pub fn stopped(&mut self, relay: usize) {
        self.counts.entry(relay).or_default().stopped = true;
    }

    /// An operator has answered: the relay goes on. Suspects are offered again, unless their refusals are explained.
    pub fn released(&mut self, relay: usize) {
        if self.counts.get(&relay).is_some_and(|counts| counts.stopped) {
            self.counts.insert(relay, Counts::default());
            let explained = &self.explained;
            self.suspects.retain(|_, suspect| suspect.relay != relay || explained.contains(&suspect.refusal.alike));
        }
    }

    /// Such refusals are the recipients' fault.
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

    /// Whether it may still come to a stop because of such refusals.
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
    fn twenty_in_a_row_with_the_same_words_stop_the_relay_and_none_fails() {
        let (mut breaker, now) = breaker();
        for number in 0..19 {
            assert_eq!(breaker.refused(0, refusal(number, "no"), now), wait(number, "no"));
        }
        // The same recipient again counts once.
        breaker.refused(0, refusal(3, "no"), now);
        assert_eq!(breaker.take_trips(), []);
        breaker.refused(0, refusal(19, "no"), now);
        let trips = breaker.take_trips();
        assert_eq!(trips.len(), 1);
        assert_eq!((trips[0].alike.as_slice(), trips[0].runs.len()), (["no".to_owned()].as_slice(), 1));
        assert!(trips[0].reason.contains("20 recipients in a row") && trips[0].reason.contains("550 no 19"));
        let later = now + Duration::from_secs(3_600);
        assert!((0..20).all(|number| breaker.before(&format!("<{number}>"), later) == Some(wait(number, "no"))));
        // It was us: they are offered again.
        breaker.released(0);
        assert!((0..20).all(|number| breaker.before(&format!("<{number}>"), later).is_none()));
    }

    #[test]
    fn the_recipients_fault_fails_without_another_offer() {
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
    fn an_acceptance_ends_the_streak_and_a_lone_refusal_fails() {
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
    fn half_of_the_last_two_hundred_stop_the_relay_whatever_their_words() {
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
    fn each_relay_is_counted_by_itself() {
        let (mut breaker, now) = breaker();
        for number in 0..15 {
            breaker.refused(0, refusal(number, "no"), now);
            breaker.refused(1, refusal(100 + number, "no"), now);
        }
        assert_eq!(breaker.take_trips(), []);
    }
}
