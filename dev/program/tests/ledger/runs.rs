//! Runs as shown on pages, and what a person may request.

use mailrun_core::{
    item::ItemState,
    run::{Phase, Wanted},
};
use mailrun_ledger::{
    runs::{
        Granted, ReplayWish, Replayed, cancel, dead_by_error, emailed_in_domain, list, progress, rate_limit, replay,
        set_paused, stopped, tally, text, troubles,
    },
    stored::Stored,
};
use serde_json::json;
use sqlx::PgConnection;
use uuid::Uuid;

use crate::support::{
    add_later_value, apply, execute, in_database, in_transaction, item, outbox, run, run_of, set_wanted, value, worker,
};

use ItemState::{Failed, Pending, Retrying, Sent, Unknown};

async fn wanted(conn: &mut PgConnection, run_id: Uuid) -> String {
    value(conn, format!("SELECT wanted::text FROM runs WHERE id = '{run_id}'")).await
}

#[test]
fn shows_a_runs_progress() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let run = run_of(&mut conn, &[Pending, Retrying, Sent, Failed]).await;
        let shown = progress(ledger, run.id).await.unwrap().unwrap();
        let counters = shown.counters;
        assert_eq!(
            (counters.total, counters.of(Pending), counters.of(Retrying), counters.of(Sent), counters.of(Failed)),
            (4, 1, 1, 1, 1)
        );
        assert_eq!((shown.run_id, shown.wanted, shown.later.as_deref()), (run.id, Wanted::Running, None));
        assert_eq!((shown.phase(), shown.restored, shown.finished_at), (Phase::Running, false, None));
        assert!(shown.held_up.is_none() && shown.rate.abs() < f64::EPSILON);
        assert!(progress(ledger, Uuid::new_v4()).await.unwrap().is_none());
    });
}

#[test]
fn the_rate_covers_recently_settled_items() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let run_id = run_of(&mut conn, &[Pending]).await.id;
        for (ago, settled) in [(60, 0), (3, 100), (1, 160)] {
            let at = format!("date_trunc('second', clock_timestamp()) - interval '{ago} seconds'");
            let insert = "INSERT INTO run_samples (run_id, at, settled) VALUES";
            execute(&mut conn, format!("{insert} ('{run_id}', {at}, {settled})")).await;
        }
        let rate = progress(ledger, run_id).await.unwrap().unwrap().rate;
        assert!((rate - 30.0).abs() < 0.01, "60 in 2 s: {rate}");
    });
}

#[test]
fn an_open_run_shows_why_nothing_is_sent() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let (open, over) = (run_of(&mut conn, &[Pending]).await.id, run_of(&mut conn, &[Sent]).await.id);
        let worker = worker(&mut conn).await;
        let lane = "UPDATE workers SET lane_reason = '421 later', lane_until = now() + interval '1 minute' WHERE id =";
        execute(&mut conn, format!("{lane} {worker}")).await;
        assert_eq!(progress(ledger, open).await.unwrap().unwrap().held_up.as_deref(), Some("421 later"));
        assert_eq!(progress(ledger, over).await.unwrap().unwrap().held_up, None);
    });
}

#[test]
fn lists_page_by_page_newest_first() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let mut ids = Vec::new();
        for _ in 0..3 {
            ids.insert(0, run_of(&mut conn, &[Pending]).await.id);
        }
        let first = list(ledger, None, 2).await.unwrap();
        assert_eq!(first.iter().map(|run| run.run_id).collect::<Vec<_>>(), ids[..2]);
        let second = list(ledger, Some(first[1].created_at), 2).await.unwrap();
        assert_eq!(second.iter().map(|run| run.run_id).collect::<Vec<_>>(), ids[2..]);
    });
}

#[test]
fn a_later_versions_wanted_state_is_shown_as_text_and_not_acted_on() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let run_id = run_of(&mut conn, &[Pending]).await.id;
        add_later_value(&mut conn, "wanted_state").await;
        execute(&mut conn, "UPDATE runs SET wanted = 'later'").await;
        let shown = progress(ledger, run_id).await.unwrap().unwrap();
        assert_eq!((shown.wanted, shown.later.as_deref()), (Wanted::Paused, Some("later")));
    });
}

