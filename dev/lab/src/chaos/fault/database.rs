//! Faults within PostgreSQL.

use std::time::Duration;

use anyhow::Result;
use futures::future::join_all;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use sqlx::{Connection as _, PgConnection, postgres::PgConnectOptions};
use tokio::{
    sync::watch::Receiver,
    time::{Instant, sleep, timeout},
};

use super::{
    super::{site::Site, watch::Stage},
    Fault, Reach, some_seconds,
};

/// Between two terminations of all sessions.
const BETWEEN_TERMINATIONS: Duration = Duration::from_millis(250);
/// Connections opened concurrently when exhausting the limit.
const ABREAST: usize = 20;
/// How often free connections are taken again.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// The number of readers that hold old snapshots.
const READERS: usize = 4;
/// The maximum duration of a snapshot, for long runs.
const LONGEST_SNAPSHOT: Duration = Duration::from_secs(600);

/// The faults of this file.
pub(super) const FAULTS: &[Fault] = &[
    Fault::new(
        "terminate-backends",
        "Terminate all PostgreSQL sessions, repeatedly for some seconds",
        |site, rng, _| Box::pin(terminate_backends(site, some_seconds(rng))),
    ),
    Fault::new("crowd-database", "Exhaust the connections of PostgreSQL for some seconds", |site, rng, _| {
        Box::pin(crowd(site, some_seconds(rng)))
    })
    .affects(Reach::Servers),
    Fault::new(
        "open-transaction",
        "A transaction holds an old snapshot and a lock on the counters for some seconds",
        |site, rng, _| Box::pin(open_transaction(site, some_seconds(rng))),
    ),
    Fault::new(
        "long-readers",
        "Readers hold old snapshots, each for up to a third of the run, during the whole run",
        |site, rng, stages| Box::pin(long_readers(site, stages, rng)),
    )
    .whole(),
    Fault::new("delete-worker-row", "Delete a sender's row in the table of workers", |site, _, _| {
        Box::pin(delete_worker_row(site))
    }),
];

/// Terminates all sessions except the bench's own, repeatedly for some time.
async fn terminate_backends(site: &Site<'_>, time: Duration) -> Result<()> {
    let end = Instant::now() + time;
    while Instant::now() < end {
        terminate(site).await?;
        sleep(BETWEEN_TERMINATIONS).await;
    }
    Ok(())
}

async fn terminate(site: &Site<'_>) -> Result<()> {
    sqlx::query(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
         WHERE datname = current_database() AND application_name <> current_setting('application_name')",
    )
    .execute(&site.pool)
    .await?;
    Ok(())
}

/// Takes all free connections, then those that our processes lost, and holds them for some time.
async fn crowd(site: &Site<'_>, time: Duration) -> Result<()> {
    let options = site.database();
    let mut crowd = Vec::new();
    fill(&options, &mut crowd).await;
    terminate(site).await?;
    let end = Instant::now() + time;
    while Instant::now() < end {
        fill(&options, &mut crowd).await;
        sleep(POLL_INTERVAL).await;
    }
    eprintln!("  {} connections taken", crowd.len());
    join_all(crowd.into_iter().map(PgConnection::close)).await;
    Ok(())
}

/// Connects until no connection is left.
async fn fill(options: &PgConnectOptions, crowd: &mut Vec<PgConnection>) {
    loop {
        let new = join_all((0..ABREAST).map(|_| PgConnection::connect_with(options))).await;
        let before = crowd.len();
        crowd.extend(new.into_iter().flatten());
        if crowd.len() < before + ABREAST {
            return;
        }
    }
}

/// Reads the whole run repeatedly, each time in a transaction that stays open until up to a third more of the run is settled. Never
/// returns.
async fn long_readers(site: &Site<'_>, stages: &Receiver<Stage>, rng: &mut StdRng) -> Result<()> {
    let readers = (0..READERS).map(|_| reader(site, stages.clone(), StdRng::seed_from_u64(rng.random())));
    join_all(readers).await;
    Ok(())
}

async fn reader(site: &Site<'_>, mut stages: Receiver<Stage>, mut rng: StdRng) {
    loop {
        let share = rng.random_range(0.05..0.33);
        if read(site, &mut stages, share).await.is_err() {
            // The server has just been killed, or has no free connection.
            sleep(BETWEEN_TERMINATIONS).await;
        }
    }
}

/// Reads the run, and holds the snapshot until this share more of it is settled.
async fn read(site: &Site<'_>, stages: &mut Receiver<Stage>, share: f64) -> Result<()> {
    let mut connection = PgConnection::connect_with(&site.database()).await?;
    let mut tx = connection.begin().await?;
    sqlx::query("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ").execute(&mut *tx).await?;
    sqlx::query("SELECT count(*) FROM run_items").execute(&mut *tx).await?;
    let until = stages.borrow().settled + share;
    let _ = timeout(LONGEST_SNAPSHOT, stages.wait_for(|stage| stage.settled >= until)).await;
    tx.rollback().await?;
    Ok(connection.close().await?)
}

/// Holds an old snapshot for twice this time, and during the second half a lock on the counters.
async fn open_transaction(site: &Site<'_>, time: Duration) -> Result<()> {
    let mut tx = site.pool.begin().await?;
    sqlx::query("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ").execute(&mut *tx).await?;
    sqlx::query("SELECT count(*) FROM run_items").execute(&mut *tx).await?;
    sleep(time).await;
    // The snapshot is old by now, so only another transaction can lock a row.
    let mut other = site.pool.begin().await?;
    sqlx::query("SELECT 1 FROM run_progress FOR UPDATE").execute(&mut *other).await?;
    sleep(time).await;
    other.rollback().await?;
    Ok(tx.rollback().await?)
}

/// Deletes the row of a live sender.
async fn delete_worker_row(site: &Site<'_>) -> Result<()> {
    let deleted = sqlx::query(
        "DELETE FROM workers WHERE id = (SELECT max(id) FROM workers
                                         WHERE permits > 0 AND id IN (SELECT id FROM live_workers))",
    )
    .execute(&site.pool)
    .await?;
    anyhow::ensure!(deleted.rows_affected() == 1, "no live sender");
    Ok(())
}
