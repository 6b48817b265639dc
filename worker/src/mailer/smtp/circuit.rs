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

use mailrun_shared::retry::Reconnect;

use super::super::Lane;

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
    Open { reason: String, until: Instant },
    Trying,
}

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
}

impl Circuit {
    /// Takes mail, until the relay turns out to be away.
    pub fn new(patience: Patience) -> Self {
        Self { state: State::Closed, waits: Reconnect::between(patience.first, patience.longest) }
    }

    /// What to expect of it.
    pub fn lane(&self, now: Instant) -> Lane {
        match &self.state {
            State::Closed => Lane::Open,
            State::Open { reason, until } if *until > now => Lane::Closed { reason: reason.clone(), until: *until },
            State::Open { .. } | State::Trying => Lane::Trying,
        }
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
            Lane::Open => Some(Pass::Free),
            Lane::Trying if self.is_due(now) => {
                self.state = State::Trying;
                Some(Pass::Trial)
            }
            Lane::Trying | Lane::Closed { .. } => None,
        }
    }

    /// The relay is away. For how long it is left alone, if this is news.
    pub fn away(&mut self, pass: Pass, reason: String, now: Instant) -> Option<Duration> {
        let was_closed = matches!(self.state, State::Closed);
        // Many mails may meet the same trouble; it counts once.
        if !was_closed && pass != Pass::Trial {
            return None;
        }
        let wait = self.waits.next_wait();
        self.state = State::Open { reason, until: now + wait };
        was_closed.then_some(wait)
    }

    /// The relay answered. True: it was away before. A mail that was sent before the relay was found to be away says nothing.
    pub fn answered(&mut self, pass: Pass) -> bool {
        let was_away = pass == Pass::Trial;
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

    #[test]
    fn it_opens_tries_one_and_closes() {
        let patience = Patience { first: Duration::from_secs(1), longest: Duration::from_secs(60) };
        let (mut circuit, start) = (Circuit::new(patience), Instant::now());
        assert_eq!(circuit.enter(start), Some(Pass::Free));
        let wait = circuit.away(Pass::Free, "gone".into(), start).unwrap();
        assert!((Duration::from_millis(500)..=Duration::from_millis(1_500)).contains(&wait));
        // The same trouble, met by another mail.
        assert_eq!(circuit.away(Pass::Free, "gone too".into(), start), None);
        assert!(
            matches!(circuit.lane(start), Lane::Closed { reason, until } if reason == "gone" && until == start + wait)
        );
        assert_eq!(circuit.enter(start), None);
        // A late success of before changes nothing.
        assert!(!circuit.answered(Pass::Free) && circuit.enter(start).is_none());
        let due = start + wait;
        assert_eq!(circuit.lane(due), Lane::Trying);
        assert_eq!(circuit.enter(due), Some(Pass::Trial));
        assert_eq!((circuit.enter(due), circuit.lane(due)), (None, Lane::Trying));
        // Still away: it is left alone for longer, which is no news.
        assert_eq!(circuit.away(Pass::Trial, "still gone".into(), due), None);
        let Lane::Closed { until, .. } = circuit.lane(due) else { panic!() };
        assert_eq!(circuit.enter(until), Some(Pass::Trial));
        circuit.dropped(until);
        assert_eq!(circuit.enter(until), Some(Pass::Trial));
        assert!(circuit.answered(Pass::Trial));
        assert_eq!((circuit.lane(until), circuit.enter(until)), (Lane::Open, Some(Pass::Free)));
        circuit.dropped(until);
        assert_eq!(circuit.lane(until), Lane::Open);
    }

    #[test]
    fn it_is_never_left_alone_for_much_longer_than_a_minute() {
        let (mut circuit, mut now) = (Circuit::new(Patience::default()), Instant::now());
        circuit.away(Pass::Free, "gone".into(), now);
        for _ in 0..50 {
            let Lane::Closed { until, .. } = circuit.lane(now) else { panic!() };
            assert!(until - now <= Duration::from_secs(90));
            now = until;
            assert_eq!(circuit.enter(now), Some(Pass::Trial));
            circuit.away(Pass::Trial, "gone".into(), now);
        }
    }
}
