//! Model checking of the protocol: all orders of steps, crashes, losses and duplicates in a small world, and random ones in larger
//! worlds. The model runs the same functions as the pipeline.
//!
//! `docs/protocol.md` maps each step to its function and statement. Each test that removes a part of the protocol must find the
//! property that this part guarantees.

mod pacing;
mod world;

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use stateright::{Checker as _, HasDiscoveries, Model, Property};

use world::{Answer, Limits, Protocol, Step, World};

const COUNTS: &str = "counters equal counts";
const ONCE: &str = "no one receives two mails without a person's decision";
const TRUE: &str = "the ledger is right about what was sent and what failed";
const SETTLED: &str = "at rest, every item is settled";
const PAUSED: &str = "nothing is sent while the run is paused";
const RECEIPTED: &str = "an attempt with a receipt never becomes unknown, unless its live worker was declared dead";

impl Model for Protocol {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        vec![self.begin()]
    }

    fn actions(&self, world: &World, steps: &mut Vec<Step>) {
        self.steps(world, steps);
        self.faults(world, steps);
    }

    fn next_state(&self, world: &World, step: Step) -> Option<World> {
        let mut next = world.clone();
        self.take_step(&mut next, step);
        // A step that changes nothing is not a step.
        (next != *world).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(COUNTS, |_, world: &World| world.counters_equal_counts()),
            Property::always(ONCE, |_, world: &World| world.no_one_got_two_unexcused()),
            Property::always(TRUE, |_, world: &World| world.the_ledger_is_right()),
            Property::always(PAUSED, |_, world: &World| world.nothing_is_sent_while_paused()),
            Property::always(RECEIPTED, |protocol: &Self, world: &World| protocol.stalls || world.receipts_hold()),
            Property::always(SETTLED, |protocol: &Self, world: &World| {
                world.is_settled() || {
                    let mut steps = Vec::new();
                    protocol.steps(world, &mut steps);
                    !steps.is_empty()
                }
            }),
        ]
    }
}

/// A world small enough to be explored exhaustively. Other answers of the relay lead to the same messages as these.
fn small(items: usize, faults: u8, requests: u8) -> Protocol {
    let answers = vec![Answer::Accepts, Answer::RefusesForNow, Answer::Drops(true)];
    Protocol { answers, ..Protocol::whole(Limits { items, faults, requests }) }
}

fn holds(protocol: Protocol) {
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let checker = protocol.checker().threads(threads).spawn_bfs().join();
    eprintln!("{} states, {} of them different", checker.state_count(), checker.unique_state_count());
    checker.assert_properties();
}

/// The first violated property is one of `expected`.
fn breaks(protocol: Protocol, expected: &[&str]) {
    let checker = protocol.checker().finish_when(HasDiscoveries::Any).spawn_bfs().join();
    let found: Vec<_> = checker.discoveries().into_keys().collect();
    assert!(found.iter().any(|name| expected.contains(name)), "expected one of {expected:?}, found {found:?}");
}

#[test]
fn one_item_survives_any_two_faults() {
    holds(small(1, 2, 0));
}

#[test]
fn one_item_survives_a_persons_request_at_any_moment() {
    holds(small(1, 0, 1));
}

#[test]
fn one_item_survives_a_pause_and_a_fault_at_any_moments() {
    let answers = vec![Answer::Accepts, Answer::RefusesForNow];
    holds(Protocol { only_pauses: true, answers, ..small(1, 1, 1) });
}

#[test]
fn one_item_survives_another_installation_on_the_same_queues() {
    holds(Protocol { second_ledger: true, ..small(1, 1, 0) });
}

#[test]
fn two_items_do_not_affect_each_other() {
    holds(small(2, 0, 0));
}

/// Crashes and purges between two claims of a worker: what it had sent by its next claim stays known.
fn with_receipts() -> Protocol {
    Protocol { answers: vec![Answer::Accepts], stalls: false, ..small(2, 2, 0) }
}

#[test]
fn two_items_with_receipts_survive_any_two_crashes() {
    holds(with_receipts());
}

#[test]
fn without_kept_receipts_a_crash_and_a_purge_leave_more_unknown_than_permits() {
    breaks(Protocol { receipts: false, ..with_receipts() }, &[RECEIPTED]);
}

#[test]
fn without_a_check_before_sending_a_claimed_attempt_of_a_paused_run_is_sent() {
    breaks(Protocol { asks_before_sending: false, ..small(1, 0, 1) }, &[PAUSED]);
}

#[test]
fn without_comparing_the_run_another_installation_changes_the_ledger() {
    breaks(Protocol { second_ledger: true, run_must_match: false, ..small(1, 1, 0) }, &[TRUE]);
}

#[test]
fn without_the_fence_a_recipient_gets_two_mails() {
    breaks(Protocol { fence: false, ..small(1, 1, 0) }, &[ONCE]);
}

#[test]
fn without_the_join_late_results_undo_newer_ones() {
    breaks(Protocol { join: false, ..small(1, 1, 0) }, &[ONCE, TRUE, SETTLED]);
}

#[test]
fn without_the_sweeper_a_purged_queue_stalls_a_run() {
    breaks(Protocol { sweeper: false, ..small(1, 1, 0) }, &[SETTLED]);
}

#[test]
fn without_the_memory_of_outcomes_a_purged_queue_stalls_a_run() {
    breaks(Protocol { memory: false, ..small(1, 1, 0) }, &[SETTLED]);
}

/// A random walk through a larger world: first with faults, then without. Returns the number of steps without faults.
fn walk(seed: u64) -> usize {
    let mut rng = StdRng::seed_from_u64(seed);
    let limits =
        Limits { items: rng.random_range(1..=6), faults: rng.random_range(0..=12), requests: rng.random_range(0..=3) };
    let protocol = Protocol::whole(limits);
    let mut world = protocol.begin();
    let mut steps = Vec::new();
    for _ in 0..rng.random_range(20..400) {
        steps.clear();
        if rng.random_bool(0.1) {
            protocol.faults(&world, &mut steps);
        }
        if steps.is_empty() {
            protocol.steps(&world, &mut steps);
        }
        if steps.is_empty() {
            break;
        }
        protocol.take_step(&mut world, steps.swap_remove(rng.random_range(0..steps.len())));
        holds_at(&protocol, &world, seed);
    }
    for taken in 0..20_000 {
        steps.clear();
        protocol.steps(&world, &mut steps);
        if steps.is_empty() {
            return taken;
        }
        protocol.take_step(&mut world, steps.swap_remove(rng.random_range(0..steps.len())));
        holds_at(&protocol, &world, seed);
    }
    panic!("seed {seed}: does not come to rest: {world:?}");
}

fn holds_at(protocol: &Protocol, world: &World, seed: u64) {
    for property in protocol.properties() {
        assert!((property.condition)(protocol, world), "seed {seed}: violated: {}: {world:?}", property.name);
    }
}

#[test]
fn larger_worlds_come_to_rest_after_any_faults() {
    let longest = (0..20_000).map(walk).max();
    eprintln!("coming to rest took at most {longest:?} steps");
}
