//! The world of the model: the ledger, the queues and the workers, small enough to be compared and hashed.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use crate::{
    item::{ItemState, Standing, merge},
    message::{DeadReason, ItemMessage, ItemResult},
    run::Wanted,
};
use uuid::Uuid;

use crate::claim::{Fate, Found, Owner, Withheld};
use crate::outcome::{
    FollowUp, Next, OnUnknown, Outcome, Refused, Repair, RetryPolicy, Withdrawn, after_death, after_send, refused,
    repair, withheld,
};

/// The number of deliveries that a worker holds at once.
const PREFETCH: usize = 2;
const WORKERS: usize = 2;
/// The relay defers no attempt beyond this number, so that the world stays finite.
const LAST_LATER: i32 = 2;

/// How much can happen in a world.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) items: usize,
    /// Crashes, losses, duplicates, and live workers declared dead.
    pub(super) faults: u8,
    /// Requests by people: a replay, a dead letter moved by hand, a cancel.
    pub(super) requests: u8,
}

/// The protocol, and switches to remove parts of it.
#[derive(Clone, Debug)]
pub(super) struct Protocol {
    pub(super) limits: Limits,
    pub(super) policy: RetryPolicy,
    /// What the relay may do.
    pub(super) answers: Vec<Answer>,
    /// Only one worker may claim an attempt.
    pub(super) fence: bool,
    /// A result is merged instead of overwriting the item.
    pub(super) join: bool,
    /// Missing messages are put back.
    pub(super) sweeper: bool,
    /// Outcomes are reported again until they are seen applied.
    pub(super) memory: bool,
    /// Receipts are kept until the outcomes are seen applied.
    pub(super) receipts: bool,
    /// Live workers may be declared dead.
    pub(super) stalls: bool,
    /// Before a claimed attempt is sent, its run is checked for a pause.
    pub(super) asks_before_sending: bool,
    /// People request only pauses.
    pub(super) only_pauses: bool,
    /// Another installation uses the same queues.
    pub(super) second_ledger: bool,
    /// Both run and item of a message must match the ledger.
    pub(super) run_must_match: bool,
}

/// An item message, without fields that never differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Asked {
    item: usize,
    attempt: i32,
    tries: i16,
    replays: i16,
}

/// A result, likewise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Report {
    asked: Asked,
    state: ItemState,
}

/// A dead letter, and whether its reason is `unknown`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Dead {
    asked: Asked,
    unknown: bool,
}

/// The stage of a delivery in a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Stage {
    /// Claimed: about to check the heartbeat and to connect to the relay.
    Claimed,
    /// The follow-up must be published, then the result. The flag: this worker holds the claim, so it remembers the result.
    FollowingUp(After, Report, bool),
    /// The result must be published. The same flag.
    Reporting(Report, bool),
    /// The delivery must be acked.
    Acknowledging,
}

/// The destination of a follow-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum After {
    Items(Asked),
    DeadLetters(Dead),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Task {
    asked: Asked,
    stage: Stage,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Worker {
    id: i64,
    tasks: Vec<Task>,
    remembered: BTreeSet<Report>,
    /// Its heartbeat fails. It knows this before the others do.
    stale: bool,
}

/// A queue. It has no order, since redelivery and several consumers do not keep one.
type Bag<T> = BTreeMap<T, u8>;

fn put<T: Ord>(bag: &mut Bag<T>, thing: T) {
    *bag.entry(thing).or_default() += 1;
}

fn take<T: Ord + Copy>(bag: &mut Bag<T>, thing: T) {
    if let Some(count) = bag.get_mut(&thing) {
        *count -= 1;
        if *count == 0 {
            bag.remove(&thing);
        }
    }
}

/// The state of the world.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct World {
    /// `run_items`: the standing of each item, with the message that it follows from.
    items: Vec<Report>,
    /// `run_progress`
    counters: [i8; ItemState::ALL.len()],
    /// `attempts`
    claims: BTreeMap<(usize, i32), i64>,
    /// `receipts`, with the worker's id.
    receipts: BTreeSet<(i64, usize, i32)>,
    /// Attempts that have had a receipt, and so hold no permit from then on.
    receipted: BTreeSet<(usize, i32)>,
    /// `run_passes`: the number of released items.
    released: usize,
    /// `runs.wanted`
    cancelled: bool,
    paused: bool,
    /// Whether a mail was handed over while the run was paused.
    sent_while_paused: bool,
    /// `mailrun.items` and `mailrun.retry.*`: a message on a retry queue returns some time, as does one on an item queue.
    waiting: Bag<Asked>,
    /// `mailrun.results`
    results: Bag<Report>,
    /// `mailrun.dead`, while a person may still move a message.
    dead_letters: Bag<Dead>,
    workers: Vec<Worker>,
    /// The ids of workers that others have declared dead.
    thought_dead: BTreeSet<i64>,
    /// The ids of workers whose death was not noticed yet.
    missed: BTreeSet<i64>,
    next_id: i64,
    /// How often each mail was handed over.
    sends: Vec<u8>,
    /// How often a person decided to send a mail again although it may have been sent.
    excused: Vec<u8>,
    faults: u8,
    requests: u8,
}

