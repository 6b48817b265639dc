//! A small run behind a large one: how long a few people wait while a long list is being sent.

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
/// From the first item of the large run to the first measurement.
const SETTLE: Duration = Duration::from_secs(3);
/// The large run is alone for this long, then beside small runs for at least as long, alternating, so that noise of some seconds affects
/// both.
const STRETCH: Duration = Duration::from_secs(3);
/// Pairs of such periods; fewer if the large run ends earlier.
const ROUNDS: usize = 6;
/// Between two small runs.
const PAUSE: Duration = Duration::from_millis(500);
const POLL: Duration = Duration::from_millis(20);

/// The measurements of the small runs and the large one.
#[derive(Clone, Debug)]
pub(super) struct Behind {
    /// People in the large run.
    pub(super) behind: usize,
    /// From each small run's POST to its end.
    pub(super) seconds: Vec<f64>,
    /// The large run's rate while it was alone.
    pub(super) alone: f64,
    /// Its rate during the small runs.
    pub(super) beside: f64,
}

/// Submits `behind` people, then small runs meanwhile. Does not wait for the large run; fails if it ends before a small one.
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
    // A new run of a million keeps the database busy for a moment.
    sleep(SETTLE).await;
    let mut seconds = Vec::new();
    let (mut alone, mut beside) = (Stretches::default(), Stretches::default());
    for round in 0..ROUNDS {
        // In alternating order, so that a drift cancels out.
        for small in if round % 2 == 0 { [false, true] } else { [true, false] } {
            let (from, begun) = (settled(mailrun, &big).await?, Instant::now());
            if small {
                let mut number = 0;
                while begun.elapsed() < STRETCH {
                    number += 1;
                    seconds.push(small_run(mailrun, conn, &format!("small-{round}-{number}")).await?);
                    sleep(PAUSE).await;
                }
            } else {
                sleep(STRETCH).await;
            }
            let end = mailrun.progress(&big).await?;
            if end.over {
                return finish(behind, seconds, &alone, &beside);
            }
            let stretches = if small { &mut beside } else { &mut alone };
            stretches.add(end.settled().checked_sub(from).context("the run went backwards")?, begun.elapsed());
        }
    }
    finish(behind, seconds, &alone, &beside)
}

fn finish(behind: usize, seconds: Vec<f64>, alone: &Stretches, beside: &Stretches) -> Result<Behind> {
    ensure!(
        !seconds.is_empty() && alone.items > 0 && beside.items > 0,
        "the run of {behind} ended before it was measured: use a larger --behind"
    );
    Ok(Behind { behind, seconds, alone: alone.rate(), beside: beside.rate() })
}

/// Sends to a few people and returns how long they waited after the POST.
async fn small_run(mailrun: &Mailrun, conn: &mut PgConnection, name: &str) -> Result<f64> {
    let form = mailrun.visitor.fill_in(&people(name, SMALL)).await?;
    let run = mailrun.submit(form).await?;
    let end = mailrun.until_over(&run, POLL).await?;
    ensure!(end.sent == SMALL as u64, "a small run was not sent");
    Ok(run.finished_after(conn).await?.as_secs_f64())
}

/// Items and time of a run in several periods.
#[derive(Default)]
struct Stretches {
    items: u64,
    time: Duration,
}

impl Stretches {
    fn add(&mut self, items: u64, time: Duration) {
        self.items += items;
        self.time += time;
    }

    /// Items per second.
    fn rate(&self) -> f64 {
        self.items as f64 / self.time.as_secs_f64()
    }
}

async fn settled(mailrun: &Mailrun, run: &Run) -> Result<u64> {
    Ok(mailrun.progress(run).await?.settled())
}
