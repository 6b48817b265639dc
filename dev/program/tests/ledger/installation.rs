//! The installation's id and epochs, and the key that ids are signed with.

use mailrun_ledger::{
    installation::{begin_epoch, begin_epoch_after, declare_restored, lock, read},
    signing,
};

use crate::support::{execute, in_database, in_transaction, run_of, until_one_waits, value};
use mailrun_core::item::ItemState::Pending;

#[test]
fn each_epoch_is_later_than_the_previous_one() {
    in_transaction(async |conn| {
        let before = read(conn).await.unwrap();
        assert_eq!(begin_epoch(conn).await.unwrap(), before.epochs.present + 1);
        let after = read(conn).await.unwrap();
        assert_eq!((after.id, after.epochs.present, after.epochs.restored), (before.id, before.epochs.present + 1, 0));
        assert!(!after.is_due && after.restored_at.is_none());
        execute(conn, "UPDATE installation SET epoch_at = now() - interval '61 seconds'").await;
        assert!(read(conn).await.unwrap().is_due);
    });
}

#[test]
fn only_one_process_begins_the_next_epoch() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let present = read(&mut conn).await.unwrap().epochs.present;
        let mut tx = ledger.begin().await.unwrap();
        assert_eq!(begin_epoch_after(&mut tx, present).await.unwrap(), Some(present + 1));
        let (second, ()) = tokio::join!(begin_epoch_after(&mut conn, present), async {
            until_one_waits(ledger).await;
            tx.commit().await.unwrap();
        });
        assert_eq!(second.unwrap(), None);
        assert_eq!(read(&mut conn).await.unwrap().epochs.present, present + 1);
    });
}

#[test]
fn starting_processes_are_serialized() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let mut tx = ledger.begin().await.unwrap();
        lock(&mut tx).await.unwrap();
        let (locked, ()) = tokio::join!(lock(&mut conn), async {
            until_one_waits(ledger).await;
            tx.commit().await.unwrap();
        });
        locked.unwrap();
    });
}

#[test]
fn a_restore_skips_epochs_and_ids_issued_since_the_backup() {
    in_database(async |ledger| {
        let mut conn = ledger.acquire().await.unwrap();
        let before = run_of(&mut conn, &[Pending]).await;
        let present = read(&mut conn).await.unwrap().epochs.present;
        assert!(!signing::was_restored(&mut conn).await.unwrap());
        let epoch = declare_restored(&mut conn).await.unwrap();
        assert!(epoch > present + 1_000_000);
        let after = read(&mut conn).await.unwrap();
        assert_eq!((after.epochs.present, after.epochs.restored), (epoch, epoch));
        assert!(after.restored_at.is_some() && signing::was_restored(&mut conn).await.unwrap());
        let run = run_of(&mut conn, &[Pending]).await;
        for (old, new) in [(before.items[0].id, run.items[0].id), (before.items[0].user_id, run.items[0].user_id)] {
            assert!(new > old + (1 << 36), "{new}");
        }
    });
}

#[test]
fn the_signing_key_is_constant_and_bound_to_the_installation() {
    in_transaction(async |conn| {
        let key = format!("{:?}", signing::key(conn).await.unwrap());
        let installation = read(conn).await.unwrap().id;
        assert!(key.contains(&installation.to_string()), "{key}");
        assert_eq!(value::<i32>(conn, "SELECT length(key) FROM signing_key").await, 32);
        execute(conn, "DELETE FROM signing_key").await;
        assert!(matches!(signing::key(conn).await.unwrap_err(), sqlx::Error::RowNotFound));
    });
}
