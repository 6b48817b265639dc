//! The pump: releases a run chunk by chunk, so that runs take turns, and what is on the queues stays bounded.
//!
//! Each step publishes its chunk and the message for the next step, and commits cursor and step last. A crash anywhere
//! repeats the step, which the fence absorbs; a message that speaks of another step than the present one is stale.

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

/// Runs that one process works on at the same time.
const CONCURRENCY: usize = 4;
/// The window of a run when nobody is there to send.
const LEAST_WINDOW: i32 = 100;
/// Until a pass is so old, little is known of its speed: its window is small, and empty before its message has gone through
/// the waiting room. So it is looked at again sooner, a few times for each message.
const YOUTH: TimeDelta = TimeDelta::seconds(1);
const SOON: Duration = Duration::from_millis(15);
const LOOKS_SOON: usize = 8;
/// Under a rate limit items are released faster than the limit by this share, a quarter: the claims keep the limit, and must
/// always find something to claim.
const AHEAD_OF_LIMIT: i32 = 4;
/// Items of a resumed run that are put back at a time.
const PUT_BACK: i64 = 1_000;
/// What is put back follows itself at this distance, so that other runs' items come in between.
const PUT_BACK_EVERY: Duration = Duration::from_secs(1);
/// A message may arrive before progress has written down when its attempt is due, by this time at most.
const PROGRESS_LAG: Duration = Duration::from_secs(10);
/// While its queue is missing, a message is held for so long.
const INSIST: Duration = Duration::from_secs(60);
/// Before a step that failed is tried again.
const PAUSE_AFTER_ERROR: Duration = Duration::from_millis(500);

/// The pump of one process.
#[derive(Debug)]
pub struct FanOut {
    context: Context,
    settings: FanOutConfig,
    /// A chunk whose results are not counted within this time has lost them.
    lost_after: Duration,
}

