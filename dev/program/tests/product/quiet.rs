//! A healthy installation logs nothing at ERROR, and nothing panics during shutdown.

use crate::support::{World, people, until};

/// Also while a run is idle, so that the sweeper checks the queues repeatedly.
#[tokio::test]
async fn a_healthy_installation_logs_no_errors_and_panics_nowhere() {
    let mut world = World::new(&[
        // Longer than the stall limit.
        ("MAILRUN_RETRY__RUNGS_MS", "100,6000"),
        ("MAILRUN_SWEEP__INTERVAL_MS", "50"),
        ("MAILRUN_WATCHDOG__IDLE_AFTER_MS", "400"),
        ("RUST_BACKTRACE", "0"),
    ])
    .await;
    world.workers();
    let extra = world.worker("send");
    let run = world.invite(&people(400)).await;
    world.until_progress(&run, "all but the retries", |progress| progress["sent"].as_i64() >= Some(396)).await;
    let swept = "SELECT extract(epoch FROM clock_timestamp() - updated_at)::float8 FROM run_progress";
    until("it is swept, or over", async || {
        let still: f64 = sqlx::query_scalar(swept).fetch_one(&world.pool).await.unwrap();
        still > 3.0 || world.progress(&run).await["over"] == true
    })
    .await;
    // One that has just started, and is still connecting.
    let young = world.worker("fan-out,send,progress");
    let started = "SELECT count(*) FROM workers";
    until("it has begun", async || sqlx::query_scalar::<_, i64>(started).fetch_one(&world.pool).await.unwrap() == 5)
        .await;
    assert!(world.terminate(young), "{}", world.log());
    assert!(world.terminate(extra), "{}", world.log());
    world.until_over(&run).await;
    world.retry(&run, "failed").await;
    world.until_progress(&run, "all sent", |progress| progress["sent"] == 400).await;
    world.terminate_all();
    let log = world.log();
    let wrong: Vec<&str> = log.lines().filter(|line| line.contains("ERROR") || line.contains("panicked")).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}
