//! Model checking of a rate limit: all orders of claims, hiccups, pauses and deferrals of a small run, over the meter that claims
//! use.

use crate::pacing::{Meter, Meters, Rate};
use chrono::{DateTime, TimeDelta, Utc};
use stateright::{Checker as _, HasDiscoveries, Model, Property};

/// Sends per second.
const PER_SECOND: i32 = 4;
/// The time of one tick.
const TICK_MS: i64 = 250;
/// A claim takes send times up to this far ahead.
const AHEAD_MS: i64 = 100;
/// An outage too long to be made up for.
const OUTAGE_MS: i64 = 60_000;
const LAST_TICK: u8 = 10;
/// Nothing is deferred after this tick, so that there is time left for deferred items.
const LAST_DEFERRAL: u8 = 5;

const LIMIT: &str = "no more is sent than the rate allows";
const RELEASED: &str = "every waiting item is sent in bounded time";

/// A limited run, and options that break its pacing.
#[derive(Clone, Debug)]
struct Pacing {
    items: u8,
    /// How often the relay defers an attempt, which then has to be repeated.
    deferrals: u8,
    /// How often the senders are down.
    outages: u8,
    /// Whether a claim that grants nothing leaves the meter unchanged. Otherwise each claim charges the deferred items again: a
    /// past fault, which stopped limited runs for ever.
    honest: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    ticks: u8,
    /// Milliseconds since the start.
    now_ms: i64,
    meter: (DateTime<Utc>, i64),
    waiting: u8,
    deferred: u8,
    /// The time of each attempt that was offered to the relay, in milliseconds.
    offered: Vec<i64>,
    deferrals: u8,
    outages: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Step {
    Tick,
    Claim,
    /// The relay defers the last attempt.
    Defer,
    Outage,
}

fn start() -> DateTime<Utc> {
    DateTime::UNIX_EPOCH
}

impl World {
    fn now(&self) -> DateTime<Utc> {
        start() + TimeDelta::milliseconds(self.now_ms)
    }

    /// `attempts::claim_paced` of the ledger, for one attempt.
    fn claim(&mut self, honest: bool) {
        let (next_at, owed_us) = self.meter;
        let mut meter = Meter { next_at, owed: TimeDelta::microseconds(owed_us) }.at(self.now());
        if !honest {
            meter.next_at += TimeDelta::milliseconds(i64::from(self.deferred) * 1_000 / i64::from(PER_SECOND));
        }
        let mut meters = Meters { run: Some((Rate::new(PER_SECOND), meter)), installation: None };
        if meters.next_slot().is_some_and(|slot| slot <= self.now() + TimeDelta::milliseconds(AHEAD_MS))
            && let Some(slot) = meters.take()
        {
            self.waiting -= 1;
            self.offered.push((slot - start()).num_milliseconds());
        }
        if let Some((_, meter)) = meters.run {
            self.meter = (meter.next_at, meter.owed.num_microseconds().unwrap());
        }
    }

    fn keeps_the_limit(&self) -> bool {
        // A tenth more while a hiccup is made up for, and one for the first slot.
        self.offered.iter().all(|from| {
            let within = self.offered.iter().filter(|at| (*from..*from + 1_000).contains(at)).count();
            within <= usize::try_from(PER_SECOND).unwrap() + 1
        })
    }
}

impl Model for Pacing {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        vec![World {
            ticks: 0,
            now_ms: 0,
            meter: (start(), 0),
            waiting: self.items,
            deferred: 0,
            offered: Vec::new(),
            deferrals: self.deferrals,
            outages: self.outages,
        }]
    }

    fn actions(&self, world: &World, steps: &mut Vec<Step>) {
        if world.ticks < LAST_TICK {
            steps.push(Step::Tick);
            if world.outages > 0 {
                steps.push(Step::Outage);
            }
        }
        if world.waiting > 0 {
            steps.push(Step::Claim);
        }
        if world.deferrals > 0 && !world.offered.is_empty() && world.ticks < LAST_DEFERRAL {
            steps.push(Step::Defer);
        }
    }

    fn next_state(&self, world: &World, step: Step) -> Option<World> {
        let mut next = world.clone();
        match step {
            Step::Tick => {
                // Senders claim whenever there is something to claim.
                if next.waiting > 0 {
                    next.claim(self.honest);
                }
                next.ticks += 1;
                next.now_ms += TICK_MS;
            }
            Step::Claim => next.claim(self.honest),
            Step::Defer => {
                next.deferrals -= 1;
                next.deferred += 1;
                next.waiting += 1;
            }
            Step::Outage => {
                next.outages -= 1;
                next.ticks += 1;
                next.now_ms += OUTAGE_MS;
            }
        }
        (next != *world).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(LIMIT, |_, world: &World| world.keeps_the_limit()),
            Property::always(RELEASED, |_, world: &World| world.ticks < LAST_TICK || world.waiting == 0),
        ]
    }
}

#[test]
fn a_limited_run_ends_and_keeps_its_limit_whatever_is_deferred() {
    for outages in [0, 1] {
        let checker = Pacing { items: 3, deferrals: 1, outages, honest: true }.checker().spawn_bfs().join();
        eprintln!("{} states of a limited run", checker.unique_state_count());
        checker.assert_properties();
    }
}

#[test]
fn a_meter_that_is_charged_again_with_each_claim_stops_a_run() {
    let pacing = Pacing { items: 3, deferrals: 1, outages: 0, honest: false };
    let checker = pacing.checker().finish_when(HasDiscoveries::Any).spawn_bfs().join();
    assert!(checker.discoveries().contains_key(RELEASED), "{:?}", checker.discoveries().keys());
}
