//! The circuit of one relay: consulted before each mail, updated with its result.
//!
//! ```text
//!         unavailable                 the wait is over
//!   closed ────────▶ open until … ─────────────────────▶ trying one mail
//!      ▲               ▲                                      │    │
//!      │               └───────────── unavailable ────────────┘    │
//!      └─────────────────────────── it answered ───────────────────┘
//! ```

use std::time::{Duration, Instant};

use mailrun_core::retry::Reconnect;

use super::verdict::Pause;
use crate::gate::Gate;

/// How long to wait before an unavailable relay is probed.
#[derive(Clone, Copy, Debug)]
pub struct ProbeDelay {
    /// The first wait.
    pub first: Duration,
    /// The longest wait, after repeated failures.
    pub longest: Duration,
}

impl Default for ProbeDelay {
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
    /// Until an operator answers.
    Stopped {
        reason: String,
    },
}

/// A stopped relay is checked again after this time.
const STOPPED_RECHECK: Duration = Duration::from_secs(5);

/// How a sender may use a relay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    Free,
    /// Send as the probe: all other mail waits for its result.
    Trial,
}

/// The state of one relay.
#[derive(Debug)]
pub struct Circuit {
    state: State,
    waits: Reconnect,
    longest: Duration,
}

/// A relay is probed at least this often, whatever the reason of its pause.
const LONGEST_OF_ALL: Duration = Duration::from_secs(3_600);

impl Circuit {
    /// Starts closed: the relay is in use.
    pub fn new(probe_delay: ProbeDelay) -> Self {
        // The wait doubles from the first one. Each reason has its own bound.
        let waits = Reconnect::between(probe_delay.first, probe_delay.longest.max(LONGEST_OF_ALL));
        Self { state: State::Closed, waits, longest: probe_delay.longest }
    }

    /// The circuit as a gate.
    pub fn gate(&self, now: Instant) -> Gate {
        match &self.state {
            State::Closed => Gate::Open,
            State::Open { reason, until } if *until > now => Gate::Closed { reason: reason.clone(), until: *until },
            State::Open { .. } | State::Trying => Gate::Trying,
            State::Stopped { reason } => Gate::Closed { reason: reason.clone(), until: now + STOPPED_RECHECK },
        }
    }

    /// Sends no mail until [`Self::release`].
    pub fn stop(&mut self, reason: &str) {
        self.state = State::Stopped { reason: reason.to_owned() };
    }

    /// Ends a stop: one mail probes the relay. Returns whether it was stopped.
    pub fn release(&mut self, now: Instant) -> bool {
        if let State::Stopped { reason } = &self.state {
            self.state = State::Open { reason: reason.clone(), until: now };
            return true;
        }
        false
    }

    /// Whether the relay is due for a probe and none is running.
    pub fn is_due(&self, now: Instant) -> bool {
        matches!(&self.state, State::Open { until, .. } if *until <= now)
    }

    /// Whether a probe is running.
    pub fn is_tried(&self) -> bool {
        matches!(self.state, State::Trying)
    }

    /// Asks to send. The holder of a trial must report how it ended.
    pub fn enter(&mut self, now: Instant) -> Option<Pass> {
        match self.gate(now) {
            Gate::Open => Some(Pass::Free),
            Gate::Trying if self.is_due(now) => {
                self.state = State::Trying;
                Some(Pass::Trial)
            }
            Gate::Trying | Gate::Closed { .. } => None,
        }
    }

    /// The relay is unavailable. Returns the wait if the circuit was closed until now.
    pub fn unavailable(&mut self, pass: Pass, pause: Pause, now: Instant) -> Option<Duration> {
        if matches!(self.state, State::Stopped { .. }) {
            return None;
        }
        let was_closed = matches!(self.state, State::Closed);
        // Many mails in progress may fail for the same reason; that counts once.
        if !was_closed && pass != Pass::Trial {
            return None;
        }
        let next = self.waits.next_wait();
        let wait = pause.wait.unwrap_or(next.min(pause.longest.unwrap_or(self.longest).max(self.longest)));
        self.state = State::Open { reason: pause.reason, until: now + wait };
        was_closed.then_some(wait)
    }

    /// The relay answered. Returns whether it was unavailable before. Only a trial counts: other mail may have been sent before
    /// the relay became unavailable.
    pub fn answered(&mut self, pass: Pass) -> bool {
        let was_unavailable = pass == Pass::Trial && !matches!(self.state, State::Stopped { .. });
        if was_unavailable {
            self.state = State::Closed;
            self.waits.reset();
        }
        was_unavailable
    }

