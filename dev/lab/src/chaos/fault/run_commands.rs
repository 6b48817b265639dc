//! Actions of a person during a run: pausing it, and erasing people.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use mailrun_core::run::Wanted;
use mailrun_ledger::people;
use mailrun_ledger::stored::SqlWanted;
use sqlx::PgPool;
use tokio::time::sleep;
use uuid::Uuid;

use super::{super::site::Site, Fault, some_seconds};

/// How long a button is pressed repeatedly while the web server is unavailable.
const RETRY_FOR: Duration = Duration::from_secs(30);
/// People erased at a time.
const ERASED: i64 = 5;
const BETWEEN: Duration = Duration::from_millis(200);

/// The faults of this file.
pub(super) const FAULTS: &[Fault] = &[PAUSE_RUN, ERASE_PEOPLE];

pub(in super::super) const PAUSE_RUN: Fault =
    Fault::new("pause-run", "Pause the run for some seconds while retries wait on their queues", |site, rng, _| {
        Box::pin(pause(site, some_seconds(rng)))
    });

const ERASE_PEOPLE: Fault =
    Fault::new("erase-people", "Erase some people during the run", |site, _, _| Box::pin(erase(site)));

/// Pauses the run, waits until the pause must be in effect and for `time` more, and resumes it.
async fn pause(site: &Site<'_>, time: Duration) -> Result<()> {
    let run_id: Uuid = sqlx::query_scalar("SELECT id FROM runs").fetch_one(&site.pool).await?;
    if wanted(&site.pool, run_id).await? != Wanted::Running {
        bail!("the run is already paused");
    }
    press(site, run_id, "pause", Wanted::Paused).await?;
    let paused_at = Instant::now();
    sleep(Duration::from_secs(1) + time).await;
    let resumed_at = Instant::now();
    site.smtp_faults
        .pauses
        .lock()
        .map_err(|_| anyhow::anyhow!("a pause was interrupted"))?
        .push((paused_at, resumed_at));
    press(site, run_id, "resume", Wanted::Running).await
}

/// Erases people, in any state of their invitation.
async fn erase(site: &Site<'_>) -> Result<()> {
    let people: Vec<(i64, String)> =
        sqlx::query_as("SELECT id, email FROM users WHERE erased_at IS NULL ORDER BY random() LIMIT $1")
            .bind(ERASED)
            .fetch_all(&site.pool)
            .await?;
    let mut conn = site.pool.acquire().await?;
    for (id, email) in people {
        // Before the erasure: it may succeed although the response is lost.
        let tombstone = people::Tombs::read(&mut conn).await?.of(&email);
        site.smtp_faults
            .erased
            .lock()
            .map_err(|_| anyhow::anyhow!("an erasure was interrupted"))?
            .insert(tombstone, email.clone());
        people::erase(&mut conn, &email).await.with_context(|| format!("erasing person {id} failed"))?;
    }
    Ok(())
}

pub(super) async fn press(site: &Site<'_>, run_id: Uuid, button: &str, until: Wanted) -> Result<()> {
    let end = Instant::now() + RETRY_FOR;
    loop {
        let pressed = site.visitor.press(run_id, button).await;
        // The response may get lost, so the ledger decides.
        if wanted(&site.pool, run_id).await.is_ok_and(|wanted| wanted == until) {
            return Ok(());
        }
        if Instant::now() > end {
            return pressed.with_context(|| format!("the request to {button} the run failed"));
        }
        sleep(BETWEEN).await;
    }
}

async fn wanted(pool: &PgPool, run_id: Uuid) -> sqlx::Result<Wanted> {
    let wanted: SqlWanted =
        sqlx::query_scalar("SELECT wanted FROM runs WHERE id = $1").bind(run_id).fetch_one(pool).await?;
    Ok(wanted.into())
}
