//! Submissions: a list becomes one run in one transaction, and no one is invited twice.

use mailrun_core::{item::ItemState, run::Wanted};
use mailrun_ledger::{
    people,
    submit::{Data, Earlier, NewRun, Refusal, Submission, Submitted, Tally, submit},
    suppressions,
};
use serde_json::json;
use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

use crate::support::{
    counters_equal_counts, execute, in_database, item, outbox, person, run, run_of, set_wanted, states, suppress,
    until_one_waits, value,
};

use ItemState::{Cancelled, Failed, Pending, Sent, Skipped, Unknown};

fn list(text: &str) -> Submission<'_> {
    Submission {
        token: Uuid::new_v4(),
        text,
        subject: "Hello",
        body: "Come!",
        sends_per_second: Some(7),
        max_addresses: 1_000,
    }
}

async fn accepted(ledger: &PgPool, submission: Submission<'_>) -> Uuid {
    match submission.submit(ledger).await.unwrap() {
        Submitted::Accepted(run_id) => run_id,
        other => panic!("{other:?}"),
    }
}

async fn refused(ledger: &PgPool, submission: Submission<'_>) -> Refusal {
    match submission.submit(ledger).await.unwrap() {
        Submitted::Refused(refusal) => refusal,
        other => panic!("{other:?}"),
    }
}

async fn column(conn: &mut PgConnection, query: &str) -> String {
    value(conn, query).await
}

#[test]
fn a_list_becomes_a_run_with_its_items_and_its_first_message() {
    in_database(async |ledger| {
        let run_id = accepted(ledger, list("Ann <Ann@example.org>\nbob@example.org\nann@EXAMPLE.org\nnobody")).await;
        let mut conn = ledger.acquire().await.unwrap();
        let items =
            "SELECT string_agg(concat_ws(' ', i.position, email, coalesce(typed, '-'), i.name), ', ' ORDER BY i.position)
                     FROM run_items i JOIN users u ON u.id = i.user_id";
        assert_eq!(column(&mut conn, items).await, "1 ann@example.org Ann@example.org Ann, 2 bob@example.org - ");
        let tally = mailrun_ledger::runs::tally(ledger, run_id).await.unwrap().unwrap();
        assert_eq!((tally.accepted, tally.repeated, tally.invalid), (2, 1, 1));
        assert_eq!((tally.invalid_entries[0].line, tally.invalid_entries[0].text.as_str()), (4, "nobody"));
        assert_eq!(mailrun_ledger::runs::rate_limit(ledger, run_id).await.unwrap(), Some(7));
        assert_eq!(outbox(&mut conn, run_id).await, [json!({"release": {"pass": 1, "step": 0}})]);
        assert_eq!(states(&mut conn, run_id).await, [Pending, Pending]);
        counters_equal_counts(&mut conn).await;
    });
}

#[test]
fn the_same_submission_is_the_same_run() {
    in_database(async |ledger| {
        let first = list("ann@example.org");
        let run_id = accepted(ledger, first).await;
        let mut conn = ledger.acquire().await.unwrap();
        set_wanted(&mut conn, run_id, Wanted::Paused).await;
        let again = Submission { sends_per_second: None, ..first };
        match again.submit(ledger).await.unwrap() {
            Submitted::Before(earlier) => {
                assert_eq!(earlier, Earlier { run_id, wanted: Wanted::Paused, sends_per_second: Some(7) });
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(outbox(&mut conn, run_id).await.len(), 1);
        assert_eq!(value::<i64>(&mut conn, "SELECT count(*) FROM run_items").await, 1);
    });
}

#[test]
fn a_simultaneous_second_click_waits_for_the_first() {
    in_database(async |ledger| {
        let submission = list("ann@example.org");
        let mut conn = ledger.acquire().await.unwrap();
        // The first submission has inserted its run.
        let mut tx = ledger.begin().await.unwrap();
        let run_id = submission.run_id();
        let insert = "INSERT INTO runs (id, subject, body, total) VALUES";
        execute(&mut tx, format!("{insert} ('{run_id}', 'Hello', 'Come!', 1)")).await;
        let (second, ()) = tokio::join!(submission.submit(ledger), async {
            until_one_waits(ledger).await;
            tx.commit().await.unwrap();
        });
        assert!(matches!(second.unwrap(), Submitted::Before(Earlier { run_id: before, .. }) if before == run_id));
        assert_eq!(value::<i64>(&mut conn, "SELECT count(*) FROM users").await, 0);
    });
}

#[test]
fn a_list_that_invites_no_one_leaves_nothing_behind() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        assert_eq!(refused(ledger, list(" \n ,, ")).await, Refusal::Empty);
        let short = Submission { max_addresses: 2, ..list("a@x.org\nb@x.org\nc@x.org") };
        assert_eq!(refused(ledger, short).await, Refusal::TooMany { limit: 2 });
        suppress(&mut conn, "sam@example.org").await;
        let nothing = refused(ledger, list("sam@example.org\nnobody")).await;
        let Refusal::NothingNew(Tally { accepted: 0, suppressed: 1, invalid: 1, .. }) = nothing else {
            panic!("{nothing:?}")
        };
        let left = "SELECT (SELECT count(*) FROM runs) + (SELECT count(*) FROM users) + (SELECT count(*) FROM outbox)";
        assert_eq!(value::<i64>(&mut conn, left).await, 0);
        // The same form with a longer list is accepted.
        accepted(ledger, list("sam@example.org\nann@example.org")).await;
    });
}

