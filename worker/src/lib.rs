//! The worker: one module for each stage of the pipeline.
//!
//! In the order of the data: `fan_out` releases a run's items, `send` claims and processes them, `progress` counts the results.
//! `replay`, `sweep` and `prune` belong to the fan-out role. The stages know runs, items and attempts. What an item is and how it
//! is processed is a [`job`]. Mailrun's own jobs are in [`jobs`] and send through a [`mailer`].

// A lock taken in a match scrutinee is held until the end of the match, whose arms may lock again.
#![warn(clippy::significant_drop_in_scrutinee)]

mod ahead;
pub mod attempt;
mod claims;
mod context;
mod fan_out;
mod gate;
mod gauges;
mod heartbeat;
mod held;
pub mod job;
pub mod jobs;
mod kinds;
pub mod mailer;
mod pace;
mod permits;
mod poison;
mod progress;
pub mod prune;
pub mod replay;
mod reporter;
pub mod scrub;
mod send;
mod stopped_runs;
pub mod sweep;
mod until_answered;

use std::{borrow::Cow, collections::BTreeSet, fmt, str::FromStr, sync::Arc, time::Duration};

use mailrun_app::{
    config::Config,
    lineage::{self, Foreign},
    monitoring::{Monitoring, MonitoringError},
};
use mailrun_core::{
    agreement::{Agreement, Difference},
    health::Health,
    metric,
    observer::Beat,
    outcome::{Outcome, RetryPolicy},
    queue,
};
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

use crate::{
    context::Context, fan_out::FanOut, heartbeat::Heartbeat, mailer::Mailer, pace::Pace, permits::Permits,
    progress::Progress, send::Senders, sweep::Sweeper, until_answered::until_answered,
};
pub use crate::{
    kinds::{Jobs, Kinds},
    poison::STALE,
};
use mailrun_broker::{
    consumer::Consumer,
    watchdog::{Standstill, Watchdog},
};

/// Prefetch of the run consumer of one process.
const FAN_OUT_PREFETCH: u16 = 16;

/// On shutdown, connections to RabbitMQ get this long to close.
const CLOSE: Duration = Duration::from_secs(3);

/// A role of a worker process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Releases items, removes replayed dead letters, sweeps, and deletes old runs.
    FanOut,
    /// Claims and processes items.
    Send,
    /// Counts results.
    Progress,
}

/// An unknown role.
#[derive(Debug, thiserror::Error)]
#[error("unknown role {0:?}; the roles are fan-out, send and progress")]
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