#[test]
fn reads_a_runs_list_and_text() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let run_id = run_of(&mut conn, &[Pending]).await.id;
        execute(
            &mut conn,
            r#"UPDATE runs SET already_invited = 2, already_failed = 3, suppressed = 4, repeated = 5, invalid = 6,
                               sends_per_second = 7, invalid_entries = '[{"line": 1, "text": "x", "reason": "no @"}]'"#,
        )
        .await;
        let tally = tally(ledger, run_id).await.unwrap().unwrap();
        assert_eq!((tally.accepted, tally.already_invited, tally.already_failed), (1, 2, 3));
        assert_eq!((tally.suppressed, tally.repeated, tally.invalid), (4, 5, 6));
        assert_eq!(tally.invalid_entries[0].reason, "no @");
        assert_eq!(rate_limit(ledger, run_id).await.unwrap(), Some(7));
        assert_eq!(
            text(&mut ledger.acquire().await.unwrap(), run_id).await.unwrap(),
            ("Hello".to_owned(), "Come!".to_owned())
        );
        let unknown = Uuid::new_v4();
        assert!(mailrun_ledger::runs::tally(ledger, unknown).await.unwrap().is_none());
        assert_eq!(rate_limit(ledger, unknown).await.unwrap(), None);
        assert!(matches!(
            text(&mut ledger.acquire().await.unwrap(), unknown).await.unwrap_err(),
            sqlx::Error::RowNotFound
        ));
    });
}

#[test]
fn troubles_are_failed_and_unknown_items_as_written_in_the_list() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let typed = item(Failed).error("550 a").to("ann@example.org").listed_as("Ann", "Ann@example.org");
        let run = run(&mut conn, &[typed, item(Sent), item(Unknown).attempt(2), item(Failed).error("550 a")]).await;
        let found = troubles(ledger, run.id, 0, 2).await.unwrap();
        assert_eq!((found[0].position, found[0].email.as_str()), (1, "Ann@example.org"));
        assert_eq!((found[0].error.as_deref(), &found[0].state), (Some("550 a"), &Stored::Known(Failed)));
        assert_eq!((found[1].position, found[1].attempts, &found[1].state), (3, 2, &Stored::Known(Unknown)));
        assert_eq!(found[1].email, run.items[2].email);
        assert_eq!(troubles(ledger, run.id, 3, 9).await.unwrap()[0].position, 4);
        let by_error = dead_by_error(ledger).await.unwrap();
        let expected = [(Stored::Known(Failed), "550 a".into(), 2), (Stored::Known(Unknown), String::new(), 1)];
        assert_eq!(by_error, expected);
    });
}

#[test]
fn finds_paused_and_cancelled_runs() {
    in_transaction(async |conn| {
        let ids =
            [run_of(conn, &[Pending]).await.id, run_of(conn, &[Pending]).await.id, run_of(conn, &[Pending]).await.id];
        set_wanted(conn, ids[1], Wanted::Paused).await;
        set_wanted(conn, ids[2], Wanted::Cancelled).await;
        let mut found = stopped(conn, &ids).await.unwrap();
        let mut expected = ids[1..].to_vec();
        found.sort_unstable();
        expected.sort_unstable();
        assert_eq!(found, expected);
    });
}

#[test]
fn a_run_is_paused_and_resumed_once() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let run_id = run_of(&mut conn, &[Pending]).await.id;
        assert_eq!(set_paused(ledger, run_id, false).await.unwrap(), Granted::NotNow);
        assert_eq!(set_paused(ledger, run_id, true).await.unwrap(), Granted::Yes);
        assert_eq!(set_paused(ledger, run_id, true).await.unwrap(), Granted::NotNow);
        assert!(outbox(&mut conn, run_id).await.is_empty());
        assert_eq!(set_paused(ledger, run_id, false).await.unwrap(), Granted::Yes);
        assert_eq!(wanted(&mut conn, run_id).await, "running");
        assert_eq!(outbox(&mut conn, run_id).await, [json!("resume")], "dropped items are republished");
        assert_eq!(set_paused(ledger, Uuid::new_v4(), true).await.unwrap(), Granted::NoSuchRun);
        set_wanted(&mut conn, run_id, Wanted::Cancelled).await;
        for paused in [true, false] {
            assert_eq!(set_paused(ledger, run_id, paused).await.unwrap(), Granted::NotNow, "cancelled is final");
        }
    });
}

