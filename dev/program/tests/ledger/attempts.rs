//! Claims: which are granted, which are refused, and what is known about them later.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use mailrun_core::{
    claim::{Fate, Found, Owner, Withheld},
    item::{ItemState, Key, Standing},
    pacing::Rate,
    run::Wanted,
};
use mailrun_ledger::{
    attempts::{self, Limits, reserve},
    invitations::{INVITED, SUPPRESSED},
    may_pass,
};
use sqlx::PgConnection;
use uuid::Uuid;

use crate::support::{
    add_later_value, claim, claim_paced, execute, in_database, in_transaction, item, kill, receipt, run, run_of,
    set_wanted, suppress, until_one_waits, value, worker,
};

use ItemState::{Cancelled, Failed, Pending, Retrying, Sent};

async fn find(conn: &mut PgConnection, keys: &[Key]) -> Vec<Found> {
    attempts::find(conn, keys).await.unwrap().into_iter().map(|(found, _)| found).collect()
}

async fn owner(conn: &mut PgConnection, key: Key) -> Option<Owner> {
    find(conn, &[key]).await[0].owner
}

#[test]
fn grants_a_claim_with_the_data_to_send() {
    in_transaction(async |conn| {
        let listed = item(Pending).to("ann@example.org").listed_as("Ann", "Ann@example.org");
        let run = run(conn, &[item(Pending), listed]).await;
        let worker = worker(conn).await;
        let claimed = claim(conn, worker, &[run.key(1, 1)]).await;
        assert_eq!(claimed.len(), 1);
        assert_eq!((claimed[0].key, claimed[0].withheld), (run.key(1, 1), None));
        let recipient = claimed[0].recipient.clone().unwrap();
        assert_eq!((recipient.email.as_str(), recipient.name.as_deref()), ("Ann@example.org", Some("Ann")));
        assert_eq!(owner(conn, run.key(1, 1)).await, Some(Owner::Worker { id: worker, fate: Fate::Alive }));
    });
}

#[test]
fn an_older_item_uses_its_persons_name() {
    in_transaction(async |conn| {
        let run = run_of(conn, &[Pending]).await;
        let worker = worker(conn).await;
        execute(conn, format!("UPDATE users SET name = 'Ann' WHERE id = {}", run.items[0].user_id)).await;
        execute(conn, format!("UPDATE run_items SET name = NULL WHERE id = {}", run.items[0].id)).await;
        assert_eq!(claim(conn, worker, &run.keys()).await[0].recipient.clone().unwrap().name.as_deref(), Some("Ann"));
    });
}

#[test]
fn refuses_a_second_claim() {
    in_transaction(async |conn| {
        let run = run_of(conn, &[Pending, Pending]).await;
        let (first, second) = (worker(conn).await, worker(conn).await);
        assert_eq!(claim(conn, first, &[run.key(0, 1)]).await.len(), 1);
        assert!(claim(conn, first, &[run.key(0, 1)]).await.is_empty(), "not even to the same worker");
        let claimed = claim(conn, second, &run.keys()).await;
        assert_eq!(claimed.iter().map(|claimed| claimed.key).collect::<Vec<_>>(), [run.key(1, 1)]);
        assert_eq!(owner(conn, run.key(0, 1)).await, Some(Owner::Worker { id: first, fate: Fate::Alive }));
    });
}

/// The `WHERE` clause is [`Standing::allows`].
#[test]
fn grants_exactly_the_attempts_that_the_standing_allows() {
    in_transaction(async |conn| {
        let run = run(conn, &ItemState::ALL.map(|state| item(state).attempt(2))).await;
        execute(conn, format!("UPDATE users SET emailed_at = NULL WHERE id = {}", run.items[6].user_id)).await;
        let worker = worker(conn).await;
        for (index, state) in ItemState::ALL.into_iter().enumerate() {
            for attempt in [1, 2, 3, 4] {
                let granted = !claim(conn, worker, &[run.key(index, attempt)]).await.is_empty();
                assert_eq!(granted, Standing { attempt: 2, state }.allows(attempt), "{state:?} {attempt}");
            }
        }
    });
}

