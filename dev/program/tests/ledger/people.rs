//! Erasing people: what is deleted, what remains, and who is not invited again.

use mailrun_core::{address::is_tombstone, item::ItemState, outcome::DELETED};
use mailrun_ledger::people::{Erased, Finder, REPLY_ERASED, Tombs, blocked, erase, mark_scrubbed, unscrubbed};
use sqlx::PgConnection;

use crate::support::{
    add_later_value, address, claim, execute, in_database, in_transaction, item, kill, person, run, run_of, suppress,
    until_one_waits, value, worker,
};

use ItemState::{Cancelled, Failed, Pending, Sent};

async fn email_of(conn: &mut PgConnection, user_id: i64) -> String {
    value(conn, format!("SELECT email FROM users WHERE id = {user_id}")).await
}

#[test]
fn a_tombstone_replaces_the_person() {
    in_transaction(async |conn| {
        let email = address();
        let listed = item(Failed).error("550 mailbox full").to(&email).listed_as("Ann", "Ann@example.org");
        let run = run(conn, &[listed]).await;
        let erased = erase(conn, &email).await.unwrap();
        assert_eq!((erased.known, erased.suppressed, erased.tests), (true, false, 0));
        let tombstone = email_of(conn, run.items[0].user_id).await;
        assert!(is_tombstone(&tombstone));
        assert_eq!(tombstone, Tombs::read(conn).await.unwrap().of(&email));
        let row = "SELECT concat_ws('|', name, coalesce(typed, '-'), error, state) FROM run_items";
        assert_eq!(value::<String>(conn, row).await, format!("|-|{REPLY_ERASED}|failed"), "the item stays");
        assert_eq!(erase(conn, &email).await.unwrap(), Erased::default(), "nothing is left");
    });
}

#[test]
fn replaces_the_address_everywhere_else() {
    in_transaction(async |conn| {
        let run =
            run(conn, &[item(Failed).error("550 <ANN@bücher.example>: forwarded by dann@xn--bcher-kva.example")]).await;
        let id = run.id;
        for statement in [
            format!("INSERT INTO run_passes (run_id, number, kind, error) VALUES ('{id}', 1, 'first', 'to ann@xn--bcher-kva.example')"),
            "INSERT INTO workers (roles, host, pid, lane_reason) VALUES ('send', 'h', 1, '421 ann@xn--bcher-kva.example')".into(),
            "INSERT INTO relay_stops (relay, reason, alike, runs) VALUES ('r', 'like ann@xn--bcher-kva.example', '{}', '{}')".into(),
            "INSERT INTO suppressions (email, reason, detail) VALUES ('bob@x.org', 'asked', 'ann@xn--bcher-kva.example knows')".into(),
            r#"UPDATE runs SET invalid_entries = '[{"line": 1, "text": "ann@bücher.example x", "reason": "no"}]'"#.into(),
            format!("INSERT INTO buried_results (run_id, item_id, attempt, state, reason) VALUES ('{id}', 1, 1, 'sent', 'ann@bücher.example')"),
            r#"INSERT INTO runs (id, kind, hidden, subject, body, total) VALUES ('00000000-0000-0000-0000-000000000001', 'test_mail', true, '', '', 1)"#.into(),
            r#"INSERT INTO run_items (run_id, position, data, error) VALUES ('00000000-0000-0000-0000-000000000001', 1, '{"email": "ann@xn--bcher-kva.example"}', '550 ann')"#.into(),
            r#"INSERT INTO outbox (message) VALUES ('{"error": "550 ann@bücher.example"}')"#.into(),
        ] {
            execute(conn, statement).await;
        }
        let erased = erase(conn, "ann@xn--bcher-kva.example").await.unwrap();
        assert_eq!((erased.known, erased.tests, erased.texts), (false, 1, 8));
        let error = value::<String>(conn, "SELECT error FROM run_items WHERE user_id IS NOT NULL").await;
        assert_eq!(error, "550 <[erased]>: forwarded by dann@xn--bcher-kva.example", "other addresses stay");
        assert_eq!(value::<String>(conn, "SELECT message->>'error' FROM outbox").await, "550 [erased]");
        assert_eq!(
            value::<String>(conn, "SELECT invalid_entries->0->>'text' FROM runs WHERE NOT hidden").await,
            "[erased] x"
        );
        assert_eq!(value::<String>(conn, "SELECT detail FROM suppressions").await, "[erased] knows");
    });
}

#[test]
fn our_own_texts_stay() {
    in_transaction(async |conn| {
        let email = address();
        run(conn, &[item(Cancelled).error(DELETED).to(&email)]).await;
        erase(conn, &email).await.unwrap();
        assert_eq!(value::<String>(conn, "SELECT error FROM run_items").await, DELETED);
    });
}

#[test]
fn a_suppression_moves_to_the_tombstone() {
    in_transaction(async |conn| {
        let email = address();
        suppress(conn, &email).await;
        execute(conn, "UPDATE suppressions SET detail = 'phoned us'").await;
        let erased = erase(conn, &email).await.unwrap();
        assert_eq!((erased.known, erased.suppressed), (false, true));
        let tombstone = Tombs::read(conn).await.unwrap().of(&email);
        let moved = "SELECT email || ' ' || reason || ' ' || coalesce(detail, '-') FROM suppressions";
        assert_eq!(value::<String>(conn, moved).await, format!("{tombstone} asked -"));
        let known =
            format!("SELECT erased_at IS NOT NULL AND scrubbed_at IS NOT NULL FROM users WHERE email = '{tombstone}'");
        assert!(value::<bool>(conn, known).await, "so that lists find it");
        // A second suppression of the same address is merged with the first one.
        suppress(conn, &email).await;
        assert!(erase(conn, &email).await.unwrap().suppressed);
        assert_eq!(value::<i64>(conn, "SELECT count(*) FROM suppressions").await, 1);
    });
}

