//! When mail was offered: what a rate limit is judged by, leaving out the moments in which the machine itself stood still.

use std::{
    iter,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    thread,
    time::{Duration, Instant},
};

/// The meter's own timer.
const TICK: Duration = Duration::from_millis(10);
/// A timer that is later than this shows that the machine did not keep time.
const LATE: Duration = Duration::from_millis(100);
/// The windows that a limit is judged by.
const WINDOW: Duration = Duration::from_secs(1);

/// Notes the moments of `MAIL` commands, and those in which its own timer was late.
#[derive(Debug, Default)]
pub struct RateMeter {
    offered: Mutex<Vec<Instant>>,
    /// From when to when the machine stood still.
    stalls: Mutex<Vec<(Instant, Instant)>>,
}

/// How a limit was kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// Windows of a second that were judged: one begins with each `MAIL`.
    pub windows: usize,
    /// Windows that were left out, since the machine did not keep time in them.
    pub discarded: usize,
    /// Windows with more than is allowed.
    pub over: usize,
    /// The most in any window that was judged.
    pub most: usize,
}

impl RateMeter {
    /// Starts its timer, in a thread of its own. It ends with the meter.
    #[must_use]
    pub fn start() -> Arc<Self> {
        let meter = Arc::new(Self::default());
        let weak = Arc::downgrade(&meter);
        thread::spawn(move || watch(&weak));
        meter
    }

    /// A `MAIL` has come.
    pub fn note(&self) {
        lock(&self.offered).push(Instant::now());
    }

    /// When each `MAIL` has come.
    #[must_use]
    pub fn offered(&self) -> Vec<Instant> {
        lock(&self.offered).clone()
    }

    /// Forgets everything.
    pub fn clear(&self) {
        lock(&self.offered).clear();
    }

    /// How many `MAIL`s came between two moments, leaving out those that came when the machine stood still.
    #[must_use]
    pub fn offered_between(&self, from: Instant, until: Instant) -> usize {
        let stalls = lock(&self.stalls);
        let disturbed = |at: &Instant| stalls.iter().any(|(since, until)| *since < *at && *at < *until + LATE);
        lock(&self.offered).iter().filter(|at| (from..until).contains(*at) && !disturbed(at)).count()
    }

    /// How many `MAIL`s came in each second, one after the other from the first `MAIL` on. Left out are those in which the machine
    /// did not keep time, and the last one, which is incomplete.
    #[must_use]
    pub fn seconds(&self) -> Vec<usize> {
        seconds(&self.offered(), &lock(&self.stalls))
    }

    /// How often there was more than `allowed` in a second.
    #[must_use]
    pub fn judge(&self, allowed: usize) -> Kept {
        judge(&self.offered(), &lock(&self.stalls), allowed)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn watch(meter: &Weak<RateMeter>) {
    loop {
        let before = Instant::now();
        thread::sleep(TICK);
        let Some(meter) = meter.upgrade() else { return };
        let now = Instant::now();
        if now - before > TICK + LATE {
            lock(&meter.stalls).push((before, now));
        }
    }
}

/// Whether the machine stood still in the window that begins then. What waits during a stall comes right after it, so a window
/// that begins there says nothing either.
fn is_disturbed(from: Instant, stalls: &[(Instant, Instant)]) -> bool {
    stalls.iter().any(|(since, until)| *since < from + WINDOW && from < *until + LATE)
}

fn seconds(offered: &[Instant], stalls: &[(Instant, Instant)]) -> Vec<usize> {
    let (Some(first), Some(last)) = (offered.first(), offered.last()) else { return Vec::new() };
    iter::successors(Some(*first), |from| Some(*from + WINDOW))
        .take_while(|from| *from + WINDOW <= *last)
        .filter(|from| !is_disturbed(*from, stalls))
        .map(|from| offered.iter().filter(|at| (from..from + WINDOW).contains(*at)).count())
        .collect()
}

fn judge(offered: &[Instant], stalls: &[(Instant, Instant)], allowed: usize) -> Kept {
    let mut kept = Kept::default();
    let mut end = 0;
    for (begin, from) in offered.iter().enumerate() {
        while end < offered.len() && offered[end] < *from + WINDOW {
            end += 1;
        }
        if is_disturbed(*from, stalls) {
            kept.discarded += 1;
            continue;
        }
        kept.windows += 1;
        kept.over += usize::from(end - begin > allowed);
        kept.most = kept.most.max(end - begin);
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_judged_unless_the_machine_stood_still() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let offered: Vec<Instant> = [0, 100, 200, 1_500, 1_600, 5_000].map(at).to_vec();
        assert_eq!(judge(&offered, &[], 2), Kept { windows: 6, discarded: 0, over: 1, most: 3 });
        let stalls = [(at(800), at(950))];
        assert_eq!(judge(&offered, &stalls, 2), Kept { windows: 3, discarded: 3, over: 0, most: 2 });
    }
    #[test]
    fn seconds_are_counted_in_which_the_machine_kept_time() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let offered: Vec<Instant> = [0, 100, 1_500, 3_200, 3_300, 4_000].map(at).to_vec();
        assert_eq!(seconds(&offered, &[]), [2, 1, 0, 2]);
        assert_eq!(seconds(&offered, &[(at(1_200), at(1_400))]), [2, 0, 2]);
        assert!(seconds(&[], &[]).is_empty() && seconds(&offered[..2], &[]).is_empty());
    }
}