#[test]
fn refuses_a_claim_for_an_outdated_attempt() {
    in_transaction(async |conn| {
        let run = run(conn, &[item(Retrying).attempt(3)]).await;
        let worker = worker(conn).await;
        assert!(claim(conn, worker, &[run.key(0, 2), run.key(0, 3)]).await.is_empty());
        assert_eq!(value::<i64>(conn, "SELECT count(*) FROM attempts").await, 0, "it leaves no row");
    });
}

#[test]
fn refuses_a_claim_in_a_paused_run_and_grants_it_once_resumed() {
    in_transaction(async |conn| {
        let run = run_of(conn, &[Pending]).await;
        let worker = worker(conn).await;
        set_wanted(conn, run.id, Wanted::Paused).await;
        assert!(claim(conn, worker, &run.keys()).await.is_empty());
        assert_eq!(owner(conn, run.key(0, 1)).await, None);
        set_wanted(conn, run.id, Wanted::Running).await;
        assert_eq!(claim(conn, worker, &run.keys()).await.len(), 1);
    });
}

#[test]
fn refuses_a_claim_whose_item_belongs_to_another_run() {
    in_transaction(async |conn| {
        let (run, other) = (run_of(conn, &[Pending]).await, run_of(conn, &[Pending]).await);
        let worker = worker(conn).await;
        let mixed = Key { run_id: other.id, ..run.key(0, 1) };
        assert!(claim(conn, worker, &[mixed]).await.is_empty());
        assert!(find(conn, &[mixed]).await.is_empty(), "it is not in the ledger");
    });
}

#[test]
fn a_withheld_claim_belongs_to_no_worker() {
    in_transaction(async |conn| {
        let run = run_of(conn, &[Pending; 6]).await;
        let cancelled = run_of(conn, &[Pending]).await;
        set_wanted(conn, cancelled.id, Wanted::Cancelled).await;
        suppress(conn, &run.items[0].email).await;
        execute(conn, format!("UPDATE users SET erased_at = now() WHERE id = {}", run.items[1].user_id)).await;
        execute(conn, format!("DELETE FROM users WHERE id = {}", run.items[2].user_id)).await;
        execute(conn, format!("UPDATE users SET emailed_at = now() WHERE id = {}", run.items[3].user_id)).await;
        execute(conn, format!("UPDATE run_items SET overtaken = true WHERE id = {}", run.items[4].id)).await;
        let worker = worker(conn).await;
        for (key, expected) in [
            (cancelled.key(0, 1), Some(Withheld::Cancelled)),
            (run.key(0, 1), Some(Withheld::ByJob(SUPPRESSED))),
            (run.key(1, 1), Some(Withheld::Deleted)),
            (run.key(2, 1), Some(Withheld::Deleted)),
            (run.key(3, 1), Some(Withheld::ByJob(INVITED))),
            (run.key(4, 1), Some(Withheld::ByJob(INVITED))),
            (run.key(5, 1), None),
        ] {
            let claimed = claim(conn, worker, &[key]).await;
            assert_eq!(claimed[0].withheld, expected);
            let owner = owner(conn, key).await.unwrap();
            match expected {
                Some(why) => assert_eq!(owner, Owner::Nobody(why)),
                None => assert_eq!(owner, Owner::Worker { id: worker, fate: Fate::Alive }),
            }
            assert!(claim(conn, worker, &[key]).await.is_empty(), "it is claimed permanently");
        }
        let deleted = run.items[2].id;
        assert_eq!(value::<i64>(conn, format!("SELECT worker_id FROM attempts WHERE item_id = {deleted}")).await, -2);
    });
}

#[test]
fn only_one_of_two_concurrent_workers_gets_the_claim() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let run = run_of(&mut conn, &[Pending, Pending]).await;
        let (first, second) = (worker(&mut conn).await, worker(&mut conn).await);
        let mut tx = ledger.begin().await.unwrap();
        assert_eq!(claim(&mut tx, first, &run.keys()).await.len(), 2);
        // The second worker claims in the other order before the first one has committed: it waits, and is refused.
        let backwards = [run.key(1, 1), run.key(0, 1)];
        let (claimed, ()) = tokio::join!(claim(&mut conn, second, &backwards), async {
            until_one_waits(ledger).await;
            tx.commit().await.unwrap();
        });
        assert!(claimed.is_empty());
        assert_eq!(owner(&mut conn, run.key(0, 1)).await, Some(Owner::Worker { id: first, fate: Fate::Alive }));
    });
}

