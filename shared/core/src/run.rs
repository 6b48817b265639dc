//! A run's counters and what follows from them: its phase, the free space in its window, and its speed. Pure functions.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize, Serializer, ser::SerializeMap as _};

use crate::item::{CounterDelta, ItemState};

/// What a person wants of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Wanted {
    /// Release its items.
    Running,
    /// Release nothing for now.
    Paused,
    /// Send nothing more, permanently.
    Cancelled,
}

/// The number of a run's items in each state. They add up to `total`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// All items of the run.
    pub total: i32,
    counts: [i32; ItemState::ALL.len()],
}

impl Counters {
    /// The counters from the ledger, in the order of [`ItemState::ALL`]. Further counters belong to states of a later version; then
    /// [`Self::sum`] is less than `total`.
    #[must_use]
    pub fn new(total: i32, counts: &[i32]) -> Self {
        let mut counters = Self { total, ..Self::default() };
        for (counter, count) in counters.counts.iter_mut().zip(counts) {
            *counter = *count;
        }
        counters
    }

    /// The counters of a run with items in these states.
    #[must_use]
    pub fn of_items(items: &[(ItemState, i32)]) -> Self {
        let mut counters = Self::default();
        for (state, count) in items {
            counters.counts[*state as usize] += count;
            counters.total += count;
        }
        counters
    }

    /// Items in this state.
    #[must_use]
    pub fn of(&self, state: ItemState) -> i32 {
        self.counts[state as usize]
    }

    /// Items that still have to be sent in the current pass.
    #[must_use]
    pub fn open(&self) -> i32 {
        ItemState::ALL.into_iter().filter(|state| state.is_open()).map(|state| self.of(state)).sum()
    }

    /// Items in any known state.
    #[must_use]
    pub fn sum(&self) -> i32 {
        self.counts.iter().sum()
    }

    /// Items that are settled.
    #[must_use]
    pub fn settled(&self) -> i32 {
        self.total - self.open()
    }

    /// The change from these counters to `other`.
    #[must_use]
    pub fn delta(&self, other: &Self) -> CounterDelta {
        CounterDelta::between(self.counts, other.counts)
    }
}

/// Serialized as `total` and each state by its name.
impl Serialize for Counters {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("total", &self.total)?;
        for state in ItemState::ALL {
            map.serialize_entry(state.name(), &self.of(state))?;
        }
        map.end()
    }
}

/// What a run is doing, as the pages show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Accepted; no item is settled yet.
    Queued,
    /// Being sent.
    Running,
    /// Nothing is released until a person resumes it.
    Paused,
    /// Cancelled by a person; attempts in progress are still being settled.
    Cancelling,
    /// Cancelled by a person, and all items are settled.
    Cancelled,
    /// Every item is settled.
    Finished,
}

impl Phase {
    /// Derives the phase from the wanted state and the counters.
    #[must_use]
    pub fn of(wanted: Wanted, counters: &Counters) -> Self {
        match (wanted, counters.open()) {
            (Wanted::Cancelled, 0) if counters.of(ItemState::Cancelled) > 0 => Self::Cancelled,
            (_, 0) => Self::Finished,
            (Wanted::Cancelled, _) => Self::Cancelling,
            (Wanted::Paused, _) => Self::Paused,
            (Wanted::Running, open) if open == counters.total => Self::Queued,
            (Wanted::Running, _) => Self::Running,
        }
    }

    /// Whether nothing changes any more unless a person acts.
    #[must_use]
    pub fn is_over(self) -> bool {
        matches!(self, Self::Cancelled | Self::Finished)
    }
}

/// The number of released items that wait for the first attempt since their release. `unreleased` are the items that the first pass
/// has not reached: they are pending, but not on the broker.
///
/// An item that waits on a retry queue does not count, since it delays no other item.
#[must_use]
pub fn outstanding(counters: &Counters, unreleased: i32) -> i32 {
    (counters.of(ItemState::Pending) - unreleased).max(0)
}

/// A run's speed, as fan-out measures it: by the items released and no longer outstanding.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Flow {
    /// When it was last measured.
    pub looked_at: DateTime<Utc>,
    /// The items of the pass that were released and no longer outstanding at that time.
    pub drained: i32,
    /// Items per second between the last two measurements.
    pub per_second: f32,
}

/// The shortest time between two measurements. Results arrive in batches, so a shorter time says little about the speed.
const LOOK_EVERY: TimeDelta = TimeDelta::milliseconds(400);
/// The same if nothing is outstanding: then the window was too small, and even a short time shows how much larger it may be.
const LOOK_WHEN_DRAINED: TimeDelta = TimeDelta::milliseconds(100);

