//! Recognises relays that offer to take several commands at once and mishandle them.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use mailrun_app::config::Relay;
use tracing::warn;

use super::super::verdict::{Cause, Failure};

/// What a relay's connections have in common, learned from their conversations.
#[derive(Debug, Default)]
pub struct Manners {
    /// It mishandles commands that are sent together, although it offers that (RFC 2920).
    no_pipelining: AtomicBool,
    /// How many connections in a row broke while such commands were outstanding.
    broken: AtomicU32,
}

/// A relay that offers pipelining but closes this many connections in a row at pipelined commands gets one command at a time.
const BROKEN_IN_A_ROW: u32 = 3;

impl Manners {
    fn mishandled(&self, relay: &Relay, why: &Failure) {
        if !self.no_pipelining.swap(true, Ordering::Relaxed) {
            // Without the reply, which may quote a recipient.
            warn!(%relay, stage = %why.stage, "relay mishandles commands that are sent together, sending one at a time from now on");
        }
    }

    /// Whether commands may be sent together.
    pub fn allow_pipelining(&self) -> bool {
        !self.no_pipelining.load(Ordering::Relaxed)
    }

    /// Commands that were sent together were answered.
    pub fn answered(&self) {
        self.broken.store(0, Ordering::Relaxed);
    }

    /// Commands that were sent together failed.
    pub fn failed(&self, relay: &Relay, why: &Failure) {
        let mishandled = match &why.cause {
            Cause::TimedOut(_) | Cause::BadReply(_) => true,
            Cause::Lost(_) => self.broken.fetch_add(1, Ordering::Relaxed) + 1 >= BROKEN_IN_A_ROW,
            Cause::Refused(_) | Cause::Unsupported(_) | Cause::Withdrawn(_) => false,
        };
        if mishandled {
            self.mishandled(relay, why);
        }
    }
}
