//! Faults of the mail server: how it treats a message other than accepting it.
//!
//! Some recipients always have faults, so that there are messages on the retry queues and dead letters: every 20th is refused once with a
//! temporary reply, every 50th permanently.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::time::sleep;

use crate::people::guest_number;
use mailrun_sink::{Action, RateMeter, Rule, Stage};

const REFUSED_ONCE_EVERY: u32 = 20;
const REFUSED_EVERY: u32 = 50;
/// While messages are dropped, every Nth one is.
const DROPPED_EVERY: u32 = 100;
/// While recipients are deferred: every Nth one, this many times.
const DEFERRED_EVERY: u32 = 7;
const DEFERRED_TIMES: u32 = 2;
/// A pause is in effect within this time.
const PAUSE_ACTS: Duration = Duration::from_secs(1);
/// The delay of a slow reply, which is shorter than the timeout.
const SLOW: Duration = Duration::from_secs(2);

/// A temporary fault of the mail server.
#[derive(Clone, Copy, Debug)]
pub(super) enum SmtpFault {
    /// Some messages are accepted, and the connection is closed before the reply.
    Drops,
    /// All clients are deferred.
    Busy,
    /// Relaying is denied.
    Refuses,
    /// A sending limit is exceeded.
    Limits,
    /// Replies are slow.
    Slow,
}

/// The present faults of a mail server.
#[derive(Debug, Default)]
pub(super) struct SmtpFaults {
    /// How many faults of each kind are active.
    drops: AtomicU32,
    busy: AtomicU32,
    refuses: AtomicU32,
    limits: AtomicU32,
    slow: AtomicU32,
    /// Connections that are still to hang.
    hangs: AtomicU32,
    messages: AtomicU32,
    refused_once: Mutex<HashSet<u32>>,
    /// How often each deferred recipient of a limited run was named.
    deferred: Mutex<HashMap<u32, u32>>,
    /// Whether some recipients are deferred repeatedly.
    pub(super) defers: AtomicBool,
    /// When mail was offered.
    pub(super) meter: OnceLock<Arc<RateMeter>>,
    /// When the run was paused, as far as a person can know.
    pub(super) pauses: Mutex<Vec<(Instant, Instant)>>,
    /// The erased people: the address, known to the sink, by tombstone.
    pub(super) erased: Mutex<HashMap<String, String>>,
}

impl SmtpFaults {
    /// The rule for a mail sink.
    pub(super) fn rule(self: &Arc<Self>) -> Rule {
        let smtp_faults = Arc::clone(self);
        Arc::new(move |stage, _| smtp_faults.action(stage))
    }

    /// Applies this fault for some time.
    pub(super) async fn apply(&self, fault: SmtpFault, time: Duration) {
        let level = match fault {
            SmtpFault::Drops => &self.drops,
            SmtpFault::Busy => &self.busy,
            SmtpFault::Refuses => &self.refuses,
            SmtpFault::Limits => &self.limits,
            SmtpFault::Slow => &self.slow,
        };
        level.fetch_add(1, Ordering::Relaxed);
        sleep(time).await;
        level.fetch_sub(1, Ordering::Relaxed);
    }

    /// Lets this many connections with a current message hang.
    pub(super) fn hang(&self, connections: u32) {
        self.hangs.fetch_add(connections, Ordering::Relaxed);
    }

    fn action(&self, stage: Stage<'_>) -> Action {
        match stage {
            Stage::Mail if self.note_offer() => Action::GoOn,
            Stage::Mail if self.busy.load(Ordering::Relaxed) > 0 => Action::Reply(421, "4.3.2 Come back later".into()),
            Stage::Rcpt(_) if self.refuses.load(Ordering::Relaxed) > 0 => {
                Action::Reply(550, "relay not permitted".into())
            }
            Stage::Rcpt(recipient) => self.of_recipient(recipient),
            Stage::Message if self.limits.load(Ordering::Relaxed) > 0 => {
                Action::Reply(550, "5.4.5 Daily user sending limit exceeded".into())
            }
            Stage::Data | Stage::Message if self.hangs() => Action::Hang,
            Stage::Message if self.slow.load(Ordering::Relaxed) > 0 => Action::Wait(SLOW),
            Stage::Message if self.is_dropped() => Action::AcceptThenDrop,
            _ => Action::GoOn,
        }
    }

    /// Always false, so that the match continues.
    fn note_offer(&self) -> bool {
        if let Some(meter) = self.meter.get() {
            meter.note();
        }
        false
    }

    /// How many mails were offered while the run was paused, excluding the second in which a pause takes effect, and stalls of the machine.
    pub(super) fn offered_while_paused(&self) -> u64 {
        let pauses = self.pauses.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(meter) = self.meter.get() else { return 0 };
        pauses.iter().map(|(from, until)| meter.offered_between(*from + PAUSE_ACTS, *until) as u64).sum()
    }

    /// The erased people: the address by tombstone.
    pub(super) fn erased(&self) -> HashMap<String, String> {
        self.erased.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn of_recipient(&self, recipient: &str) -> Action {
        let Some(number) = guest_number(recipient) else { return Action::GoOn };
        if self.defers.load(Ordering::Relaxed) && number.is_multiple_of(DEFERRED_EVERY) {
            let mut deferred = self.deferred.lock().unwrap_or_else(PoisonError::into_inner);
            let times = deferred.entry(number).or_default();
            *times += 1;
            if *times <= DEFERRED_TIMES {
                return Action::Reply(451, "4.7.1 Greylisted, please try again later".into());
            }
        }
        if number.is_multiple_of(REFUSED_EVERY) {
            return Action::Reply(550, "5.7.1 Not wanted here".into());
        }
        if number.is_multiple_of(REFUSED_ONCE_EVERY)
            && self.refused_once.lock().unwrap_or_else(PoisonError::into_inner).insert(number)
        {
            return Action::Reply(451, "4.3.0 Not now".into());
        }
        Action::GoOn
    }

    fn hangs(&self) -> bool {
        self.hangs.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
    }

    fn is_dropped(&self) -> bool {
        self.drops.load(Ordering::Relaxed) > 0
            && (self.messages.fetch_add(1, Ordering::Relaxed) + 1).is_multiple_of(DROPPED_EVERY)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn applies_the_active_faults() {
        let smtp_faults = SmtpFaults::default();
        let refused = |number: u32| smtp_faults.action(Stage::Rcpt(&format!("guest-{number:07}@example.org")));
        assert!(matches!(refused(20), Action::Reply(451, _)));
        assert_eq!(refused(20), Action::GoOn);
        assert!(matches!((refused(50), refused(50)), (Action::Reply(550, _), Action::Reply(550, _))));
        smtp_faults.hang(1);
        assert_eq!([smtp_faults.action(Stage::Data), smtp_faults.action(Stage::Data)], [Action::Hang, Action::GoOn]);
        smtp_faults.drops.store(1, Ordering::Relaxed);
        let dropped = (0..1_000).filter(|_| smtp_faults.action(Stage::Message) == Action::AcceptThenDrop).count();
        assert_eq!(dropped, 10);
    }
}
