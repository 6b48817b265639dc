//! The suppression list.

use chrono::{DateTime, Utc};
use mailrun_core::item::ItemState::Pending;
use mailrun_ledger::{
    people,
    stored::Stored,
    suppressions::{
        Reason, count, count_since, invited, list, reason, remove, remove_number, remove_since, suppress, suppress_item,
    },
};
use uuid::Uuid;

use crate::support::{add_later_value, address, execute, in_database, in_transaction, run_of, value};

#[test]
fn the_first_reason_is_kept() {
    in_transaction(async |conn| {
        let email = address();
        assert!(suppress(conn, &email, Reason::Bounced, Some("550")).await.unwrap());
        assert!(!suppress(conn, &email, Reason::Complained, None).await.unwrap());
        assert_eq!(reason(conn, &email).await.unwrap(), Some(Stored::Known(Reason::Bounced)));
        assert_eq!(reason(conn, "other@example.org").await.unwrap(), None);
    });
}

#[test]
fn suppresses_the_recipient_of_an_item() {
    in_transaction(async |conn| {
        let run = run_of(conn, &[Pending]).await;
        let item = &run.items[0];
        assert_eq!(suppress_item(conn, Some(Uuid::new_v4()), item.id, Reason::Unsubscribed).await.unwrap(), None);
        let first = suppress_item(conn, Some(run.id), item.id, Reason::Unsubscribed).await.unwrap().unwrap();
        assert_eq!((first.email.as_str(), first.suppressed), (item.email.as_str(), None), "as it was before");
        let second = suppress_item(conn, None, item.id, Reason::Complained).await.unwrap().unwrap();
        assert_eq!(second.suppressed, Some(Stored::Known(Reason::Unsubscribed)));
        assert_eq!(invited(conn, Some(run.id), item.id).await.unwrap(), Some(second));
        assert_eq!(suppress_item(conn, None, -1, Reason::Complained).await.unwrap(), None, "pruned");
    });
}

#[test]
fn removes_an_address_or_its_tombstone() {
    in_transaction(async |conn| {
        let (kept, erased) = (address(), address());
        for email in [&kept, &erased] {
            suppress(conn, email, Reason::Asked, None).await.unwrap();
        }
        people::erase(conn, &erased).await.unwrap();
        assert_eq!(reason(conn, &erased).await.unwrap(), None, "it is stored under another name");
        assert!(remove(conn, &erased).await.unwrap());
        assert!(remove(conn, &kept).await.unwrap());
        assert!(!remove(conn, &kept).await.unwrap());
    });
}

#[test]
fn removes_by_number() {
    in_transaction(async |conn| {
        suppress(conn, &address(), Reason::Asked, None).await.unwrap();
        let number: i64 = value(conn, "SELECT number FROM suppressions").await;
        assert!(!remove_number(conn, number + 1).await.unwrap());
        assert!(remove_number(conn, number).await.unwrap());
        assert!(!remove_number(conn, number).await.unwrap());
    });
}

#[test]
fn removes_entries_with_one_reason_since_a_moment() {
    in_transaction(async |conn| {
        let (old, new, other) = (address(), address(), address());
        suppress(conn, &old, Reason::Bounced, None).await.unwrap();
        suppress(conn, &new, Reason::Bounced, None).await.unwrap();
        suppress(conn, &other, Reason::Asked, None).await.unwrap();
        execute(conn, format!("UPDATE suppressions SET created_at = now() - interval '1 day' WHERE email = '{old}'"))
            .await;
        let since: DateTime<Utc> =
            value(conn, "SELECT created_at FROM suppressions ORDER BY number DESC LIMIT 1").await;
        assert_eq!(count_since(conn, Reason::Bounced, since).await.unwrap(), 1, "the moment is included");
        assert_eq!(remove_since(conn, Reason::Bounced, since).await.unwrap(), 1);
        assert_eq!(count_since(conn, Reason::Bounced, since).await.unwrap(), 0);
        assert!(reason(conn, &old).await.unwrap().is_some() && reason(conn, &other).await.unwrap().is_some());
    });
}

#[test]
fn lists_page_by_page_newest_first() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let emails: Vec<String> = (0..5).map(|_| address()).collect();
        for email in &emails {
            suppress(&mut conn, email, Reason::Asked, Some("by hand")).await.unwrap();
        }
        add_later_value(&mut conn, "suppression_reason").await;
        execute(&mut conn, format!("UPDATE suppressions SET reason = 'later' WHERE email = '{}'", emails[4])).await;
        assert_eq!(count(ledger).await.unwrap(), 5);
        let first = list(ledger, None, 2).await.unwrap();
        assert_eq!((first[0].email.as_str(), first[1].email.as_str()), (emails[4].as_str(), emails[3].as_str()));
        assert_eq!(first[0].reason, Stored::Later("later".into()));
        assert_eq!(first[1].detail.as_deref(), Some("by hand"));
        let second = list(ledger, Some(first[1].number), 9).await.unwrap();
        assert_eq!(
            second.iter().map(|one| one.email.as_str()).collect::<Vec<_>>(),
            [&emails[2], &emails[1], &emails[0]]
        );
    });
}
