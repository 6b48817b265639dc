//! Gauges for monitoring: queue depths, and counts from the ledger. Only the fan-out role exports them.

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

/// About the scrape interval of monitoring systems.
const READ_EVERY: Duration = Duration::from_secs(10);

/// Updates the gauges until `stop`. A gauge that can't be read keeps its last value; `/readyz` says why.
pub async fn run(context: Context, stop: CancellationToken) {
    let Context { pool, broker, answer_timeout: limit, .. } = context;
    let mut ticks = interval(READ_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut outlook = Outlook::new(Arc::clone(&broker));
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        let look = async {
            let read = async { gauges::read(&mut *pool.acquire().await?).await };
            match in_time(limit, read).await {
                Ok(gauges) => show(&gauges),
                Err(error) => debug!(%error, "can't read the ledger's gauges"),
            }
            if let Err(error) = show_queues(&broker, &mut outlook).await {
                debug!(%error, "can't read the queue depths");
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
        // A missing queue counts as empty.
        let messages = outlook.depth(&queue).await?.unwrap_or_default();
        gauge!(metric::QUEUE_MESSAGES, "queue" => queue).set(messages);
    }
    Ok(())
}
