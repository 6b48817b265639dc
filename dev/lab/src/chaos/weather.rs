//! The mail server's moods: what it does to a message beside taking it in.
//!
//! Some recipients are always in trouble, so that there is something on the queues of the retry schedule and among the
//! dead letters: every 20th is refused once for a passing reason, every 50th for good.

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
/// While messages are dropped, it is every so manieth.
const DROPPED_EVERY: u32 = 100;
/// While recipients are deferred, it is one of so many, and so often.
const DEFERRED_EVERY: u32 = 7;
const DEFERRED_TIMES: u32 = 2;
/// A pause holds within this time.
const PAUSE_ACTS: Duration = Duration::from_secs(1);
/// A slow answer comes so late: it is waited for.
const SLOW: Duration = Duration::from_secs(2);

/// What can be wrong with the mail server for a while.
#[derive(Clone, Copy, Debug)]
pub(super) enum Trouble {
    /// Some messages are taken in, and the connection is closed before that is said.
    Drops,
    /// Everybody is asked to come back later.
    Busy,
    /// It does not relay for us.
    Refuses,
    /// A limit of ours is reached.
    Limits,
    /// An answer takes its time.
    Slow,
}

/// What a mail server does at present.
#[derive(Debug, Default)]
pub(super) struct Weather {
    /// How many want it so at the moment.
    drops: AtomicU32,
    busy: AtomicU32,
    refuses: AtomicU32,
    limits: AtomicU32,
    slow: AtomicU32,
    /// Connections that shall still fall silent.
    hangs: AtomicU32,
    messages: AtomicU32,
    refused_once: Mutex<HashSet<u32>>,
    /// How often each of the recipients was named whom a limited run's mail server defers.
    deferred: Mutex<HashMap<u32, u32>>,
    /// Whether some recipients are deferred again and again.
    pub(super) defers: AtomicBool,
    /// When mail was offered.
    pub(super) meter: OnceLock<Arc<RateMeter>>,
    /// From when to when the run was paused, as far as a person can know.
    pub(super) pauses: Mutex<Vec<(Instant, Instant)>>,
    /// The people who were erased: by tombstone, the address, which the sink knows.
    pub(super) erased: Mutex<HashMap<String, String>>,
}

impl Weather {
    /// The rule for a mail sink.
    pub(super) fn rule(self: &Arc<Self>) -> Rule {
        let weather = Arc::clone(self);
        Arc::new(move |stage, _| weather.action(stage))
    }

    /// Has this trouble for so long.
    pub(super) async fn bad(&self, trouble: Trouble, time: Duration) {
        let level = match trouble {
            Trouble::Drops => &self.drops,
            Trouble::Busy => &self.busy,
            Trouble::Refuses => &self.refuses,
            Trouble::Limits => &self.limits,
            Trouble::Slow => &self.slow,
        };
        level.fetch_add(1, Ordering::Relaxed);
        sleep(time).await;
        level.fetch_sub(1, Ordering::Relaxed);
    }

    /// Falls silent on so many connections that have a message under way.
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

    /// False, always: what follows is decided elsewhere.
    fn note_offer(&self) -> bool {
        if let Some(meter) = self.meter.get() {
            meter.note();
        }
        false
    }

    /// How many mails were offered while the run was paused, leaving out the second within which a pause acts, and the moments in
    /// which the machine stood still.
    pub(super) fn offered_while_paused(&self) -> u64 {
        let pauses = self.pauses.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(meter) = self.meter.get() else { return 0 };
        pauses.iter().map(|(from, until)| meter.offered_between(*from + PAUSE_ACTS, *until) as u64).sum()
    }

    /// The people who were erased: by tombstone, the address.
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
    fn the_weather_is_as_it_was_made() {
        let weather = Weather::default();
        let refused = |number: u32| weather.action(Stage::Rcpt(&format!("guest-{number:07}@example.org")));
        assert!(matches!(refused(20), Action::Reply(451, _)));
        assert_eq!(refused(20), Action::GoOn);
        assert!(matches!((refused(50), refused(50)), (Action::Reply(550, _), Action::Reply(550, _))));
        weather.hang(1);
        assert_eq!([weather.action(Stage::Data), weather.action(Stage::Data)], [Action::Hang, Action::GoOn]);
        weather.drops.store(1, Ordering::Relaxed);
        let dropped = (0..1_000).filter(|_| weather.action(Stage::Message) == Action::AcceptThenDrop).count();
        assert_eq!(dropped, 10);
    }
}