    /// A trial was dropped before its end: another mail may try.
    pub fn dropped(&mut self, now: Instant) {
        if self.is_tried() {
            self.state = State::Open { reason: "the trial was not finished".into(), until: now };
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
        let probe_delay = ProbeDelay { first: Duration::from_secs(1), longest: Duration::from_secs(60) };
        let (mut circuit, start) = (Circuit::new(probe_delay), Instant::now());
        assert_eq!(circuit.enter(start), Some(Pass::Free));
        let wait = circuit.unavailable(Pass::Free, pause("gone"), start).unwrap();
        assert!((Duration::from_millis(500)..=Duration::from_millis(1_500)).contains(&wait));
        // The same failure, met by another mail.
        assert_eq!(circuit.unavailable(Pass::Free, pause("gone too"), start), None);
        assert!(
            matches!(circuit.gate(start), Gate::Closed { reason, until } if reason == "gone" && until == start + wait)
        );
        assert_eq!(circuit.enter(start), None);
        // A late success of a mail sent before changes nothing.
        assert!(!circuit.answered(Pass::Free) && circuit.enter(start).is_none());
        let due = start + wait;
        assert_eq!(circuit.gate(due), Gate::Trying);
        assert_eq!(circuit.enter(due), Some(Pass::Trial));
        assert_eq!((circuit.enter(due), circuit.gate(due)), (None, Gate::Trying));
        // Still unavailable: the wait grows, without another report.
        assert_eq!(circuit.unavailable(Pass::Trial, pause("still gone"), due), None);
        let Gate::Closed { until, .. } = circuit.gate(due) else { panic!() };
        assert_eq!(circuit.enter(until), Some(Pass::Trial));
        circuit.dropped(until);
        assert_eq!(circuit.enter(until), Some(Pass::Trial));
        assert!(circuit.answered(Pass::Trial));
        assert_eq!((circuit.gate(until), circuit.enter(until)), (Gate::Open, Some(Pass::Free)));
        circuit.dropped(until);
        assert_eq!(circuit.gate(until), Gate::Open);
    }

    #[test]
    fn the_default_wait_is_bounded_by_about_a_minute() {
        let (mut circuit, mut now) = (Circuit::new(ProbeDelay::default()), Instant::now());
        circuit.unavailable(Pass::Free, pause("gone"), now);
        for _ in 0..50 {
            let Gate::Closed { until, .. } = circuit.gate(now) else { panic!() };
            assert!(until - now <= Duration::from_secs(90));
            now = until;
            assert_eq!(circuit.enter(now), Some(Pass::Trial));
            circuit.unavailable(Pass::Trial, pause("gone"), now);
        }
    }

    #[test]
    fn the_wait_is_as_long_as_the_server_asks() {
        let (mut circuit, now) = (Circuit::new(ProbeDelay::default()), Instant::now());
        let asked = Duration::from_secs(7_200);
        let wait = circuit.unavailable(Pass::Free, Pause { wait: Some(asked), ..pause("wait 2 hours") }, now);
        assert_eq!(wait, Some(asked));
    }

    #[test]
    fn probes_of_a_periodic_limit_become_less_frequent() {
        let (mut circuit, mut now) = (Circuit::new(ProbeDelay::default()), Instant::now());
        let daily = || Pause { longest: Some(Duration::from_secs(1_800)), ..pause("daily") };
        let first = circuit.unavailable(Pass::Free, daily(), now).unwrap();
        assert!(first <= Duration::from_secs(2));
        let mut longest = first;
        for _ in 0..30 {
            let Gate::Closed { until, .. } = circuit.gate(now) else { panic!() };
            longest = longest.max(until - now);
            now = until;
            assert_eq!(circuit.enter(now), Some(Pass::Trial));
            circuit.unavailable(Pass::Trial, daily(), now);
        }
        assert_eq!(longest, Duration::from_secs(1_800));
    }

    #[test]
    fn only_a_release_ends_a_stop_and_a_trial_follows() {
        let (mut circuit, now) = (Circuit::new(ProbeDelay::default()), Instant::now());
        circuit.stop("ask");
        circuit.unavailable(Pass::Free, pause("gone"), now);
        assert!(!circuit.answered(Pass::Trial));
        let later = now + Duration::from_secs(86_400);
        assert!(matches!(circuit.gate(later), Gate::Closed { reason, .. } if reason == "ask"));
        assert!(circuit.enter(later).is_none() && circuit.release(later) && !circuit.release(later));
        assert_eq!(circuit.enter(later), Some(Pass::Trial));
    }
}