#[test]
fn a_rolled_back_claim_is_granted_to_the_next_worker() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let run = run_of(&mut conn, &[Pending]).await;
        let (first, second) = (worker(&mut conn).await, worker(&mut conn).await);
        let mut tx = ledger.begin().await.unwrap();
        claim(&mut tx, first, &run.keys()).await;
        let keys = run.keys();
        let (claimed, ()) = tokio::join!(claim(&mut conn, second, &keys), async {
            until_one_waits(ledger).await;
            tx.rollback().await.unwrap();
        });
        assert_eq!(claimed.len(), 1);
    });
}

#[test]
fn writes_the_receipt_with_the_claim_whatever_is_granted() {
    in_transaction(async |conn| {
        let run = run_of(conn, &[Pending, Pending]).await;
        let worker = worker(conn).await;
        claim(conn, worker, &[run.key(0, 1)]).await;
        let outdated = [run.key(1, 0)];
        let claimed = attempts::claim(conn, worker, None, &outdated, &receipt(7, &[run.key(0, 1)])).await.unwrap();
        assert!(claimed.is_empty());
        assert_eq!(value::<i64>(conn, "SELECT number FROM receipts").await, 7);
        kill(conn, worker).await;
        assert_eq!(owner(conn, run.key(0, 1)).await, Some(Owner::Worker { id: worker, fate: Fate::Accepted }));
    });
}

#[test]
fn writes_no_empty_receipt() {
    in_transaction(async |conn| {
        let run = run_of(conn, &[Pending]).await;
        let worker = worker(conn).await;
        claim(conn, worker, &run.keys()).await;
        assert_eq!(value::<i64>(conn, "SELECT count(*) FROM receipts").await, 0);
    });
}

/// A claim whose response was lost may have been made: repeating it with the same receipt must not claim anything.
#[test]
fn an_existing_receipt_number_fails_the_whole_claim() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let run = run_of(&mut conn, &[Pending, Pending]).await;
        let worker = worker(&mut conn).await;
        let of_first = receipt(1, &[run.key(0, 1)]);
        attempts::claim(&mut conn, worker, None, &[run.key(0, 1)], &of_first).await.unwrap();
        let error = attempts::claim(&mut conn, worker, None, &[run.key(1, 1)], &of_first).await.unwrap_err();
        assert!(!may_pass(&error), "{error}");
        assert_eq!(owner(&mut conn, run.key(1, 1)).await, None);
    });
}

#[test]
fn finds_the_fate_of_the_claims_worker() {
    in_transaction(async |conn| {
        let run = run_of(conn, &[Pending; 4]).await;
        let (alive, stopped, dead) = (worker(conn).await, worker(conn).await, worker(conn).await);
        for (index, worker) in [alive, stopped, dead].into_iter().enumerate() {
            claim(conn, worker, &[run.key(index, 1)]).await;
        }
        execute(conn, format!("UPDATE workers SET stopped_at = now() WHERE id = {stopped}")).await;
        kill(conn, dead).await;
        let found = find(conn, &run.keys()).await;
        let fate = |id: i64, fate| Some(Owner::Worker { id, fate });
        let expected = [fate(alive, Fate::Alive), fate(stopped, Fate::Dead), fate(dead, Fate::Dead), None];
        for (index, owner) in expected.into_iter().enumerate() {
            let found = found.iter().find(|found| found.key == run.key(index, 1)).unwrap();
            assert_eq!((found.owner, found.wanted), (owner, Some(Wanted::Running)));
            assert_eq!(found.standing, Some(Standing::NEW));
        }
        execute(conn, format!("DELETE FROM workers WHERE id = {alive}")).await;
        assert_eq!(owner(conn, run.key(0, 1)).await, fate(alive, Fate::Dead), "its row was pruned");
    });
}