/// One step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Step {
    /// Fan-out releases the next item.
    Release,
    /// Fan-out settles an item of a cancelled run that has not been claimed.
    Withhold(usize),
    /// A worker takes a delivery and claims its attempt.
    Take(usize, Asked),
    /// A worker continues with a delivery.
    Work(usize, Task),
    /// A worker hands a mail over, with this answer as far as it sees it. The flag says whether the mail was accepted.
    Send(usize, Task, Answer),
    /// A result is applied.
    Apply(Report),
    /// A worker reports an outcome again.
    Repeat(usize, Report),
    /// The sweeper repairs an item.
    Sweep(usize),
    /// Others declare a worker dead, rightly or not.
    Notice(i64),
    /// A worker's heartbeat works again.
    Recover(usize),
    /// A person eventually resumes a paused run.
    Resume,

    /// A worker is killed and replaced.
    Crash(usize),
    /// A worker's heartbeat starts to fail.
    Stall(usize),
    /// A step of fan-out is repeated after a crash, so items are released twice.
    ReleaseAgain,
    /// A progress worker dies after its commit, so the result is delivered again.
    ApplyAndCrash(Report),
    /// A message is duplicated.
    DoubleItem(Asked),
    /// A result is duplicated.
    DoubleResult(Report),
    /// A queue is emptied, by a person or a broken disk.
    Purge(Queue),
    /// A worker of another installation takes a message from the shared queue.
    TakenByAnother(Asked),
    /// Another installation reports that it has sent its own item with this number.
    ReportedByAnother(usize),

    /// A person replays failed and unknown items.
    Replay,
    /// A person moves a dead letter back by hand.
    Move(Dead),
    /// A person cancels the run.
    Cancel,
    /// A person pauses the run.
    Pause,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Queue {
    Items,
    Results,
    DeadLetters,
}

/// What the relay does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Answer {
    Accepts,
    RefusesForNow,
    IsAway,
    RefusesForGood,
    /// It drops the connection before it replies. The flag: it has accepted the mail.
    Drops(bool),
}

impl Answer {
    const ALL: [Self; 6] =
        [Self::Accepts, Self::RefusesForNow, Self::IsAway, Self::RefusesForGood, Self::Drops(true), Self::Drops(false)];
}

fn message(asked: Asked) -> ItemMessage {
    ItemMessage {
        run_id: Uuid::nil(),
        item_id: i64::try_from(asked.item).unwrap(),
        attempt: asked.attempt,
        tries: asked.tries,
        replays: asked.replays,
        impersonal: false,
    }
}

fn asked(message: ItemMessage) -> Asked {
    Asked {
        item: usize::try_from(message.item_id).unwrap(),
        attempt: message.attempt,
        tries: message.tries,
        replays: message.replays,
    }
}

fn report(result: &ItemResult) -> Report {
    let asked = Asked {
        item: usize::try_from(result.item_id).unwrap(),
        attempt: result.attempt,
        tries: result.tries,
        replays: result.replays,
    };
    Report { asked, state: result.state }
}

impl Report {
    fn standing(self) -> Standing {
        Standing { attempt: self.asked.attempt, state: self.state }
    }
}

impl World {
    pub(super) fn counters_equal_counts(&self) -> bool {
        ItemState::ALL.iter().all(|state| {
            let count = self.items.iter().filter(|item| item.state == *state).count();
            usize::try_from(self.counters[*state as usize]) == Ok(count)
        })
    }