impl Flow {
    /// Measures again, unless the last measurement is too recent.
    #[must_use]
    pub fn look(self, now: DateTime<Utc>, released: i32, outstanding: i32) -> Self {
        let (elapsed, drained) = (now - self.looked_at, released - outstanding);
        if elapsed < TimeDelta::zero() {
            // The clock was set back: start a new measurement.
            return Self { looked_at: now, drained, ..self };
        }
        if elapsed < if outstanding <= 0 { LOOK_WHEN_DRAINED } else { LOOK_EVERY } {
            return self;
        }
        let fewer = (drained - self.drained).max(0) as f32;
        Self { looked_at: now, drained, per_second: fewer / elapsed.as_seconds_f32() }
    }

    /// The window in items: what the run drains in `time`, but at least `least`, so that a new run gets started and its senders
    /// have work, and at most `most`.
    #[must_use]
    pub fn window(self, time: Duration, least: i32, most: i32) -> i32 {
        let wanted = self.per_second * time.as_secs_f32();
        // The cast saturates.
        (wanted as i32).max(least).min(most)
    }
}

/// The number of items in the next chunk, given what is outstanding. 0 until a quarter of the window is free, since each chunk
/// costs a transaction and a round of confirms.
#[must_use]
pub fn room(window: i32, outstanding: i32) -> i32 {
    let room = window - outstanding;
    if room * 4 >= window { room } else { 0 }
}

/// How many items may be released now under a rate limit. The limit itself is enforced by the claims ([`crate::pacing`]); this
/// keeps the queues short.
///
/// It is the leaky bucket as a meter (GCRA): each send moves `next_due_at` forward by one interval, so the rate is exact over any
/// time, even if several fan-out workers spend from the same budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    per_second: i32,
    /// The time from which the next send is due.
    pub next_due_at: DateTime<Utc>,
}

/// The furthest that `next_due_at` can lie ahead: at one send per second it is at most a second ahead.
const FURTHEST_AHEAD: TimeDelta = TimeDelta::seconds(2);

impl Budget {
    /// The budget at time `now`. A late step catches up, but at most `burst` of unused time is made up for: before that, nothing
    /// was waiting to be sent.
    #[must_use]
    pub fn new(per_second: i32, next_due_at: DateTime<Utc>, now: DateTime<Utc>, burst: Duration) -> Self {
        let burst = TimeDelta::from_std(burst).unwrap_or(TimeDelta::zero());
        // Only due sends are spent, so a value further ahead was written before the clock was set back.
        let possible = now - burst..=now + FURTHEST_AHEAD;
        let next_due_at = if possible.contains(&next_due_at) { next_due_at } else { now };
        Self { per_second: per_second.max(1), next_due_at }
    }

    /// How many sends are due.
    #[must_use]
    pub fn due(&self, now: DateTime<Utc>) -> i32 {
        let Some(late_us) = (now - self.next_due_at).num_microseconds().filter(|late| *late >= 0) else { return 0 };
        // One send is due at `next_due_at` itself, and one more after each interval.
        let due = late_us.saturating_mul(i64::from(self.per_second)) / 1_000_000 + 1;
        i32::try_from(due).unwrap_or(i32::MAX)
    }

    /// The budget after this many due sends.
    #[must_use]
    pub fn spend(self, sends: i32) -> Self {
        let spent_us = i64::from(sends) * 1_000_000 / i64::from(self.per_second);
        Self { next_due_at: self.next_due_at + TimeDelta::microseconds(spent_us), ..self }
    }

