//! Which relay a mail goes to: by weight among those that take mail, and one mail to each whose time has come to be tried.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use mailrun_app::config::{Relay, RelayTls};
use rand::RngExt as _;
use tokio::sync::watch;
use tokio_rustls::TlsConnector;
use tracing::{info, warn};

use super::{
    blame::Blame,
    circuit::{Circuit, Pass, Patience},
    tls::{TlsError, connector},
    verdict::Pause,
};
use crate::gate::Gate;

/// A relay, and how it is.
pub struct Endpoint {
    /// What is known of it.
    pub relay: Relay,
    /// Encrypts connections to it; none: they are not encrypted.
    pub tls: Option<TlsConnector>,
    circuit: Mutex<Circuit>,
    blame: Mutex<Blame>,
}

impl Endpoint {
    fn circuit(&self) -> MutexGuard<'_, Circuit> {
        self.circuit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whose fault refusals are.
    pub fn blame(&self) -> MutexGuard<'_, Blame> {
        self.blame.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All relays.
pub struct Relays {
    endpoints: Vec<Endpoint>,
    /// Tells whoever waits that a circuit is another one than before.
    changed: watch::Sender<()>,
}

/// What to do with a mail.
pub enum Choice<'a> {
    /// Send it with this one.
    Relay(Ticket<'a>),
    /// One is being tried: wait for how that ends.
    Wait,
    /// There is none, in the words of the one that takes mail first again.
    None(String),
}

/// The right to send a mail with a relay, and the duty to say how it ended.
pub struct Ticket<'a> {
    relays: &'a Relays,
    /// The relay.
    pub endpoint: &'a Endpoint,
    /// Its number.
    pub number: usize,
    pass: Pass,
    settled: bool,
}

impl Relays {
    /// None of them is away yet.
    ///
    /// # Errors
    /// When connections to one of them can't be encrypted.
    pub fn new(relays: Vec<Relay>, patience: Patience) -> Result<Self, TlsError> {
        let endpoint = |relay: Relay| {
            let tls = (relay.tls != RelayTls::None).then(|| connector(relay.ca_file.as_ref())).transpose()?;
            Ok(Endpoint { relay, tls, circuit: Mutex::new(Circuit::new(patience)), blame: Mutex::default() })
        };
        Ok(Self {
            endpoints: relays.into_iter().map(endpoint).collect::<Result<_, TlsError>>()?,
            changed: watch::Sender::new(()),
        })
    }

    /// Whether any of them takes mail.
    pub fn gate(&self) -> Gate {
        let now = Instant::now();
        let lanes = self.endpoints.iter().map(|endpoint| endpoint.circuit().lane(now));
        lanes.min_by_key(rank).unwrap_or(Gate::Open)
    }

    /// Chooses one that was not `tried` with this mail.
    pub fn choose(&self, tried: &[usize]) -> Choice<'_> {
        let now = Instant::now();
        let left = || self.endpoints.iter().enumerate().filter(|(number, _)| !tried.contains(number));
        let ticket =
            |number, endpoint, pass| Choice::Relay(Ticket { relays: self, endpoint, number, pass, settled: false });
        for (number, endpoint) in left() {
            let mut circuit = endpoint.circuit();
            if circuit.is_due(now)
                && let Some(pass) = circuit.enter(now)
            {
                return ticket(number, endpoint, pass);
            }
        }
        let open: Vec<_> = left().filter(|(_, endpoint)| endpoint.circuit().lane(now) == Gate::Open).collect();
        let total: u32 = open.iter().map(|(_, endpoint)| endpoint.relay.weight).sum();
        if total > 0 {
            let mut drawn = rand::rng().random_range(0..total);
            for (number, endpoint) in open {
                match drawn.checked_sub(endpoint.relay.weight) {
                    Some(rest) => drawn = rest,
                    None => return ticket(number, endpoint, Pass::Free),
                }
            }
        }
        if left().any(|(_, endpoint)| endpoint.circuit().is_tried()) {
            return Choice::Wait;
        }
        Choice::None(match self.gate() {
            Gate::Closed { reason, .. } => reason,
            Gate::Open | Gate::Trying => "no mail server takes mail at present".into(),
        })
    }

    /// Lets no mail through to a relay until [`Self::release`].
    pub fn stop(&self, number: usize, reason: &str) {
        if let Some(endpoint) = self.endpoints.get(number) {
            endpoint.circuit().stop(reason);
            self.changed.send_replace(());
        }
    }

    /// Ends a stop. Whether the relay was stopped.
    pub fn release(&self, number: usize) -> bool {
        let was_stopped = self.endpoints.get(number).is_some_and(|endpoint| endpoint.circuit().release(Instant::now()));
        if was_stopped {
            self.changed.send_replace(());
        }
        was_stopped
    }

    /// What they are called, by their numbers.
    pub fn names(&self) -> Vec<String> {
        self.endpoints.iter().map(|endpoint| endpoint.relay.to_string()).collect()
    }

    /// Tells of changes from now on.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Ends, with the reason, when none of them takes mail.
    pub async fn closed(&self) -> String {
        let mut changes = self.changes();
        loop {
            if let Gate::Closed { reason, .. } = self.gate() {
                return reason;
            }
            // Its other end is in `self`.
            let _ = changes.changed().await;
        }
    }
}