    pub(super) fn no_one_got_two_unexcused(&self) -> bool {
        self.sends.iter().zip(&self.excused).all(|(sends, excused)| *sends <= 1 + excused)
    }

    pub(super) fn the_ledger_is_right(&self) -> bool {
        self.items.iter().enumerate().all(|(item, known)| match known.state {
            ItemState::Sent => self.sends[item] > 0,
            ItemState::Failed | ItemState::Cancelled | ItemState::Skipped => {
                // After a dead letter was moved by hand, a later attempt may have been made without a result in the ledger yet.
                let tried_since = self.claims.keys().any(|key| key.0 == item && key.1 > known.asked.attempt);
                self.sends[item] == 0 || self.excused[item] > 0 || tried_since
            }
            _ => true,
        })
    }

    pub(super) fn nothing_is_sent_while_paused(&self) -> bool {
        !self.sent_while_paused
    }

    pub(super) fn receipts_hold(&self) -> bool {
        self.receipted.iter().all(|(item, attempt)| {
            let known = self.items[*item];
            known.asked.attempt != *attempt || known.state != ItemState::Unknown
        })
    }

    pub(super) fn is_settled(&self) -> bool {
        self.items.iter().all(|item| !item.state.is_open())
    }

    /// The attempt that an open item waits for.
    fn awaited(&self, item: usize) -> Asked {
        asked(message(self.items[item].asked).awaited(self.items[item].state))
    }

    fn owner(&self, asked: Asked) -> Option<Owner> {
        self.claims.get(&(asked.item, asked.attempt)).map(|id| match id {
            0 => Owner::Nobody(Withheld::Cancelled),
            id if !self.thought_dead.contains(id) => Owner::Worker { id: *id, fate: Fate::Alive },
            id if self.receipts.contains(&(*id, asked.item, asked.attempt)) => {
                Owner::Worker { id: *id, fate: Fate::Accepted }
            }
            id => Owner::Worker { id: *id, fate: Fate::Dead },
        })
    }

    /// Whether a message for this attempt, or its result, is on a queue or in a worker.
    fn is_in_flight(&self, asked: Asked) -> bool {
        let same = |other: &Asked| (other.item, other.attempt) == (asked.item, asked.attempt);
        self.waiting.keys().any(same)
            || self.results.keys().any(|report| same(&report.asked))
            || self.workers.iter().any(|worker| worker.tasks.iter().any(|task| same(&task.asked)))
    }

    /// The receipts that a claim of this worker commits: for what it has sent and not seen applied.
    fn receipt(&mut self, place: usize) {
        let worker = &self.workers[place];
        let sent = worker.tasks.iter().filter_map(|task| match task.stage {
            Stage::Reporting(report, true) if report.state == ItemState::Sent => Some(report.asked),
            _ => None,
        });
        for asked in sent {
            self.receipts.insert((worker.id, asked.item, asked.attempt));
            self.receipted.insert((asked.item, asked.attempt));
        }
    }

    fn follow_up(&mut self, after: After) {
        match after {
            After::Items(asked) => put(&mut self.waiting, asked),
            After::DeadLetters(dead) if self.requests > 0 => put(&mut self.dead_letters, dead),
            After::DeadLetters(_) => {}
        }
    }
}

impl Protocol {
    /// The complete protocol.
    pub(super) fn whole(limits: Limits) -> Self {
        let policy = RetryPolicy::new(vec![Duration::from_secs(1)], OnUnknown::Hold);
        Self {
            limits,
            policy,
            answers: Answer::ALL.to_vec(),
            fence: true,
            join: true,
            sweeper: true,
            memory: true,
            receipts: true,
            stalls: true,
            asks_before_sending: true,
            only_pauses: false,
            second_ledger: false,
            run_must_match: true,
        }
    }

