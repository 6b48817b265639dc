//! What waits, for monitoring: the depths of the queues, and what the ledger holds. Only the fan-out's role looks.

use std::{sync::Arc, time::Duration};

use lapin::Channel;
use mailrun_shared::{
    broker::{Broker, BrokerError, Link, depth},
    metric,
    store::{
        gauges::{self, Gauges},
        in_time,
    },
};
use metrics::gauge;
use sqlx::PgPool;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;
use tracing::debug;

/// Monitoring systems ask about as often.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// Looks until `stop`. What can't be seen keeps its last value: `/readyz` says why.
pub async fn run(pool: PgPool, broker: Arc<Broker>, limit: Duration, stop: CancellationToken) {
    let mut ticks = interval(LOOK_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut outlook = None;
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        let look = async {
            let read = async { gauges::read(&mut *pool.acquire().await?).await };
            match in_time(limit, read).await {
                Ok(gauges) => show(&gauges),
                Err(error) => debug!(%error, "the ledger can't be looked at"),
            }
            if let Err(error) = show_queues(&broker, &mut outlook).await {
                debug!(%error, "the queues can't be looked at");
                close(&mut outlook).await;
            }
        };
        if stop.run_until_cancelled(look).await.is_none() {
            break;
        }
    }
    close(&mut outlook).await;
}

fn show(gauges: &Gauges) {
    for (state, items) in gauges.items {
        gauge!(metric::LEDGER_ITEMS, "state" => state.name()).set(items as f64);
    }
    gauge!(metric::RUNS_OPEN).set(gauges.open_runs as f64);
    gauge!(metric::OUTBOX_MESSAGES).set(gauges.outbox_messages as f64);
    gauge!(metric::OUTBOX_OLDEST).set(gauges.outbox_oldest.as_secs_f64());
    gauge!(metric::SUPPRESSIONS).set(gauges.suppressions as f64);
    gauge!(metric::RELAYS_STOPPED).set(gauges.relays_stopped as f64);
}

/// Looks over a connection that is kept.
async fn show_queues(broker: &Broker, outlook: &mut Option<(Link, Channel)>) -> Result<(), BrokerError> {
    let look = async {
        if outlook.is_none() {
            let link = broker.connect("look").await?;
            let channel = link.channel().await?;
            *outlook = Some((link, channel));
        }
        let Some((_, channel)) = outlook.as_ref() else { return Ok(()) };
        for queue in broker.queue_names() {
            let messages = depth(channel, &queue).await?;
            gauge!(metric::QUEUE_MESSAGES, "queue" => queue).set(messages);
        }
        Ok(())
    };
    timeout(broker.answer_timeout(), look).await.map_err(|_| BrokerError::Timeout)?
}

async fn close(outlook: &mut Option<(Link, Channel)>) {
    if let Some((link, _)) = outlook.take() {
        link.close().await;
    }
}