#[test]
fn accepts_exactly_the_maximum_number_of_addresses() {
    in_database(async |ledger| {
        accepted(ledger, Submission { max_addresses: 2, ..list("a@x.org\nb@x.org\nnobody") }).await;
    });
}

#[test]
fn leaves_out_people_with_an_invitation() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let states = [Pending, Sent, Failed, Unknown, Cancelled, Skipped];
        let earlier = run_of(&mut conn, &states).await;
        // Emailed by a run that was pruned.
        person(&mut conn, "old@example.org").await;
        execute(&mut conn, "UPDATE users SET emailed_at = now() WHERE email = 'old@example.org'").await;
        suppress(&mut conn, "sam@example.org").await;
        let mut emails: Vec<&str> = earlier.items.iter().map(|item| item.email.as_str()).collect();
        emails.extend(["old@example.org", "sam@example.org", "new@example.org"]);
        let run_id = accepted(ledger, list(&emails.join("\n"))).await;
        let tally = mailrun_ledger::runs::tally(ledger, run_id).await.unwrap().unwrap();
        assert_eq!((tally.accepted, tally.suppressed), (3, 1), "cancelled, skipped and new");
        assert_eq!((tally.already_invited, tally.already_failed), (3, 2));
        let positions = format!(
            "SELECT string_agg(position::text, ',' ORDER BY position) FROM run_items WHERE run_id = '{run_id}'"
        );
        assert_eq!(column(&mut conn, &positions).await, "1,2,3", "without gaps");
        counters_equal_counts(&mut conn).await;
    });
}

#[test]
fn an_overtaken_item_does_not_count() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let earlier = run_of(&mut conn, &[Pending]).await;
        execute(&mut conn, "UPDATE run_items SET overtaken = true").await;
        let again = accepted(ledger, list(&earlier.items[0].email)).await;
        assert_eq!(states(&mut conn, again).await, [Pending]);
    });
}

#[test]
fn people_erased_after_an_invitation_stay_out() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        run(&mut conn, &[item(Sent).to("sent@example.org"), item(Failed).to("failed@example.org")]).await;
        suppressions::suppress(&mut conn, "sam@example.org", suppressions::Reason::Asked, None).await.unwrap();
        for email in ["sent@example.org", "failed@example.org", "sam@example.org"] {
            people::erase(&mut conn, email).await.unwrap();
        }
        let run_id =
            accepted(ledger, list("sent@example.org\nfailed@example.org\nsam@example.org\nnew@example.org")).await;
        let tally = mailrun_ledger::runs::tally(ledger, run_id).await.unwrap().unwrap();
        // An erased person who neither received mail nor refused it counts as a new person.
        assert_eq!((tally.accepted, tally.already_invited, tally.suppressed), (2, 1, 1));
        let known = "SELECT count(*) FROM users WHERE email IN ('sent@example.org', 'sam@example.org')";
        assert_eq!(value::<i64>(&mut conn, known).await, 0);
    });
}