/// Why a worker could not start or did not end cleanly.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The database URL is malformed.
    #[error("database.url is not usable: {0}")]
    Database(#[from] sqlx::Error),
    /// The mailer's configuration is not usable.
    #[error(transparent)]
    Mailer(#[from] mailer::MailerError),
    /// The metrics endpoint's configuration is not usable.
    #[error(transparent)]
    Monitoring(#[from] MonitoringError),
    /// A part of the worker ended unexpectedly.
    #[error("a part of the worker ended unexpectedly, and the process cannot work without it")]
    DeadTask,
    /// The worker's row in `workers` is gone or marked dead.
    #[error(
        "this worker was declared dead, or its row in the table workers is gone: other workers settle its attempts. \
         Start it again"
    )]
    Fenced,
    /// A live worker has different settings.
    #[error("{0}. All workers need the same settings: stop the other workers, or change the settings here")]
    Disagrees(String),
    /// The virtual host belongs to another installation.
    #[error(transparent)]
    Foreign(#[from] Foreign),
    /// The drain took too long.
    #[error("the work in progress could not be finished within {0:?}; other workers will settle it")]
    Deadline(Duration),
}

/// The jobs of a worker with these roles: Mailrun's own and `jobs`.
///
/// # Errors
/// If the mailer's configuration is not usable.
pub fn kinds(config: &Config, jobs: Jobs, roles: &BTreeSet<Role>) -> Result<(Kinds, Arc<dyn Mailer>), WorkerError> {
    let (jobs, mailer) = jobs::with_mail(jobs, config, roles.contains(&Role::Send))?;
    Ok((Kinds::new(jobs, RetryPolicy::new(config.rungs(), config.send.on_unknown)), mailer))
}

/// Works in `roles` until `stop`, with Mailrun's own jobs and `jobs`. Then drains in the order of the data: stops consuming,
/// finishes the work in progress, publishes, acknowledges, closes.
///
/// # Errors
/// If the worker cannot start, a part of it ends unexpectedly, or the drain takes too long.
pub async fn run(
    config: Config,
    roles: BTreeSet<Role>,
    jobs: Jobs,
    stop: CancellationToken,
) -> Result<(), WorkerError> {
    let names = roles.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let health = Health::default();
    health.starting("PostgreSQL");
    let monitoring = Monitoring::start(&config.metrics, &names, &health).await?;
    let ended = work(config, roles, jobs, &names, &health, stop).await;
    monitoring.stop().await;
    ended
}

async fn work(
    config: Config,
    roles: BTreeSet<Role>,
    jobs: Jobs,
    names: &str,
    health: &Health,
    stop: CancellationToken,
) -> Result<(), WorkerError> {
    let (kinds, mailer) = kinds(&config, jobs, &roles)?;
    let pool = mailrun_ledger::open(&config.database, &format!("mailrun worker {names}"))?;
    let permits = if roles.contains(&Role::Send) { config.usual_attempts() } else { 0 };
    let Some(heartbeat) = register(&pool, names, permits, &config, kinds.names(), health, &stop).await? else {
        return Ok(());
    };
    info!(worker_id = heartbeat.worker_id(), roles = names, "worker started");
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
    let context = Context {
        pool,
        broker: Arc::clone(&broker),
        publisher,
        kinds: Arc::new(kinds),
        answer_timeout: config.database.answer_timeout,
        result_batch: config.send.result_batch,
    };
    let consume = |queues: &[Cow<'static, str>], prefetch| {
        Consumer::start(&broker, queues, prefetch, &watchdog, &stop, &consumers)
    };
    let parts = start(&config, &roles, &context, &mailer, &heartbeat, consume, &stop);
    // Its publisher would be waited for at the end.
    drop(context);
    consumers.close();
    health.started();
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

/// A consumer that holds messages and has finished none for this long gets a new connection. Longer than any attempt.
const STUCK_AFTER: Duration = Duration::from_secs(23 * 60);

/// Whether a run has not moved for this time without a known reason. False if PostgreSQL does not answer.
fn standstill(pool: PgPool, limit: Duration) -> Standstill {
    Box::new(move |period| {
        let pool = pool.clone();
        Box::pin(async move {
            let query = async {
                let mut conn = pool.acquire().await?;
                Ok::<_, sqlx::Error>(
                    mailrun_ledger::sweep::is_standstill(&mut conn, period).await?
                        && !mailrun_ledger::sweep::all_lanes_closed(&mut conn).await?,
                )
            };
            in_time(limit, query).await.unwrap_or(false)
        })
    })
}

/// Registers the worker, retrying until PostgreSQL answers. `None`: stopped before that.
///
/// A worker that was killed counts as alive until another one declares it dead. If there is no other, this worker watches its
/// heartbeat for that long, so that it can start with different settings.
async fn register(
    pool: &PgPool,
    roles: &str,
    permits: usize,
    config: &Config,
    jobs: &[String],
    health: &Health,
    stop: &CancellationToken,
) -> Result<Option<Arc<Heartbeat>>, WorkerError> {
    let limit = config.database.answer_timeout;
    let settings = Agreement { jobs: Some(jobs.to_vec()), ..config.agreement() };
    let register = || in_time(limit, Heartbeat::register(pool, roles, permits, &settings, &config.heartbeat, health));
    let mut seen: Vec<Beat> = Vec::new();
    loop {
        let Some(registered) = until_answered("can't register this worker", stop, register).await else {
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
            warn!(seconds = silence.as_secs(), "live workers have different settings, checking whether they still run");
            seen = others.iter().map(|other| other.beat).collect();
            if stop.run_until_cancelled(sleep(silence)).await.is_none() {
                return Ok(None);
            }
        } else {
            let silent: Vec<Beat> = others.iter().map(|other| other.beat).collect();
            let declare =
                || in_time(limit, async { workers::declare_dead(&mut *pool.acquire().await?, &silent).await });
            if until_answered("can't declare silent workers dead", stop, declare).await.is_none() {
                return Ok(None);
            }
        }
    }
}

/// Whether a worker's heartbeat has changed since `seen`, or the worker has registered since.
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
        "worker {} (process {} on {}) has different settings: {differences}",
        other.beat.worker_id, other.pid, other.host
    )
}

