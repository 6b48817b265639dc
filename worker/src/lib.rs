//! The workers: one file for each stage of the pipeline, in the order of the data.
//!
//! `fan_out` releases a run's items, `send` carries them out through a `mailer`, `progress` counts the results. `test_send`
//! sends single mails to whoever wants to look at an invitation. `replay`, `sweep` and `prune` belong to the fan-out's role.
//! `consumer` is the only file that acknowledges, and `watchdog` watches over it; `outcome` and `claims` hold the protocol's
//! decisions and memory.

// A lock that is taken for a match is kept until its end, in which somebody may want it again.
#![warn(clippy::significant_drop_in_scrutinee)]

pub mod attempt;
mod claims;
mod fan_out;
mod gate;
mod gauges;
mod heartbeat;
mod held;
mod ids;
pub mod mailer;
mod pace;
mod permits;
mod poison;
mod progress;
pub mod prune;
mod relay_stops;
pub mod replay;
pub mod scrub;
mod send;
mod stopped_runs;
pub mod sweep;
mod templates;
pub mod test_send;
mod until_answered;

use std::{borrow::Cow, collections::BTreeSet, fmt, str::FromStr, sync::Arc, time::Duration};

use mailrun_app::{
    config::Config,
    lineage::{self, Foreign},
    monitoring::{Monitoring, MonitoringError},
};
use mailrun_broker::{Broker, Publisher};
use mailrun_core::queue;
use mailrun_core::{agreement::Difference, health::Health, observer::Beat};
use mailrun_ledger::{
    in_time,
    workers::{self, Disagreeing},
};
use sqlx::PgPool;
use tokio::{
    task::{JoinHandle, JoinSet},
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{error, info, warn};

pub use crate::poison::STALE;
use crate::until_answered::until_answered;
use crate::{
    fan_out::FanOut, heartbeat::Heartbeat, ids::Ids, permits::Permits, progress::Progress, send::Senders,
    sweep::Sweeper, test_send::TestSends,
};
use mailrun_broker::{
    consumer::Consumer,
    watchdog::{Standstill, Watchdog},
};

/// Run messages handed out ahead to one pump.
const FAN_OUT_PREFETCH: u16 = 16;

/// At the end, connections to RabbitMQ are closed within this time or left.
const CLOSE: Duration = Duration::from_secs(3);

/// What a worker process does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Releases items, replays dead letters, sweeps, and deletes what is old.
    FanOut,
    /// Sends.
    Send,
    /// Counts.
    Progress,
}

/// A role that doesn't exist.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no role; there are fan-out, send and progress")]
pub struct NoSuchRole(String);

impl FromStr for Role {
    type Err = NoSuchRole;

    fn from_str(text: &str) -> Result<Self, NoSuchRole> {
        match text {
            "fan-out" => Ok(Self::FanOut),
            "send" => Ok(Self::Send),
            "progress" => Ok(Self::Progress),
            _ => Err(NoSuchRole(text.to_owned())),
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::FanOut => "fan-out",
            Self::Send => "send",
            Self::Progress => "progress",
        })
    }
}