/// A receipt of another attempt proves nothing about this one.
#[test]
fn a_receipt_counts_for_its_own_attempt_and_worker() {
    in_transaction(async |conn| {
        let run = run_of(conn, &[Pending, Pending]).await;
        let (dead, other) = (worker(conn).await, worker(conn).await);
        claim(conn, dead, &run.keys()).await;
        kill(conn, dead).await;
        for (worker, key) in [(dead, run.key(0, 2)), (other, run.key(1, 1))] {
            mailrun_ledger::receipts::write(conn, worker, &receipt(1, &[key])).await.unwrap();
        }
        for index in [0, 1] {
            assert_eq!(owner(conn, run.key(index, 1)).await, Some(Owner::Worker { id: dead, fate: Fate::Dead }));
        }
    });
}

#[test]
fn finds_items_of_a_deleted_run() {
    in_transaction(async |conn| {
        let run = run_of(conn, &[Failed]).await;
        execute(conn, format!("DELETE FROM run_progress WHERE run_id = '{}'", run.id)).await;
        execute(conn, format!("DELETE FROM runs WHERE id = '{}'", run.id)).await;
        let found = find(conn, &[run.key(0, 2)]).await;
        assert_eq!((found[0].wanted, found[0].standing), (None, Some(Standing { attempt: 1, state: Failed })));
    });
}

#[test]
fn a_later_versions_state_has_no_standing() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let run = run_of(&mut conn, &[Pending]).await;
        add_later_value(&mut conn, "item_state").await;
        execute(&mut conn, "UPDATE run_items SET state = 'later'").await;
        let worker = worker(&mut conn).await;
        assert!(claim(&mut conn, worker, &[run.key(0, 1), run.key(0, 2)]).await.is_empty());
        assert_eq!(find(&mut conn, &run.keys()).await[0].standing, None);
        let item_id = run.items[0].id;
        assert_eq!(attempts::standings(&mut conn, &[item_id]).await.unwrap(), [(item_id, None)]);
    });
}

#[test]
fn reads_standings() {
    in_transaction(async |conn| {
        let run = run(conn, &[item(Sent).attempt(3)]).await;
        let item_id = run.items[0].id;
        let standing = Standing { attempt: 3, state: Sent };
        assert_eq!(attempts::standings(conn, &[item_id, -1]).await.unwrap(), [(item_id, Some(standing))]);
    });
}

fn limits(run_id: Uuid, per_second: i32) -> Limits {
    Limits { runs: BTreeMap::from([(run_id, Some(Rate::new(per_second)))]), ..Limits::default() }
}

#[test]
fn claims_items_with_a_near_slot_under_a_rate_limit() {
    in_transaction(async |conn| {
        let run = run_of(conn, &[Pending; 5]).await;
        let worker = worker(conn).await;
        let limits = limits(run.id, 10);
        let ahead = Duration::from_millis(250);
        let paced = claim_paced(conn, worker, &run.keys(), &limits, ahead).await;
        // Slots at 0, 100 and 200 ms are within reach. The other attempts get the wait until theirs.
        assert_eq!(paced.claimed.len(), 3);
        // Minus the microseconds since the meter was created, which are made up for.
        let tenths = |wait: &Duration| (wait.as_secs_f64() * 10.0).round() as i32;
        let mut waits: Vec<i32> = paced.slots.values().map(tenths).collect();
        waits.sort_unstable();
        assert_eq!(waits, [0, 1, 2]);
        let not_due: Vec<_> = paced.not_due.iter().map(|(key, wait)| (*key, tenths(wait))).collect();
        assert_eq!(not_due, [(run.key(3, 1), 3), (run.key(4, 1), 4)]);
        assert_eq!(owner(conn, run.key(3, 1)).await, None, "it is not claimed");

        // The next claim continues after them.
        let paced = claim_paced(conn, worker, &[run.key(3, 1)], &limits, Duration::from_secs(1)).await;
        let wait = paced.slots[&run.key(3, 1)];
        assert!(wait > Duration::from_millis(200) && wait <= Duration::from_millis(300), "{wait:?}");
    });
}

