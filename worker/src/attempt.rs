//! A claimed attempt, and the checks before the bytes that let the remote side accept it.
//!
//! Between the claim and these bytes a job may wait, for example for a connection. In the meantime the run may be paused, the
//! reserved send time may pass, and the heartbeat may fail. A job whose exchange takes several steps checks twice:
//! [`Attempt::may_proceed`] before the first step, and [`Attempt::may_commit`] before the step that has the effect.

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

/// How long an attempt waits for another send time before it is withdrawn.
const LONGEST_WAIT: Duration = Duration::from_secs(2);

/// What all attempts of a process are checked against.
pub(crate) struct Checks {
    pub(crate) heartbeat: Arc<Heartbeat>,
    pub(crate) broker: Arc<Broker>,
    pub(crate) stopped: Arc<StoppedRuns>,
    pub(crate) pace: Arc<Pace>,
}

/// One attempt, from its claim to its outcome. Clones are the same attempt.
#[derive(Clone)]
pub struct Attempt {
    item: ItemMessage,
    position: i32,
    /// `None`: it is never checked.
    claim: Option<Arc<Claim>>,
}

struct Claim {
    run_id: Uuid,
    claimed_at: Instant,
    /// Whether a rate limit applies to the run.
    limited: bool,
    /// The reserved send time that is not used yet.
    slot: Mutex<Option<Instant>>,
    /// Reserved send times that passed unused.
    unused: AtomicI32,
    checks: Arc<Checks>,
}

impl Attempt {
    /// An attempt claimed at `claimed_at`, at the item with this position in its run. `slot`: the send time reserved by the
    /// claim, if a rate limit applies.
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
        Self { item, position, claim: Some(Arc::new(claim)) }
    }

    /// An attempt without checks, for mail that belongs to no run.
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

    /// Call this immediately before the remote side could accept the item, each time it is offered. Waits for the send time,
    /// and checks that the run is neither paused nor cancelled and that the heartbeat is fresh.
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
            let allowed =
                claim.checks.stopped.may_continue(claim.run_id, claim.claimed_at, &claim.checks.heartbeat).await;
            if let Err(withdrawn) = allowed.and_then(|()| claim.may_commit()) {
                claim.unused.fetch_add(i32::from(claim.limited), Ordering::Relaxed);
                return Err(withdrawn);
            }
            match slot {
                // A slot that is used too late would add to the sends that are due by now.
                Some(slot) if slot.elapsed() > claim.checks.pace.burst() => {
                    claim.unused.fetch_add(1, Ordering::Relaxed);
                }
                _ => return Ok(()),
            }
        }
    }

    /// Call this after [`Self::may_proceed`], immediately before the bytes that have the effect. Checks only the heartbeat.
    ///
    /// # Errors
    /// Why these bytes must not be sent.
    pub fn may_commit(&self) -> Result<(), Withdrawn> {
        self.claim.as_ref().map_or(Ok(()), |claim| claim.may_commit())
    }

    /// How many send times were reserved for this attempt and not used.
    pub(crate) fn unused(&self) -> i32 {
        self.claim.as_ref().map_or(0, |claim| {
            let left = claim.slot.lock().unwrap_or_else(PoisonError::into_inner).is_some();
            claim.unused.load(Ordering::Relaxed) + i32::from(left)
        })
    }

    /// Whether a rate limit applies to its run. If so, another try needs another send time.
    pub(crate) fn is_limited(&self) -> bool {
        self.claim.as_ref().is_some_and(|claim| claim.limited)
    }
}

impl Claim {
    fn may_commit(&self) -> Result<(), Withdrawn> {
        let owned = self.checks.heartbeat.is_fresh() && !self.checks.broker.epoch().is_behind();
        if owned { Ok(()) } else { Err(Withdrawn::CutOff) }
    }

    /// The send time reserved by the claim the first time, then a newly reserved one.
    async fn next_slot(&self) -> Result<Instant, Withdrawn> {
        let reserved = self.slot.lock().unwrap_or_else(PoisonError::into_inner).take();
        match reserved {
            Some(slot) => Ok(slot),
            None => self.checks.pace.reserve(self.run_id, LONGEST_WAIT).await.map_err(Withdrawn::NotDue),
        }
    }
}