#[test]
fn concurrent_lists_invite_each_person_once() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        // The other submission has inserted two people and an item of one of them, and is about to commit.
        let mut tx = ledger.begin().await.unwrap();
        let other = run(&mut tx, &[item(Pending).to("ann@example.org")]).await;
        person(&mut tx, "bob@example.org").await;
        let (run_id, ()) =
            tokio::join!(accepted(ledger, list("bob@example.org\nann@example.org\ncid@example.org")), async {
                until_one_waits(ledger).await;
                tx.commit().await.unwrap();
            });
        let invited = format!(
            "SELECT string_agg(position || ' ' || email, ', ' ORDER BY position)
             FROM run_items i JOIN users u ON u.id = i.user_id WHERE run_id = '{run_id}'"
        );
        assert_eq!(column(&mut conn, &invited).await, "1 bob@example.org, 2 cid@example.org");
        assert_eq!(states(&mut conn, other.id).await, [Pending]);
        let tally = mailrun_ledger::runs::tally(ledger, run_id).await.unwrap().unwrap();
        assert_eq!((tally.accepted, tally.already_invited), (2, 1));
        counters_equal_counts(&mut conn).await;
    });
}

#[test]
fn concurrent_lists_in_any_order_lose_no_one() {
    in_database(async |ledger| {
        let emails: Vec<String> = (0..200).map(|number| format!("guest-{number}@example.org")).collect();
        let forwards = emails.join("\n");
        let backwards = emails.iter().rev().cloned().collect::<Vec<_>>().join("\n");
        let mixed = format!("{backwards}\nextra@example.org");
        let results =
            tokio::join!(list(&forwards).submit(ledger), list(&backwards).submit(ledger), list(&mixed).submit(ledger));
        for result in <[_; 3]>::from(results) {
            result.unwrap();
        }
        let mut conn = ledger.acquire().await.unwrap();
        assert_eq!(value::<i64>(&mut conn, "SELECT count(*) FROM run_items WHERE active").await, 201);
        assert_eq!(value::<i64>(&mut conn, "SELECT count(DISTINCT user_id) FROM run_items").await, 201);
        counters_equal_counts(&mut conn).await;
    });
}

#[derive(serde::Serialize)]
struct Call {
    url: String,
}

#[test]
fn rows_of_data_become_a_run_of_their_kind() {
    in_database(async |ledger| {
        let calls = ["a", "b", "c"].map(|url| Call { url: url.into() });
        let run = NewRun { sends_per_second: Some(5), ..NewRun::new("calls", "Three calls") };
        let accepted = submit(ledger, run, &Data(&calls)).await.unwrap();
        assert!(matches!(accepted, Submitted::Accepted(run_id) if run_id == run.id), "{accepted:?}");
        let again = submit(ledger, run, &Data(&calls)).await.unwrap();
        assert!(matches!(again, Submitted::Before(_)), "the same id is the same run");
        let none = submit(ledger, NewRun::new("calls", "None"), &Data::<Call>(&[])).await.unwrap();
        assert!(matches!(none, Submitted::Refused(Refusal::Empty)));
        let mut conn = ledger.acquire().await.unwrap();
        let items =
            "SELECT string_agg(concat_ws(' ', position, data->>'url', state), ', ' ORDER BY position) FROM run_items";
        assert_eq!(column(&mut conn, items).await, "1 a pending, 2 b pending, 3 c pending");
        let message = "SELECT kind || ' ' || (message->'command'->'release'->>'pass') FROM outbox";
        assert_eq!(column(&mut conn, message).await, "mailrun.run.v1 1", "the fan-out releases it");
        let listed = mailrun_ledger::runs::list(ledger, None, 10).await.unwrap();
        assert_eq!(listed.iter().map(|run| run.counters.total).collect::<Vec<_>>(), [3]);
        counters_equal_counts(&mut conn).await;
    });
}

#[test]
fn a_large_hidden_run_is_released_by_the_fan_out() {
    in_database(async |ledger| {
        let run = NewRun { hidden: true, ..NewRun::new("calls", "") };
        submit(ledger, run, &Data(&[1; 101])).await.unwrap();
        let mut conn = ledger.acquire().await.unwrap();
        assert_eq!(column(&mut conn, "SELECT string_agg(kind, ',') FROM outbox").await, "mailrun.run.v1");
        assert_eq!(value::<i64>(&mut conn, "SELECT count(*) FROM run_passes").await, 0);
    });
}
