//! Records when mail was offered, to check a rate limit, excluding times in which the machine itself stalled.

use std::{
    iter,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    thread,
    time::{Duration, Instant},
};

/// Interval of the meter's own timer.
const TICK: Duration = Duration::from_millis(10);
/// A timer this late shows that the machine stalled.
const LATE: Duration = Duration::from_millis(100);
/// The length of the windows that are checked.
const WINDOW: Duration = Duration::from_secs(1);

/// Records the times of `MAIL` commands, and when its own timer was late.
#[derive(Debug, Default)]
pub struct RateMeter {
    offered: Mutex<Vec<Instant>>,
    /// The intervals in which the machine stalled.
    stalls: Mutex<Vec<(Instant, Instant)>>,
}

/// How well a limit was kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RateCheck {
    /// Windows of one second that were checked: one begins with each `MAIL`.
    pub windows: usize,
    /// Windows excluded because the machine stalled in them.
    pub discarded: usize,
    /// Windows over the limit.
    pub over: usize,
    /// The maximum in any checked window.
    pub most: usize,
}

impl RateMeter {
    /// Starts its timer in a thread, which ends with the meter.
    #[must_use]
    pub fn start() -> Arc<Self> {
        let meter = Arc::new(Self::default());
        let weak = Arc::downgrade(&meter);
        thread::spawn(move || watch(&weak));
        meter
    }

    /// Records a `MAIL`.
    pub fn note(&self) {
        lock(&self.offered).push(Instant::now());
    }

    /// When each `MAIL` came.
    #[must_use]
    pub fn offered(&self) -> Vec<Instant> {
        lock(&self.offered).clone()
    }

    /// Resets the meter.
    pub fn clear(&self) {
        lock(&self.offered).clear();
    }

    /// How many `MAIL`s came between two times, excluding stalls.
    #[must_use]
    pub fn offered_between(&self, from: Instant, until: Instant) -> usize {
        let stalls = lock(&self.stalls);
        let disturbed = |at: &Instant| stalls.iter().any(|(since, until)| *since < *at && *at < *until + LATE);
        lock(&self.offered).iter().filter(|at| (from..until).contains(*at) && !disturbed(at)).count()
    }

    /// How many `MAIL`s came in each consecutive second since the first one, excluding seconds with a stall and the incomplete last
    /// one.
    #[must_use]
    pub fn seconds(&self) -> Vec<usize> {
        seconds(&self.offered(), &lock(&self.stalls))
    }

    /// Checks the limit of `allowed` per second.
    #[must_use]
    pub fn check(&self, allowed: usize) -> RateCheck {
        check(&self.offered(), &lock(&self.stalls), allowed)
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

/// Whether the machine stalled in the window that begins then. Mail delayed by a stall arrives right after it, so a window that
/// begins there is excluded, too.
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

fn check(offered: &[Instant], stalls: &[(Instant, Instant)], allowed: usize) -> RateCheck {
    let mut checked = RateCheck::default();
    let mut end = 0;
    for (begin, from) in offered.iter().enumerate() {
        while end < offered.len() && offered[end] < *from + WINDOW {
            end += 1;
        }
        if is_disturbed(*from, stalls) {
            checked.discarded += 1;
            continue;
        }
        checked.windows += 1;
        checked.over += usize::from(end - begin > allowed);
        checked.most = checked.most.max(end - begin);
    }
    checked
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_with_a_stall_are_excluded() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let offered: Vec<Instant> = [0, 100, 200, 1_500, 1_600, 5_000].map(at).to_vec();
        assert_eq!(check(&offered, &[], 2), RateCheck { windows: 6, discarded: 0, over: 1, most: 3 });
        let stalls = [(at(800), at(950))];
        assert_eq!(check(&offered, &stalls, 2), RateCheck { windows: 3, discarded: 3, over: 0, most: 2 });
    }
    #[test]
    fn seconds_with_a_stall_are_excluded() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let offered: Vec<Instant> = [0, 100, 1_500, 3_200, 3_300, 4_000].map(at).to_vec();
        assert_eq!(seconds(&offered, &[]), [2, 1, 0, 2]);
        assert_eq!(seconds(&offered, &[(at(1_200), at(1_400))]), [2, 0, 2]);
        assert!(seconds(&[], &[]).is_empty() && seconds(&offered[..2], &[]).is_empty());
    }
}
