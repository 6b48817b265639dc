//! Relay stops: they pause the runs of the relay, and the answer resumes them.

use mailrun_core::{item::ItemState::Pending, run::Wanted};
use mailrun_ledger::{
    relay_stops::{Fault, answer, recent, stop},
    runs,
    stored::Stored,
};
use serde_json::json;
use sqlx::PgConnection;
use uuid::Uuid;

use crate::support::{execute, in_database, in_transaction, outbox, run_of, set_wanted, value};

async fn wanted(conn: &mut PgConnection, run_id: Uuid) -> String {
    value(conn, format!("SELECT wanted::text FROM runs WHERE id = '{run_id}'")).await
}

async fn stop_relay(conn: &mut PgConnection, runs: &[Uuid]) {
    stop(conn, "relay:25", "20 refusals", &["550 blocked".to_owned()], runs).await.unwrap();
}

#[test]
fn pauses_running_runs() {
    in_transaction(async |conn| {
        let [running, paused, cancelled] =
            [run_of(conn, &[Pending]).await.id, run_of(conn, &[Pending]).await.id, run_of(conn, &[Pending]).await.id];
        set_wanted(conn, paused, Wanted::Paused).await;
        set_wanted(conn, cancelled, Wanted::Cancelled).await;
        stop_relay(conn, &[running, paused, cancelled]).await;
        let stops = recent(conn).await.unwrap();
        assert_eq!((stops[0].relay.as_str(), stops[0].reason.as_str()), ("relay:25", "20 refusals"));
        assert_eq!((stops[0].runs.as_slice(), &stops[0].fault), (&[running][..], &None), "only the run that it paused");
        assert_eq!(wanted(conn, running).await, "paused");
        assert_eq!(wanted(conn, cancelled).await, "cancelled");
    });
}

#[test]
fn a_second_worker_adds_its_runs_to_the_stop() {
    in_transaction(async |conn| {
        let (first, second) = (run_of(conn, &[Pending]).await.id, run_of(conn, &[Pending]).await.id);
        stop_relay(conn, &[first]).await;
        stop(conn, "relay:25", "other words", &["554 no".to_owned()], &[first, second]).await.unwrap();
        let stops = recent(conn).await.unwrap();
        assert_eq!((stops.len(), stops[0].runs.as_slice()), (1, &[first, second][..]));
        assert_eq!(stops[0].reason, "20 refusals");
        assert_eq!(stops[0].alike, ["550 blocked", "554 no"]);
    });
}

#[test]
fn the_answer_resumes_the_runs_paused_with_the_relay() {
    in_transaction(async |conn| {
        let (stopped, cancelled) = (run_of(conn, &[Pending]).await.id, run_of(conn, &[Pending]).await.id);
        stop_relay(conn, &[stopped, cancelled]).await;
        set_wanted(conn, cancelled, Wanted::Cancelled).await;
        let number = recent(conn).await.unwrap()[0].number;
        assert_eq!(answer(conn, Some(number + 1), Fault::Them).await.unwrap(), 0);
        assert_eq!(answer(conn, Some(number), Fault::Us).await.unwrap(), 1);
        assert_eq!(recent(conn).await.unwrap()[0].fault, Some(Stored::Known(Fault::Us)));
        assert_eq!(
            (wanted(conn, stopped).await.as_str(), wanted(conn, cancelled).await.as_str()),
            ("running", "cancelled")
        );
        assert_eq!(outbox(conn, stopped).await, [json!("resume")]);
        assert!(outbox(conn, cancelled).await.is_empty());
        assert_eq!(answer(conn, Some(number), Fault::Them).await.unwrap(), 0, "the first answer stays");
    });
}

#[test]
fn a_relay_may_be_stopped_again_after_the_answer() {
    in_transaction(async |conn| {
        stop_relay(conn, &[]).await;
        stop(conn, "other:25", "x", &[], &[]).await.unwrap();
        assert_eq!(answer(conn, None, Fault::Them).await.unwrap(), 2, "all stopped relays");
        stop_relay(conn, &[]).await;
        assert_eq!(recent(conn).await.unwrap().len(), 3);
        execute(conn, "UPDATE relay_stops SET answered_at = now() - interval '8 days' WHERE answered_at IS NOT NULL")
            .await;
        assert_eq!(recent(conn).await.unwrap().len(), 1, "old answers are not shown");
    });
}

/// The person's decision takes precedence.
#[test]
fn the_answer_does_not_touch_a_run_that_a_person_resumed_or_paused() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let run = run_of(&mut conn, &[Pending]).await.id;
        stop_relay(&mut conn, &[run]).await;
        runs::set_paused(ledger, run, false).await.unwrap();
        runs::set_paused(ledger, run, true).await.unwrap();
        assert_eq!(answer(&mut conn, None, Fault::Us).await.unwrap(), 1);
        assert_eq!(wanted(&mut conn, run).await, "paused");
    });
}
