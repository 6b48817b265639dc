//! The progress consumer: takes result messages, applies them to the ledger in batches, and acknowledges what is committed.

use std::time::Duration;

use mailrun_shared::{
    broker::Publisher,
    config::Config,
    message::{ItemResult, ResultsMessage, decode},
    retry::Reconnect,
    store::{
        Session, is_about_data,
        progress::{self, Applied},
    },
};
use sqlx::PgPool;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::{
    consumer::{Consumer, Delivery},
    poison,
};

/// How long results are gathered: far less than what a person sees of the bar.
const GATHER: Duration = Duration::from_millis(15);

/// A message and what it says.
struct Report {
    delivery: Delivery,
    results: Vec<ItemResult>,
}

/// The progress consumer of one process.
#[derive(Debug)]
pub struct Progress {
    session: Session,
    publisher: Publisher,
    config: Config,
}

impl Progress {
    /// The progress consumer of this process.
    #[must_use]
    pub fn new(config: Config, pool: &PgPool, publisher: Publisher) -> Self {
        Self { session: Session::new(pool), publisher, config }
    }

    /// Counts until the consumer stops. What is not counted by then is still on the queue.
    pub async fn run(mut self, mut consumer: Consumer, stop: CancellationToken) {
        while let Some(Some(first)) = stop.run_until_cancelled(consumer.next()).await {
            // More arrive meanwhile, and a transaction for many costs little more than one for few.
            sleep(GATHER).await;
            let mut reports = Vec::new();
            let mut delivery = Some(first);
            while let Some(next) = delivery.take() {
                match decode::<ResultsMessage>(next.kind(), &next.body) {
                    Ok(message) => reports.push(Report { delivery: next, results: message.results }),
                    Err(error) => poison::bury(&self.publisher, next, &error.to_string()).await,
                }
                if reports.len() < self.config.progress.batch_messages {
                    delivery = consumer.next_now();
                }
            }
            self.count(reports, &stop).await;
        }
    }

    /// Applies a batch. If the ledger refuses it for good, each message is applied by itself, so that one that can't be
    /// applied spoils nothing but itself.
    async fn count(&mut self, reports: Vec<Report>, stop: &CancellationToken) {
        match self.apply(&reports, stop).await {
            Some(Ok(applied)) => {
                debug!(?applied, messages = reports.len(), "counted");
                reports.into_iter().for_each(|report| report.delivery.ack());
            }
            Some(Err(error)) if reports.len() == 1 => {
                for report in reports {
                    poison::bury(&self.publisher, report.delivery, &format!("the ledger refuses it: {error}")).await;
                }
            }
            Some(Err(_)) => {
                for report in reports {
                    Box::pin(self.count(vec![report], stop)).await;
                }
            }
            // Stopping: the messages come again.
            None => {}
        }
    }

    /// Applies until it is done, is refused for good, or is told to stop (`None`).
    async fn apply(&mut self, reports: &[Report], stop: &CancellationToken) -> Option<sqlx::Result<Applied>> {
        let results: Vec<&ItemResult> = reports.iter().flat_map(|report| &report.results).collect();
        let mut trouble = Reconnect::default();
        loop {
            let limit = self.config.database.answer_timeout();
            match self.session.run(limit, async |conn| progress::apply(conn, &results).await).await {
                Err(error) if !is_about_data(&error) => {
                    let wait = trouble.next_wait();
                    warn!(%error, wait_ms = wait.as_millis(), "results can't be counted; trying again");
                    stop.run_until_cancelled(sleep(wait)).await?;
                }
                result => return Some(result),
            }
        }
    }
}
