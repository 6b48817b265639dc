//! Chooses the relay for a mail: by weight among those that accept mail, and one mail for each relay that is due for a probe.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use mailrun_app::config::{Relay, RelayTls};
use rand::RngExt as _;
use tokio::sync::watch;
use tokio_rustls::TlsConnector;
use tracing::{info, warn};

use super::{
    blame::Blame,
    circuit::{Circuit, Pass, ProbeDelay},
    session::Manners,
    tls::{TlsError, connector},
    verdict::Pause,
};
use crate::gate::Gate;

/// A relay and its state.
pub struct Endpoint {
    /// Its settings.
    pub relay: Relay,
    /// Encrypts connections. `None`: they are not encrypted.
    pub tls: Option<TlsConnector>,
    circuit: Mutex<Circuit>,
    blame: Mutex<Blame>,
    /// What was learned from its connections.
    pub manners: Arc<Manners>,
}

impl Endpoint {
    fn circuit(&self) -> MutexGuard<'_, Circuit> {
        self.circuit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Decides whether refusals concern the relay or only their recipients.
    pub fn blame(&self) -> MutexGuard<'_, Blame> {
        self.blame.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All relays.
pub struct Relays {
    endpoints: Vec<Endpoint>,
    /// Notifies waiting senders when a circuit changes.
    changed: watch::Sender<()>,
}

/// Where to send a mail.
pub enum Choice<'a> {
    /// To this relay.
    Relay(Ticket<'a>),
    /// A relay is being probed: wait for the result.
    Wait,
    /// No relay accepts mail. Holds the reason of the relay that will be probed first.
    None(String),
}

/// The right to send one mail through a relay. Its holder reports how that ended.
pub struct Ticket<'a> {
    relays: &'a Relays,
    pub endpoint: &'a Endpoint,
    /// The relay's index.
    pub number: usize,
    pass: Pass,
    settled: bool,
}

impl Relays {
    /// All relays start as available.
    ///
    /// # Errors
    /// If TLS cannot be set up for one of them.
    pub fn new(relays: Vec<Relay>, probe_delay: ProbeDelay) -> Result<Self, TlsError> {
        let endpoint = |relay: Relay| {
            let tls = (relay.tls != RelayTls::None).then(|| connector(relay.ca_file.as_ref())).transpose()?;
            Ok(Endpoint {
                manners: Arc::new(Manners::new(&relay)),
                relay,
                tls,
                circuit: Mutex::new(Circuit::new(probe_delay)),
                blame: Mutex::default(),
            })
        };
        Ok(Self {
            endpoints: relays.into_iter().map(endpoint).collect::<Result<_, TlsError>>()?,
            changed: watch::Sender::new(()),
        })
    }

    /// Whether any relay accepts mail.
    pub fn gate(&self) -> Gate {
        let now = Instant::now();
        let gates = self.endpoints.iter().map(|endpoint| endpoint.circuit().gate(now));
        gates.min_by_key(rank).unwrap_or(Gate::Open)
    }

