//! The end of an attempt: releases what it held and passes its result to the report.

use std::sync::Arc;

use mailrun_core::{
    item::{ItemState, Key},
    outcome::Next,
};
use tokio::sync::mpsc;

use crate::{attempt::Attempt, pace::Pace, permits::Permits, stopped_runs::StoppedRuns};

/// A finished attempt and what follows.
pub(crate) struct Finished {
    pub(crate) key: Key,
    pub(crate) next: Next,
}

/// Accepts finished attempts.
#[derive(Clone)]
pub(crate) struct Reporter {
    pub(crate) stopped: Arc<StoppedRuns>,
    pub(crate) pace: Arc<Pace>,
    pub(crate) permits: Arc<Permits>,
    pub(crate) finished: mpsc::Sender<Finished>,
}

impl Reporter {
    /// Reports a finished attempt.
    pub(crate) async fn finish(&self, attempt: &Attempt, next: Next) {
        let key = attempt.key();
        self.stopped.end(key.run_id);
        self.pace.add_unused(key.run_id, attempt.unused());
        if next.result.state == ItemState::Sent {
            self.permits.accepted(key);
        }
        // The report task outlives all senders of this channel, so this cannot fail.
        let _ = self.finished.send(Finished { key, next }).await;
    }
}
