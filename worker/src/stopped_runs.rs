//! Knows which runs are paused or cancelled. Polls the ledger several times a second while attempts are in progress, so that a
//! pause also stops attempts that are already claimed.

use std::{
    collections::{HashMap, HashSet, hash_map::Entry},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use mailrun_ledger::{Session, runs};
use sqlx::PgPool;
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::debug;
use uuid::Uuid;

use crate::heartbeat::Heartbeat;
use mailrun_core::outcome::Withdrawn;

/// How often the wanted states are read.
const POLL_EVERY: Duration = Duration::from_millis(300);
/// An older snapshot is not trusted.
const GOOD_FOR: Duration = Duration::from_millis(700);

/// The wanted states at one moment.
#[derive(Clone, Debug)]
struct Snapshot {
    /// When the query was begun.
    at: Instant,
    stopped: Arc<HashSet<Uuid>>,
}

/// The paused or cancelled runs among those with attempts in progress.
#[derive(Debug)]
pub struct StoppedRuns {
    pool: PgPool,
    answer_timeout: Duration,
    /// By run: the number of attempts in progress.
    in_progress: Mutex<HashMap<Uuid, usize>>,
    newest: watch::Sender<Snapshot>,
}

impl StoppedRuns {
    pub fn new(pool: PgPool, answer_timeout: Duration) -> Arc<Self> {
        let snapshot = Snapshot { at: Instant::now(), stopped: Arc::default() };
        Arc::new(Self { pool, answer_timeout, in_progress: Mutex::default(), newest: watch::Sender::new(snapshot) })
    }

    /// Attempts of a run were claimed.
    pub fn begin(&self, run_id: Uuid, attempts: usize) {
        *self.in_progress().entry(run_id).or_default() += attempts;
    }

    /// An attempt of a run ended.
    pub fn end(&self, run_id: Uuid) {
        if let Entry::Occupied(mut count) = self.in_progress().entry(run_id) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }

    /// Whether an attempt may go on: its run is neither paused nor cancelled, according to a recent claim or snapshot. If need
    /// be, waits for the next snapshot, as long as the heartbeat is fresh.
    pub async fn may_continue(
        &self,
        run_id: Uuid,
        claimed_at: Instant,
        heartbeat: &Heartbeat,
    ) -> Result<(), Withdrawn> {
        let judge = |snapshot: &Snapshot| {
            // A claim is granted only to a running run, so an older snapshot is outdated.
            if snapshot.at >= claimed_at && snapshot.stopped.contains(&run_id) {
                return Some(Err(Withdrawn::Stopped));
            }
            (snapshot.at.max(claimed_at).elapsed() < GOOD_FOR).then_some(Ok(()))
        };
        // The usual case: no waiting.
        let immediate = judge(&self.newest.borrow());
        if let Some(answer) = immediate {
            return answer;
        }
        let mut newest = self.newest.subscribe();
        loop {
            let judged = judge(&newest.borrow_and_update());
            if let Some(answer) = judged {
                return answer;
            }
            if !heartbeat.is_fresh() {
                return Err(Withdrawn::CutOff);
            }
            let _ = timeout(POLL_EVERY, newest.changed()).await;
        }
    }

    /// Takes snapshots until `stop`.
    pub async fn watch(self: Arc<Self>, stop: CancellationToken) {
        let mut session = Session::new(&self.pool);
        while stop.run_until_cancelled(sleep(POLL_EVERY)).await.is_some() {
            let run_ids: Vec<Uuid> = self.in_progress().keys().copied().collect();
            if run_ids.is_empty() {
                continue;
            }
            let at = Instant::now();
            let read = async |conn: &mut sqlx::PgConnection| runs::stopped(conn, &run_ids).await;
            match session.run(self.answer_timeout, read).await {
                Ok(stopped) => {
                    self.newest.send_replace(Snapshot { at, stopped: Arc::new(stopped.into_iter().collect()) });
                }
                // Attempts wait until a snapshot succeeds or the heartbeat is too old.
                Err(error) => debug!(%error, "can't read the wanted states of runs"),
            }
        }
    }

    fn in_progress(&self) -> MutexGuard<'_, HashMap<Uuid, usize>> {
        self.in_progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
