//! Records which relays this process has stopped, pauses their runs, and passes operators' answers to the mailer.

use std::{mem, sync::Arc, time::Duration};

use mailrun_ledger::{Session, relay_stops};
use sqlx::{PgConnection, PgPool};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::mailer::{Mailer, Stopped};

/// How often the ledger is queried: an answer takes effect within this time.
const READ_EVERY: Duration = Duration::from_secs(1);

/// Synchronizes relay stops between the mailer and the ledger until `stop`, if the mailer can stop relays at all.
pub async fn watch(pool: PgPool, mailer: Arc<dyn Mailer>, limit: Duration, stop: CancellationToken) {
    if !mailer.stops_relays() {
        // If this task ended, the worker would end.
        return stop.cancelled().await;
    }
    let mut session = Session::new(&pool);
    let mut unwritten: Vec<Stopped> = Vec::new();
    while stop.run_until_cancelled(sleep(READ_EVERY)).await.is_some() {
        unwritten.extend(mailer.take_stopped());
        for stopped in mem::take(&mut unwritten) {
            let write = async |conn: &mut PgConnection| {
                relay_stops::stop(conn, &stopped.relay, &stopped.reason, &stopped.alike, &stopped.runs).await
            };
            if let Err(error) = session.run(limit, write).await {
                warn!(%error, relay = stopped.relay, "can't record a stopped relay, trying again");
                unwritten.push(stopped);
            }
        }
        // A stop that is not recorded yet would be taken for an answered one.
        if unwritten.is_empty() {
            match session.run(limit, async |conn: &mut PgConnection| relay_stops::recent(conn).await).await {
                Ok(stops) => mailer.learn(&stops),
                Err(error) => debug!(%error, "can't read the stopped relays"),
            }
        }
    }
}
