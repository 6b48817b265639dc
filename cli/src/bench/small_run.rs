//! A small run behind a big one: how long a handful of people wait while a long list is under way.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use sqlx::PgConnection;
use tokio::time::sleep;

use super::{
    Settings, people,
    pipeline::{Mailrun, Run, Setup},
    place::Place,
};

/// People in a small run.
const SMALL: usize = 10;
/// Small runs, one after the other; fewer if the big one is over before.
const REPEAT: usize = 10;
/// From the first item of the big run to the first small run.
const SETTLE: Duration = Duration::from_secs(3);
/// The big run is alone for so long after the last small one, to see what they cost it.
const ALONE: Duration = Duration::from_secs(3);
/// Between two small runs.
const PAUSE: Duration = Duration::from_millis(500);
const POLL: Duration = Duration::from_millis(20);

/// How the small runs fared, and the big one.
#[derive(Clone, Debug)]
pub(super) struct Behind {
    /// People in the big run.
    pub(super) behind: usize,
    /// From each small run's POST to its end.
    pub(super) seconds: Vec<f64>,
    /// The big run's rate after the last small one.
    pub(super) alone: f64,
    /// Its rate while they came.
    pub(super) beside: f64,
}

/// Submits `behind` people, then small runs while they are under way. The big run is not waited for.
///
/// # Errors
/// When the big run is over before a single small one.
pub(super) async fn measure(place: &Place<'_>, settings: &Settings<'_>, behind: usize) -> Result<Behind> {
    let mut conn = place.database().await?;
    let mailrun = Mailrun::start(place, settings, Setup::default()).await?;
    place.quiet(&mut conn).await?;
    let measured = submit(&mailrun, &mut conn, behind).await;
    mailrun.services.stop().await;
    measured
}

async fn submit(mailrun: &Mailrun, conn: &mut PgConnection, behind: usize) -> Result<Behind> {
    let big = mailrun.submit(mailrun.visitor.fill_in(&people("guest", behind)).await?).await?;
    while settled(mailrun, &big).await? == 0 {
        sleep(POLL).await;
    }
    // A fresh million keeps the database busy by itself for a moment.
    sleep(SETTLE).await;
    let mut rate = Rate::begin(mailrun, &big).await?;
    let mut seconds = Vec::with_capacity(REPEAT);
    for number in 1..=REPEAT {
        let form = mailrun.visitor.fill_in(&people(&format!("small-{number}"), SMALL)).await?;
        let run = mailrun.submit(form).await?;
        let end = mailrun.until_over(&run, POLL).await?;
        ensure!(end.sent == SMALL as u64, "a small run was not sent");
        if mailrun.progress(&big).await?.over {
            break;
        }
        seconds.push(run.finished_after(conn).await?.as_secs_f64());
        sleep(PAUSE).await;
    }
    ensure!(!seconds.is_empty(), "the run of {behind} was over before a small one: ask for a larger one with --behind");
    let beside = rate.lap(mailrun, &big).await?;
    sleep(ALONE).await;
    let alone = rate.lap(mailrun, &big).await?;
    Ok(Behind { behind, seconds, alone, beside })
}

/// How fast a run moves between two looks at it.
struct Rate {
    at: Instant,
    settled: u64,
}

impl Rate {
    async fn begin(mailrun: &Mailrun, run: &Run) -> Result<Self> {
        Ok(Self { settled: settled(mailrun, run).await?, at: Instant::now() })
    }

    /// Items a second since the look before.
    async fn lap(&mut self, mailrun: &Mailrun, run: &Run) -> Result<f64> {
        let now = Self::begin(mailrun, run).await?;
        let before = std::mem::replace(self, now);
        let items = self.settled.checked_sub(before.settled).context("the run went backwards")?;
        Ok(items as f64 / (self.at - before.at).as_secs_f64())
    }
}

async fn settled(mailrun: &Mailrun, run: &Run) -> Result<u64> {
    Ok(mailrun.progress(run).await?.settled())
}