    pub(super) fn begin(&self) -> World {
        let new = |item| Report { asked: Asked { item, attempt: 1, tries: 1, replays: 0 }, state: ItemState::Pending };
        let mut counters = [0; ItemState::ALL.len()];
        counters[ItemState::Pending as usize] = i8::try_from(self.limits.items).unwrap();
        let worker = |id| Worker { id, tasks: Vec::new(), remembered: BTreeSet::new(), stale: false };
        World {
            items: (0..self.limits.items).map(new).collect(),
            counters,
            claims: BTreeMap::new(),
            receipts: BTreeSet::new(),
            receipted: BTreeSet::new(),
            released: 0,
            cancelled: false,
            paused: false,
            sent_while_paused: false,
            waiting: Bag::new(),
            results: Bag::new(),
            dead_letters: Bag::new(),
            workers: (1..=WORKERS as i64).map(worker).collect(),
            thought_dead: BTreeSet::new(),
            missed: BTreeSet::new(),
            next_id: WORKERS as i64 + 1,
            sends: vec![0; self.limits.items],
            excused: vec![0; self.limits.items],
            faults: self.limits.faults,
            requests: self.limits.requests,
        }
    }

    /// Steps that need neither a fault nor a person.
    pub(super) fn steps(&self, world: &World, steps: &mut Vec<Step>) {
        if world.released < world.items.len() && !world.cancelled && !world.paused {
            steps.push(Step::Release);
        }
        if world.paused {
            steps.push(Step::Resume);
        }
        for (place, worker) in world.workers.iter().enumerate() {
            if worker.tasks.len() < PREFETCH {
                // Taking a delivery and putting it back unchanged is not a step.
                let takes = world.waiting.keys().map(|asked| Step::Take(place, *asked));
                steps.extend(takes.filter(|take| {
                    let mut next = world.clone();
                    self.take_step(&mut next, *take);
                    next != *world
                }));
            }
            for task in &worker.tasks {
                match task.stage {
                    Stage::Claimed if !(worker.stale || world.paused && self.asks_before_sending) => {
                        let is_late = task.asked.attempt > LAST_LATER;
                        let answers = self.answers.iter().filter(|answer| !(is_late && **answer == Answer::IsAway));
                        steps.extend(answers.map(|answer| Step::Send(place, *task, *answer)));
                    }
                    _ => steps.push(Step::Work(place, *task)),
                }
            }
            if self.memory {
                let missing = worker.remembered.iter().filter(|report| !world.results.contains_key(report));
                steps.extend(missing.map(|report| Step::Repeat(place, *report)));
            }
            if worker.stale {
                steps.push(Step::Recover(place));
            }
        }
        steps.extend(world.results.keys().map(|report| Step::Apply(*report)));
        steps.extend(world.missed.iter().map(|id| Step::Notice(*id)));
        for item in 0..world.items.len() {
            if !world.items[item].state.is_open() {
                continue;
            }
            let awaited = world.awaited(item);
            if world.cancelled && world.owner(awaited).is_none() {
                steps.push(Step::Withhold(item));
            }
            if self.sweeper && item < world.released && !world.is_in_flight(awaited) {
                let lives = matches!(world.owner(awaited), Some(Owner::Worker { fate: Fate::Alive, .. }));
                // Messages that senders dropped during a pause are put back when the run resumes.
                let dropped = world.paused && world.owner(awaited).is_none();
                if !lives && !dropped {
                    steps.push(Step::Sweep(item));
                }
            }
        }
    }

    /// Faults and requests by people.
    pub(super) fn faults(&self, world: &World, steps: &mut Vec<Step>) {
        if world.faults > 0 {
            for (place, worker) in world.workers.iter().enumerate() {
                steps.push(Step::Crash(place));
                if self.stalls && !worker.stale {
                    steps.push(Step::Stall(place));
                }
            }
            if world.released > 0 {
                steps.push(Step::ReleaseAgain);
            }
            steps.extend(
                world.results.keys().flat_map(|report| [Step::ApplyAndCrash(*report), Step::DoubleResult(*report)]),
            );
            steps.extend(world.waiting.keys().map(|asked| Step::DoubleItem(*asked)));
            if self.second_ledger {
                steps.extend(world.waiting.keys().map(|asked| Step::TakenByAnother(*asked)));
                steps.extend((0..world.items.len()).map(Step::ReportedByAnother));
            }
            for (queue, is_empty) in [
                (Queue::Items, world.waiting.is_empty()),
                (Queue::Results, world.results.is_empty()),
                (Queue::DeadLetters, world.dead_letters.is_empty()),
            ] {
                if !is_empty {
                    steps.push(Step::Purge(queue));
                }
            }
        }
        if world.requests > 0 && !world.cancelled && !world.is_settled() && !world.paused {
            steps.push(Step::Pause);
        }
        if world.requests > 0 && !self.only_pauses {
            if world.items.iter().any(|item| matches!(item.state, ItemState::Failed | ItemState::Unknown)) {
                steps.push(Step::Replay);
            }
            steps.extend(world.dead_letters.keys().map(|dead| Step::Move(*dead)));
            if !world.cancelled && !world.is_settled() {
                steps.push(Step::Cancel);
            }
        }
    }

