//! What a person asks for in the middle of a run.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use mailrun_core::run::Wanted;
use mailrun_ledger::people;
use mailrun_ledger::stored::SqlWanted;
use sqlx::PgPool;
use tokio::time::sleep;
use uuid::Uuid;

use super::super::site::Site;

/// A person presses the button again for so long while the pages do not answer.
const PATIENT_FOR: Duration = Duration::from_secs(30);
/// People who are erased at a time.
const ERASED: i64 = 5;
const BETWEEN: Duration = Duration::from_millis(200);

/// Pauses the run, waits until that must hold and for `time` more, and resumes it.
pub(super) async fn pause(site: &Site<'_>, time: Duration) -> Result<()> {
    let run_id: Uuid = sqlx::query_scalar("SELECT id FROM runs").fetch_one(&site.pool).await?;
    if wanted(&site.pool, run_id).await? != Wanted::Running {
        bail!("the run is paused already");
    }
    press(site, run_id, "pause", Wanted::Paused).await?;
    let paused_at = Instant::now();
    sleep(Duration::from_secs(1) + time).await;
    let resumed_at = Instant::now();
    site.weather.pauses.lock().map_err(|_| anyhow::anyhow!("a pause was broken off"))?.push((paused_at, resumed_at));
    press(site, run_id, "resume", Wanted::Running).await
}

/// Erases people, in whatever state their invitation is.
pub(super) async fn erase(site: &Site<'_>) -> Result<()> {
    let people: Vec<(i64, String)> =
        sqlx::query_as("SELECT id, email FROM users WHERE erased_at IS NULL ORDER BY random() LIMIT $1")
            .bind(ERASED)
            .fetch_all(&site.pool)
            .await?;
    let mut conn = site.pool.acquire().await?;
    for (id, email) in people {
        // Before it is done: it may be, although the answer is lost.
        let tombstone = people::Tombs::read(&mut conn).await?.of(&email);
        site.weather
            .erased
            .lock()
            .map_err(|_| anyhow::anyhow!("an erasure was broken off"))?
            .insert(tombstone, email.clone());
        people::erase(&mut conn, &email).await.with_context(|| format!("person {id} can't be erased"))?;
    }
    Ok(())
}

pub(super) async fn press(site: &Site<'_>, run_id: Uuid, button: &str, until: Wanted) -> Result<()> {
    let end = Instant::now() + PATIENT_FOR;
    loop {
        let pressed = site.visitor.press(run_id, button).await;
        // The answer may get lost, so the ledger says whether it was heard.
        if wanted(&site.pool, run_id).await.is_ok_and(|wanted| wanted == until) {
            return Ok(());
        }
        if Instant::now() > end {
            return pressed.with_context(|| format!("the pages do not {button} the run"));
        }
        sleep(BETWEEN).await;
    }
}

async fn wanted(pool: &PgPool, run_id: Uuid) -> sqlx::Result<Wanted> {
    let wanted: SqlWanted =
        sqlx::query_scalar("SELECT wanted FROM runs WHERE id = $1").bind(run_id).fetch_one(pool).await?;
    Ok(wanted.into())
}