#[test]
fn a_run_is_cancelled_once_unless_it_has_ended() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let (open, over) = (run_of(&mut conn, &[Pending]).await.id, run_of(&mut conn, &[Sent]).await.id);
        set_wanted(&mut conn, open, Wanted::Paused).await;
        assert_eq!(cancel(ledger, open).await.unwrap(), Granted::Yes);
        assert_eq!(cancel(ledger, open).await.unwrap(), Granted::NotNow);
        let commands = outbox(&mut conn, open).await;
        assert!(commands.len() == 1 && commands[0]["cancel"]["command_id"].is_string(), "{commands:?}");
        assert_eq!(cancel(ledger, over).await.unwrap(), Granted::NotNow);
        assert_eq!(wanted(&mut conn, over).await, "running");
        assert_eq!(cancel(ledger, Uuid::new_v4()).await.unwrap(), Granted::NoSuchRun);
    });
}

fn wish(run_id: Option<Uuid>, states: &[ItemState]) -> ReplayWish {
    ReplayWish { run_id, states: states.to_vec(), error: None, token: Uuid::new_v4(), restored: false }
}

#[test]
fn a_replay_covers_every_run_with_matching_items() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let failed = run(&mut conn, &[item(Failed).error("550"), item(Sent)]).await.id;
        let unknown = run_of(&mut conn, &[Unknown]).await.id;
        let cancelled = run_of(&mut conn, &[Failed]).await.id;
        set_wanted(&mut conn, cancelled, Wanted::Cancelled).await;
        let asked = async |wish: ReplayWish| replay(ledger, &wish).await.unwrap().runs;
        assert_eq!(asked(wish(None, &[Failed, Unknown])).await, 2);
        assert_eq!(asked(wish(Some(unknown), &[Failed])).await, 0);
        assert_eq!(asked(ReplayWish { error: Some("other".into()), ..wish(None, &[Failed]) }).await, 0);
        assert_eq!(asked(ReplayWish { error: Some("550".into()), ..wish(None, &[Failed]) }).await, 1);
        assert_eq!(outbox(&mut conn, cancelled).await.len(), 0);
        let commands = outbox(&mut conn, failed).await;
        assert_eq!(commands[0]["replay"]["states"], json!(["failed", "unknown"]));
        assert_eq!(commands[1]["replay"]["error"], "550");
        assert_ne!(commands[0]["replay"]["command_id"], commands[1]["replay"]["command_id"]);
    });
}

#[test]
fn the_same_request_is_the_same_pass() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let run_id = run_of(&mut conn, &[Failed]).await.id;
        let wish = wish(None, &[Failed]);
        for _ in 0..2 {
            replay(ledger, &wish).await.unwrap();
        }
        let commands = outbox(&mut conn, run_id).await;
        assert_eq!(commands[0]["replay"]["command_id"], commands[1]["replay"]["command_id"]);
    });
}

#[test]
fn a_restored_run_is_replayed_only_after_a_confirmation() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let run_id = run_of(&mut conn, &[Failed]).await.id;
        execute(&mut conn, "UPDATE runs SET restored_at = now()").await;
        let unconfirmed = wish(None, &[Failed]);
        assert_eq!(replay(ledger, &unconfirmed).await.unwrap(), Replayed { runs: 0, unconfirmed: 1 });
        assert!(outbox(&mut conn, run_id).await.is_empty());
        let confirmed = ReplayWish { restored: true, ..unconfirmed };
        assert_eq!(replay(ledger, &confirmed).await.unwrap(), Replayed { runs: 1, unconfirmed: 0 });
    });
}

#[test]
fn counts_emailed_people_of_a_domain() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let run = run_of(&mut conn, &[Pending, Pending]).await;
        apply(&mut conn, run.id, &[run.result(0, 1, Sent)]).await;
        assert_eq!(emailed_in_domain(ledger, "example.org").await.unwrap(), 1);
        assert_eq!(emailed_in_domain(ledger, "example.com").await.unwrap(), 0);
    });
}