    /// Chooses a relay that is not in `tried`.
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
        if let Some(number) = self.draw(tried) {
            return ticket(number, &self.endpoints[number], Pass::Free);
        }
        if left().any(|(_, endpoint)| endpoint.circuit().is_tried()) {
            return Choice::Wait;
        }
        Choice::None(match self.gate() {
            Gate::Closed { reason, .. } => reason,
            Gate::Open | Gate::Trying => "no mail server accepts mail at present".into(),
        })
    }

    /// Draws one of the relays that accept mail, by weight. The draw is no promise: see [`Self::choose`].
    pub fn draw(&self, tried: &[usize]) -> Option<usize> {
        let now = Instant::now();
        let is_open = |(number, endpoint): &(usize, &Endpoint)| {
            !tried.contains(number) && endpoint.circuit().gate(now) == Gate::Open
        };
        let open: Vec<_> = self.endpoints.iter().enumerate().filter(is_open).collect();
        let total: u32 = open.iter().map(|(_, endpoint)| endpoint.relay.weight).sum();
        if total == 0 {
            return None;
        }
        let mut drawn = rand::rng().random_range(0..total);
        open.into_iter().find_map(|(number, endpoint)| match drawn.checked_sub(endpoint.relay.weight) {
            Some(rest) => {
                drawn = rest;
                None
            }
            None => Some(number),
        })
    }

    /// The right to send a mail on a connection to this relay that is in use.
    pub fn on(&self, number: usize) -> Ticket<'_> {
        Ticket { relays: self, endpoint: &self.endpoints[number], number, pass: Pass::Free, settled: false }
    }

    /// Sends no mail to a relay until [`Self::release`].
    pub fn stop(&self, number: usize, reason: &str) {
        if let Some(endpoint) = self.endpoints.get(number) {
            endpoint.circuit().stop(reason);
            self.changed.send_replace(());
        }
    }

    /// Ends a stop. Returns whether the relay was stopped.
    pub fn release(&self, number: usize) -> bool {
        let was_stopped = self.endpoints.get(number).is_some_and(|endpoint| endpoint.circuit().release(Instant::now()));
        if was_stopped {
            self.changed.send_replace(());
        }
        was_stopped
    }

    /// `host:port` of each relay, by index.
    pub fn names(&self) -> Vec<String> {
        self.endpoints.iter().map(|endpoint| endpoint.relay.to_string()).collect()
    }

    /// Notifications of changes from now on.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Waits until no relay accepts mail, and returns the reason.
    pub async fn closed(&self) -> String {
        let mut changes = self.changes();
        loop {
            if let Gate::Closed { reason, .. } = self.gate() {
                return reason;
            }
            // The sender is in `self`, so this cannot fail.
            let _ = changes.changed().await;
        }
    }
}

/// Open before trying before closed; among the closed, the one that opens first.
fn rank(gate: &Gate) -> (u8, Option<Instant>) {
    match gate {
        Gate::Open => (0, None),
        Gate::Trying => (1, None),
        Gate::Closed { until, .. } => (2, Some(*until)),
    }
}

impl Ticket<'_> {
    /// The relay is unavailable.
    pub fn unavailable(mut self, pause: Pause) {
        self.settled = true;
        let reason = pause.reason.clone();
        let news = self.endpoint.circuit().unavailable(self.pass, pause, Instant::now());
        if let Some(wait) = news {
            let wait_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
            warn!(relay = %self.endpoint.relay, reason, wait_ms, "relay takes no mail, probing it later");
        }
        self.relays.changed.send_replace(());
    }

    /// The relay answered.
    pub fn answered(mut self) {
        self.settled = true;
        let was_unavailable = self.endpoint.circuit().answered(self.pass);
        if was_unavailable {
            info!(relay = %self.endpoint.relay, "relay available again");
            self.relays.changed.send_replace(());
        }
    }

    /// The conversation broke. That decides nothing, unless this mail was the probe.
    pub fn broken(self, reason: &str) {
        if self.pass == Pass::Trial {
            self.unavailable(Pause::new(reason.to_owned()));
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
        let probe_delay = ProbeDelay { first: Duration::from_secs(60), longest: Duration::from_secs(60) };
        let relay = |weight| Relay::parse(&format!("smtp://localhost?tls=none&weight={weight}").into()).unwrap();
        Relays::new(weights.iter().map(relay).collect(), probe_delay).unwrap()
    }

    fn chosen(relays: &Relays, tried: &[usize]) -> Option<usize> {
        match relays.choose(tried) {
            Choice::Relay(ticket) => Some(ticket.number),
            Choice::Wait | Choice::None(_) => None,
        }
    }

    #[test]
    fn mail_is_distributed_by_weight() {
        let relays = relays(&[1, 9]);
        let second = (0..1_000).filter(|_| chosen(&relays, &[]) == Some(1)).count();
        assert!((850..950).contains(&second), "{second}");
        assert_eq!((chosen(&relays, &[1]), chosen(&relays, &[0, 1])), (Some(0), None));
    }

    #[test]
    fn an_unavailable_relay_is_skipped_and_the_gate_closes_with_the_last() {
        let relays = relays(&[1, 1]);
        for (number, gate_is_open) in [(1, true), (0, false)] {
            let Choice::Relay(ticket) = relays.choose(&[1 - number]) else { panic!() };
            ticket.unavailable(Pause::new("gone".into()));
            assert_eq!(relays.gate() == Gate::Open, gate_is_open);
        }
        assert!(matches!(relays.choose(&[]), Choice::None(reason) if reason == "gone"));
    }
}
