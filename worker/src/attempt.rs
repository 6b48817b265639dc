//! A claimed attempt: asked whether it may proceed before the bytes that let the remote side accept it.
//!
//! Between the claim and these bytes a job may wait, for a connection for instance. Meanwhile the run may be paused, the send time
//! that the claim reserved may pass, and the heartbeat may fail. A job whose exchange takes several steps asks twice:
//! [`Attempt::may_proceed`] before the first, and [`Attempt::may_commit`] before the one that has the effect.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicI32, Ordering},
    },
    time::Duration,
};

use mailrun_broker::Broker;
use mailrun_core::{item::Key, message::ItemMessage, outcome::Withdrawn};
use tokio::time::{Instant, sleep_until};
use uuid::Uuid;

use crate::{heartbeat::Heartbeat, pace::Pace, stopped_runs::StoppedRuns};

/// How long an attempt waits for another send time before it is given back.
const LONGEST_WAIT: Duration = Duration::from_secs(2);

/// What the attempts of a process are checked against.
pub(crate) struct Checks {
    pub(crate) heartbeat: Arc<Heartbeat>,
    pub(crate) broker: Arc<Broker>,
    pub(crate) stopped: Arc<StoppedRuns>,
    pub(crate) pace: Arc<Pace>,
}

/// One attempt, from its claim to its outcome.
pub struct Attempt {
    item: ItemMessage,
    position: i32,
    /// None: it is not held back.
    claim: Option<Claim>,
}

struct Claim {
    run_id: Uuid,
    claimed_at: Instant,
    /// Whether a rate limit holds for the run.
    limited: bool,
    /// The send time that is reserved and not used yet.
    slot: Mutex<Option<Instant>>,
    /// Send times that were reserved and went by.
    unused: AtomicI32,
    checks: Arc<Checks>,
}

impl Attempt {
    /// An attempt at an item in its place of a run, claimed at `claimed_at`. `slot`: the send time that the claim has reserved, if
    /// a rate limit holds.
    pub(crate) fn new(
        item: ItemMessage,
        position: i32,
        claimed_at: Instant,
        slot: Option<Instant>,
        checks: &Arc<Checks>,
    ) -> Self {
        let claim = Claim {
            run_id: item.run_id,
            claimed_at,
            limited: slot.is_some(),
            slot: Mutex::new(slot),
            unused: AtomicI32::new(0),
            checks: Arc::clone(checks),
        };
        Self { item, position, claim: Some(claim) }
    }

    /// An attempt that is never held back: for what is sent without a run.
    #[must_use]
    pub fn unchecked() -> Self {
        Self::unchecked_at(1, 1, 0)
    }

    pub(crate) fn unchecked_at(position: i32, tries: i16, replays: i16) -> Self {
        let item = ItemMessage { run_id: Uuid::nil(), item_id: 0, attempt: 1, tries, replays, impersonal: true };
        Self { item, position, claim: None }
    }

    /// The run, the item, and the number of the attempt.
    #[must_use]
    pub fn key(&self) -> Key {
        self.item.key()
    }

    /// The item's place in its run, from 1.
    #[must_use]
    pub fn position(&self) -> i32 {
        self.position
    }

    /// Which try of the present budget it is, from 1.
    #[must_use]
    pub fn tries(&self) -> i16 {
        self.item.tries
    }

    /// How often a person has replayed the item.
    #[must_use]
    pub fn replays(&self) -> i16 {
        self.item.replays
    }

    pub(crate) fn item(&self) -> ItemMessage {
        self.item
    }

    /// To be asked immediately before the remote side may accept the item, each time that it is offered: waits for the send time,
    /// and checks that the run is not paused or cancelled and that the heartbeat is fresh.
    ///
    /// # Errors
    /// Why the attempt must not proceed: [`Outcome::Withdrawn`](mailrun_core::outcome::Outcome::Withdrawn).
    pub async fn may_proceed(&self) -> Result<(), Withdrawn> {
        let Some(claim) = &self.claim else { return Ok(()) };
        loop {
            let slot = if claim.limited { Some(claim.next_slot().await?) } else { None };
            if let Some(slot) = slot {
                sleep_until(slot).await;
            }
            let going_on =
                claim.checks.stopped.is_going_on(claim.run_id, claim.claimed_at, &claim.checks.heartbeat).await;
            if let Err(withdrawn) = going_on.and_then(|()| claim.may_commit()) {
                claim.unused.fetch_add(i32::from(claim.limited), Ordering::Relaxed);
                return Err(withdrawn);
            }
            match slot {
                // Used late, it would come on top of the sends that are due by now.
                Some(slot) if slot.elapsed() > claim.checks.pace.burst() => {
                    claim.unused.fetch_add(1, Ordering::Relaxed);
                }
                _ => return Ok(()),
            }
        }
    }

    /// To be asked again, after [`Self::may_proceed`], immediately before the bytes that have the effect: checks the heartbeat only.
    ///
    /// # Errors
    /// Why these bytes must not be sent.
    pub fn may_commit(&self) -> Result<(), Withdrawn> {
        self.claim.as_ref().map_or(Ok(()), Claim::may_commit)
    }

    /// How many send times were reserved for it and not used.
    pub(crate) fn unused(&self) -> i32 {
        self.claim.as_ref().map_or(0, |claim| {
            let left = claim.slot.lock().unwrap_or_else(PoisonError::into_inner).is_some();
            claim.unused.load(Ordering::Relaxed) + i32::from(left)
        })
    }

    /// Whether a rate limit holds for its run: then a second try takes another send time.
    pub(crate) fn is_limited(&self) -> bool {
        self.claim.as_ref().is_some_and(|claim| claim.limited)
    }
}

impl Claim {
    fn may_commit(&self) -> Result<(), Withdrawn> {
        let owned = self.checks.heartbeat.is_fresh() && !self.checks.broker.epoch().is_behind();
        if owned { Ok(()) } else { Err(Withdrawn::CutOff) }
    }

    /// The send time that the claim has reserved, at first; then another one.
    async fn next_slot(&self) -> Result<Instant, Withdrawn> {
        let reserved = self.slot.lock().unwrap_or_else(PoisonError::into_inner).take();
        match reserved {
            Some(slot) => Ok(slot),
            None => self.checks.pace.reserve(self.run_id, LONGEST_WAIT).await.map_err(Withdrawn::NotDue),
        }
    }
}
