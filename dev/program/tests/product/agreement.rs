//! Workers with different settings do not run side by side.

use crate::support::{World, people, until};

async fn registered(world: &World) -> i64 {
    sqlx::query_scalar("SELECT count(*) FROM workers").fetch_one(&world.pool).await.unwrap()
}

#[tokio::test]
async fn a_worker_with_other_settings_does_not_start_beside_a_live_one() {
    let mut world = World::new(&[]).await;
    world.workers();
    until("three workers are registered", async || registered(&world).await == 3).await;
    world.set("MAILRUN_FAN_OUT__SENDS_PER_SECOND", "7".into());
    world.set("MAILRUN_RETRY__RUNGS_MS", "100".into());
    let other = world.worker("send");
    assert!(!world.until_ended(other).await, "it refuses to start");
    let log = world.log();
    for difference in
        ["fan_out.sends_per_second is 7 here and no limit there", "retry.rungs_ms is 100 here and 100,200 there"]
    {
        assert!(log.contains(difference), "{difference} is not in the log:\n{log}");
    }
    assert_eq!(registered(&world).await, 3, "and is not registered");
}

#[tokio::test]
async fn workers_that_were_all_killed_do_not_keep_others_from_starting_with_other_settings() {
    let mut world = World::new(&[]).await;
    let killed = world.worker("fan-out,send,progress");
    until("it is registered", async || registered(&world).await == 1).await;
    world.kill(killed);
    world.set("MAILRUN_RETRY__RUNGS_MS", "150".into());
    world.worker("fan-out,send,progress");
    let run = world.invite(&people(10)).await;
    world.until_over(&run).await;
}
