//! The send times that rate limits allow: one meter for each limited run and one for the installation. Pure functions.
//!
//! A claim reserves a send time (a slot) for each attempt, in the meters of its run and of the installation, within its own
//! transaction. So every attempt is paced, whether its message comes from fan-out, a retry queue or a dead letter.

use chrono::{DateTime, TimeDelta, Utc};

/// Unused time is made up for if it is at most this long: a hiccup of the machine, or a claim that ended without a send. A longer
/// gap is a pause, an outage or a lack of work, and is not made up for.
const MAKE_UP: TimeDelta = TimeDelta::seconds(5);
/// While time is made up for, the interval between slots shrinks so that a tenth more of them fit.
const FASTER_BY: i32 = 10;
/// The furthest that a meter reserves ahead. If one is further ahead, it was written before the clock was set back.
const FURTHEST_AHEAD: TimeDelta = TimeDelta::seconds(30);

/// The sends per second that a limit allows; at least one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate(i32);

impl Rate {
    /// `per_second` sends a second.
    #[must_use]
    pub fn new(per_second: i32) -> Self {
        Self(per_second.max(1))
    }

    /// The number of sends allowed in `time`, rounded down.
    #[must_use]
    pub fn within(self, time: std::time::Duration) -> i32 {
        (f64::from(self.0) * time.as_secs_f64()) as i32
    }

    /// The time between two slots.
    fn interval(self) -> TimeDelta {
        TimeDelta::nanoseconds(1_000_000_000 / i64::from(self.0))
    }
}

/// How far a rate limit is used up.
///
/// Over any time, a meter grants at most the rate plus one slot. For a short time it may grant a tenth more than the rate, while
/// up to five seconds of unused time are made up for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Meter {
    /// The next free slot. Earlier ones are taken or have passed unused.
    pub next_at: DateTime<Utc>,
    /// Unused time still to be made up for.
    pub owed: TimeDelta,
}

impl Meter {
    /// An unused meter.
    #[must_use]
    pub fn new(now: DateTime<Utc>) -> Self {
        Self { next_at: now, owed: TimeDelta::zero() }
    }

    /// The meter at time `now`: slots in the past can't be taken any more.
    #[must_use]
    pub fn at(self, now: DateTime<Utc>) -> Self {
        let unused = now - self.next_at;
        if unused < -FURTHEST_AHEAD || unused > MAKE_UP {
            Self::new(now)
        } else if unused > TimeDelta::zero() {
            Self { next_at: now, ..self }.give_back(unused)
        } else {
            self
        }
    }

    /// The meter after taking the slot at `slot`, which is [`Self::next_at`] or later.
    fn take(self, slot: DateTime<Utc>, rate: Rate) -> Self {
        let interval = rate.interval();
        let saved = (interval / (FASTER_BY + 1)).min(self.owed);
        Self { next_at: slot + interval - saved, owed: self.owed - saved }
    }

    /// The meter after attempts that had `slots` ended without being offered to the relay. Those slots are over, so their time is
    /// made up for instead of charged.
    #[must_use]
    pub fn unused(self, slots: i32, rate: Rate) -> Self {
        self.give_back(rate.interval() * slots)
    }

    fn give_back(self, time: TimeDelta) -> Self {
        Self { owed: (self.owed + time).min(MAKE_UP), ..self }
    }
}

/// The meters that apply to a run's attempts, with their rates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Meters {
    /// That of the run.
    pub run: Option<(Rate, Meter)>,
    /// That of the whole installation.
    pub installation: Option<(Rate, Meter)>,
}

impl Meters {
    fn each(&mut self) -> impl Iterator<Item = &mut (Rate, Meter)> {
        self.run.iter_mut().chain(&mut self.installation)
    }

    /// When the next attempt may be sent. None: no limit applies.
    #[must_use]
    pub fn next_slot(&self) -> Option<DateTime<Utc>> {
        self.run.iter().chain(&self.installation).map(|(_, meter)| meter.next_at).max()
    }

