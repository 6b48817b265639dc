//! Whether a relay takes mail at present: asked before each mail, and told what became of it.
//!
//! ```text
//!            away                    its time has come
//!   closed ────────▶ open until … ─────────────────────▶ trying one mail
//!      ▲               ▲                                      │    │
//!      │               └──────────────── away ────────────────┘    │
//!      └─────────────────────────── it answered ───────────────────┘
//! ```

use std::time::{Duration, Instant};

use mailrun_core::retry::Reconnect;

use super::verdict::Pause;
use crate::gate::Gate;

/// How long a relay is left alone after it was away.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// At first.
    pub first: Duration,
    /// At most, after it was away again and again.
    pub longest: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { first: Duration::from_secs(1), longest: Duration::from_secs(60) }
    }
}

#[derive(Debug)]
enum State {
    Closed,
    Open {
        reason: String,
        until: Instant,
    },
    Trying,
    /// Until an operator has answered.
    Stopped {
        reason: String,
    },
}

/// A relay that is stopped is looked at again after so long.
const STOPPED_LOOK: Duration = Duration::from_secs(5);

/// What a sender may do with a relay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// Send.
    Free,
    /// Send, and everybody waits for how it ends.
    Trial,
}

/// The state of one relay.
#[derive(Debug)]
pub struct Circuit {
    state: State,
    waits: Reconnect,
    longest: Duration,
}

/// However long a relay was away, it is tried at least so often.
const LONGEST_OF_ALL: Duration = Duration::from_secs(3_600);

impl Circuit {
    /// Takes mail, until the relay turns out to be away.
    pub fn new(patience: Patience) -> Self {
        // It doubles from the first wait, and each reason has its own bound.
        let waits = Reconnect::between(patience.first, patience.longest.max(LONGEST_OF_ALL));
        Self { state: State::Closed, waits, longest: patience.longest }
    }

    /// What to expect of it.
    pub fn lane(&self, now: Instant) -> Gate {
        match &self.state {
            State::Closed => Gate::Open,
            State::Open { reason, until } if *until > now => Gate::Closed { reason: reason.clone(), until: *until },
            State::Open { .. } | State::Trying => Gate::Trying,
            State::Stopped { reason } => Gate::Closed { reason: reason.clone(), until: now + STOPPED_LOOK },
        }
    }

    /// Lets no mail through, until [`Self::release`].
    pub fn stop(&mut self, reason: &str) {
        self.state = State::Stopped { reason: reason.to_owned() };
    }

    /// Ends a stop: one mail tries whether the relay takes it. Whether it was stopped.
    pub fn release(&mut self, now: Instant) -> bool {
        if let State::Stopped { reason } = &self.state {
            self.state = State::Open { reason: reason.clone(), until: now };
            return true;
        }
        false
    }

    /// Whether nobody tries it, though its time has come.
    pub fn is_due(&self, now: Instant) -> bool {
        matches!(&self.state, State::Open { until, .. } if *until <= now)
    }

    /// Whether somebody tries it just now.
    pub fn is_tried(&self) -> bool {
        matches!(self.state, State::Trying)
    }

    /// Asks to send. Whoever gets a trial has to say how it ended.
    pub fn enter(&mut self, now: Instant) -> Option<Pass> {
        match self.lane(now) {
            Gate::Open => Some(Pass::Free),
            Gate::Trying if self.is_due(now) => {
                self.state = State::Trying;
                Some(Pass::Trial)
            }
            Gate::Trying | Gate::Closed { .. } => None,
        }
    }

    /// The relay is away. For how long it is left alone, if this is news: as long as it asks for, or each time longer.
    pub fn away(&mut self, pass: Pass, pause: Pause, now: Instant) -> Option<Duration> {
        if matches!(self.state, State::Stopped { .. }) {
            return None;
        }
        let was_closed = matches!(self.state, State::Closed);
        // Many mails may meet the same trouble; it counts once.
        if !was_closed && pass != Pass::Trial {
            return None;
        }
        let next = self.waits.next_wait();
        let wait = pause.wait.unwrap_or(next.min(pause.longest.unwrap_or(self.longest).max(self.longest)));
        self.state = State::Open { reason: pause.reason, until: now + wait };
        was_closed.then_some(wait)
    }

    /// The relay answered. True: it was away before. A mail that was sent before the relay was found to be away says nothing.
    pub fn answered(&mut self, pass: Pass) -> bool {
        let was_away = pass == Pass::Trial && !matches!(self.state, State::Stopped { .. });
        if was_away {
            self.state = State::Closed;
            self.waits.reset();
        }
        was_away
    }

