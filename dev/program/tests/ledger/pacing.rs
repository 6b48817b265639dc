//! The meters of rate limits: one row each, always locked in the same order.

use std::{collections::BTreeMap, time::Instant};

use chrono::TimeDelta;
use mailrun_core::{item::ItemState::Pending, pacing::Rate};
use mailrun_ledger::pacing::{lock, rates, save};
use uuid::Uuid;

use crate::support::{execute, in_database, in_transaction, run_of, until_one_waits, value};

fn limited(run_ids: &[Uuid]) -> BTreeMap<Uuid, Option<Rate>> {
    run_ids.iter().map(|run_id| (*run_id, Some(Rate::new(10)))).collect()
}

#[test]
fn reads_the_rates_of_existing_runs() {
    in_transaction(async |conn| {
        let (free, slow) = (run_of(conn, &[Pending]).await.id, run_of(conn, &[Pending]).await.id);
        execute(conn, format!("UPDATE runs SET sends_per_second = 3 WHERE id = '{slow}'")).await;
        let found = rates(conn, &[free, slow, Uuid::new_v4()]).await.unwrap();
        assert_eq!(found, [(free, None), (slow, Some(Rate::new(3)))].into());
    });
}

#[test]
fn the_meter_of_a_newly_locked_run_starts_now() {
    in_transaction(async |conn| {
        let run_id = Uuid::new_v4();
        let mut meters = lock(conn, &limited(&[run_id]), None).await.unwrap();
        assert_eq!(meters.next_slot(run_id), Some(meters.now));
        assert_eq!(meters.take(run_id), Some(meters.now));
        assert_eq!(meters.next_slot(Uuid::new_v4()), None, "another run is not limited");
        save(conn, &meters).await.unwrap();
        let again = lock(conn, &limited(&[run_id]), None).await.unwrap();
        let next = again.next_slot(run_id).unwrap();
        // The interval is 100 ms. At most a tenth of it is made up for, for the time that has passed since.
        assert!(next - meters.now > TimeDelta::milliseconds(90), "{}", next - meters.now);
        assert_eq!(value::<i64>(conn, "SELECT count(*) FROM pacing").await, 1, "no row for the installation");
    });
}

#[test]
fn under_the_installations_limit_all_runs_share_its_slots() {
    in_transaction(async |conn| {
        let (first, second) = (Uuid::new_v4(), Uuid::new_v4());
        let runs = BTreeMap::from([(first, None), (second, None)]);
        let mut meters = lock(conn, &runs, Some(Rate::new(1))).await.unwrap();
        let slots = [first, second, first].map(|run_id| meters.take(run_id).unwrap());
        for pair in slots.windows(2) {
            let apart = pair[1] - pair[0];
            assert!(apart > TimeDelta::milliseconds(900) && apart <= TimeDelta::seconds(1), "{apart}");
        }
        save(conn, &meters).await.unwrap();
        let again = lock(conn, &runs, Some(Rate::new(1))).await.unwrap();
        assert!(again.next_slot(second).unwrap() > slots[2]);
    });
}

#[test]
fn capacity_unused_before_the_runs_began_is_not_made_up_for() {
    in_transaction(async |conn| {
        let run_id = Uuid::new_v4();
        let nil = Uuid::nil();
        execute(conn, format!("INSERT INTO pacing (run_id, next_at) VALUES ('{nil}', now() - interval '3 seconds')"))
            .await;
        let meters = lock(conn, &BTreeMap::from([(run_id, None)]), Some(Rate::new(1))).await.unwrap();
        save(conn, &meters).await.unwrap();
        let owed: i64 = value(conn, format!("SELECT owed_us FROM pacing WHERE run_id = '{nil}'")).await;
        assert!(owed < 1_000_000, "{owed}: the run has only begun");
    });
}

#[test]
fn unused_slots_return_to_both_meters() {
    let begun = Instant::now();
    in_transaction(async |conn| {
        let run_id = Uuid::new_v4();
        let mut meters = lock(conn, &limited(&[run_id]), Some(Rate::new(10))).await.unwrap();
        meters.unused(run_id, 4);
        save(conn, &meters).await.unwrap();
        let least: i64 = value(conn, "SELECT min(owed_us) FROM pacing").await;
        // More by as much as a slot was late.
        let late = i64::try_from(begun.elapsed().as_micros()).unwrap();
        assert!((400_000..=400_000 + late).contains(&least), "{least}");
    });
}

/// Claims always lock in the same order, so two of them cannot deadlock.
#[test]
fn a_second_claim_waits_and_reserves_behind_the_first() {
    in_database(async |ledger| {
        let runs = limited(&[Uuid::new_v4(), Uuid::new_v4()]);
        let run_id = *runs.keys().next().unwrap();
        let mut first = ledger.begin().await.unwrap();
        let mut second = ledger.begin().await.unwrap();
        let mut meters = lock(&mut first, &runs, Some(Rate::new(10))).await.unwrap();
        let taken = meters.take(run_id).unwrap();
        let (behind, ()) = tokio::join!(lock(&mut second, &runs, Some(Rate::new(10))), async {
            until_one_waits(ledger).await;
            save(&mut first, &meters).await.unwrap();
            first.commit().await.unwrap();
        });
        let behind = behind.unwrap();
        assert!(behind.now > taken, "its clock is read after the lock is held");
        assert!(behind.next_slot(run_id).unwrap() >= taken + TimeDelta::milliseconds(90));
    });
}

#[test]
fn a_meter_from_the_future_does_not_stop_sending() {
    in_transaction(async |conn| {
        let run_id = Uuid::new_v4();
        execute(conn, format!("INSERT INTO pacing (run_id, next_at) VALUES ('{run_id}', now() + interval '3 hours')"))
            .await;
        let meters = lock(conn, &limited(&[run_id]), None).await.unwrap();
        assert_eq!(meters.next_slot(run_id), Some(meters.now));
    });
}