    pub(super) fn take_step(&self, world: &mut World, step: Step) {
        match step {
            Step::Release => {
                put(&mut world.waiting, world.items[world.released].asked);
                world.released += 1;
            }
            Step::Withhold(item) => {
                let awaited = world.awaited(item);
                world.claims.insert((awaited.item, awaited.attempt), 0);
                put(&mut world.results, report(&withheld(message(awaited), Withheld::Cancelled, &[])));
            }
            Step::Take(place, asked) => {
                take(&mut world.waiting, asked);
                if let Some(stage) = self.claim(world, place, asked) {
                    let tasks = &mut world.workers[place].tasks;
                    tasks.push(Task { asked, stage });
                    tasks.sort_unstable();
                }
            }
            Step::Work(place, task) => self.work(world, place, task),
            Step::Send(place, task, answer) => self.send(world, place, task, answer),
            Step::Apply(report) => {
                self.apply(world, report);
                take(&mut world.results, report);
            }
            Step::Repeat(place, report) => {
                debug_assert!(world.workers[place].remembered.contains(&report));
                put(&mut world.results, report);
            }
            Step::Sweep(item) => self.sweep(world, item),
            Step::Notice(id) => {
                world.missed.remove(&id);
                world.thought_dead.insert(id);
            }
            Step::Recover(place) => {
                let worker = &mut world.workers[place];
                worker.stale = false;
                world.thought_dead.remove(&worker.id);
                world.missed.remove(&worker.id);
            }
            Step::Crash(place) => {
                world.faults -= 1;
                let id = world.next_id;
                world.next_id += 1;
                let heir = Worker { id, tasks: Vec::new(), remembered: BTreeSet::new(), stale: false };
                let gone = std::mem::replace(&mut world.workers[place], heir);
                for task in gone.tasks {
                    put(&mut world.waiting, task.asked);
                }
                if !world.thought_dead.contains(&gone.id) {
                    world.missed.insert(gone.id);
                }
            }
            Step::Stall(place) => {
                world.faults -= 1;
                world.workers[place].stale = true;
                world.missed.insert(world.workers[place].id);
            }
            Step::ReleaseAgain => {
                world.faults -= 1;
                let first = Asked { item: world.released - 1, attempt: 1, tries: 1, replays: 0 };
                put(&mut world.waiting, first);
            }
            Step::ApplyAndCrash(report) => {
                world.faults -= 1;
                self.apply(world, report);
            }
            Step::DoubleItem(asked) => {
                world.faults -= 1;
                put(&mut world.waiting, asked);
            }
            Step::DoubleResult(report) => {
                world.faults -= 1;
                put(&mut world.results, report);
            }
            Step::Purge(queue) => {
                world.faults -= 1;
                match queue {
                    Queue::Items => world.waiting.clear(),
                    Queue::Results => world.results.clear(),
                    Queue::DeadLetters => world.dead_letters.clear(),
                }
            }
            Step::Replay => {
                world.requests -= 1;
                for item in 0..world.items.len() {
                    let known = world.items[item];
                    if !matches!(known.state, ItemState::Failed | ItemState::Unknown) {
                        continue;
                    }
                    world.excused[item] += u8::from(known.state == ItemState::Unknown);
                    let again = message(known.asked).replayed();
                    put(&mut world.results, report(&again.result(ItemState::Pending, None)));
                    put(&mut world.waiting, asked(again));
                }
                world.dead_letters.clear();
            }
            Step::Move(dead) => {
                world.requests -= 1;
                world.excused[dead.asked.item] += u8::from(dead.unknown);
                take(&mut world.dead_letters, dead);
                put(&mut world.waiting, dead.asked);
            }
            Step::Cancel => {
                world.requests -= 1;
                world.cancelled = true;
                world.paused = false;
                world.released = world.items.len();
            }
            Step::Pause => {
                world.requests -= 1;
                world.paused = true;
            }
            Step::Resume => {
                world.paused = false;
                // `passes::dropped_items` of the ledger
                for item in 0..world.items.len() {
                    let (known, awaited) = (world.items[item], world.awaited(item));
                    let is_released = item < world.released || known.asked.attempt > 1;
                    if known.state.is_open() && is_released && world.owner(awaited).is_none() {
                        put(&mut world.waiting, awaited);
                    }
                }
            }
            Step::TakenByAnother(asked) => {
                world.faults -= 1;
                take(&mut world.waiting, asked);
                if !self.run_must_match {
                    let sent = Report { asked, state: ItemState::Sent };
                    put(&mut world.results, sent);
                }
            }
            Step::ReportedByAnother(item) => {
                world.faults -= 1;
                if !self.run_must_match {
                    let asked = Asked { item, attempt: 1, tries: 1, replays: 0 };
                    put(&mut world.results, Report { asked, state: ItemState::Sent });
                }
            }
        }
    }