    /// A trial was dropped before its end: somebody else may try.
    pub fn dropped(&mut self, now: Instant) {
        if self.is_tried() {
            self.state = State::Open { reason: "it was not tried to the end".into(), until: now };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pause(reason: &str) -> Pause {
        Pause::new(reason.into())
    }

    #[test]
    fn it_opens_tries_one_and_closes() {
        let patience = Patience { first: Duration::from_secs(1), longest: Duration::from_secs(60) };
        let (mut circuit, start) = (Circuit::new(patience), Instant::now());
        assert_eq!(circuit.enter(start), Some(Pass::Free));
        let wait = circuit.away(Pass::Free, pause("gone"), start).unwrap();
        assert!((Duration::from_millis(500)..=Duration::from_millis(1_500)).contains(&wait));
        // The same trouble, met by another mail.
        assert_eq!(circuit.away(Pass::Free, pause("gone too"), start), None);
        assert!(
            matches!(circuit.lane(start), Gate::Closed { reason, until } if reason == "gone" && until == start + wait)
        );
        assert_eq!(circuit.enter(start), None);
        // A late success of before changes nothing.
        assert!(!circuit.answered(Pass::Free) && circuit.enter(start).is_none());
        let due = start + wait;
        assert_eq!(circuit.lane(due), Gate::Trying);
        assert_eq!(circuit.enter(due), Some(Pass::Trial));
        assert_eq!((circuit.enter(due), circuit.lane(due)), (None, Gate::Trying));
        // Still away: it is left alone for longer, which is no news.
        assert_eq!(circuit.away(Pass::Trial, pause("still gone"), due), None);
        let Gate::Closed { until, .. } = circuit.lane(due) else { panic!() };
        assert_eq!(circuit.enter(until), Some(Pass::Trial));
        circuit.dropped(until);
        assert_eq!(circuit.enter(until), Some(Pass::Trial));
        assert!(circuit.answered(Pass::Trial));
        assert_eq!((circuit.lane(until), circuit.enter(until)), (Gate::Open, Some(Pass::Free)));
        circuit.dropped(until);
        assert_eq!(circuit.lane(until), Gate::Open);
    }

    #[test]
    fn it_is_never_left_alone_for_much_longer_than_a_minute() {
        let (mut circuit, mut now) = (Circuit::new(Patience::default()), Instant::now());
        circuit.away(Pass::Free, pause("gone"), now);
        for _ in 0..50 {
            let Gate::Closed { until, .. } = circuit.lane(now) else { panic!() };
            assert!(until - now <= Duration::from_secs(90));
            now = until;
            assert_eq!(circuit.enter(now), Some(Pass::Trial));
            circuit.away(Pass::Trial, pause("gone"), now);
        }
    }

    #[test]
    fn it_is_left_alone_for_as_long_as_it_asks() {
        let (mut circuit, now) = (Circuit::new(Patience::default()), Instant::now());
        let asked = Duration::from_secs(7_200);
        let wait = circuit.away(Pass::Free, Pause { wait: Some(asked), ..pause("wait 2 hours") }, now);
        assert_eq!(wait, Some(asked));
    }

    #[test]
    fn a_limit_of_a_period_is_tried_sooner_and_then_later() {
        let (mut circuit, mut now) = (Circuit::new(Patience::default()), Instant::now());
        let daily = || Pause { longest: Some(Duration::from_secs(1_800)), ..pause("daily") };
        let first = circuit.away(Pass::Free, daily(), now).unwrap();
        assert!(first <= Duration::from_secs(2));
        let mut longest = first;
        for _ in 0..30 {
            let Gate::Closed { until, .. } = circuit.lane(now) else { panic!() };
            longest = longest.max(until - now);
            now = until;
            assert_eq!(circuit.enter(now), Some(Pass::Trial));
            circuit.away(Pass::Trial, daily(), now);
        }
        assert_eq!(longest, Duration::from_secs(1_800));
    }

    #[test]
    fn a_stop_ends_with_a_trial_and_with_nothing_else() {
        let (mut circuit, now) = (Circuit::new(Patience::default()), Instant::now());
        circuit.stop("ask");
        circuit.away(Pass::Free, pause("gone"), now);
        assert!(!circuit.answered(Pass::Trial));
        let later = now + Duration::from_secs(86_400);
        assert!(matches!(circuit.lane(later), Gate::Closed { reason, .. } if reason == "ask"));
        assert!(circuit.enter(later).is_none() && circuit.release(later) && !circuit.release(later));
        assert_eq!(circuit.enter(later), Some(Pass::Trial));
    }
}