/// Why a step was broken off. What it has published is published again by the next try, and absorbed.
#[derive(Debug, thiserror::Error)]
enum StepError {
    #[error(transparent)]
    Ledger(#[from] sqlx::Error),
    #[error(transparent)]
    Broker(#[from] BrokerError),
}

/// How fast a step may release items, under rate limits.
#[derive(Debug, Default)]
struct Limits {
    run: Option<Budget>,
    installation: Option<Budget>,
    /// Items that the tighter limit allows this run within the window; none: there is no limit.
    window: Option<i32>,
}

impl Limits {
    fn both(&self) -> impl Iterator<Item = Budget> {
        self.run.into_iter().chain(self.installation)
    }

    /// How many of the wished-for items may be released now.
    fn grant(&self, wish: i32, now: DateTime<Utc>) -> i32 {
        self.both().map(|budget| budget.due(now)).fold(wish, i32::min)
    }
}

/// What comes after a step.
#[derive(Debug)]
enum After {
    /// The message is spent.
    Nothing,
    /// There is no room, in a pass that has just begun.
    Soon,
    /// The same message again, in a moment: there is no room.
    Wait,
    /// The same message again, later: it is not wanted now.
    Paused,
    /// The run goes on after a pause: put back what senders have dropped.
    PutBack,
}

impl FanOut {
    /// The pump of this process.
    #[must_use]
    pub fn new(context: Context, settings: FanOutConfig, lost_after: Duration) -> Arc<Self> {
        Arc::new(Self { context, settings, lost_after })
    }

    /// Carries out run messages until the consumer stops, then finishes those under way.
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
        let mut looks = 0;
        let step = loop {
            let step = in_time(self.context.answer_timeout, self.step(&message)).await;
            if !matches!(step, Ok(Some(After::Soon))) || looks == LOOKS_SOON {
                break step;
            }
            looks += 1;
            sleep(SOON).await;
        };
        let after = match step {
            Ok(Some(after)) => after,
            Ok(None) => return poison::bury(&self.context.publisher, delivery, "there is no such run").await,
            Err(error) => {
                // An error that will not pass goes round as well, slowly and audibly, since the run must not be forgotten
                // over it.
                let passing = !matches!(&error, StepError::Ledger(error) if !may_pass(error));
                warn!(run_id = %message.run_id, %error, passing, "a step failed; trying again");
                sleep(PAUSE_AFTER_ERROR).await;
                After::Wait
            }
        };
        match after {
            After::Nothing => delivery.ack(),
            After::Soon | After::Wait => self.again(&message, delivery, queue::RUNS_WAIT).await,
            After::Paused => self.again(&message, delivery, queue::RUNS_PAUSED).await,
            After::PutBack => match self.put_back(message.run_id).await {
                Ok(()) => delivery.ack(),
                Err(error) => {
                    warn!(run_id = %message.run_id, %error, "a resumed run's items can't be put back; trying again");
                    sleep(PAUSE_AFTER_ERROR).await;
                    self.again(&message, delivery, queue::RUNS_WAIT).await;
                }
            },
        }
    }

    /// Sends a message round by a waiting room. Without that, it waits here, and takes nobody's place meanwhile.
    async fn again(&self, message: &RunMessage, delivery: Delivery, waiting_room: &'static str) {
        let message = Outgoing::new(message);
        match self.context.publisher.offer(vec![message.clone().to(waiting_room)]).await {
            Ok(rejected) if rejected.is_empty() => delivery.ack(),
            Ok(_) => {
                let publisher = self.context.publisher.clone();
                tokio::spawn(async move {
                    sleep(topology::waiting_time(waiting_room)).await;
                    // Given up, it comes again when the consumer connects anew.
                    if let Ok(Ok(())) = timeout(INSIST, publisher.publish(vec![message])).await {
                        delivery.ack();
                    }
                });
            }
            Err(_) => {}
        }
    }

    /// Carries out one message. None: there is no such run.
    async fn step(&self, message: &RunMessage) -> Result<Option<After>, StepError> {
        let mut tx = self.context.pool.begin().await?;
        let Some(pass) = passes::lock(&mut tx, message.run_id).await? else { return Ok(None) };
        let Some(situation) = self.situation(&mut tx, message.run_id).await? else { return Ok(None) };
        let after = match &message.command {
            Command::Release(step) if is_stale(*step, &pass) => {
                debug!(run_id = %message.run_id, ?step, pass = pass.number, "a stale step is dropped");
                After::Nothing
            }
            Command::Release(_) => self.release(&mut tx, &pass, &situation).await?,
            Command::Replay(_) if situation.wanted == Wanted::Cancelled => After::Nothing,
            Command::Replay(replay) => match passes::begun_by(&mut tx, replay.command_id).await? {
                Some(number) => self.start(message, number).await?,
                // One pass after the other: the one before has not reached every item yet. This message drives the next
                // one, so it must not make the sweeper think that the present one is driven.
                None if pass.done_at.is_none() && situation.wanted == Wanted::Paused => After::Paused,
                None if pass.done_at.is_none() => After::Wait,
                None => self.start(message, passes::begin_replay(&mut tx, &pass, replay).await?).await?,
            },
            Command::Cancel { command_id } => match passes::begun_by(&mut tx, *command_id).await? {
                Some(number) => self.start(message, number).await?,
                None => self.start(message, passes::begin_cancel(&mut tx, &pass, *command_id).await?).await?,
            },
            Command::Resume if situation.wanted == Wanted::Running => After::PutBack,
            Command::Resume => After::Nothing,
        };
        tx.commit().await?;
        Ok(Some(after))
    }

    /// Puts back what senders have dropped while a run was paused: whatever is released, due and not claimed. What has its
    /// message already is claimed once all the same.
    async fn put_back(&self, run_id: Uuid) -> Result<(), StepError> {
        let limit = self.context.answer_timeout;
        let waits = &self.context.kinds.installation().delays;
        let (mut after, mut put_back, mut chunks) = (0, 0, 0);
        loop {
            let items = async {
                let mut conn = self.context.pool.acquire().await?;
                passes::dropped_items(&mut conn, run_id, PROGRESS_LAG, after, PUT_BACK).await
            };
            let items = in_time(limit, items).await?;
            let Some(last) = items.last() else { break };
            after = last.position;
            put_back += items.len();
            let wait = waits.iter().filter(|wait| **wait <= PUT_BACK_EVERY * chunks).max();
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
        if put_back > 0 {
            info!(%run_id, put_back, "resumed, its waiting items are back on their queue");
        }
        Ok(())
    }

    /// Publishes the first step of a pass that the caller's transaction has begun. The same command again starts it
    /// again, which is stale if it has gone on by then.
    async fn start(&self, message: &RunMessage, pass: i32) -> Result<After, StepError> {
        info!(run_id = %message.run_id, pass, command = ?message.command, "a pass begins");
        // The step is published before the pass is committed, so it may come too early: it waits for the lock.
        self.publish(vec![next_step(message.run_id, pass, 0)]).await?;
        Ok(After::Nothing)
    }

    /// Releases the next chunk of the present pass, if there is room for it.
    async fn release(&self, conn: &mut PgConnection, pass: &Pass, situation: &Situation) -> Result<After, StepError> {
        if pass.done_at.is_some() {
            return Ok(After::Nothing);
        }
        let Some(kind) = pass.kind else {
            // A later version has begun it, and carries it out.
            passes::touch(conn, pass).await?;
            return Ok(After::Paused);
        };
        let cancels = kind == PassKind::Cancel;
        match situation.wanted {
            // The command that cancels it has a message of its own.
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
        let wish = if cancels {
            self.settings.chunk_items
        } else {
            self.wish(situation, &limits, flow, outstanding, is_young)
        };
        let granted = limits.grant(wish, situation.now);
        if granted <= 0 || self.is_unapplied(conn, pass, situation).await? {
            passes::touch(conn, pass).await?;
            return Ok(if wish <= 0 && is_young { After::Soon } else { After::Wait });
        }
        let items = passes::next_items(conn, pass, kind, granted).await?;
        let Some(last) = items.last() else {
            passes::finish(conn, pass).await?;
            debug!(run_id = %pass.run_id, pass = pass.number, "the pass has gone over the whole run");
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
        // The next step may arrive before this one is committed: it waits for the lock. If this one is not committed after
        // all, that is a step too early, and stale.
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

    /// How fast the run may be released. The installation's budget stays locked until the step is committed.
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

    /// How many items there is room for.
    fn wish(&self, situation: &Situation, limits: &Limits, flow: Flow, outstanding: i32, is_young: bool) -> i32 {
        let config = &self.settings;
        let time = config.window;
        // Twice what can be in flight: a sender that is done finds the next one waiting. At first some more, since even the
        // fastest senders have no more than this.
        let least = situation.permits.saturating_mul(if is_young { 3 } else { 2 }).max(LEAST_WINDOW);
        // Under a limit no more waits than it allows within the window, beside what is being sent.
        let most = limits.window.map(|window| window.saturating_add(situation.in_flight.min(situation.permits)));
        let window = flow.window(time, least, most.map_or(config.window_items, |most| most.min(config.window_items)));
        if situation.counters.of(ItemState::Retrying) >= config.deferred_items {
            0
        } else {
            room(window, outstanding).min(config.chunk_items)
        }
    }

    /// A replay's next chunk waits until the counters show the newest one as pending again, since the window is judged by
    /// them. But not for ever: if that got lost, it is lost for that chunk only.
    async fn is_unapplied(&self, conn: &mut PgConnection, pass: &Pass, situation: &Situation) -> sqlx::Result<bool> {
        let lost_after = TimeDelta::from_std(self.lost_after).unwrap_or(TimeDelta::MAX);
        Ok(pass.kind == Some(PassKind::Replay)
            && (TimeDelta::zero()..lost_after).contains(&(situation.now - pass.chunk_at))
            && passes::is_unapplied(conn, pass).await?)
    }

    /// A replayed item is pending again before it is on its way, so that the run is seen to be running.
    fn replayed(&self, pass: &Pass, items: &[Item]) -> Vec<Outgoing> {
        let messages: Vec<ItemMessage> = items.iter().map(|item| present(pass, item).replayed()).collect();
        let results: Vec<ItemResult> =
            messages.iter().map(|message| message.result(ItemState::Pending, None)).collect();
        Outgoing::results(pass.run_id, &results, self.context.result_batch)
            .into_iter()
            .chain(messages.iter().map(Outgoing::new))
            .collect()
    }

    /// Claims what nobody has claimed, for nobody, and reports it as cancelled. What somebody is sending at this moment
    /// settles by itself. The claims are committed with the step, after the results are published.
    async fn cancelled(&self, conn: &mut PgConnection, pass: &Pass, items: &[Item]) -> sqlx::Result<Vec<Outgoing>> {
        let next: Vec<ItemMessage> = items.iter().map(|item| present(pass, item).awaited(item.state)).collect();
        let keys: Vec<Key> = next.iter().map(|item| item.key()).collect();
        // The run is cancelled, so no claim is granted to this worker: its id is of no importance.
        let claimed = attempts::claim(conn, 0, None, &keys, &Receipt::default()).await?;
        let withheld: HashMap<Key, Withheld> =
            claimed.iter().filter_map(|claim| Some((claim.key, claim.withheld?))).collect();
        let results: Vec<ItemResult> =
            next.iter().filter_map(|item| Some(outcome::withheld(*item, *withheld.get(&item.key())?, &[]))).collect();
        Ok(Outgoing::results(pass.run_id, &results, self.context.result_batch))
    }

    /// The step is not committed if this fails.
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

fn present(pass: &Pass, item: &Item) -> ItemMessage {
    ItemMessage {
        run_id: pass.run_id,
        item_id: item.id,
        attempt: item.attempt,
        tries: item.tries,
        replays: item.replays,
        impersonal: item.impersonal,
    }
}

/// The first attempt of an item. If a crash repeats the chunk, the fence absorbs it.
fn release(pass: &Pass, item: &Item) -> Outgoing {
    let first = ItemMessage {
        run_id: pass.run_id,
        item_id: item.id,
        attempt: 1,
        tries: 1,
        replays: 0,
        impersonal: item.impersonal,
    };
    Outgoing::new(&first)
}