    /// `send::Senders::begin`. None: the delivery is acked.
    fn claim(&self, world: &mut World, place: usize, asked: Asked) -> Option<Stage> {
        if world.workers[place].stale {
            put(&mut world.waiting, asked);
            return None;
        }
        let key = (asked.item, asked.attempt);
        let standing = world.items[asked.item].standing();
        let is_free = !self.fence || !world.claims.contains_key(&key);
        if !(standing.allows(asked.attempt) && is_free) || world.paused {
            return self.refused(world, place, asked, standing);
        }
        if world.cancelled {
            world.claims.insert(key, 0);
            return Some(Stage::Reporting(report(&withheld(message(asked), Withheld::Cancelled, &[])), true));
        }
        world.claims.insert(key, world.workers[place].id);
        world.receipt(place);
        Some(Stage::Claimed)
    }

    /// `send::Senders::report`, and `attempt` for a worker that is cut off.
    fn work(&self, world: &mut World, place: usize, task: Task) {
        let stage = match task.stage {
            Stage::Claimed => {
                let why = if world.workers[place].stale { Withdrawn::CutOff } else { Withdrawn::Stopped };
                let outcome = Outcome::Withdrawn(why);
                Some(ended(&after_send(message(task.asked), outcome, Duration::ZERO, &self.policy), true))
            }
            Stage::FollowingUp(after, report, mine) => {
                world.follow_up(after);
                Some(Stage::Reporting(report, mine))
            }
            Stage::Reporting(report, mine) => {
                put(&mut world.results, report);
                let worker = &mut world.workers[place];
                if mine {
                    worker.remembered.insert(report);
                }
                if !self.receipts {
                    world.receipts.remove(&(worker.id, report.asked.item, report.asked.attempt));
                }
                Some(Stage::Acknowledging)
            }
            Stage::Acknowledging => None,
        };
        move_on(&mut world.workers[place], task, stage);
    }

    /// `send::Senders::settle_refused`. None: the delivery is acked.
    fn refused(&self, world: &mut World, place: usize, asked: Asked, standing: Standing) -> Option<Stage> {
        let wanted = if world.paused { Wanted::Paused } else { Wanted::Running };
        let found = Found {
            key: message(asked).key(),
            standing: Some(standing),
            wanted: Some(wanted),
            owner: world.owner(asked),
        };
        match refused(Some(&found), world.workers[place].id) {
            Refused::NoSuchItem | Refused::Outdated | Refused::Paused { reopen: false } => None,
            Refused::Paused { reopen: true } => {
                Some(Stage::Reporting(report(&message(asked).result(ItemState::Pending, None)), false))
            }
            Refused::Withheld(why) => Some(Stage::Reporting(report(&withheld(message(asked), why, &[])), false)),
            Refused::Accepted => Some(Stage::Reporting(report(&message(asked).result(ItemState::Sent, None)), false)),
            Refused::Orphaned => Some(ended(&after_death(message(asked), &self.policy), false)),
            // The model has no states of later versions.
            Refused::InOtherHands | Refused::Later => {
                put(&mut world.waiting, asked);
                None
            }
            Refused::Mine => {
                let same = |other: &Asked| (other.item, other.attempt) == (asked.item, asked.attempt);
                let worker = &world.workers[place];
                // In progress here: that attempt takes over the delivery.
                if worker.tasks.iter().any(|task| same(&task.asked)) {
                    return None;
                }
                match worker.remembered.iter().find(|report| same(&report.asked)) {
                    Some(report) => Some(Stage::Reporting(*report, false)),
                    None => {
                        put(&mut world.waiting, asked);
                        None
                    }
                }
            }
        }
    }