    /// Takes the next slot. None: no limit applies.
    pub fn take(&mut self) -> Option<DateTime<Utc>> {
        let slot = self.next_slot()?;
        for (rate, meter) in self.each() {
            *meter = meter.take(slot, *rate);
        }
        Some(slot)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn start() -> DateTime<Utc> {
        DateTime::from_timestamp(1_800_000_000, 0).unwrap()
    }

    /// Takes up to `wanted` slots that are due within `ahead`.
    fn take_due(meters: &mut Meters, now: DateTime<Utc>, ahead: TimeDelta, wanted: usize) -> Vec<DateTime<Utc>> {
        let mut slots = Vec::new();
        while slots.len() < wanted && meters.next_slot().is_some_and(|slot| slot <= now + ahead) {
            slots.extend(meters.take());
        }
        slots
    }

    fn at(meters: &mut Meters, now: DateTime<Utc>) {
        meters.each().for_each(|(_, meter)| *meter = meter.at(now));
    }

    fn run_of(per_second: i32) -> Meters {
        Meters { run: Some((Rate::new(per_second), Meter::new(start()))), installation: None }
    }

    /// The maximum number of slots in any window of this length.
    fn most_in(slots: &[DateTime<Utc>], window: TimeDelta) -> usize {
        slots
            .iter()
            .map(|from| slots.iter().filter(|slot| (*from..*from + window).contains(slot)).count())
            .max()
            .unwrap_or(0)
    }

    #[test]
    fn slots_follow_each_other_at_the_rate() {
        let mut meters = run_of(10);
        let slots = take_due(&mut meters, start(), TimeDelta::zero(), 5);
        assert_eq!(slots, [start()], "one is due at the beginning");
        let slots = take_due(&mut meters, start(), TimeDelta::milliseconds(350), 9);
        assert_eq!(slots.iter().map(|slot| (*slot - start()).num_milliseconds()).collect::<Vec<_>>(), [100, 200, 300]);
    }

    #[test]
    fn without_a_limit_nothing_waits() {
        assert_eq!(Meters::default().take(), None);
    }

    #[test]
    fn a_hiccup_is_made_up_for_at_a_bounded_rate_and_an_outage_is_not() {
        for (gap_ms, made_up) in [(3_000, 30), (60_000, 0)] {
            let mut meters = run_of(10);
            let after = start() + TimeDelta::milliseconds(gap_ms);
            at(&mut meters, after);
            let mut slots = Vec::new();
            for tenth in 0..600 {
                let now = after + TimeDelta::milliseconds(100 * tenth);
                at(&mut meters, now);
                slots.extend(take_due(&mut meters, now, TimeDelta::milliseconds(100), 100));
            }
            let expected: usize = 600 + made_up;
            assert!(slots.len().abs_diff(expected) <= 2, "{} of {expected} slots", slots.len());
            assert!(most_in(&slots, TimeDelta::seconds(1)) <= 12);
        }
    }

    #[test]
    fn slots_of_attempts_that_were_not_offered_are_made_up_for() {
        let meter = Meter::new(start()).unused(5, Rate::new(10));
        assert_eq!(meter.owed, TimeDelta::milliseconds(500));
        assert_eq!(meter.unused(1_000, Rate::new(10)).owed, MAKE_UP);
    }

    #[test]
    fn the_tighter_of_two_limits_decides() {
        let mut meters = run_of(100);
        meters.installation = Some((Rate::new(2), Meter::new(start())));
        let slots = take_due(&mut meters, start(), TimeDelta::seconds(3), 99);
        assert_eq!(slots.len(), 7);
    }

    #[test]
    fn a_clock_that_is_set_back_stops_nothing() {
        let mut meters = run_of(10);
        take_due(&mut meters, start(), TimeDelta::seconds(1), 99);
        let earlier = start() - TimeDelta::hours(3);
        at(&mut meters, earlier);
        assert_eq!(meters.next_slot(), Some(earlier));
    }

    #[test]
    fn a_rate_is_at_least_one() {
        assert_eq!(Rate::new(0), Rate::new(1));
        assert_eq!(Rate::new(150).within(Duration::from_millis(500)), 75);
    }

    /// What can happen to a limited run.
    #[derive(Clone, Copy, Debug)]
    enum Event {
        /// Time passes, then a claim takes what is due.
        Claim { after_ms: i64, wanted: usize },
        /// Time passes without claims: a pause, an outage, a lack of work.
        Idle { ms: i64 },
        /// Claimed attempts end without being offered.
        Unused { slots: i32 },
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            6 => (0..400i64, 1..200usize).prop_map(|(after_ms, wanted)| Event::Claim { after_ms, wanted }),
            1 => (0..20_000i64).prop_map(|ms| Event::Idle { ms }),
            1 => (1..5i32).prop_map(|slots| Event::Unused { slots }),
        ]
    }

    proptest! {
        #[test]
        fn never_more_than_the_rate_and_never_a_longer_wait(
            per_second in 1..500i32, shared in prop::option::of(1..500i32), events in prop::collection::vec(event(), 1..120),
        ) {
            let ahead = TimeDelta::milliseconds(100);
            let mut meters = run_of(per_second);
            meters.installation = shared.map(|shared| (Rate::new(shared), Meter::new(start())));
            let limit = f64::from(shared.map_or(per_second, |shared| shared.min(per_second)));
            let (mut now, mut slots, mut unused) = (start(), Vec::new(), 0);
            for event in events {
                match event {
                    Event::Idle { ms } => now += TimeDelta::milliseconds(ms),
                    Event::Unused { slots: given_back } => {
                        // Only what was granted can end unused.
                        let given_back = given_back.min(i32::try_from(slots.len()).unwrap() - unused);
                        unused += given_back;
                        meters.each().for_each(|(rate, meter)| *meter = meter.unused(given_back, *rate));
                    }
                    Event::Claim { after_ms, wanted } => {
                        now += TimeDelta::milliseconds(after_ms);
                        at(&mut meters, now);
                        let granted = take_due(&mut meters, now, ahead, wanted);
                        prop_assert!(granted.iter().all(|slot| *slot >= now), "no slot lies in the past");
                        slots.extend(granted);
                        // Every waiting item is released in bounded time: the next slot is near.
                        let next = meters.next_slot().unwrap();
                        let interval = TimeDelta::nanoseconds((1e9 / limit) as i64 + 1);
                        prop_assert!(next <= now + ahead + interval + TimeDelta::microseconds(1), "{}", next - now);
                    }
                }
            }
            prop_assert!(slots.is_sorted());
            // Over the whole time, what was used is at most the rate; 1e-6 for the rounding of intervals.
            let elapsed = (now - start() + ahead).as_seconds_f64();
            prop_assert!(slots.len() as f64 - f64::from(unused) <= limit * elapsed * (1.0 + 1e-6) + 1.0);
            // In any second, at most a tenth more.
            prop_assert!(most_in(&slots, TimeDelta::seconds(1)) as f64 <= limit * 1.1 + 2.0);
        }
    }
}
