//! This worker's heartbeat, its self-fencing when the heartbeat fails, and its watch over other workers' heartbeats.

use std::{
    fmt,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use mailrun_app::config::HeartbeatConfig;
use mailrun_broker::Broker;
use mailrun_core::{agreement::Agreement, health::Health, metric};
use mailrun_ledger::workers::{self, Disagreeing, Registration};
use metrics::gauge;
use rustix::time::{ClockId, clock_gettime};
use sqlx::PgPool;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::{gate::Gate, permits::Permits};
use mailrun_core::observer::Observer;

/// What `/livez` reports for a fenced worker.
const FENCED: &str = "others have declared this worker dead, or its row in the table workers is gone";

/// Exports the sender's gauges.
fn measure(gate: &GetGate, permits: &Permits) -> Gate {
    gauge!(metric::PERMITS).set(permits.all() as f64);
    gauge!(metric::PERMITS_IN_USE).set(permits.in_use() as f64);
    let gate = gate();
    let present = match gate {
        Gate::Open => "open",
        Gate::Trying => "trying",
        Gate::Closed { .. } => "closed",
    };
    for state in ["open", "trying", "closed"] {
        gauge!(metric::RELAY_STATE, "state" => state).set(if state == present { 1 } else { 0 });
    }
    gate
}

/// Returns the gate to report.
pub type GetGate = Box<dyn Fn() -> Gate + Send + Sync>;

/// A clock that includes suspend, as the other workers' clocks do. [`std::time::Instant`] does not advance during suspend.
fn since_boot() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    Duration::new(now.tv_sec.try_into().unwrap_or_default(), now.tv_nsec.try_into().unwrap_or_default())
}

/// A worker process's registration.
pub struct Heartbeat {
    pool: PgPool,
    worker_id: i64,
    interval: Duration,
    dead_after: Duration,
    /// When the newest successful heartbeat was begun.
    last: Mutex<Duration>,
    /// Cancelled when the row is gone or declares this worker dead. Permanent, because other workers act on it.
    fenced: CancellationToken,
    health: Health,
    /// The worker's connection to RabbitMQ.
    broker: OnceLock<Arc<Broker>>,
    /// Gate and permits, in a worker that sends.
    sender: OnceLock<(GetGate, Arc<Permits>)>,
}

impl fmt::Debug for Heartbeat {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Heartbeat").field("worker_id", &self.worker_id).finish_non_exhaustive()
    }
}

impl Heartbeat {
    /// Registers the process under a new id, or returns the live workers with different settings.
    pub async fn register(
        pool: &PgPool,
        roles: &str,
        permits: usize,
        settings: &Agreement,
        config: &HeartbeatConfig,
        health: &Health,
    ) -> sqlx::Result<Result<Self, Vec<Disagreeing>>> {
        let last = since_boot();
        let system = rustix::system::uname();
        let host = system.nodename().to_string_lossy();
        let registration = Registration {
            roles,
            host: &host,
            pid: i32::try_from(std::process::id()).unwrap_or_default(),
            permits: i32::try_from(permits).unwrap_or(i32::MAX),
            settings,
        };
        let registered = workers::register(&mut *pool.acquire().await?, &registration).await?;
        Ok(registered.map(|worker_id| Self {
            pool: pool.clone(),
            worker_id,
            interval: config.interval,
            dead_after: config.dead_after,
            last: Mutex::new(last),
            fenced: CancellationToken::new(),
            health: health.clone(),
            broker: OnceLock::new(),
            sender: OnceLock::new(),
        }))
    }

    pub fn worker_id(&self) -> i64 {
        self.worker_id
    }

    /// Waits until this worker is declared dead or its row is gone.
    pub async fn fenced(&self) {
        self.fenced.cancelled().await;
    }

    /// Whether no other worker can have declared this one dead yet. The margin is on the safe side: time counts from before the
    /// heartbeat was written.
    pub fn is_fresh(&self) -> bool {
        if self.fenced.is_cancelled() {
            return false;
        }
        let last = *self.last.lock().unwrap_or_else(PoisonError::into_inner);
        since_boot().saturating_sub(last) + self.interval / 2 < self.dead_after
    }