/// Why a worker ended otherwise than it should.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The database's address is none.
    #[error("database.url is not usable: {0}")]
    Database(#[from] sqlx::Error),
    /// The mailer can't be used as configured.
    #[error(transparent)]
    Mailer(#[from] mailer::MailerError),
    /// It can't be monitored as configured.
    #[error(transparent)]
    Monitoring(#[from] MonitoringError),
    /// A part ended by itself.
    #[error("a part of the worker ended by itself; the process is of no use without it")]
    DeadTask,
    /// Its row in `workers` is gone, or declares it dead.
    #[error(
        "others have declared this worker dead, or its row in the table workers is gone: its attempts are theirs to settle. \
         Start it again"
    )]
    Fenced,
    /// A live worker has other settings.
    #[error("{0}. All workers need the same: stop the others, or change the settings here")]
    Disagrees(String),
    /// The virtual host is not this installation's.
    #[error(transparent)]
    Foreign(#[from] Foreign),
    /// The drain took too long.
    #[error("what was in flight could not be finished within {0:?}; it will be settled by other workers")]
    Deadline(Duration),
}

/// Works in `roles` until `stop`, then drains in the order of the data: takes nothing more, finishes what is in flight,
/// publishes, acknowledges, closes.
///
/// # Errors
/// When a part ended by itself, or the drain took too long.
pub async fn run(config: Config, roles: BTreeSet<Role>, stop: CancellationToken) -> Result<(), WorkerError> {
    let names = roles.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let health = Health::default();
    health.starting("PostgreSQL");
    let monitoring = Monitoring::start(&config.metrics, &names, &health).await?;
    let ended = work(config, roles, &names, &health, stop).await;
    monitoring.stop().await;
    ended
}

async fn work(
    config: Config,
    roles: BTreeSet<Role>,
    names: &str,
    health: &Health,
    stop: CancellationToken,
) -> Result<(), WorkerError> {
    let pool = mailrun_ledger::open(&config.database, &format!("mailrun worker {names}"))?;
    let permits = if roles.contains(&Role::Send) { config.permits() } else { 0 };
    let Some(heartbeat) = register(&pool, names, permits, &config, health, &stop).await? else { return Ok(()) };
    info!(worker_id = heartbeat.worker_id(), roles = names, "worker started");
    let ids = match roles.contains(&Role::Send) {
        true => match Ids::read(&pool, &config, &stop).await {
            None => return Ok(()),
            ids => ids,
        },
        false => None,
    };
    let broker = config.broker_with_health(format!("mailrun worker {} {names}", heartbeat.worker_id()), health.clone());
    let publisher = broker.publisher(config.amqp.publish_lanes);
    heartbeat.show_broker(Arc::clone(&broker));
    let beating = CancellationToken::new();
    let beat = tokio::spawn({
        let (heartbeat, beating) = (Arc::clone(&heartbeat), beating.clone());
        async move { heartbeat.beat(beating).await }
    });

    let lineage = tokio::spawn({
        let (pool, broker, stop) = (pool.clone(), Arc::clone(&broker), stop.clone());
        let limit = config.database.answer_timeout;
        async move { lineage::keep(&pool, &broker, limit, &stop).await }
    });
    let consumers = TaskTracker::new();
    let watchdog = Watchdog::new(
        Arc::clone(&broker),
        config.watchdog.idle_after,
        STUCK_AFTER,
        standstill(pool.clone(), config.database.answer_timeout),
    );
    let parts =
        start(&config, &roles, &pool, &broker, &publisher, &heartbeat, ids.as_ref(), &watchdog, &consumers, &stop)?;
    health.started();
    drop(publisher);
    let deadline = config.send.shutdown_deadline;
    let ended = supervise(parts, lineage, &consumers, &heartbeat, health, &stop, deadline).await;
    watchdog.close().await;
    broker.closed(CLOSE).await;
    beating.cancel();
    let _ = beat.await;
    if ended.is_ok() {
        heartbeat.stop().await;
    }
    info!(worker_id = heartbeat.worker_id(), "worker stopped");
    ended
}

/// A consumer that has messages in hand and has finished none for so long gets a new connection: longer than any send can take.
const STUCK_AFTER: Duration = Duration::from_secs(23 * 60);

/// Whether a run has not moved for this time, for no reason that is known. False also where PostgreSQL does not answer.
fn standstill(pool: PgPool, limit: Duration) -> Standstill {
    Box::new(move |period| {
        let pool = pool.clone();
        Box::pin(async move {
            let ask = async {
                let mut conn = pool.acquire().await?;
                Ok::<_, sqlx::Error>(
                    mailrun_ledger::sweep::is_standstill(&mut conn, period).await?
                        && !mailrun_ledger::sweep::all_lanes_closed(&mut conn).await?,
                )
            };
            in_time(limit, ask).await.unwrap_or(false)
        })
    })
}

/// Registers, however long PostgreSQL takes to answer. None: told to stop before that.
///
/// A worker that was killed counts as alive until another one has declared it dead. Where there is no other, this one watches it for
/// as long, so that it can start with other settings.
async fn register(
    pool: &PgPool,
    roles: &str,
    permits: usize,
    config: &Config,
    health: &Health,
    stop: &CancellationToken,
) -> Result<Option<Arc<Heartbeat>>, WorkerError> {
    let limit = config.database.answer_timeout;
    let settings = config.agreement();
    let register = || in_time(limit, Heartbeat::register(pool, roles, permits, &settings, &config.heartbeat, health));
    let mut seen: Vec<Beat> = Vec::new();
    loop {
        let Some(registered) = until_answered("this worker can't register", stop, register).await else {
            return Ok(None);
        };
        let others = match registered {
            Ok(heartbeat) => return Ok(Some(Arc::new(heartbeat))),
            Err(others) => others,
        };
        if let Some(other) = others.iter().find(|other| is_alive(&seen, other.beat)) {
            return Err(WorkerError::Disagrees(disagreement(other)));
        }
        if seen.is_empty() {
            let silence = others.iter().map(|other| other.dead_after).max().unwrap_or_default();
            warn!(seconds = silence.as_secs(), "live workers have other settings, checking whether they still run");
            seen = others.iter().map(|other| other.beat).collect();
            if stop.run_until_cancelled(sleep(silence)).await.is_none() {
                return Ok(None);
            }
        } else {
            let silent: Vec<Beat> = others.iter().map(|other| other.beat).collect();
            let declare =
                || in_time(limit, async { workers::declare_dead(&mut *pool.acquire().await?, &silent).await });
            if until_answered("silent workers can't be declared dead", stop, declare).await.is_none() {
                return Ok(None);
            }
        }
    }
}

/// Whether a worker's heartbeat has changed since it was seen, or it has come since.
fn is_alive(seen: &[Beat], beat: Beat) -> bool {
    !seen.is_empty() && !seen.contains(&beat)
}

fn disagreement(other: &Disagreeing) -> String {
    let differences = other
        .differences
        .iter()
        .map(|Difference { key, ours, theirs }| format!("{key} is {ours} here and {theirs} there"));
    let differences = differences.collect::<Vec<_>>().join(", ");
    format!(
        "worker {} (process {} on {}) has other settings: {differences}",
        other.beat.worker_id, other.pid, other.host
    )
}

#[expect(clippy::too_many_arguments, reason = "the one place where everything is put together")]
fn start(
    config: &Config,
    roles: &BTreeSet<Role>,
    pool: &PgPool,
    broker: &Arc<Broker>,
    publisher: &Publisher,
    heartbeat: &Arc<Heartbeat>,
    ids: Option<&Ids>,
    watchdog: &Arc<Watchdog>,
    consumers: &TaskTracker,
    stop: &CancellationToken,
) -> Result<JoinSet<()>, WorkerError> {
    let mut parts = JoinSet::new();
    let consume =
        |queues: &[Cow<'static, str>], prefetch| Consumer::start(broker, queues, prefetch, watchdog, stop, consumers);
    for role in roles {
        match role {
            Role::FanOut => {
                let pump = FanOut::new(config.clone(), pool.clone(), publisher.clone());
                parts.spawn(pump.run(consume(&[queue::RUNS.into()], FAN_OUT_PREFETCH), stop.clone()));
                let sweeper = Sweeper::new(config.clone(), pool.clone(), Arc::clone(broker), publisher.clone());
                parts.spawn(sweeper.run(stop.clone()));
                let limit = config.database.answer_timeout;
                parts.spawn(replay::run(pool.clone(), Arc::clone(broker), publisher.clone(), limit, stop.clone()));
                parts.spawn(prune::run(pool.clone(), config.clone(), stop.clone()));
                if config.metrics.listen.is_some() {
                    parts.spawn(gauges::run(pool.clone(), Arc::clone(broker), limit, stop.clone()));
                }
            }
            Role::Send => {
                // Senders have read them.
                let Some(ids) = ids.cloned() else { continue };
                let mailer = mailer::mailer(&config.mailer)?;
                let permits = Arc::new(Permits::new(config.permits()));
                let same = Arc::clone(&mailer);
                heartbeat.show_sender(Box::new(move || same.gate()), Arc::clone(&permits));
                let (id, same) = (heartbeat.worker_id(), Arc::clone(&mailer));
                let tests = TestSends::new(config, pool.clone(), publisher.clone(), id, same, ids.clone());
                parts.spawn(tests.run(consume(&[queue::TESTS.into()], test_send::PREFETCH), stop.clone()));
                let limit = config.database.answer_timeout;
                parts.spawn(relay_stops::watch(pool.clone(), Arc::clone(&mailer), limit, stop.clone()));
                let beat = Arc::clone(heartbeat);
                let (config, pool, broker, publisher) =
                    (config.clone(), pool.clone(), Arc::clone(broker), publisher.clone());
                let (queues, prefetch) = (broker.item_queues().to_vec(), config.send.prefetch);
                let senders = Senders::new(config, pool, broker, publisher, beat, mailer, permits, ids);
                parts.spawn(senders.run(consume(&queues, prefetch), stop.clone()));
            }
            Role::Progress => {
                let progress = Progress::new(config.clone(), pool, publisher.clone());
                let prefetch = u16::try_from(config.progress.batch_messages * 2).unwrap_or(u16::MAX).min(2_000);
                parts.spawn(progress.run(consume(&[queue::RESULTS.into()], prefetch), stop.clone()));
            }
        }
    }
    consumers.close();
    Ok(parts)
}

/// Waits for the end. A part that ends before it was told to takes the process with it: half a worker is worse than none.
async fn supervise(
    mut parts: JoinSet<()>,
    lineage: JoinHandle<Result<(), Foreign>>,
    consumers: &TaskTracker,
    heartbeat: &Heartbeat,
    health: &Health,
    stop: &CancellationToken,
    deadline: Duration,
) -> Result<(), WorkerError> {
    let why = tokio::select! {
        // Parts that end because they were told to are not dead.
        biased;
        () = stop.cancelled() => None,
        () = heartbeat.fenced() => Some(WorkerError::Fenced),
        ended = lineage => match ended {
            Ok(Err(foreign)) => Some(foreign.into()),
            // It ends only when it is told to.
            _ => Some(WorkerError::DeadTask),
        },
        ended = parts.join_next() => {
            error!(?ended, "a part of this worker ended by itself");
            Some(WorkerError::DeadTask)
        }
    };
    stop.cancel();
    health.stopping();
    let drain = async {
        let mut clean = true;
        while let Some(ended) = parts.join_next().await {
            clean &= ended.is_ok();
        }
        consumers.wait().await;
        clean
    };
    match timeout(deadline, drain).await {
        Ok(clean) => match why {
            Some(why) => Err(why),
            None if clean => Ok(()),
            None => Err(WorkerError::DeadTask),
        },
        Err(_) => Err(why.unwrap_or(WorkerError::Deadline(deadline))),
    }
}