/// The best first; of those that are closed, the one that opens first.
fn rank(lane: &Gate) -> (u8, Option<Instant>) {
    match lane {
        Gate::Open => (0, None),
        Gate::Trying => (1, None),
        Gate::Closed { until, .. } => (2, Some(*until)),
    }
}

impl Ticket<'_> {
    /// The relay is away.
    pub fn away(mut self, pause: Pause) {
        self.settled = true;
        let reason = pause.reason.clone();
        let news = self.endpoint.circuit().away(self.pass, pause, Instant::now());
        if let Some(wait) = news {
            let wait_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
            warn!(relay = %self.endpoint.relay, reason, wait_ms, "a mail server takes no mail; it is tried again later");
        }
        self.relays.changed.send_replace(());
    }

    /// The relay answered.
    pub fn answered(mut self) {
        self.settled = true;
        let was_away = self.endpoint.circuit().answered(self.pass);
        if was_away {
            info!(relay = %self.endpoint.relay, "a mail server takes mail again");
            self.relays.changed.send_replace(());
        }
    }

    /// The conversation broke, which settles nothing, unless it was the one to settle it.
    pub fn broken(self, reason: &str) {
        if self.pass == Pass::Trial {
            self.away(Pause::new(reason.to_owned()));
        }
    }
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        if !self.settled && self.pass == Pass::Trial {
            self.endpoint.circuit().dropped(Instant::now());
            self.relays.changed.send_replace(());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn relays(weights: &[u32]) -> Relays {
        let patience = Patience { first: Duration::from_secs(60), longest: Duration::from_secs(60) };
        let relay = |weight| Relay::parse(&format!("smtp://localhost?tls=none&weight={weight}").into()).unwrap();
        Relays::new(weights.iter().map(relay).collect(), patience).unwrap()
    }

    fn chosen(relays: &Relays, tried: &[usize]) -> Option<usize> {
        match relays.choose(tried) {
            Choice::Relay(ticket) => Some(ticket.number),
            Choice::Wait | Choice::None(_) => None,
        }
    }

    #[test]
    fn the_heavier_one_gets_more() {
        let relays = relays(&[1, 9]);
        let second = (0..1_000).filter(|_| chosen(&relays, &[]) == Some(1)).count();
        assert!((850..950).contains(&second), "{second}");
        assert_eq!((chosen(&relays, &[1]), chosen(&relays, &[0, 1])), (Some(0), None));
    }

    #[test]
    fn one_that_is_away_is_left_out_and_the_lane_closes_with_the_last() {
        let relays = relays(&[1, 1]);
        for (number, lane_is_open) in [(1, true), (0, false)] {
            let Choice::Relay(ticket) = relays.choose(&[1 - number]) else { panic!() };
            ticket.away(Pause::new("gone".into()));
            assert_eq!(relays.gate() == Gate::Open, lane_is_open);
        }
        assert!(matches!(relays.choose(&[]), Choice::None(reason) if reason == "gone"));
    }
}
