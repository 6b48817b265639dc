//! A claimed attempt: asked whether it may go on before the bytes that let the far side accept it.
//!
//! Between the claim and these bytes a mailer may wait, for a connection for instance. Meanwhile the run may be paused, the send
//! time that the claim reserved may pass, and the heartbeat may fail. So a mailer asks twice: [`Attempt::may_begin`] before it
//! offers the mail, and [`Attempt::may_commit`] before it hands over the message itself.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicI32, Ordering},
    },
    time::Duration,
};

use mailrun_broker::Broker;
use mailrun_core::outcome::Withdrawn;
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
pub struct Attempt(Option<Claim>);

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
    /// An attempt of a run that was claimed at `claimed_at`. `slot`: the send time that the claim has reserved, if a rate limit
    /// holds.
    pub(crate) fn new(run_id: Uuid, claimed_at: Instant, slot: Option<Instant>, checks: &Arc<Checks>) -> Self {
        Self(Some(Claim {
            run_id,
            claimed_at,
            limited: slot.is_some(),
            slot: Mutex::new(slot),
            unused: AtomicI32::new(0),
            checks: Arc::clone(checks),
        }))
    }

    /// An attempt that nothing holds back: a mail that belongs to no run.
    #[must_use]
    pub fn unchecked() -> Self {
        Self(None)
    }

    /// To be asked immediately before the mail is offered, each time that it is: waits for the send time.
    ///
    /// # Errors
    /// Why the mail must not be offered now.
    pub async fn may_begin(&self) -> Result<(), Withdrawn> {
        let Some(claim) = &self.0 else { return Ok(()) };
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

    /// To be asked immediately before the bytes after which the far side may accept.
    ///
    /// # Errors
    /// Why these bytes must not be sent.
    pub fn may_commit(&self) -> Result<(), Withdrawn> {
        self.0.as_ref().map_or(Ok(()), Claim::may_commit)
    }

    /// The run that it belongs to, if any.
    pub(crate) fn run_id(&self) -> Option<Uuid> {
        self.0.as_ref().map(|claim| claim.run_id)
    }

    /// How many send times were reserved for it and not used.
    pub(crate) fn unused(&self) -> i32 {
        self.0.as_ref().map_or(0, |claim| {
            let left = claim.slot.lock().unwrap_or_else(PoisonError::into_inner).is_some();
            claim.unused.load(Ordering::Relaxed) + i32::from(left)
        })
    }

    /// Whether a rate limit holds for its run: then a second try takes another send time.
    pub(crate) fn is_limited(&self) -> bool {
        self.0.as_ref().is_some_and(|claim| claim.limited)
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