    /// `send::Senders::attempt`
    fn send(&self, world: &mut World, place: usize, task: Task, answer: Answer) {
        let (went_out, outcome) = match answer {
            Answer::Accepts => (true, Outcome::Sent),
            Answer::RefusesForNow => (false, Outcome::Retry(String::new())),
            Answer::IsAway => (false, Outcome::Later(String::new())),
            Answer::RefusesForGood => (false, Outcome::failed("")),
            Answer::Drops(went_out) => (went_out, Outcome::Unknown(String::new())),
        };
        world.sends[task.asked.item] += u8::from(went_out);
        world.sent_while_paused |= world.paused;
        let next = after_send(message(task.asked), outcome, Duration::ZERO, &self.policy);
        move_on(&mut world.workers[place], task, Some(ended(&next, true)));
    }

    /// `progress::apply` of the ledger
    fn apply(&self, world: &mut World, incoming: Report) {
        let known = world.items[incoming.asked.item];
        let (next, delta) = merge(known.standing(), incoming.standing());
        if self.join {
            for state in ItemState::ALL {
                world.counters[state as usize] += i8::try_from(delta.of(state)).unwrap();
            }
            if next != known.standing() {
                world.items[incoming.asked.item] = incoming;
            }
        } else {
            world.counters[known.state as usize] -= 1;
            world.counters[incoming.state as usize] += 1;
            world.items[incoming.asked.item] = incoming;
        }
        // A worker forgets what it sees applied. In reality it checks later, but until then the outcome has no effect.
        let items = &world.items;
        let is_applied = |known: &Report| items[known.asked.item].standing().covers(known.standing());
        for worker in &mut world.workers {
            for known in worker.remembered.iter().filter(|known| is_applied(known)) {
                world.receipts.remove(&(worker.id, known.asked.item, known.asked.attempt));
            }
            worker.remembered.retain(|known| !is_applied(known));
        }
    }

    /// `sweep::Sweeper::repair_items`
    fn sweep(&self, world: &mut World, item: usize) {
        let awaited = world.awaited(item);
        match repair(world.owner(awaited)) {
            Repair::PutBack => put(&mut world.waiting, awaited),
            Repair::Leave => {}
            Repair::Withhold(why) => put(&mut world.results, report(&withheld(message(awaited), why, &[]))),
            Repair::Confirm => {
                put(&mut world.results, report(&message(awaited).result(ItemState::Sent, None)));
            }
            Repair::Bury => {
                let next = after_death(message(awaited), &self.policy);
                if let Some(follow_up) = &next.follow_up {
                    world.follow_up(after(follow_up));
                }
                put(&mut world.results, report(&next.result));
            }
        }
    }
}

fn move_on(worker: &mut Worker, task: Task, stage: Option<Stage>) {
    if let Some(place) = worker.tasks.iter().position(|other| *other == task) {
        match stage {
            Some(stage) => worker.tasks[place].stage = stage,
            None => drop(worker.tasks.remove(place)),
        }
        worker.tasks.sort_unstable();
    }
}

/// The first stage after an attempt. Only the holder of the claim remembers the result.
fn ended(next: &Next, mine: bool) -> Stage {
    let report = report(&next.result);
    match &next.follow_up {
        Some(follow_up) => Stage::FollowingUp(after(follow_up), report, mine),
        None => Stage::Reporting(report, mine),
    }
}

fn after(follow_up: &FollowUp) -> After {
    match follow_up {
        FollowUp::Now(item) | FollowUp::Wait(item, _) => After::Items(asked(*item)),
        FollowUp::Dead(item, reason, _) => {
            After::DeadLetters(Dead { asked: asked(*item), unknown: *reason == DeadReason::Unknown })
        }
    }
}
