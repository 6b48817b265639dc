//! Tests: takes a test from its queue, claims it, hands it to the mailer once, and writes down what became of it.
//!
//! A test is for one who waits for it, so nothing is tried again: whatever goes wrong is the answer. Claiming it and having
//! the right to send it are one statement, so it goes out at most once; a worker that dies with it leaves it to the page to
//! say that nobody knows.

use std::{sync::Arc, time::Duration};

use mailrun_app::config::Config;
use mailrun_broker::Publisher;
use mailrun_core::{message::TestMessage, retry::Reconnect, template::Template};
use mailrun_ledger::{
    in_time,
    test_sends::{self, Claimed, TestState},
};
use sqlx::PgPool;
use tokio::{task::JoinSet, time::sleep};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use uuid::Uuid;

use crate::{
    attempt::Attempt,
    gate::Gate,
    ids::Ids,
    mailer::{Mail, Mailer, Outcome},
    poison,
};
use mailrun_broker::consumer::{Consumer, Delivery};

/// Tests handed out ahead, which are sent at the same time.
pub const PREFETCH: u16 = 4;

/// The sender of tests in this process.
#[derive(Clone)]
pub struct TestSends {
    pool: PgPool,
    publisher: Publisher,
    worker_id: i64,
    mailer: Arc<dyn Mailer>,
    ids: Ids,
    answer_timeout: Duration,
}

impl TestSends {
    /// Sends through `mailer`, in the name of the worker with this id.
    #[must_use]
    pub fn new(
        config: &Config,
        pool: PgPool,
        publisher: Publisher,
        worker_id: i64,
        mailer: Arc<dyn Mailer>,
        ids: Ids,
    ) -> Self {
        let answer_timeout = config.database.answer_timeout;
        Self { pool, publisher, worker_id, mailer, ids, answer_timeout }
    }

    /// Sends until the consumer stops, then finishes what is under way.
    pub async fn run(self, mut consumer: Consumer, stop: CancellationToken) {
        let mut under_way = JoinSet::new();
        while let Some(Some(delivery)) = stop.run_until_cancelled(consumer.next()).await {
            let (this, stop) = (self.clone(), stop.clone());
            under_way.spawn(async move { this.handle(delivery, &stop).await });
            while under_way.try_join_next().is_some() {}
        }
        under_way.join_all().await;
    }

    async fn handle(&self, delivery: Delivery, stop: &CancellationToken) {
        let test_id = match poison::read::<TestMessage>(&delivery) {
            Ok(TestMessage { test_id }) => test_id,
            Err(refusal) => return poison::refuse(&self.publisher, delivery, refusal).await,
        };
        let mut trouble = Reconnect::default();
        let claimed = loop {
            match self.claim(test_id).await {
                Ok(claimed) => break claimed,
                // Dropped unacknowledged, the delivery comes again.
                Err(error) if !goes_on(&error, &mut trouble, stop).await => return,
                Err(_) => {}
            }
        };
        // A repetition, or a test that is pruned: there is nothing to do.
        let Some(claimed) = claimed else { return delivery.ack() };
        let (state, reason) = became(self.send(test_id, claimed).await);
        info!(%test_id, ?state, "a test is over");
        while let Err(error) = self.finish(test_id, state, reason.as_deref()).await {
            if !goes_on(&error, &mut trouble, stop).await {
                return;
            }
        }
        delivery.ack();
    }

    async fn claim(&self, test_id: Uuid) -> sqlx::Result<Option<Claimed>> {
        let claim = async { test_sends::claim(&mut *self.pool.acquire().await?, test_id, self.worker_id).await };
        in_time(self.answer_timeout, claim).await
    }

    async fn finish(&self, test_id: Uuid, state: TestState, reason: Option<&str>) -> sqlx::Result<()> {
        let finish = async {
            test_sends::finish(&mut *self.pool.acquire().await?, test_id, self.worker_id, state, reason).await
        };
        in_time(self.answer_timeout, finish).await
    }

    async fn send(&self, test_id: Uuid, test: Claimed) -> Outcome {
        if let Gate::Closed { reason, .. } = self.mailer.gate() {
            return Outcome::Later(reason);
        }
        let template = match Template::new(&test.subject, &test.body) {
            Ok(template) => Arc::new(template),
            Err(error) => return Outcome::Failed { reason: error.to_string(), bad_address: false },
        };
        let mail = test_mail(test_id, self.ids.domain(), test.email, template, self.ids.test_link());
        self.mailer.send(&mail, &Attempt::unchecked()).await
    }
}

/// A mail that invites nobody. `domain` stands behind the @ of its Message-ID.
#[must_use]
pub fn test_mail(
    test_id: Uuid,
    domain: &str,
    email: String,
    template: Arc<Template>,
    unsubscribe: Option<String>,
) -> Mail {
    Mail {
        message_id: format!("<test.{test_id}@{domain}>"),
        email,
        name: None,
        template,
        unsubscribe,
        position: 1,
        tries: 1,
        replays: 0,
    }
}

/// What the page says of an outcome.
fn became(outcome: Outcome) -> (TestState, Option<String>) {
    match outcome {
        Outcome::Sent => (TestState::Sent, None),
        Outcome::Retry(reason) | Outcome::Later(reason) | Outcome::Failed { reason, .. } => {
            (TestState::Failed, Some(reason))
        }
        Outcome::Unknown(reason) => (TestState::Unknown, Some(reason)),
        // Nothing holds a test back.
        Outcome::Withdrawn(why) => (TestState::Failed, Some(format!("not sent: {why:?}"))),
    }
}

/// Waits before PostgreSQL is asked again. False: told to stop.
async fn goes_on(error: &sqlx::Error, trouble: &mut Reconnect, stop: &CancellationToken) -> bool {
    let wait = trouble.next_wait();
    warn!(%error, wait_ms = wait.as_millis(), "a test can't be claimed or finished; trying again");
    stop.run_until_cancelled(sleep(wait)).await.is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_hinders_a_test_is_its_answer() {
        assert_eq!(became(Outcome::Sent), (TestState::Sent, None));
        let failed = (TestState::Failed, Some("421 busy".to_owned()));
        for outcome in [
            Outcome::Retry("421 busy".into()),
            Outcome::Later("421 busy".into()),
            Outcome::Failed { reason: "421 busy".into(), bad_address: true },
        ] {
            assert_eq!(became(outcome), failed);
        }
        assert_eq!(became(Outcome::Unknown("lost".into())), (TestState::Unknown, Some("lost".into())));
    }
}
