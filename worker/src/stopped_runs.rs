//! Which runs a person has paused or cancelled: looked up several times a second while attempts of them are in hand, so that a
//! pause holds for attempts that are claimed already.

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

/// How often the runs in hand are looked up.
const LOOK_EVERY: Duration = Duration::from_millis(300);
/// What was looked up so long ago says nothing any more.
const GOOD_FOR: Duration = Duration::from_millis(700);

/// What the newest look has found.
#[derive(Clone, Debug)]
struct Look {
    /// When it was begun.
    at: Instant,
    stopped: Arc<HashSet<Uuid>>,
}

/// The runs in hand that are paused or cancelled.
#[derive(Debug)]
pub struct StoppedRuns {
    pool: PgPool,
    answer_timeout: Duration,
    /// How many attempts of each run are in hand.
    in_hand: Mutex<HashMap<Uuid, usize>>,
    newest: watch::Sender<Look>,
}

impl StoppedRuns {
    /// None is in hand yet.
    pub fn new(pool: PgPool, answer_timeout: Duration) -> Arc<Self> {
        let look = Look { at: Instant::now(), stopped: Arc::default() };
        Arc::new(Self { pool, answer_timeout, in_hand: Mutex::default(), newest: watch::Sender::new(look) })
    }

    /// So many attempts of a run are claimed.
    pub fn begin(&self, run_id: Uuid, attempts: usize) {
        *self.in_hand().entry(run_id).or_default() += attempts;
    }

    /// An attempt of a run has come to its end.
    pub fn end(&self, run_id: Uuid) {
        if let Entry::Occupied(mut count) = self.in_hand().entry(run_id) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }

    /// Whether an attempt may go on: its run is neither paused nor cancelled, as far as a claim or a look has told lately. Waits
    /// for the next look if need be, for as long as the heartbeat is fresh.
    pub async fn is_going_on(&self, run_id: Uuid, claimed_at: Instant, heartbeat: &Heartbeat) -> Result<(), Withdrawn> {
        let told = |look: &Look| {
            // A claim is granted only to a run that goes on, so what was seen before it is outdated.
            if look.at >= claimed_at && look.stopped.contains(&run_id) {
                return Some(Err(Withdrawn::Stopped));
            }
            (look.at.max(claimed_at).elapsed() < GOOD_FOR).then_some(Ok(()))
        };
        // Almost always this is enough.
        let at_once = told(&self.newest.borrow());
        if let Some(answer) = at_once {
            return answer;
        }
        let mut newest = self.newest.subscribe();
        loop {
            let by_look = told(&newest.borrow_and_update());
            if let Some(answer) = by_look {
                return answer;
            }
            if !heartbeat.is_fresh() {
                return Err(Withdrawn::CutOff);
            }
            let _ = timeout(LOOK_EVERY, newest.changed()).await;
        }
    }

    /// Looks until `stop`.
    pub async fn watch(self: Arc<Self>, stop: CancellationToken) {
        let mut session = Session::new(&self.pool);
        while stop.run_until_cancelled(sleep(LOOK_EVERY)).await.is_some() {
            let run_ids: Vec<Uuid> = self.in_hand().keys().copied().collect();
            if run_ids.is_empty() {
                continue;
            }
            let at = Instant::now();
            let look = async |conn: &mut sqlx::PgConnection| runs::stopped(conn, &run_ids).await;
            match session.run(self.answer_timeout, look).await {
                Ok(stopped) => {
                    self.newest.send_replace(Look { at, stopped: Arc::new(stopped.into_iter().collect()) });
                }
                // Attempts wait until the next look succeeds or the heartbeat is too old.
                Err(error) => debug!(%error, "the wanted states of runs can't be read"),
            }
        }
    }

    fn in_hand(&self) -> MutexGuard<'_, HashMap<Uuid, usize>> {
        self.in_hand.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
