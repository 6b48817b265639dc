//! Receipts: written with a claim or alone, and deleted once their results are applied.

use mailrun_core::item::ItemState::Pending;
use mailrun_ledger::receipts::{Receipt, delete, write};

use crate::support::{in_transaction, receipt, run_of, value, worker};

#[test]
fn writes_a_receipt_alone_unless_it_is_empty() {
    in_transaction(async |conn| {
        let run = run_of(conn, &[Pending, Pending]).await;
        let worker = worker(conn).await;
        write(conn, worker, &Receipt::default()).await.unwrap();
        write(conn, worker, &receipt(3, &[run.key(0, 1), run.key(1, 4)])).await.unwrap();
        let row = "SELECT number || ' ' || array_to_string(attempts, ',') FROM receipts";
        assert_eq!(value::<String>(conn, row).await, "3 1,4");
        assert_eq!(value::<i64>(conn, "SELECT count(*) FROM receipts").await, 1);
    });
}

#[test]
fn a_receipt_number_is_written_once() {
    in_transaction(async |conn| {
        let run = run_of(conn, &[Pending]).await;
        let worker = worker(conn).await;
        write(conn, worker, &receipt(1, &run.keys())).await.unwrap();
        assert!(mailrun_ledger::is_about_data(&write(conn, worker, &receipt(1, &run.keys())).await.unwrap_err()));
    });
}

#[test]
fn deletes_a_workers_receipts_in_a_range() {
    in_transaction(async |conn| {
        let run = run_of(conn, &[Pending]).await;
        let (mine, other) = (worker(conn).await, worker(conn).await);
        for number in 1..=5 {
            write(conn, mine, &receipt(number, &run.keys())).await.unwrap();
            write(conn, other, &receipt(number, &run.keys())).await.unwrap();
        }
        delete(conn, mine, 2, 4).await.unwrap();
        let left = |worker| {
            format!("SELECT string_agg(number::text, ',' ORDER BY number) FROM receipts WHERE worker_id = {worker}")
        };
        assert_eq!(value::<String>(conn, left(mine)).await, "1,4,5");
        assert_eq!(value::<String>(conn, left(other)).await, "1,2,3,4,5");
    });
}