#[test]
fn refused_and_withheld_attempts_take_no_slot() {
    in_transaction(async |conn| {
        let run = run_of(conn, &[Pending; 3]).await;
        let worker = worker(conn).await;
        claim(conn, worker, &[run.key(0, 1)]).await;
        suppress(conn, &run.items[1].email).await;
        let ahead = Duration::from_secs(60);
        let limits = limits(run.id, 1);
        let paced = claim_paced(conn, worker, &run.keys(), &limits, ahead).await;
        assert_eq!(paced.claimed.len(), 2);
        assert_eq!(paced.slots.into_iter().collect::<Vec<_>>(), [(run.key(2, 1), Duration::ZERO)]);
    });
}

#[test]
fn the_installations_limit_applies_to_runs_without_one() {
    in_transaction(async |conn| {
        let (first, second) = (run_of(conn, &[Pending]).await, run_of(conn, &[Pending]).await);
        let worker = worker(conn).await;
        let limits = Limits {
            runs: BTreeMap::from([(first.id, None), (second.id, None)]),
            installation: Some(Rate::new(1)),
            ..Limits::default()
        };
        let keys = [first.key(0, 1), second.key(0, 1)];
        let ahead = Duration::from_millis(500);
        let paced = claim_paced(conn, worker, &keys, &limits, ahead).await;
        assert_eq!((paced.claimed.len(), paced.not_due.len()), (1, 1));
    });
}

#[test]
fn reserves_another_slot_unless_it_is_too_far_away() {
    in_transaction(async |conn| {
        let run = run_of(conn, &[Pending]).await;
        let limits = limits(run.id, 1);
        let soon = Duration::from_millis(100);
        assert_eq!(reserve(conn, run.id, &limits, soon).await.unwrap(), Some(Duration::ZERO));
        let next_at = format!("SELECT next_at::text FROM pacing WHERE run_id = '{}'", run.id);
        let before: String = value(conn, &*next_at).await;
        assert_eq!(reserve(conn, run.id, &limits, soon).await.unwrap(), None);
        assert_eq!(value::<String>(conn, &*next_at).await, before, "nothing is reserved");
        assert!(reserve(conn, run.id, &limits, Duration::from_secs(2)).await.unwrap() > Some(soon));
        assert_eq!(reserve(conn, run.id, &Limits::default(), soon).await.unwrap(), Some(Duration::ZERO), "no limit");
    });
}

#[test]
fn unused_slots_are_made_up_for() {
    let begun = Instant::now();
    in_transaction(async |conn| {
        let run = run_of(conn, &[Pending]).await;
        let mut limits = limits(run.id, 10);
        limits.unused.insert(run.id, 3);
        reserve(conn, run.id, &limits, Duration::from_secs(1)).await.unwrap();
        let owed: i64 = value(conn, format!("SELECT owed_us FROM pacing WHERE run_id = '{}'", run.id)).await;
        // Three slots of 100 ms are owed, less what the next slot has made up, and more by as much as that one was late.
        let late = i64::try_from(begun.elapsed().as_micros()).unwrap();
        assert!((250_000..300_000 + late).contains(&owed), "{owed}");
    });
}

/// The item's state decides about a claim in a cancelled run, and it is read in the claim's statement.
#[test]
fn a_cancelled_items_next_attempt_may_be_claimed_by_a_replay() {
    in_transaction(async |conn| {
        let run = run_of(conn, &[Cancelled]).await;
        let worker = worker(conn).await;
        assert!(claim(conn, worker, &[run.key(0, 1)]).await.is_empty());
        assert_eq!(claim(conn, worker, &[run.key(0, 2)]).await[0].withheld, None);
    });
}

/// A worker without the job leaves the items to a worker that has it.
#[test]
fn grants_only_attempts_of_the_requested_kinds() {
    in_transaction(async |conn| {
        let run = run_of(conn, &[Pending]).await;
        execute(conn, format!("UPDATE runs SET kind = 'calls' WHERE id = '{}'", run.id)).await;
        let worker = worker(conn).await;
        let claim = async |conn: &mut PgConnection, kind: &str| {
            attempts::claim(conn, worker, Some(&[kind.to_owned()]), &run.keys(), &Default::default()).await.unwrap()
        };
        assert!(claim(conn, "invitations").await.is_empty());
        assert_eq!(attempts::find(conn, &run.keys()).await.unwrap()[0].1.as_deref(), Some("calls"));
        assert_eq!(claim(conn, "calls").await.len(), 1);
    });
}