    /// Adds the permits in use, and the reason of a closed gate, to the heartbeat.
    pub fn show_sender(&self, gate: GetGate, permits: Arc<Permits>) {
        // Set once per process.
        let _ = self.sender.set((gate, permits));
    }

    /// Beats until `stop` or until fenced. A failed heartbeat is not repeated: the next one follows soon enough.
    pub async fn beat(&self, stop: CancellationToken) {
        let mut ticks = interval(self.interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut observer = Observer::new(self.interval, self.dead_after);
        let mut observed_at = Instant::now();
        let mut failing = false;
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = ticks.tick() => {}
            }
            let begun = since_boot();
            let written = timeout(self.dead_after, self.write()).await;
            self.health.database_answers(matches!(written, Ok(Ok(_))));
            match written {
                Ok(Ok(true)) => {
                    *self.last.lock().unwrap_or_else(PoisonError::into_inner) = begun;
                    failing = false;
                }
                Ok(Ok(false)) => {
                    self.health.fail(FENCED);
                    self.fenced.cancel();
                    return;
                }
                Ok(Err(error)) if !failing => {
                    warn!(%error, "can't write the heartbeat");
                    failing = true;
                }
                Err(_) if !failing => {
                    warn!("can't write the heartbeat: PostgreSQL does not answer");
                    failing = true;
                }
                _ => {}
            }
            let elapsed = observed_at.elapsed();
            match timeout(self.dead_after, self.observe(&mut observer, elapsed)).await {
                Ok(Ok(())) => observed_at = Instant::now(),
                Ok(Err(error)) => debug!(%error, "can't read the other workers' heartbeats"),
                Err(_) => debug!("can't read the other workers' heartbeats: PostgreSQL does not answer"),
            }
        }
    }

    /// Declares workers dead whose heartbeat has stopped changing.
    async fn observe(&self, observer: &mut Observer, elapsed: Duration) -> sqlx::Result<()> {
        let mut conn = self.pool.acquire().await?;
        let mut beats = workers::beats(&mut conn).await?;
        beats.retain(|beat| beat.worker_id != self.worker_id);
        let silent = observer.look(&beats, elapsed);
        if !silent.is_empty() {
            for worker_id in workers::declare_dead(&mut conn, &silent).await? {
                warn!(worker_id, "a worker's heartbeat has stopped, declaring it dead");
            }
        }
        Ok(())
    }

    /// Writes a heartbeat. False: this worker is declared dead, or its row is gone.
    async fn write(&self) -> sqlx::Result<bool> {
        let mut conn = self.pool.acquire().await?;
        let gate = self.sender.get().map(|(gate, permits)| measure(gate, permits));
        let closed = match gate {
            Some(Gate::Closed { reason, until }) => Some((reason, until.saturating_duration_since(Instant::now()))),
            _ => None,
        };
        let rebuilds = self.broker.get().map_or(0, |broker| broker.rebuilds());
        let rejected = self.broker.get().and_then(|broker| broker.rejections().words());
        workers::heartbeat(&mut conn, self.worker_id, self.in_flight(), rebuilds, closed, rejected).await
    }

    /// Adds rejected messages and rebuilt connections to the heartbeat.
    pub fn show_broker(&self, broker: Arc<Broker>) {
        // Set once per process.
        let _ = self.broker.set(broker);
    }

    fn in_flight(&self) -> i32 {
        let in_use = self.sender.get().map_or(0, |(_, permits)| permits.in_use());
        i32::try_from(in_use).unwrap_or(i32::MAX)
    }

    /// Records that the process ended with nothing left unreported.
    pub async fn stop(&self) {
        let write = async {
            let mut conn = self.pool.acquire().await?;
            workers::stop(&mut conn, self.worker_id, self.in_flight()).await
        };
        match timeout(self.dead_after, write).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => warn!(%error, "can't record the end of this worker, its heartbeat will expire"),
            Err(_) => warn!("can't record the end of this worker, its heartbeat will expire"),
        }
    }
}
