//! Where an attempt ends: what it held is given back, and its result goes to the report.

use std::sync::Arc;

use mailrun_core::{
    item::{ItemState, Key},
    outcome::Next,
};
use tokio::sync::mpsc;

use crate::{attempt::Attempt, pace::Pace, permits::Permits, stopped_runs::StoppedRuns};

/// An attempt that has ended.
pub(crate) struct Finished {
    pub(crate) key: Key,
    pub(crate) next: Next,
}

/// Takes the attempts that have ended.
#[derive(Clone)]
pub(crate) struct Reporter {
    pub(crate) stopped: Arc<StoppedRuns>,
    pub(crate) pace: Arc<Pace>,
    pub(crate) permits: Arc<Permits>,
    pub(crate) finished: mpsc::Sender<Finished>,
}

impl Reporter {
    /// Reports an attempt with what follows from it.
    pub(crate) async fn finish(&self, attempt: &Attempt, next: Next) {
        let key = attempt.key();
        self.stopped.end(key.run_id);
        self.pace.add_unused(key.run_id, attempt.unused());
        if next.result.state == ItemState::Sent {
            self.permits.accepted(key);
        }
        // The report outlives every sender of this channel.
        let _ = self.finished.send(Finished { key, next }).await;
    }
}
