//! The senders: permit → claim → send → outcome → publish → acknowledge.
//!
//! A permit comes before a claim and is given back when the outcome is on disk, so a worker that is killed leaves at most
//! as many attempts unknown as it has permits. What was sent is on disk with the next claim already, which takes a receipt
//! along: so a slow mail server never waits for RabbitMQ. Claims, follow-ups and results travel in batches that form by
//! themselves: each takes what has gathered while the one before was under way.

use std::{
    collections::{BTreeMap, HashMap, HashSet, hash_map::Entry},
    iter,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use mailrun_app::config::Config;
use mailrun_broker::{Broker, Outgoing, Publisher};
use mailrun_core::{
    claim::Found,
    queue::{ITEMS_WAIT, retry_queue},
};
use mailrun_core::{
    item::{ItemState, Key},
    message::{ItemMessage, ItemResult},
    metric,
    retry::{Reconnect, in_process},
    signed_id::Named,
};
use mailrun_ledger::{
    Session,
    attempts::{self, Claimed, Paced},
    in_time, receipts,
};
use metrics::{Counter, Histogram, counter, histogram};
use sqlx::{PgConnection, PgPool};
use tokio::{
    sync::mpsc,
    task::yield_now,
    time::{sleep, sleep_until, timeout, timeout_at},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{debug, warn};
use uuid::Uuid;

use crate::{
    attempt::{Attempt, Checks},
    claims::{Claims, Known},
    gate::Gate,
    heartbeat::Heartbeat,
    held::Held,
    ids::Ids,
    mailer::{self, Mail, Mailer, Outcome},
    pace::Pace,
    permits::Permits,
    poison::{self, Refusal},
    stopped_runs::StoppedRuns,
    templates::{Read, Templates, TemplatesError},
};
use mailrun_broker::consumer::{Consumer, Delivery};
use mailrun_core::outcome::{Next, Refused, Rules, after_cut_off, after_death, after_send, refused, withheld};

/// How long deliveries are gathered for a claim while there are permits for more: a claim of many costs little more than
/// one of few. With a slow mail server the permits are used up, and nobody waits here.
const GATHER: Duration = Duration::from_millis(20);
/// Deliveries that are claimed by one statement at most.
const CLAIM_BATCH: usize = 200;
/// Tries within one attempt, where the far side allows an immediate retry, before the item waits for its retry delay.
const REPETITIONS: u32 = 1;
/// The time before the first of them; it doubles.
const FIRST_REPETITION: Duration = Duration::from_millis(20);
/// How long outcomes are gathered for a report. Hardly anybody waits for it: permits come back with the next claim.
const GATHER_OUTCOMES: Duration = Duration::from_millis(5);
/// Of limited runs, attempts are claimed whose send time lies within this: a connection that is free finds one waiting, and
/// few permits wait.
const AHEAD: Duration = Duration::from_millis(100);
/// How often remembered outcomes are compared with the ledger, and how many at a time.
const REMEMBER_INTERVAL: Duration = Duration::from_millis(500);
const REMEMBER_BATCH: usize = 2_000;
/// A delivery that has waited for a permit for so long is put off. With the longest attempt after it, it would otherwise be held
/// for longer than RabbitMQ allows.
const LONGEST_UNCLAIMED: Duration = Duration::from_secs(4 * 60);
/// How often that is looked for while there is no permit.
const LOOK_FOR_OLD_EVERY: Duration = Duration::from_secs(10);
/// For so long messages that the broker rejects are published again, before the sweeper is left to replace them. Their items keep
/// their permits meanwhile, and a deployment or a full queue may pass within it.
const INSIST: Duration = Duration::from_secs(10);
/// Each look at the results queue takes a connection.
const LOOK_AT_RESULTS_EVERY: Duration = Duration::from_secs(1);
/// Why a message is dead whose item is not in the ledger.
const NO_SUCH_ITEM: &str =
    "its run has no such item: the message belongs to another installation, or is newer than the ledger";

/// What the senders of a process share.
pub struct Senders {
    pool: PgPool,
    broker: Arc<Broker>,
    publisher: Publisher,
    heartbeat: Arc<Heartbeat>,
    mailer: Arc<dyn Mailer>,
    templates: Templates,
    ids: Ids,
    claims: Mutex<Claims>,
    permits: Arc<Permits>,
    pace: Arc<Pace>,
    stopped: Arc<StoppedRuns>,
    checks: Arc<Checks>,
    /// When the results queue was last looked at, and whether nothing waited.
    results_look: tokio::sync::Mutex<Option<(Instant, bool)>>,
    rules: Rules,
    config: Config,
    measures: Measures,
}

/// What is measured of every send: looked up once, since it costs more than counting.
struct Measures {
    claim_seconds: Histogram,
    send_seconds: Histogram,
    attempts: [Counter; Outcome::NAMES.len()],
}

impl Measures {
    fn new() -> Self {
        metric::begin(metric::REPLIES, "class", mailer::reply_classes());
        metric::begin(metric::ATTEMPTS, "outcome", Outcome::NAMES);
        Self {
            claim_seconds: histogram!(metric::CLAIM_SECONDS),
            send_seconds: histogram!(metric::SEND_SECONDS),
            attempts: Outcome::NAMES.map(|outcome| counter!(metric::ATTEMPTS, "outcome" => outcome)),
        }
    }
}

/// An attempt that has come to an end.
struct Finished {
    key: Key,
    next: Next,
}

/// A message with all the deliveries that ask for the same attempt.
struct Asked {
    item: ItemMessage,
    deliveries: Vec<Delivery>,
}

/// What is claimed together.
#[derive(Default)]
struct Batch {
    /// Messages that were held until their send time was near.
    held: Vec<Asked>,
    /// Messages that have just come.
    fresh: Vec<Delivery>,
}

impl Batch {
    fn len(&self) -> usize {
        self.held.len() + self.fresh.len()
    }
}

impl Senders {
    /// The senders of this process.
    #[must_use]
    #[expect(clippy::too_many_arguments, reason = "each is another part of the process")]
    pub fn new(
        config: Config,
        pool: PgPool,
        broker: Arc<Broker>,
        publisher: Publisher,
        heartbeat: Arc<Heartbeat>,
        mailer: Arc<dyn Mailer>,
        permits: Arc<Permits>,
        ids: Ids,
    ) -> Arc<Self> {
        let stopped = StoppedRuns::new(pool.clone(), config.database.answer_timeout);
        let pace = Pace::new(&config, pool.clone());
        let checks = Checks {
            heartbeat: Arc::clone(&heartbeat),
            broker: Arc::clone(&broker),
            stopped: Arc::clone(&stopped),
            pace: Arc::clone(&pace),
        };
        Arc::new(Self {
            ids,
            templates: Templates::new(pool.clone(), config.database.answer_timeout),
            pool,
            broker,
            publisher,
            heartbeat,
            mailer,
            claims: Mutex::default(),
            permits,
            pace,
            stopped,
            checks: Arc::new(checks),
            results_look: tokio::sync::Mutex::default(),
            rules: Rules { rungs: config.rungs(), on_unknown: config.send.on_unknown },
            config,
            measures: Measures::new(),
        })
    }

    /// Sends until the consumer stops, then finishes what is in flight.
    pub async fn run(self: Arc<Self>, consumer: Consumer, stop: CancellationToken) {
        let (finished, outcomes) = mpsc::channel(self.config.permits());
        let intake = tokio::spawn(Arc::clone(&self).take(consumer, finished, stop));
        let ending = CancellationToken::new();
        let remember = tokio::spawn(Arc::clone(&self).remember(ending.clone()));
        let watch = tokio::spawn(Arc::clone(&self.stopped).watch(ending.clone()));
        // Ends when the intake and the last send have dropped their end.
        Arc::clone(&self).report(outcomes).await;
        ending.cancel();
        let _ = (intake.await, remember.await, watch.await);
        self.last_receipt().await;
    }

    /// Takes deliveries in and begins to send, until told to stop. Deliveries that were taken ahead by then go back to the
    /// queue when the consumer closes.
    async fn take(self: Arc<Self>, mut consumer: Consumer, finished: mpsc::Sender<Finished>, stop: CancellationToken) {
        let mut session = Session::new(&self.pool);
        // Half of what the broker hands out: the other half is for runs without a limit.
        let mut held = Held::new(usize::from(self.config.send.prefetch) / 2);
        while let Some(Some(batch)) = stop.run_until_cancelled(self.gather(&mut consumer, &mut held)).await {
            if !self.heartbeat.is_fresh() {
                // It would only be given up again, and use up an attempt's number each time.
                self.put_off(batch, Instant::now()).await;
                continue;
            }
            match self.mailer.gate() {
                Gate::Open | Gate::Trying => self.begin(batch, &mut held, &mut session, &finished).await,
                Gate::Closed { until, .. } => self.put_off(batch, until).await,
            }
        }
    }

    /// Waits for room and a message, then takes as many more of both as come within a moment.
    async fn gather(self: &Arc<Self>, consumer: &mut Consumer, held: &mut Held<Asked>) -> Option<Batch> {
        loop {
            let has_room = timeout(LOOK_FOR_OLD_EVERY, self.permits.some()).await.is_ok();
            let old: Vec<Delivery> = iter::from_fn(|| consumer.next_older_than(LONGEST_UNCLAIMED)).collect();
            if !old.is_empty() {
                debug!(deliveries = old.len(), "no permit became free in time, putting deliveries off");
                self.put_off(Batch { fresh: old, ..Batch::default() }, Instant::now()).await;
            }
            if has_room {
                break;
            }
        }
        // Those that were claimed together end together: let them, or most would wait for the next claim.
        yield_now().await;
        let mut batch = Batch::default();
        while batch.len() == 0 {
            let held_until = held.next_at();
            tokio::select! {
                biased;
                () = sleep_until(held_until.unwrap_or_else(Instant::now).into()), if held_until.is_some() => {
                    batch.held.extend(held.take_due(Instant::now()));
                }
                delivery = consumer.next() => batch.fresh.push(delivery?),
            }
        }
        let until = Instant::now() + GATHER;
        let most = if self.mailer.gate() == Gate::Trying { 1 } else { CLAIM_BATCH };
        while batch.len() < most.min(self.permits.room()) {
            if let Some(due) = held.take_due(Instant::now()) {
                batch.held.push(due);
            } else if let Ok(Some(delivery)) = timeout_at(until.into(), consumer.next()).await {
                batch.fresh.push(delivery);
            } else {
                break;
            }
        }
        Some(batch)
    }

    /// Claims a batch, starts what was granted, holds what is not due and settles what was refused.
    async fn begin(
        self: &Arc<Self>,
        batch: Batch,
        held: &mut Held<Asked>,
        session: &mut Session,
        finished: &mpsc::Sender<Finished>,
    ) {
        let (keys, mut asked) = self.understand(batch).await;
        let lost_before = self.claims().asking(&keys);
        let paced = match self.claim(session, &keys).await {
            Ok(paced) => paced,
            Err(error) => {
                warn!(%error, "claiming failed; looking again later");
                self.claims().answer_lost(asked.keys().copied());
                return self.park(asked.into_values().collect(), self.rules.shortest()).await;
            }
        };
        let claimed_at = Instant::now();
        // Before anything is begun: there is room for each delivery, and at least one delivery for each claim.
        self.permits.begin(paced.claimed.len());
        self.claims().answer_lost(lost_before.into_iter().filter(|key| {
            // What was granted now had not been claimed.
            !paced.claimed.iter().any(|claimed| claimed.key == *key)
        }));
        // One look for all: it is the same run's text, most of the time.
        let mut templates = HashMap::new();
        for run_id in paced.claimed.iter().map(|claimed| claimed.key.run_id) {
            if let Entry::Vacant(place) = templates.entry(run_id) {
                place.insert(self.templates.of(run_id).await);
            }
        }
        for claimed in paced.claimed {
            let key = claimed.key;
            let Some(template) = templates.get(&key.run_id).cloned() else { continue };
            let Some(asked) = asked.remove(&key) else { continue };
            self.claims().begin(key, asked.deliveries);
            self.stopped.begin(key.run_id, 1);
            let slot = paced.slots.get(&key).map(|wait| (claimed_at + *wait).into());
            let attempt = Attempt::new(key.run_id, claimed_at.into(), slot, &self.checks);
            let (this, finished) = (Arc::clone(self), finished.clone());
            tokio::spawn(async move {
                let next = this.attempt(asked.item, claimed, template, &attempt).await;
                this.stopped.end(key.run_id);
                this.pace.add_unused(key.run_id, attempt.unused());
                if next.result.state == ItemState::Sent {
                    this.permits.accepted(key);
                }
                // The reporter outlives every sender of this channel.
                let _ = finished.send(Finished { key, next }).await;
            });
        }
        self.hold(paced.not_due, &mut asked, held).await;
        if !asked.is_empty() {
            self.settle_refused(asked).await;
        }
    }

    /// Keeps messages whose send time is not near until it is. What has to wait longer, or has no room, waits on a retry queue.
    async fn hold(
        self: &Arc<Self>,
        not_due: Vec<(Key, Duration)>,
        asked: &mut HashMap<Key, Asked>,
        held: &mut Held<Asked>,
    ) {
        let now = Instant::now();
        let mut beyond: BTreeMap<Duration, Vec<Asked>> = BTreeMap::new();
        for (key, wait) in not_due {
            let Some(asked) = asked.remove(&key) else { continue };
            if let Err(asked) = held.put(asked, now + wait.saturating_sub(AHEAD / 2), now) {
                beyond.entry(self.rules.rung_within(wait)).or_default().push(asked);
            }
        }
        for (wait, asked) in beyond {
            self.park(asked, wait).await;
        }
    }

    /// Claims nothing, so that nobody's attempt is used up: what has come waits on a rung until then.
    async fn put_off(self: &Arc<Self>, batch: Batch, until: Instant) {
        let (_, asked) = self.understand(batch).await;
        let wait = self.rules.rung_within(until.saturating_duration_since(Instant::now()));
        self.park(asked.into_values().collect(), wait).await;
    }

    /// Reads messages, in their order. Two that ask for the same attempt become one. What is not understood is dead.
    async fn understand(&self, batch: Batch) -> (Vec<Key>, HashMap<Key, Asked>) {
        let mut keys = Vec::with_capacity(batch.len());
        let mut asked: HashMap<Key, Asked> = HashMap::with_capacity(batch.len());
        let mut add = |item: ItemMessage, deliveries: Vec<Delivery>| match asked.entry(item.key()) {
            Entry::Occupied(mut same) => same.get_mut().deliveries.extend(deliveries),
            Entry::Vacant(place) => {
                keys.push(item.key());
                place.insert(Asked { item, deliveries });
            }
        };
        for Asked { item, deliveries } in batch.held {
            add(item, deliveries);
        }
        for delivery in batch.fresh {
            match poison::read::<ItemMessage>(&delivery) {
                Ok(item) => add(item, vec![delivery]),
                Err(refusal) => poison::refuse(&self.publisher, delivery, refusal).await,
            }
        }
        (keys, asked)
    }

    /// Claims what is due, and writes down what the mail server has accepted since the last claim.
    async fn claim(&self, session: &mut Session, keys: &[Key]) -> sqlx::Result<Paced> {
        if keys.is_empty() {
            return Ok(Paced::default());
        }
        let mut limits = self.pace.limits(keys.iter().map(|key| key.run_id)).await?;
        if let Some(limits) = &mut limits {
            self.pace.take_unused(limits);
        }
        let accepted = self.permits.receipt();
        let receipt = self.claims().receipt(&accepted);
        let (limit, me) = (self.config.database.answer_timeout, self.heartbeat.worker_id());
        let claim = async |conn: &mut PgConnection| match &limits {
            Some(limits) => attempts::claim_paced(conn, me, keys, &receipt, limits, AHEAD).await,
            None => Ok(Paced { claimed: attempts::claim(conn, me, keys, &receipt).await?, ..Paced::default() }),
        };
        let begun = Instant::now();
        let claimed = session.run(limit, claim).await;
        self.measures.claim_seconds.record(begun.elapsed());
        match &claimed {
            Ok(_) => {
                self.claims().receipt_written(receipt.number, &accepted);
                self.permits.receipt_written(&accepted);
            }
            Err(_) => {
                self.claims().receipt_lost(receipt.number);
                for (run_id, slots) in limits.into_iter().flat_map(|limits| limits.unused) {
                    self.pace.add_unused(run_id, slots);
                }
            }
        }
        claimed
    }

    /// Carries an attempt out, and decides what follows.
    async fn attempt(&self, item: ItemMessage, claimed: Claimed, template: Read, attempt: &Attempt) -> Next {
        if let Some(why) = claimed.withheld {
            return Next { follow_up: None, result: withheld(item, why) };
        }
        let template = match template {
            Ok(template) => template,
            Err(error) => {
                return match &*error {
                    TemplatesError::Ledger(error) => {
                        warn!(%error, item_id = item.item_id, "what the run says can't be read: not sending now");
                        after_cut_off(item)
                    }
                    TemplatesError::Template(error) => {
                        let outcome = Outcome::Failed { reason: error.to_string(), bad_address: false };
                        after_send(item, outcome, Duration::ZERO, &self.rules)
                    }
                };
            }
        };
        let named = Named { run_id: claimed.key.run_id, item_id: claimed.key.item_id };
        let mail = Mail {
            message_id: self.ids.message_id(named),
            email: claimed.email,
            name: claimed.name,
            template,
            unsubscribe: self.mailer.writes_mail().then(|| self.ids.link(named)).flatten(),
            position: claimed.position,
            tries: item.tries,
            replays: item.replays,
        };
        let repeats = self.mailer.bears_repetition() && !attempt.is_limited();
        let repetitions = if repeats { REPETITIONS } else { 0 };
        let mut waits = in_process(FIRST_REPETITION, repetitions);
        loop {
            let begun = Instant::now();
            let outcome = self.mailer.send(&mail, attempt).await;
            self.measures.send_seconds.record(begun.elapsed());
            self.measures.attempts[outcome.place()].increment(1);
            if let Outcome::Withdrawn(why) = &outcome {
                debug!(item_id = item.item_id, attempt = item.attempt, ?why, "attempt withdrawn");
            }
            match (&outcome, waits.next()) {
                (Outcome::Retry(_), Some(wait)) => sleep(wait).await,
                _ => {
                    let closed_for =
                        if matches!(outcome, Outcome::Later(_)) { self.gate_wait() } else { Duration::ZERO };
                    break after_send(item, outcome, closed_for, &self.rules);
                }
            }
        }
    }

    /// How long the lane stays closed, as far as is known.
    fn gate_wait(&self) -> Duration {
        match self.mailer.gate() {
            Gate::Closed { until, .. } => until.saturating_duration_since(Instant::now()),
            Gate::Open | Gate::Trying => Duration::ZERO,
        }
    }

    /// Publishes follow-ups, then results, then acknowledges; batch after batch.
    async fn report(self: Arc<Self>, mut outcomes: mpsc::Receiver<Finished>) {
        let mut batch = Vec::new();
        let late = TaskTracker::new();
        while outcomes.recv_many(&mut batch, self.config.send.result_batch).await > 0 {
            let until = Instant::now() + GATHER_OUTCOMES;
            while batch.len() < self.config.send.result_batch
                && let Ok(Some(finished)) = timeout_at(until.into(), outcomes.recv()).await
            {
                batch.push(finished);
            }
            let mut follow_ups = Vec::new();
            let mut of_follow_up = HashMap::new();
            for finished in &mut batch {
                if let Some(follow_up) = finished.next.follow_up.take().map(Outgoing::from) {
                    of_follow_up.insert(follow_up.id(), finished.key);
                    follow_ups.push(follow_up);
                }
            }
            let Ok(rejected) = self.publisher.offer(follow_ups).await else { return };
            let held: HashSet<Key> =
                rejected.iter().filter_map(|message| of_follow_up.get(&message.id())).copied().collect();
            let (held, batch): (Vec<Finished>, Vec<Finished>) =
                batch.drain(..).partition(|finished| held.contains(&finished.key));
            if !held.is_empty() {
                let this = Arc::clone(&self);
                late.spawn(async move {
                    this.insist(rejected).await;
                    this.settle(held).await;
                });
            }
            if !self.settle(batch).await {
                return;
            }
        }
        late.close();
        late.wait().await;
    }

    /// Publishes messages that the broker has rejected, for a while. Without them their items are found by the sweeper, and sent
    /// by what it puts back; a dead letter that is missing is no loss.
    async fn insist(&self, rejected: Vec<Outgoing>) {
        let _ = timeout(INSIST, self.publisher.publish(rejected)).await;
    }

    /// Publishes results, gives the permits back and acknowledges. False: the process is ending.
    async fn settle(&self, batch: Vec<Finished>) -> bool {
        let results = batch.iter().map(|finished| (finished.key.run_id, finished.next.result.clone())).collect();
        if !self.publish(self.results(results)).await {
            return false;
        }
        // All at once, so that the next claim is as large as this report.
        self.permits.confirmed(batch.iter().map(|Finished { key, next }| (*key, next.result.state)));
        let now = Instant::now();
        let mut claims = self.claims();
        for Finished { key, next } in batch {
            claims.done(key, next.result, now).into_iter().for_each(Delivery::ack);
        }
        true
    }

    /// Finds out why claims were refused, and does what that calls for.
    async fn settle_refused(self: &Arc<Self>, mut asked: HashMap<Key, Asked>) {
        let found = match self.find(&asked).await {
            Ok(found) => found,
            Err(error) => {
                warn!(%error, "refused claims can't be looked up; looking again later");
                return self.park(asked.into_values().collect(), self.rules.shortest()).await;
            }
        };
        let me = self.heartbeat.worker_id();
        let why: HashMap<Key, Refused> = asked.keys().map(|key| (*key, refused(found.get(key), me))).collect();
        // What a worker has reported before it ended may still have to be counted.
        let all_counted = !why.values().any(|why| *why == Refused::Orphaned) || self.all_results_are_counted().await;
        let mut follow_ups = Vec::new();
        let mut results = Vec::new();
        let mut done = Vec::new();
        let mut later = Vec::new();
        for (key, Asked { item, deliveries }) in asked.drain() {
            let why = why.get(&key).copied().unwrap_or(Refused::InOtherHands);
            debug!(item_id = key.item_id, attempt = key.attempt, ?why, "claim refused");
            match why {
                Refused::NoSuchItem => {
                    for delivery in deliveries {
                        poison::bury(&self.publisher, delivery, NO_SUCH_ITEM).await;
                    }
                    continue;
                }
                Refused::Later => {
                    for delivery in deliveries {
                        let refusal = Refusal::Newer { waiting_room: ITEMS_WAIT };
                        poison::refuse(&self.publisher, delivery, refusal).await;
                    }
                    continue;
                }
                Refused::Outdated => {}
                Refused::Paused { reopen } => {
                    if reopen {
                        results.push((key.run_id, item.result(ItemState::Pending, None)));
                    }
                }
                Refused::Accepted => results.push((key.run_id, item.result(ItemState::Sent, None))),
                Refused::Withheld(why) => results.push((key.run_id, withheld(item, why))),
                Refused::Orphaned if !all_counted => {
                    later.push(Asked { item, deliveries });
                    continue;
                }
                Refused::Orphaned => {
                    warn!(item_id = key.item_id, attempt = key.attempt, "its worker died: the outcome is unknown");
                    let next = after_death(item, self.rules.on_unknown);
                    follow_ups.extend(next.follow_up.map(Outgoing::from));
                    results.push((key.run_id, next.result));
                }
                Refused::Mine => {
                    for delivery in deliveries {
                        // Not within the match, which would keep the lock until its end.
                        let known = self.claims().meet(key, delivery);
                        match known {
                            Known::UnderWay => {}
                            Known::Done(result, delivery) => {
                                results.push((key.run_id, result));
                                done.push(delivery);
                            }
                            Known::InVain(delivery) => {
                                let next = after_cut_off(item);
                                follow_ups.extend(next.follow_up.map(Outgoing::from));
                                self.claims().done(key, next.result.clone(), Instant::now());
                                results.push((key.run_id, next.result));
                                done.push(delivery);
                            }
                            Known::Forgotten(delivery) => later.push(Asked { item, deliveries: vec![delivery] }),
                        }
                    }
                    continue;
                }
                Refused::InOtherHands => {
                    later.push(Asked { item, deliveries });
                    continue;
                }
            }
            done.extend(deliveries);
        }
        self.park(later, self.rules.shortest()).await;
        let Ok(rejected) = self.publisher.offer(follow_ups).await else { return };
        let (this, is_taken) = (Arc::clone(self), rejected.is_empty());
        let report = async move {
            this.insist(rejected).await;
            if this.publish(this.results(results)).await {
                done.into_iter().for_each(Delivery::ack);
            }
        };
        if is_taken {
            report.await;
        } else {
            tokio::spawn(report);
        }
    }

    async fn find(&self, asked: &HashMap<Key, Asked>) -> sqlx::Result<HashMap<Key, Found>> {
        let keys: Vec<Key> = asked.keys().copied().collect();
        let find = async {
            let mut conn = self.pool.acquire().await?;
            attempts::find(&mut conn, &keys).await
        };
        let found = in_time(self.config.database.answer_timeout, find).await?;
        Ok(found.into_iter().map(|found| (found.key, found)).collect())
    }

    /// Whether no result waits to be counted, as far as a look of less than a second ago has told.
    async fn all_results_are_counted(&self) -> bool {
        let mut newest = self.results_look.lock().await;
        if let Some((at, counted)) = *newest
            && at.elapsed() < LOOK_AT_RESULTS_EVERY
        {
            return counted;
        }
        let counted = match self.broker.waiting_results().await {
            Ok(waiting) => waiting == 0,
            Err(error) => {
                debug!(%error, "the results queue can't be looked at");
                false
            }
        };
        *newest = Some((Instant::now(), counted));
        counted
    }

    /// Looks again later, through a rung: a delivery is never held through a wait.
    async fn park(self: &Arc<Self>, asked: Vec<Asked>, wait: Duration) {
        let queue = retry_queue(wait);
        let messages: Vec<Outgoing> =
            asked.iter().map(|Asked { item, .. }| Outgoing::new(item).to(queue.clone())).collect();
        let ids: Vec<Uuid> = messages.iter().map(Outgoing::id).collect();
        let Ok(rejected) = self.publisher.offer(messages).await else { return };
        let held: HashSet<Uuid> = rejected.iter().map(Outgoing::id).collect();
        let (held, taken): (Vec<_>, Vec<_>) = ids.into_iter().zip(asked).partition(|(id, _)| held.contains(id));
        let ack = |asked: Vec<(Uuid, Asked)>| {
            asked.into_iter().flat_map(|(_, asked)| asked.deliveries).for_each(Delivery::ack);
        };
        ack(taken);
        if !held.is_empty() {
            let this = Arc::clone(self);
            tokio::spawn(async move {
                this.insist(rejected).await;
                ack(held);
            });
        }
    }

    /// Compares remembered outcomes with the ledger: forgets what is applied, repeats what is not.
    async fn remember(self: Arc<Self>, stop: CancellationToken) {
        let mut first_receipt = 0;
        let mut trouble = Reconnect::default();
        let mut wait = REMEMBER_INTERVAL;
        while stop.run_until_cancelled(sleep(wait)).await.is_some() {
            wait = match self.look_up(&mut first_receipt).await {
                // There is more of the kind: go on without a pause.
                Ok(REMEMBER_BATCH) => Duration::ZERO,
                Ok(_) => {
                    trouble.reset();
                    REMEMBER_INTERVAL
                }
                Err(error) => {
                    debug!(%error, "outcomes can't be compared with the ledger");
                    trouble.next_wait()
                }
            };
        }
    }

    /// `first_receipt`: those before it are deleted.
    async fn look_up(&self, first_receipt: &mut i64) -> sqlx::Result<usize> {
        let keys = self.claims().to_look_up(Instant::now(), REMEMBER_BATCH);
        if keys.is_empty() {
            return Ok(0);
        }
        let ids: Vec<i64> = keys.iter().map(|key| key.item_id).collect();
        let look = async { attempts::standings(&mut *self.pool.acquire().await?, &ids).await };
        let standings = in_time(self.config.database.answer_timeout, look).await?;
        let standings: HashMap<_, _> = standings.into_iter().collect();
        let now = Instant::now();
        let repeats: Vec<(Uuid, ItemResult)> = {
            let mut claims = self.claims();
            let mut repeat = |key: &Key| match standings.get(&key.item_id) {
                // The result waits for a process that understands the item, and so does what is remembered of it.
                Some(None) => {
                    claims.look_again(*key, now);
                    None
                }
                found => claims.looked_up(*key, found.copied().flatten(), now),
            };
            keys.iter().filter_map(|key| Some((key.run_id, repeat(key)?))).collect()
        };
        self.publish(self.results(repeats)).await;
        self.delete_receipts(first_receipt).await?;
        Ok(keys.len())
    }

    async fn delete_receipts(&self, first: &mut i64) -> sqlx::Result<()> {
        let until = self.claims().first_needed_receipt();
        if until > *first {
            let delete = async {
                let mut conn = self.pool.acquire().await?;
                receipts::delete(&mut conn, self.heartbeat.worker_id(), *first, until).await
            };
            in_time(self.config.database.answer_timeout, delete).await?;
            *first = until;
        }
        Ok(())
    }

    /// Writes down what was sent and is not seen to be counted: nobody repeats these results when the worker has ended.
    async fn last_receipt(&self) {
        let receipt = {
            let mut claims = self.claims();
            let keys = claims.without_receipt();
            claims.receipt(&keys)
        };
        let write =
            async { receipts::write(&mut *self.pool.acquire().await?, self.heartbeat.worker_id(), &receipt).await };
        if let Err(error) = in_time(self.config.database.answer_timeout, write).await {
            warn!(%error, sent = receipt.item_ids.len(), "the last receipt can't be written");
        }
    }

    fn results(&self, results: Vec<(Uuid, ItemResult)>) -> Vec<Outgoing> {
        Outgoing::results_by_run(results, self.config.send.result_batch)
    }

    /// False: the process is ending; what is not confirmed stays unacknowledged.
    async fn publish(&self, messages: Vec<Outgoing>) -> bool {
        self.publisher.publish(messages).await.is_ok()
    }

    fn claims(&self) -> MutexGuard<'_, Claims> {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
