//! The fan-out: releases runs chunk by chunk, so that runs take turns and the queues stay bounded.
//!
//! Each step publishes its chunk and the message for the next step, and commits cursor and step last. A crash anywhere repeats
//! the step, which the fence absorbs. A message for any other step than the current one is stale.

use std::{collections::HashMap, sync::Arc, time::Duration};

use chrono::{DateTime, TimeDelta, Utc};
use mailrun_app::config::FanOutConfig;
use mailrun_broker::{
    BrokerError, Outgoing,
    consumer::{Consumer, Delivery},
    topology,
};
use mailrun_core::{
    claim::Withheld,
    item::{ItemState, Key},
    message::{Command, ItemMessage, ItemResult, RunMessage, Step},
    outcome,
    pacing::Rate,
    queue,
    run::{Budget, Flow, Wanted, outstanding, room},
};
use mailrun_ledger::{
    attempts, in_time, may_pass,
    passes::{self, Advance, Item, Pass, PassKind, Situation},
    receipts::Receipt,
};
use sqlx::PgConnection;
use tokio::{
    sync::Semaphore,
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{debug, info, warn};
use uuid::Uuid;

use crate::{context::Context, poison};

/// Runs that one process handles at the same time.
const CONCURRENCY: usize = 4;
/// The smallest window of a run, used when there are no senders.
const LEAST_WINDOW: i32 = 100;
/// Until a pass is this old, its measured speed is unreliable: its window is small, and drains before its message has passed
/// through the wait queue. So the step is retried after [`SOON`], up to [`SOON_TRIES`] times for each message.
const YOUTH: TimeDelta = TimeDelta::seconds(1);
const SOON: Duration = Duration::from_millis(15);
const SOON_TRIES: usize = 8;
/// Under a rate limit, items are released faster than the limit by one part in this number. The claims enforce the limit, and
/// must always find something to claim.
const AHEAD_OF_LIMIT: i32 = 4;
/// Items of a resumed run that are republished in one chunk.
const REPUBLISH_CHUNK: i64 = 1_000;
/// The distance between two republished chunks, so that other runs' items come in between.
const REPUBLISH_EVERY: Duration = Duration::from_secs(1);
/// A message may arrive before progress has recorded when its attempt is due, by at most this time.
const PROGRESS_LAG: Duration = Duration::from_secs(10);
/// How long publishing is retried while the queue is missing.
const RETRY_FOR: Duration = Duration::from_secs(60);
/// The pause before a failed step is retried.
const PAUSE_AFTER_ERROR: Duration = Duration::from_millis(500);

/// The fan-out of one process.
#[derive(Debug)]
pub struct FanOut {
    context: Context,
    settings: FanOutConfig,
    /// If the results of a chunk are not counted within this time, they are considered lost.
    lost_after: Duration,
}

/// Why a step failed. The next try publishes the same messages again, and the fence absorbs them.
#[derive(Debug, thiserror::Error)]
enum StepError {
    #[error(transparent)]
    Ledger(#[from] sqlx::Error),
    #[error(transparent)]
    Broker(#[from] BrokerError),
}

/// How fast a step may release items under rate limits.
#[derive(Debug, Default)]
struct Limits {
    run: Option<Budget>,
    installation: Option<Budget>,
    /// The items that the tighter limit allows this run within the window. `None`: there is no limit.
    window: Option<i32>,
}

impl Limits {
    fn both(&self) -> impl Iterator<Item = Budget> {
        self.run.into_iter().chain(self.installation)
    }

    /// How many of `releasable` items may be released now.
    fn grant(&self, releasable: i32, now: DateTime<Utc>) -> i32 {
        self.both().map(|budget| budget.due(now)).fold(releasable, i32::min)
    }
}

/// What to do with the message after a step.
#[derive(Debug)]
enum After {
    /// Acknowledge it.
    Nothing,
    /// Repeat it at once: the window of a young pass is full.
    Soon,
    /// Repeat it shortly: the window is full.
    Wait,
    /// Repeat it later: the run is paused.
    Paused,
    /// The run was resumed: republish the items that senders have dropped.
    Republish,
}

impl FanOut {
    #[must_use]
    pub fn new(context: Context, settings: FanOutConfig, lost_after: Duration) -> Arc<Self> {
        Arc::new(Self { context, settings, lost_after })
    }

    /// Handles run messages until the consumer stops, then finishes those in progress.
    pub async fn run(self: Arc<Self>, mut consumer: Consumer, stop: CancellationToken) {
        let permits = Arc::new(Semaphore::new(CONCURRENCY));
        let tasks = TaskTracker::new();
        while let Ok(permit) = Arc::clone(&permits).acquire_owned().await
            && let Some(Some(delivery)) = stop.run_until_cancelled(consumer.next()).await
        {
            let this = Arc::clone(&self);
            tasks.spawn(async move {
                this.handle(delivery).await;
                drop(permit);
            });
        }
        tasks.close();
        tasks.wait().await;
    }

    async fn handle(&self, delivery: Delivery) {
        let message = match poison::read::<RunMessage>(&delivery) {
            Ok(message) => message,
            Err(refusal) => return poison::refuse(&self.context.publisher, delivery, refusal).await,
        };
        let mut tries = 0;
        let step = loop {
            let step = in_time(self.context.answer_timeout, self.step(&message)).await;
            if !matches!(step, Ok(Some(After::Soon))) || tries == SOON_TRIES {
                break step;
            }
            tries += 1;
            sleep(SOON).await;
        };
        let after = match step {
            Ok(Some(after)) => after,
            Ok(None) => return poison::bury(&self.context.publisher, delivery, "there is no such run").await,
            Err(error) => {
                // A permanent error is retried as well, slowly and with a log line, because the run must not be forgotten.
                let passing = !matches!(&error, StepError::Ledger(error) if !may_pass(error));
                warn!(run_id = %message.run_id, %error, passing, "fan-out step failed, trying again");
                sleep(PAUSE_AFTER_ERROR).await;
                After::Wait
            }
        };
        match after {
            After::Nothing => delivery.ack(),
            After::Soon | After::Wait => self.again(&message, delivery, queue::RUNS_WAIT).await,
            After::Paused => self.again(&message, delivery, queue::RUNS_PAUSED).await,
            After::Republish => match self.republish_dropped(message.run_id).await {
                Ok(()) => delivery.ack(),
                Err(error) => {
                    warn!(run_id = %message.run_id, %error, "can't republish the items of a resumed run, trying again");
                    sleep(PAUSE_AFTER_ERROR).await;
                    self.again(&message, delivery, queue::RUNS_WAIT).await;
                }
            },
        }
    }

    /// Sends a message through a wait queue. If that queue is missing, the message waits here, outside the concurrency limit.
    async fn again(&self, message: &RunMessage, delivery: Delivery, wait_queue: &'static str) {
        let message = Outgoing::new(message);
        match self.context.publisher.offer(vec![message.clone().to(wait_queue)]).await {
            Ok(rejected) if rejected.is_empty() => delivery.ack(),
            Ok(_) => {
                let publisher = self.context.publisher.clone();
                tokio::spawn(async move {
                    sleep(topology::waiting_time(wait_queue)).await;
                    // If this fails too, the message is redelivered when the consumer reconnects.
                    if let Ok(Ok(())) = timeout(RETRY_FOR, publisher.publish(vec![message])).await {
                        delivery.ack();
                    }
                });
            }
            Err(_) => {}
        }
    }

    /// Carries out one message. `None`: there is no such run.
    async fn step(&self, message: &RunMessage) -> Result<Option<After>, StepError> {
        let mut tx = self.context.pool.begin().await?;
        let Some(pass) = passes::lock(&mut tx, message.run_id).await? else { return Ok(None) };
        let Some(situation) = self.situation(&mut tx, message.run_id).await? else { return Ok(None) };
        let after = match &message.command {
            Command::Release(step) if is_stale(*step, &pass) => {
                debug!(run_id = %message.run_id, ?step, pass = pass.number, "dropping a stale step");
                After::Nothing
            }
            Command::Release(_) => self.release(&mut tx, &pass, &situation).await?,
            Command::Replay(_) if situation.wanted == Wanted::Cancelled => After::Nothing,
            Command::Replay(replay) => match passes::begun_by(&mut tx, replay.command_id).await? {
                Some(number) => self.start(message, number).await?,
                // Passes do not overlap: the previous one has not reached every item yet. This message drives the next pass, so it
                // must not make the sweeper believe that the current one is driven.
                None if pass.done_at.is_none() && situation.wanted == Wanted::Paused => After::Paused,
                None if pass.done_at.is_none() => After::Wait,
                None => self.start(message, passes::begin_replay(&mut tx, &pass, replay).await?).await?,
            },
            Command::Cancel { command_id } => match passes::begun_by(&mut tx, *command_id).await? {
                Some(number) => self.start(message, number).await?,
                None => self.start(message, passes::begin_cancel(&mut tx, &pass, *command_id).await?).await?,
            },
            Command::Resume if situation.wanted == Wanted::Running => After::Republish,
            Command::Resume => After::Nothing,
        };
        tx.commit().await?;
        Ok(Some(after))
    }

    /// Republishes what senders dropped while the run was paused: every item that is released, due and not claimed. An item whose
    /// message still exists is claimed only once all the same.
    async fn republish_dropped(&self, run_id: Uuid) -> Result<(), StepError> {
        let limit = self.context.answer_timeout;
        let waits = &self.context.kinds.installation().delays;
        let (mut after, mut republished, mut chunks) = (0, 0, 0);
        loop {
            let items = async {
                let mut conn = self.context.pool.acquire().await?;
                passes::dropped_items(&mut conn, run_id, PROGRESS_LAG, after, REPUBLISH_CHUNK).await
            };
            let items = in_time(limit, items).await?;
            let Some(last) = items.last() else { break };
            after = last.position;
            republished += items.len();
            let wait = waits.iter().filter(|wait| **wait <= REPUBLISH_EVERY * chunks).max();
            let messages = items.iter().map(|item| {
                let message = Outgoing::new(&item.next);
                match wait {
                    Some(wait) => message.to(queue::retry_queue(*wait)),
                    None => message,
                }
            });
            self.publish(messages.collect()).await?;
            chunks += 1;
        }
        if republished > 0 {
            info!(%run_id, republished, "run resumed, its waiting items were republished");
        }
        Ok(())
    }

    /// Publishes the first step of a pass that the caller's transaction has begun. A repeated command publishes the step again; if
    /// the pass has moved on by then, that step is stale.
    async fn start(&self, message: &RunMessage, pass: i32) -> Result<After, StepError> {
        info!(run_id = %message.run_id, pass, command = ?message.command, "pass started");
        // The step is published before the pass is committed, so it may arrive too early. It then waits for the lock.
        self.publish(vec![next_step(message.run_id, pass, 0)]).await?;
        Ok(After::Nothing)
    }

    /// Releases the next chunk of the current pass, if there is room.
    async fn release(&self, conn: &mut PgConnection, pass: &Pass, situation: &Situation) -> Result<After, StepError> {
        if pass.done_at.is_some() {
            return Ok(After::Nothing);
        }
        let Some(kind) = pass.kind else {
            // A later version began this pass and carries it out.
            passes::touch(conn, pass).await?;
            return Ok(After::Paused);
        };
        let cancels = kind == PassKind::Cancel;
        match situation.wanted {
            // The cancel command has its own message.
            Wanted::Cancelled if !cancels => return Ok(After::Nothing),
            Wanted::Paused if !cancels => {
                passes::touch(conn, pass).await?;
                return Ok(After::Paused);
            }
            _ => {}
        }
        let outstanding = outstanding(&situation.counters, situation.counters.total - situation.first_released);
        let is_young = (TimeDelta::zero()..YOUTH).contains(&(situation.now - pass.created_at));
        let flow = pass.flow.look(situation.now, pass.released, outstanding);
        let limits = if cancels { Limits::default() } else { self.limits(conn, pass, situation).await? };
        let releasable = if cancels {
            self.settings.chunk_items
        } else {
            self.releasable(situation, &limits, flow, outstanding, is_young)
        };
        let granted = limits.grant(releasable, situation.now);
        if granted <= 0 || self.is_unapplied(conn, pass, situation).await? {
            passes::touch(conn, pass).await?;
            return Ok(if releasable <= 0 && is_young { After::Soon } else { After::Wait });
        }
        let items = passes::next_items(conn, pass, kind, granted).await?;
        let Some(last) = items.last() else {
            passes::finish(conn, pass).await?;
            debug!(run_id = %pass.run_id, pass = pass.number, "pass finished");
            return Ok(After::Nothing);
        };
        let released = i32::try_from(items.len()).unwrap_or(i32::MAX);
        let advance = Advance {
            cursor: last.position,
            released,
            next_due_at: limits.run.map_or(situation.now, |budget| budget.spend(released).next_due_at),
            flow,
        };
        let mut chunk: Vec<Outgoing> = match kind {
            PassKind::First => items.iter().map(|item| release(pass, item)).collect(),
            PassKind::Replay => self.replayed(pass, &items),
            PassKind::Cancel => self.cancelled(conn, pass, &items).await?,
        };
        // The next step may arrive before this one is committed: it waits for the lock. If this one is not committed after all,
        // that step is one too early, and stale.
        chunk.push(next_step(pass.run_id, pass.number, pass.step + 1));
        self.publish(chunk).await?;
        passes::advance(conn, pass, advance).await?;
        if let Some(budget) = limits.installation {
            passes::spend_budget(conn, budget.spend(released).next_due_at).await?;
        }
        Ok(After::Nothing)
    }

    async fn situation(&self, conn: &mut PgConnection, run_id: Uuid) -> sqlx::Result<Option<Situation>> {
        passes::situation(conn, run_id).await
    }

    /// The rate limits of a step. The installation's budget stays locked until the step is committed.
    async fn limits(&self, conn: &mut PgConnection, pass: &Pass, situation: &Situation) -> sqlx::Result<Limits> {
        let burst = self.settings.window;
        let budget = |per_second: i32, next_due_at| {
            let ahead = per_second.saturating_add(per_second / AHEAD_OF_LIMIT + 1);
            Budget::new(ahead, next_due_at, situation.now, burst)
        };
        let within = |per_second| Rate::new(per_second).within(burst).saturating_add(1);
        let mut limits = Limits::default();
        if let Some(per_second) = situation.sends_per_second {
            limits.run = Some(budget(per_second, pass.next_due_at));
            limits.window = Some(within(per_second));
        }
        if let Some(per_second) = self.settings.sends_per_second {
            limits.installation = Some(budget(per_second, passes::lock_budget(conn).await?));
            let runs = i32::try_from(passes::count_running(conn).await?).unwrap_or(i32::MAX).max(1);
            let share = within(per_second) / runs + 1;
            limits.window = Some(limits.window.map_or(share, |window| window.min(share)));
        }
        Ok(limits)
    }

    /// How many items fit into the window.
    fn releasable(&self, situation: &Situation, limits: &Limits, flow: Flow, outstanding: i32, is_young: bool) -> i32 {
        let config = &self.settings;
        let time = config.window;
        // Twice what can be in progress: a sender that is done finds the next item waiting. A young pass gets three times that,
        // because the fastest senders would otherwise be limited to this window until their speed is measured.
        let least = situation.permits.saturating_mul(if is_young { 3 } else { 2 }).max(LEAST_WINDOW);
        // Under a limit, no more items wait than the limit allows within the window, besides those being sent.
        let most = limits.window.map(|window| window.saturating_add(situation.in_flight.min(situation.permits)));
        let window = flow.window(time, least, most.map_or(config.window_items, |most| most.min(config.window_items)));
        if situation.counters.of(ItemState::Retrying) >= config.deferred_items {
            0
        } else {
            room(window, outstanding).min(config.chunk_items)
        }
    }

    /// A replay's next chunk waits until the counters show the newest chunk as pending again, because the window depends on them.
    /// The wait is bounded: a lost result delays only its chunk.
    async fn is_unapplied(&self, conn: &mut PgConnection, pass: &Pass, situation: &Situation) -> sqlx::Result<bool> {
        let lost_after = TimeDelta::from_std(self.lost_after).unwrap_or(TimeDelta::MAX);
        Ok(pass.kind == Some(PassKind::Replay)
            && (TimeDelta::zero()..lost_after).contains(&(situation.now - pass.chunk_at))
            && passes::is_unapplied(conn, pass).await?)
    }

    /// A replayed item is pending before its message is published, so that the run is shown as running.
    fn replayed(&self, pass: &Pass, items: &[Item]) -> Vec<Outgoing> {
        let messages: Vec<ItemMessage> = items.iter().map(|item| item.message(pass.run_id).replayed()).collect();
        let results: Vec<ItemResult> =
            messages.iter().map(|message| message.result(ItemState::Pending, None)).collect();
        Outgoing::results(pass.run_id, &results, self.context.result_batch)
            .into_iter()
            .chain(messages.iter().map(Outgoing::new))
            .collect()
    }

    /// Claims unclaimed items for no worker and reports them as cancelled. Attempts in progress settle themselves. The claims are
    /// committed with the step, after the results are published.
    async fn cancelled(&self, conn: &mut PgConnection, pass: &Pass, items: &[Item]) -> sqlx::Result<Vec<Outgoing>> {
        let next: Vec<ItemMessage> = items.iter().map(|item| item.message(pass.run_id).awaited(item.state)).collect();
        let keys: Vec<Key> = next.iter().map(|item| item.key()).collect();
        // The run is cancelled, so no claim is granted to a worker, and the worker id does not matter.
        let claimed = attempts::claim(conn, 0, None, &keys, &Receipt::default()).await?;
        let withheld: HashMap<Key, Withheld> =
            claimed.iter().filter_map(|claim| Some((claim.key, claim.withheld?))).collect();
        let results: Vec<ItemResult> =
            next.iter().filter_map(|item| Some(outcome::withheld(*item, *withheld.get(&item.key())?, &[]))).collect();
        Ok(Outgoing::results(pass.run_id, &results, self.context.result_batch))
    }

    /// If this fails, the step is not committed.
    async fn publish(&self, messages: Vec<Outgoing>) -> Result<(), BrokerError> {
        self.context.publisher.publish_soon(messages).await
    }
}

fn is_stale(step: Step, pass: &Pass) -> bool {
    step.pass.is_some_and(|number| number != pass.number) || step.step.is_some_and(|step| step != pass.step)
}

fn next_step(run_id: Uuid, pass: i32, step: i32) -> Outgoing {
    let command = Command::Release(Step { pass: Some(pass), step: Some(step) });
    Outgoing::new(&RunMessage { run_id, command })
}

/// The first attempt of an item. If a crash repeats the chunk, the fence absorbs it.
fn release(pass: &Pass, item: &Item) -> Outgoing {
    let first = ItemMessage { attempt: 1, tries: 1, replays: 0, ..item.message(pass.run_id) };
    Outgoing::new(&first)
}