    /// The number of sends that it allows in `time`.
    #[must_use]
    pub fn within(&self, time: Duration) -> i32 {
        (f64::from(self.per_second) * time.as_secs_f64()) as i32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn counters(pending: i32, sent: i32, cancelled: i32) -> Counters {
        Counters::of_items(&[(ItemState::Pending, pending), (ItemState::Sent, sent), (ItemState::Cancelled, cancelled)])
    }

    #[test]
    fn the_phase_follows_from_the_wanted_state_and_the_counters() {
        assert_eq!(Phase::of(Wanted::Running, &counters(5, 0, 0)), Phase::Queued);
        assert_eq!(Phase::of(Wanted::Running, &counters(4, 1, 0)), Phase::Running);
        assert_eq!(Phase::of(Wanted::Paused, &counters(4, 1, 0)), Phase::Paused);
        assert_eq!(Phase::of(Wanted::Cancelled, &counters(4, 1, 0)), Phase::Cancelling);
        assert_eq!(Phase::of(Wanted::Cancelled, &counters(0, 1, 4)), Phase::Cancelled);
        // Cancelled too late: everything was sent.
        assert_eq!(Phase::of(Wanted::Cancelled, &counters(0, 5, 0)), Phase::Finished);
        assert_eq!(Phase::of(Wanted::Paused, &counters(0, 5, 0)), Phase::Finished);
    }

    #[test]
    fn unreleased_items_are_not_outstanding() {
        assert_eq!(outstanding(&counters(100, 20, 0), 70), 30);
        assert_eq!(outstanding(&counters(0, 120, 0), 0), 0);
        assert_eq!(outstanding(&Counters::of_items(&[(ItemState::Retrying, 9)]), 0), 0);
    }

    #[test]
    fn the_window_is_what_drains_in_its_time() {
        let start = DateTime::UNIX_EPOCH;
        let flow = Flow { looked_at: start, drained: 0, per_second: 0.0 };
        let time = Duration::from_millis(500);
        assert_eq!(flow.window(time, 100, 5_000), 100, "an unknown speed gets the minimum");
        assert_eq!(flow.look(start + TimeDelta::milliseconds(100), 1_000, 100), flow, "too early to measure");
        assert_eq!(flow.look(start + TimeDelta::milliseconds(100), 900, 0).per_second, 9_000.0);
        let flow = flow.look(start + TimeDelta::seconds(2), 4_400, 400);
        assert_eq!(flow.window(time, 100, 5_000), 1_000);
        assert_eq!(flow.window(time, 2_000, 5_000), 2_000);
        assert_eq!(flow.window(time, 100, 700), 700);
        // Items of a replay are outstanding before they count as released. The speed must not become negative.
        assert_eq!(flow.look(start + TimeDelta::seconds(3), 4_400, 1_400).window(time, 100, 5_000), 100);
    }

    #[test]
    fn a_chunk_waits_for_a_quarter_of_the_window() {
        assert_eq!(room(1_000, 0), 1_000);
        assert_eq!(room(1_000, 750), 250);
        assert_eq!(room(1_000, 751), 0);
        assert_eq!(room(100, 5_000), 0);
        assert_eq!(room(1, 0), 1);
    }

    proptest! {
        /// A simulated pipeline: whatever its speed and latency, the window finds the speed and then holds the items of about
        /// its time.
        #[test]
        fn the_window_finds_any_speed(capacity in 20..20_000i32, latency_ms in 10..300i64) {
            let time = Duration::from_millis(500);
            let (tick_ms, mut now, mut released, mut drained) = (10, DateTime::UNIX_EPOCH, 0i32, 0i32);
            let mut flow = Flow { looked_at: now, drained: 0, per_second: 0.0 };
            let mut on_the_way: std::collections::VecDeque<(DateTime<Utc>, i32)> = [].into();
            let mut budget = 0.0f64;
            let mut window = 0;
            for _ in 0..3_000 {
                now += TimeDelta::milliseconds(tick_ms);
                budget = (budget + f64::from(capacity) * 0.01).min(f64::from(capacity) * 0.02);
                while let Some((due, items)) = on_the_way.front_mut()
                    && *due <= now
                    && budget >= 1.0
                {
                    let settled = (*items).min(budget as i32);
                    budget -= f64::from(settled);
                    drained += settled;
                    *items -= settled;
                    if *items == 0 {
                        on_the_way.pop_front();
                    }
                }
                flow = flow.look(now, released, released - drained);
                window = flow.window(time, 64, 1_000_000);
                let chunk = room(window, released - drained);
                if chunk > 0 {
                    released += chunk;
                    on_the_way.push_back((now + TimeDelta::milliseconds(latency_ms), chunk));
                }
            }
            let ideal = (capacity / 2).max(64);
            prop_assert!((ideal * 7 / 10..=ideal * 13 / 10).contains(&window), "{window}, and not about {ideal}");
        }
    }

    #[test]
    fn a_budget_written_before_the_clock_was_set_back_stops_nothing() {
        let now = DateTime::UNIX_EPOCH;
        let budget = Budget::new(10, now + TimeDelta::hours(3), now, Duration::ZERO);
        assert_eq!(budget.due(now), 1);
    }

    proptest! {
        #[test]
        fn the_rate_is_exact_over_any_time(
            per_second in 1..5000i32,
            waits_ms in prop::collection::vec(1..400i64, 1..50),
            wanted in 1..2000i32,
        ) {
            let start = DateTime::UNIX_EPOCH;
            let burst = Duration::from_millis(250);
            let (mut now, mut next_due_at, mut released) = (start, start, 0i64);
            for wait in &waits_ms {
                now += TimeDelta::milliseconds(*wait);
                let budget = Budget::new(per_second, next_due_at, now, burst);
                let items = budget.due(now).min(wanted);
                next_due_at = budget.spend(items).next_due_at;
                released += i64::from(items);
            }
            let elapsed_ms = (now - start).num_milliseconds();
            // Each chunk may round down by one microsecond.
            let most = (elapsed_ms * i64::from(per_second)) / 1000 + 1 + i64::try_from(waits_ms.len()).unwrap();
            prop_assert!(released <= most, "{released} released, {most} allowed");
            let held_back = waits_ms.iter().any(|wait| *wait > 250) || i64::from(wanted) * 1000 < i64::from(per_second) * 400;
            if !held_back {
                let least = elapsed_ms * i64::from(per_second) / 1000 - 1;
                prop_assert!(released >= least, "{released} released, {least} due");
            }
        }
    }
}
