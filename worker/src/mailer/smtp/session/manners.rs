//! Whether a relay can be sent several commands at once (RFC 2920). Some offer it and mishandle it.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use mailrun_app::config::Relay;
use tracing::warn;

use super::super::verdict::{Cause, Failure, Stage};

/// A relay that closes this many connections in a row at commands sent together, and has never answered any, mishandles them.
const BROKEN_IN_A_ROW: u32 = 3;

/// How an envelope was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    Alone,
    /// Right behind the message of another mail.
    Behind,
}

/// What is known about one relay, from the settings and from all its connections.
#[derive(Debug)]
pub struct Manners {
    relay: String,
    pipelining: AtomicBool,
    chunking: bool,
    /// Whether it has ever answered an envelope that was sent alone, and one that was sent behind a message.
    answered: [AtomicBool; 2],
    /// How many connections in a row broke at an envelope.
    broken: AtomicU32,
}

impl Manners {
    /// Nothing is learned yet.
    pub fn new(relay: &Relay) -> Self {
        Self {
            relay: relay.to_string(),
            pipelining: AtomicBool::new(relay.pipelining),
            chunking: relay.chunking,
            answered: Default::default(),
            broken: AtomicU32::new(0),
        }
    }

    /// Whether commands may be sent together, if the relay offers that.
    pub fn pipelining(&self) -> bool {
        self.pipelining.load(Ordering::Relaxed)
    }

    /// Whether messages may be sent in chunks, if the relay offers that.
    pub fn chunking(&self) -> bool {
        self.chunking
    }

    /// An envelope was answered: accepted or refused.
    pub fn answered(&self, sent: Sent) {
        self.answered[sent as usize].store(true, Ordering::Relaxed);
        self.broken.store(0, Ordering::Relaxed);
    }

    /// An envelope was not answered. That says nothing about a relay that has answered another one: it was restarted, or hangs.
    pub fn failed(&self, sent: Sent, why: &Failure) {
        if self.answered[sent as usize].load(Ordering::Relaxed) {
            return;
        }
        let mishandled = match &why.cause {
            // A relay that does not answer the very first command would not have answered it alone either.
            Cause::TimedOut(_) | Cause::BadReply(_) => sent == Sent::Behind || why.stage != Stage::Mail,
            Cause::Lost(_) => self.broken.fetch_add(1, Ordering::Relaxed) + 1 >= BROKEN_IN_A_ROW,
            Cause::Refused(_) | Cause::Unsupported(_) | Cause::Withdrawn(_) => false,
        };
        if mishandled {
            self.mishandles(why.stage);
        }
    }

    /// The relay mishandles commands that are sent together: from now on it gets one at a time.
    pub fn mishandles(&self, stage: Stage) {
        if self.pipelining.swap(false, Ordering::Relaxed) {
            // Without the reply, which may quote a recipient.
            warn!(relay = self.relay, %stage, "relay mishandles commands that are sent together, sending one at a time from now on");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn manners() -> Manners {
        Manners::new(&Relay::parse(&"smtp://localhost?tls=none".into()).unwrap())
    }

    fn failure(stage: Stage, cause: Cause) -> Failure {
        Failure { stage, cause }
    }

    #[test]
    fn a_restarted_or_hanging_relay_that_has_answered_before_is_not_doubted() {
        let manners = manners();
        for sent in [Sent::Alone, Sent::Behind] {
            manners.answered(sent);
            for _ in 0..10 {
                manners.failed(sent, &failure(Stage::Mail, Cause::Lost("reset".into())));
                manners.failed(sent, &failure(Stage::Rcpt, Cause::TimedOut(Duration::from_secs(300))));
            }
        }
        assert!(manners.pipelining());
        manners.mishandles(Stage::Rcpt);
        assert!(!manners.pipelining(), "unless it says so");
    }

    #[test]
    fn a_relay_that_does_not_answer_at_all_is_not_doubted() {
        let manners = manners();
        manners.failed(Sent::Alone, &failure(Stage::Mail, Cause::TimedOut(Duration::from_secs(300))));
        assert!(manners.pipelining());
    }

    #[test]
    fn a_relay_that_forgets_commands_is_recognised() {
        for (sent, stage) in [(Sent::Alone, Stage::Rcpt), (Sent::Alone, Stage::Data), (Sent::Behind, Stage::Mail)] {
            let manners = manners();
            // What it can do behind nothing is no proof of what it can do behind a message.
            if sent == Sent::Behind {
                manners.answered(Sent::Alone);
            }
            manners.failed(sent, &failure(stage, Cause::TimedOut(Duration::from_secs(300))));
            assert!(!manners.pipelining(), "{sent:?} {stage}");
        }
    }

    #[test]
    fn a_relay_that_closes_connections_is_recognised() {
        let manners = manners();
        for number in 1..=BROKEN_IN_A_ROW {
            assert!(manners.pipelining(), "after {}", number - 1);
            manners.failed(Sent::Alone, &failure(Stage::Mail, Cause::Lost("reset".into())));
        }
        assert!(!manners.pipelining());
    }
}