/// Starts the stages of these roles.
fn start(
    config: &Config,
    roles: &BTreeSet<Role>,
    context: &Context,
    mailer: &Arc<dyn Mailer>,
    heartbeat: &Arc<Heartbeat>,
    consume: impl Fn(&[Cow<'static, str>], u16) -> Consumer,
    stop: &CancellationToken,
) -> JoinSet<()> {
    let mut parts = JoinSet::new();
    for role in roles {
        match role {
            Role::FanOut => {
                let fan_out = FanOut::new(context.clone(), config.fan_out.clone(), config.sweep.stalled_after);
                parts.spawn(fan_out.run(consume(&[queue::RUNS.into()], FAN_OUT_PREFETCH), stop.clone()));
                parts.spawn(Sweeper::new(context.clone(), config.sweep.clone()).run(stop.clone()));
                parts.spawn(replay::run(context.clone(), stop.clone()));
                parts.spawn(prune::run(context.clone(), config.retention.keep(), stop.clone()));
                if config.metrics.listen.is_some() {
                    parts.spawn(gauges::run(context.clone(), stop.clone()));
                }
            }
            Role::Send => {
                metric::begin(metric::REPLIES, "class", mailer::reply_classes());
                metric::begin(metric::ATTEMPTS, "outcome", Outcome::NAMES);
                let permits = Arc::new(Permits::new(config.send.permits, config.connections()));
                let kinds = Arc::clone(&context.kinds);
                heartbeat.show_sender(Box::new(move || kinds.gate()), Arc::clone(&permits));
                let pool = context.pool.clone();
                parts.spawn(jobs::watch_relay_stops(
                    pool.clone(),
                    Arc::clone(mailer),
                    context.answer_timeout,
                    stop.clone(),
                ));
                let pace = Pace::new(&config.fan_out, pool, context.answer_timeout);
                let (queues, prefetch) = (context.broker.item_queues().to_vec(), config.send.prefetch);
                let senders = Senders::new(context.clone(), Arc::clone(heartbeat), permits, pace, prefetch);
                parts.spawn(senders.run(consume(&queues, prefetch), stop.clone()));
            }
            Role::Progress => {
                let batch = config.progress.batch_messages;
                let prefetch = u16::try_from(batch * 2).unwrap_or(u16::MAX).min(2_000);
                let progress = Progress::new(context.clone(), batch);
                parts.spawn(progress.run(consume(&[queue::RESULTS.into()], prefetch), stop.clone()));
            }
        }
    }
    parts
}

/// Waits for the end. If one part ends unexpectedly, the whole process ends: half a worker is worse than none.
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
        // A part that ends after `stop` is not dead.
        biased;
        () = stop.cancelled() => None,
        () = heartbeat.fenced() => Some(WorkerError::Fenced),
        ended = lineage => match ended {
            Ok(Err(foreign)) => Some(foreign.into()),
            // The lineage check ends only when told to.
            _ => Some(WorkerError::DeadTask),
        },
        ended = parts.join_next() => {
            error!(?ended, "a part of this worker ended unexpectedly");
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