#[test]
fn a_held_suppression_is_kept_under_the_tombstone() {
    in_transaction(async |conn| {
        let email = address();
        let run = run_of(conn, &[Failed]).await;
        execute(conn, format!("INSERT INTO suppression_reviews (run_id) VALUES ('{}')", run.id)).await;
        let held = "INSERT INTO held_suppressions (run_id, email, detail) VALUES";
        execute(conn, format!("{held} ('{}', '{email}', '550 {email}')", run.id)).await;
        erase(conn, &email).await.unwrap();
        let row = "SELECT email LIKE 'erased:%' AND detail IS NULL FROM held_suppressions";
        assert!(value::<bool>(conn, row).await);
    });
}

#[test]
fn a_person_who_returns_is_erased_under_another_name() {
    in_transaction(async |conn| {
        let email = address();
        let first = person(conn, &email).await;
        erase(conn, &email).await.unwrap();
        let second = person(conn, &email).await;
        erase(conn, &email).await.unwrap();
        let (first, second) = (email_of(conn, first).await, (email_of(conn, second).await, second));
        assert_eq!(second.0, format!("{first}.{}", second.1));
        execute(conn, "UPDATE users SET emailed_at = now()").await;
        let blocked = blocked(conn).await.unwrap().unwrap();
        assert!(blocked.name(&email).is_some() && blocked.name("other@example.org").is_none());
    });
}

#[test]
fn blocks_erased_people_who_were_invited_or_suppressed() {
    in_transaction(async |conn| {
        assert!(blocked(conn).await.unwrap().is_none());
        let emails: Vec<String> = (0..5).map(|_| address()).collect();
        let items = [
            item(Failed).to(&emails[0]),
            item(Sent).to(&emails[1]),
            item(Pending).to(&emails[2]),
            item(Cancelled).to(&emails[3]),
        ];
        run(conn, &items).await;
        suppress(conn, &emails[4]).await;
        for email in &emails {
            erase(conn, email).await.unwrap();
        }
        let blocked = blocked(conn).await.unwrap().unwrap();
        let names: Vec<bool> = emails.iter().map(|email| blocked.name(email).is_some()).collect();
        assert_eq!(names, [false, true, true, false, true]);
    });
}

#[test]
fn concurrent_erasures_of_a_person_wait_for_each_other() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let email = address();
        person(&mut conn, &email).await;
        let mut tx = ledger.begin().await.unwrap();
        assert!(erase(&mut tx, &email).await.unwrap().known);
        let (second, ()) = tokio::join!(erase(&mut conn, &email), async {
            until_one_waits(ledger).await;
            tx.commit().await.unwrap();
        });
        assert!(!second.unwrap().known);
        assert_eq!(value::<i64>(&mut conn, "SELECT count(*) FROM users").await, 1);
    });
}

#[test]
fn an_erased_person_stays_unscrubbed_until_marked() {
    in_transaction(async |conn| {
        let run = run_of(conn, &[Pending, Sent]).await;
        let worker = worker(conn).await;
        claim(conn, worker, &[run.key(0, 1)]).await;
        for item in &run.items {
            erase(conn, &item.email).await.unwrap();
        }
        let mut found = unscrubbed(conn).await.unwrap();
        found.sort_by_key(|one| one.user_id);
        assert_eq!(found[0].item_ids, [run.items[0].id]);
        assert_eq!(found.iter().map(|one| one.in_flight).collect::<Vec<_>>(), [true, false]);
        kill(conn, worker).await;
        assert!(!unscrubbed(conn).await.unwrap().iter().any(|one| one.in_flight), "no further result can arrive");
        // A result in progress has stored a reply in the meantime.
        execute(conn, format!("UPDATE run_items SET error = '550 ann' WHERE id = {}", run.items[0].id)).await;
        mark_scrubbed(conn, &[run.items[0].user_id]).await.unwrap();
        let error = format!("SELECT error FROM run_items WHERE id = {}", run.items[0].id);
        assert_eq!(value::<String>(conn, error).await, REPLY_ERASED);
        assert_eq!(unscrubbed(conn).await.unwrap().len(), 1);
    });
}

#[test]
fn a_finder_recognises_erased_people_by_their_tombstones() {
    in_transaction(async |conn| {
        let (erased, other) = (address(), address());
        let user_id = person(conn, &erased).await;
        person(conn, &other).await;
        erase(conn, &erased).await.unwrap();
        let finder = Finder::of(conn, &[user_id]).await.unwrap();
        assert_eq!(
            finder.scrubbed(&format!("550 <{erased}> and <{other}>")),
            Some(format!("550 <[erased]> and <{other}>"))
        );
        assert_eq!(finder.scrubbed(&other), None);
    });
}

#[test]
fn erases_an_item_in_a_later_versions_state() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let run = run(&mut conn, &[item(Failed).error("550")]).await;
        add_later_value(&mut conn, "item_state").await;
        execute(&mut conn, "UPDATE run_items SET state = 'later'").await;
        assert!(erase(&mut conn, &run.items[0].email).await.unwrap().known);
        assert!(blocked(&mut conn).await.unwrap().is_some(), "it may have been sent");
    });
}
