//! The senders: permit → claim → send → outcome → publish → acknowledge.
//!
//! A permit comes before a claim and is given back when the outcome is on disk, so a worker that is killed leaves at most
//! as many attempts unknown as it has permits. What was sent is on disk with the next claim already, which takes a receipt
//! along: so a slow mail server never waits for RabbitMQ. Claims, follow-ups and results travel in batches that form by
//! themselves: each takes what has gathered while the one before was under way.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use mailrun_shared::{
    broker::{Outgoing, Publisher},
    config::Config,
    item::{ItemState, message_id},
    message::{ItemMessage, ItemResult, decode},
    retry::{Reconnect, in_process},
    store::{
        Session,
        attempts::{self, Claimed, Found},
        in_time, receipts,
    },
    topology::retry_queue,
};
use sqlx::PgPool;
use tokio::{
    sync::mpsc,
    task::yield_now,
    time::{sleep, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::{
    claims::{Claims, Key, Known},
    consumer::{Consumer, Delivery},
    heartbeat::Heartbeat,
    mailer::{Lane, Mail, Mailer, Outcome},
    outcome::{Next, Refused, Rules, after_cut_off, after_death, after_send, refused, withheld},
    permits::Permits,
    templates::{Read, Templates, TemplatesError},
    unsubscribe::Links,
};

/// How long deliveries are gathered for a claim while there are permits for more: a claim of many costs little more than
/// one of few. With a slow mail server the permits are used up, and nobody waits here.
const GATHER: Duration = Duration::from_millis(20);
/// How long outcomes are gathered for a report. Hardly anybody waits for it: permits come back with the next claim.
const GATHER_OUTCOMES: Duration = Duration::from_millis(5);
/// How often remembered outcomes are compared with the ledger, and how many at a time.
const REMEMBER_INTERVAL: Duration = Duration::from_millis(500);
const REMEMBER_BATCH: usize = 2_000;

/// What the senders of a process share.
pub struct Senders {
    pool: PgPool,
    publisher: Publisher,
    heartbeat: Arc<Heartbeat>,
    mailer: Arc<dyn Mailer>,
    /// Behind the @ of a Message-ID.
    domain: String,
    templates: Templates,
    links: Links,
    claims: Mutex<Claims>,
    permits: Arc<Permits>,
    rules: Rules,
    config: Config,
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

impl Senders {
    /// The senders of this process.
    #[must_use]
    pub fn new(
        config: Config,
        pool: PgPool,
        publisher: Publisher,
        heartbeat: Arc<Heartbeat>,
        mailer: Arc<dyn Mailer>,
        permits: Arc<Permits>,
        links: Links,
    ) -> Arc<Self> {
        Arc::new(Self {
            links,
            templates: Templates::new(pool.clone(), config.database.answer_timeout()),
            pool,
            publisher,
            heartbeat,
            mailer,
            domain: config.message_id_domain(),
            claims: Mutex::default(),
            permits,
            rules: Rules { rungs: config.rungs(), on_unknown: config.send.on_unknown },
            config,
        })
    }

    /// Sends until the consumer stops, then finishes what is in flight.
    pub async fn run(self: Arc<Self>, consumer: Consumer, stop: CancellationToken) {
        let (finished, outcomes) = mpsc::channel(self.config.permits());
        let intake = tokio::spawn(Arc::clone(&self).take(consumer, finished, stop));
        let remembering = CancellationToken::new();
        let remember = tokio::spawn(Arc::clone(&self).remember(remembering.clone()));
        // Ends when the intake and the last send have dropped their end.
        self.report(outcomes).await;
        remembering.cancel();
        let _ = (intake.await, remember.await);
    }

    /// Takes deliveries in and begins to send, until told to stop. Deliveries that were taken ahead by then go back to the
    /// queue when the consumer closes.
    async fn take(self: Arc<Self>, mut consumer: Consumer, finished: mpsc::Sender<Finished>, stop: CancellationToken) {
        let mut session = Session::new(&self.pool);
        while let Some(Some(batch)) = stop.run_until_cancelled(self.gather(&mut consumer)).await {
            if !self.heartbeat.is_fresh() {
                // It would only be given up again, and use up an attempt's number each time.
                self.put_off(batch, Instant::now()).await;
                continue;
            }
            match self.mailer.lane() {
                Lane::Open | Lane::Trying => self.begin(batch, &mut session, &finished).await,
                Lane::Closed { until, .. } => self.put_off(batch, until).await,
            }
        }
    }

    /// Waits for room and a delivery, then takes as many more of both as come within a moment.
    async fn gather(&self, consumer: &mut Consumer) -> Option<Vec<Delivery>> {
        self.permits.some().await;
        // Those that were claimed together end together: let them, or most would wait for the next claim.
        yield_now().await;
        let mut batch = vec![consumer.next().await?];
        let until = Instant::now() + GATHER;
        let most = if self.mailer.lane() == Lane::Trying { 1 } else { self.config.send.claim_batch };
        while batch.len() < most.min(self.permits.room())
            && let Ok(Some(delivery)) = timeout_at(until.into(), consumer.next()).await
        {
            batch.push(delivery);
        }
        Some(batch)
    }

    /// Claims a batch, starts what was granted and settles what was refused.
    async fn begin(
        self: &Arc<Self>,
        deliveries: Vec<Delivery>,
        session: &mut Session,
        finished: &mpsc::Sender<Finished>,
    ) {
        let mut asked = self.understand(deliveries).await;
        let ids: Vec<i64> = asked.keys().map(|key| key.0).collect();
        let numbers: Vec<i32> = asked.keys().map(|key| key.1).collect();
        let lost_before = self.claims().asking(asked.keys());
        let claimed = match self.claim(session, &ids, &numbers).await {
            Ok(claimed) => claimed,
            Err(error) => {
                warn!(%error, "claiming failed; looking again later");
                self.claims().answer_lost(asked.keys().copied());
                return self.park(asked.into_values().collect(), self.rules.shortest()).await;
            }
        };
        // There is room for each delivery, and at least one delivery for each claim.
        self.permits.begin(claimed.len());
        // One look for all: it is the same run's text, most of the time.
        let mut templates = HashMap::new();
        for run_id in claimed.iter().map(|claimed| claimed.run_id) {
            if let Entry::Vacant(place) = templates.entry(run_id) {
                place.insert(self.templates.of(run_id).await);
            }
        }
        for claimed in claimed {
            let Some(template) = templates.get(&claimed.run_id).cloned() else { continue };
            let key = (claimed.item_id, claimed.number);
            let Some(asked) = asked.remove(&key) else { continue };
            self.claims().begin(key, asked.deliveries);
            let (this, finished) = (Arc::clone(self), finished.clone());
            tokio::spawn(async move {
                let next = this.attempt(asked.item, claimed, template).await;
                if next.result.state == ItemState::Sent {
                    this.permits.accepted(key);
                }
                // The reporter outlives every sender of this channel.
                let _ = finished.send(Finished { key, next }).await;
            });
        }
        self.claims().answer_lost(lost_before.into_iter().filter(|key| asked.contains_key(key)));
        if !asked.is_empty() {
            self.settle_refused(asked).await;
        }
    }

    /// Claims nothing, so that nobody's attempt is used up: what has come waits on a rung until then.
    async fn put_off(&self, batch: Vec<Delivery>, until: Instant) {
        let asked = self.understand(batch).await;
        let wait = self.rules.rung_within(until.saturating_duration_since(Instant::now()));
        self.park(asked.into_values().collect(), wait).await;
    }

    /// Reads messages. Two that ask for the same attempt become one. What is not understood is dead.
    async fn understand(&self, deliveries: Vec<Delivery>) -> HashMap<Key, Asked> {
        let mut asked: HashMap<Key, Asked> = HashMap::new();
        for delivery in deliveries {
            match decode::<ItemMessage>(delivery.kind(), &delivery.body) {
                Ok(item) => asked
                    .entry((item.item_id, item.attempt))
                    .or_insert_with(|| Asked { item, deliveries: Vec::new() })
                    .deliveries
                    .push(delivery),
                Err(error) => crate::poison::bury(&self.publisher, delivery, &error.to_string()).await,
            }
        }
        asked
    }

    async fn claim(&self, session: &mut Session, ids: &[i64], numbers: &[i32]) -> sqlx::Result<Vec<Claimed>> {
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        let accepted = self.permits.receipt();
        let receipt = self.claims().receipt(&accepted);
        let (limit, me) = (self.config.database.answer_timeout(), self.heartbeat.worker_id());
        let claimed = session.run(limit, async |conn| attempts::claim(conn, me, ids, numbers, &receipt).await).await;
        match &claimed {
            Ok(_) => {
                self.claims().receipt_written(receipt.number, &accepted);
                self.permits.receipt_written(&accepted);
            }
            Err(_) => self.claims().receipt_lost(receipt.number),
        }
        claimed
    }

    /// Carries an attempt out, and decides what follows.
    async fn attempt(&self, item: ItemMessage, claimed: Claimed, template: Read) -> Next {
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
        let mail = Mail {
            message_id: format!("<{}>", message_id(claimed.item_id, claimed.run_id, &self.domain)),
            email: claimed.email,
            name: claimed.name,
            template,
            unsubscribe: self.links.of(claimed.item_id),
            position: claimed.position,
            tries: item.tries,
            replays: item.replays,
        };
        let repetitions = if self.mailer.bears_repetition() { self.config.retry.in_process_tries } else { 0 };
        let mut waits = in_process(Duration::from_millis(self.config.retry.in_process_first_ms), repetitions);
        loop {
            // Others may have declared this attempt unknown by now: then it is not for us to send it.
            if !self.heartbeat.is_fresh() {
                warn!(item_id = item.item_id, attempt = item.attempt, "cut off for too long: not sending");
                break after_cut_off(item);
            }
            let outcome = self.mailer.send(&mail).await;
            match (&outcome, waits.next()) {
                (Outcome::Retry(_), Some(wait)) => sleep(wait).await,
                _ => {
                    let closed_for =
                        if matches!(outcome, Outcome::Later(_)) { self.lane_wait() } else { Duration::ZERO };
                    break after_send(item, outcome, closed_for, &self.rules);
                }
            }
        }
    }

    /// How long the lane stays closed, as far as is known.
    fn lane_wait(&self) -> Duration {
        match self.mailer.lane() {
            Lane::Closed { until, .. } => until.saturating_duration_since(Instant::now()),
            Lane::Open | Lane::Trying => Duration::ZERO,
        }
    }

    /// Publishes follow-ups, then results, then acknowledges; batch after batch.
    async fn report(&self, mut outcomes: mpsc::Receiver<Finished>) {
        let mut batch = Vec::new();
        while outcomes.recv_many(&mut batch, self.config.send.result_batch).await > 0 {
            let until = Instant::now() + GATHER_OUTCOMES;
            while batch.len() < self.config.send.result_batch
                && let Ok(Some(finished)) = timeout_at(until.into(), outcomes.recv()).await
            {
                batch.push(finished);
            }
            let mut follow_ups = Vec::new();
            let mut results = Vec::with_capacity(batch.len());
            for finished in &mut batch {
                follow_ups.extend(finished.next.follow_up.take().map(Outgoing::from));
                results.push(finished.next.result.clone());
            }
            if !self.publish(follow_ups).await || !self.publish(self.results(&results)).await {
                return;
            }
            // All at once, so that the next claim is as large as this report.
            self.permits.confirmed(batch.iter().map(|Finished { key, next }| (*key, next.result.state)));
            let now = Instant::now();
            let mut claims = self.claims();
            for Finished { key, next } in batch.drain(..) {
                claims.done(key, next.result, now).into_iter().for_each(Delivery::ack);
            }
        }
    }

    /// Finds out why claims were refused, and does what that calls for.
    async fn settle_refused(&self, mut asked: HashMap<Key, Asked>) {
        let found = match self.find(&asked).await {
            Ok(found) => found,
            Err(error) => {
                warn!(%error, "refused claims can't be looked up; looking again later");
                return self.park(asked.into_values().collect(), self.rules.shortest()).await;
            }
        };
        let mut follow_ups = Vec::new();
        let mut results = Vec::new();
        let mut done = Vec::new();
        let mut later = Vec::new();
        for (key, Asked { item, deliveries }) in asked.drain() {
            let why = refused(found.get(&key), self.heartbeat.worker_id());
            debug!(item_id = key.0, attempt = key.1, ?why, "claim refused");
            match why {
                Refused::NoSuchItem => {
                    for delivery in deliveries {
                        crate::poison::bury(&self.publisher, delivery, "there is no such item").await;
                    }
                    continue;
                }
                Refused::Outdated => {}
                Refused::Accepted => results.push(item.result(ItemState::Sent, None)),
                Refused::Withheld(why) => results.push(withheld(item, why)),
                Refused::Orphaned => {
                    warn!(item_id = key.0, attempt = key.1, "its worker died: the outcome is unknown");
                    let next = after_death(item, self.rules.on_unknown);
                    follow_ups.extend(next.follow_up.map(Outgoing::from));
                    results.push(next.result);
                }
                Refused::Mine => {
                    for delivery in deliveries {
                        // Not within the match, which would keep the lock until its end.
                        let known = self.claims().meet(key, delivery);
                        match known {
                            Known::UnderWay => {}
                            Known::Done(result, delivery) => {
                                results.push(result);
                                done.push(delivery);
                            }
                            Known::InVain(delivery) => {
                                let next = after_cut_off(item);
                                follow_ups.extend(next.follow_up.map(Outgoing::from));
                                self.claims().done(key, next.result.clone(), Instant::now());
                                results.push(next.result);
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
        if self.publish(follow_ups).await && self.publish(self.results(&results)).await {
            done.into_iter().for_each(Delivery::ack);
        }
    }

    async fn find(&self, asked: &HashMap<Key, Asked>) -> sqlx::Result<HashMap<Key, Found>> {
        let ids: Vec<i64> = asked.keys().map(|key| key.0).collect();
        let numbers: Vec<i32> = asked.keys().map(|key| key.1).collect();
        let find = async {
            let mut conn = self.pool.acquire().await?;
            attempts::find(&mut conn, self.heartbeat.dead_after(), &ids, &numbers).await
        };
        let found = in_time(self.config.database.answer_timeout(), find).await?;
        Ok(found.into_iter().map(|found| ((found.item_id, found.number), found)).collect())
    }

    /// Looks again later, through a rung: a delivery is never held through a wait.
    async fn park(&self, asked: Vec<Asked>, wait: Duration) {
        let queue = retry_queue(wait);
        let messages =
            asked.iter().map(|Asked { item, .. }| Outgoing::new(item).of_run(item.run_id).to(queue.clone())).collect();
        if self.publish(messages).await {
            asked.into_iter().flat_map(|asked| asked.deliveries).for_each(Delivery::ack);
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
        let ids: Vec<i64> = keys.iter().map(|key| key.0).collect();
        let look = async { attempts::standings(&mut *self.pool.acquire().await?, &ids).await };
        let standings = in_time(self.config.database.answer_timeout(), look).await?;
        let standings: HashMap<_, _> = standings.into_iter().collect();
        let now = Instant::now();
        let repeats: Vec<ItemResult> = {
            let mut claims = self.claims();
            keys.iter().filter_map(|key| claims.looked_up(*key, standings.get(&key.0).copied(), now)).collect()
        };
        self.publish(self.results(&repeats)).await;
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
            in_time(self.config.database.answer_timeout(), delete).await?;
            *first = until;
        }
        Ok(())
    }

    fn results(&self, results: &[ItemResult]) -> Vec<Outgoing> {
        Outgoing::results(results, self.config.send.result_batch)
    }

    /// False: the process is ending; what is not confirmed stays unacknowledged.
    async fn publish(&self, messages: Vec<Outgoing>) -> bool {
        self.publisher.publish(messages).await.is_ok()
    }

    fn claims(&self) -> MutexGuard<'_, Claims> {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
