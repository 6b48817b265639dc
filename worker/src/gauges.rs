//! What waits, for monitoring: the depths of the queues, and what the ledger holds. Only the fan-out's role looks.

use std::{sync::Arc, time::Duration};

use mailrun_broker::{Broker, BrokerError};
use mailrun_core::metric;
use mailrun_ledger::{
    gauges::{self, Gauges},
    in_time,
};
use metrics::gauge;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::context::Context;
use mailrun_broker::outlook::Outlook;

/// Monitoring systems ask about as often.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// Looks until `stop`. What can't be seen keeps its last value: `/readyz` says why.
pub async fn run(context: Context, stop: CancellationToken) {
    let Context { pool, broker, answer_timeout: limit, .. } = context;
    let mut ticks = interval(LOOK_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut outlook = Outlook::new(Arc::clone(&broker));
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        let look = async {
            let read = async { gauges::read(&mut *pool.acquire().await?).await };
            match in_time(limit, read).await {
                Ok(gauges) => show(&gauges),
                Err(error) => debug!(%error, "the ledger can't be looked at"),
            }
            if let Err(error) = show_queues(&broker, &mut outlook).await {
                debug!(%error, "the queues can't be looked at");
            }
        };
        if stop.run_until_cancelled(look).await.is_none() {
            break;
        }
    }
    outlook.close().await;
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

async fn show_queues(broker: &Broker, outlook: &mut Outlook) -> Result<(), BrokerError> {
    for queue in broker.queue_names() {
        // Nothing waits on a queue that does not exist.
        let messages = outlook.depth(&queue).await?.unwrap_or_default();
        gauge!(metric::QUEUE_MESSAGES, "queue" => queue).set(messages);
    }
    Ok(())
}
