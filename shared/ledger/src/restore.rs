//! Declares that the ledger was restored from a backup: what is open in it may have been sent since the backup.

use sqlx::{Connection as _, PgConnection};
use uuid::Uuid;

use crate::invitations::ByPeople;
use crate::progress::{self, Report};
use crate::stored::SqlState;
use mailrun_core::{
    item::ItemState,
    message::{ItemMessage, ItemResult},
};

/// The error of unknown items in a restored run.
pub const MAY_HAVE_BEEN_SENT: &str =
    "the ledger was restored from a backup: this invitation may have been sent after the backup was taken";
/// Items settled in one transaction.
const BATCH: i64 = 1_000;

/// The effect of [`stop_all`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stopped {
    /// Runs in the ledger. Replaying their failed items needs a confirmation from now on.
    pub runs: u64,
    /// Runs with open items, which are paused.
    pub paused: u64,
    /// Unpublished messages that were removed.
    pub messages: u64,
}

/// An open item.
struct Item {
    hidden: bool,
    run_id: Uuid,
    id: i64,
    attempt: i32,
    tries: i16,
    replays: i16,
    state: ItemState,
}

impl Item {
    /// The attempt it waits for.
    fn awaited(&self) -> ItemMessage {
        let Self { run_id, id, attempt, tries, replays, state, .. } = *self;
        // The result is not published.
        ItemMessage { run_id, item_id: id, attempt, tries, replays, impersonal: false }.awaited(state)
    }
}

/// The names of the processes connected to this database. They must be stopped first.
pub async fn connected_workers(conn: &mut PgConnection) -> sqlx::Result<Vec<String>> {
    sqlx::query_scalar!(
        r#"SELECT DISTINCT application_name AS "name!" FROM pg_stat_activity
           WHERE datname = current_database() AND application_name LIKE 'mailrun worker%' ORDER BY 1"#
    )
    .fetch_all(conn)
    .await
}

/// Pauses every run with open items, and removes whatever would make them continue. Idempotent.
///
/// On an error nothing is changed.
pub async fn stop_all(conn: &mut PgConnection) -> sqlx::Result<Stopped> {
    let mut tx = conn.begin().await?;
    let paused = sqlx::query_scalar!(
        "UPDATE runs r SET wanted = 'paused' FROM run_progress p
         WHERE p.run_id = r.id AND p.finished_at IS NULL AND r.wanted = 'running' RETURNING r.hidden"
    )
    .fetch_all(&mut *tx)
    .await?;
    let runs = sqlx::query_scalar!("UPDATE runs SET restored_at = clock_timestamp() RETURNING hidden")
        .fetch_all(&mut *tx)
        .await?;
    let visible = |hidden: Vec<bool>| hidden.into_iter().filter(|hidden| !hidden).count() as u64;
    // A later answer for a relay must not resume the runs.
    sqlx::query!("UPDATE relay_stops SET runs = '{}' WHERE answered_at IS NULL").execute(&mut *tx).await?;
    // Every item is settled below, so no pass has anything left to release.
    sqlx::query!(
        "UPDATE run_passes SET done_at = clock_timestamp(), tidied_at = clock_timestamp() WHERE done_at IS NULL"
    )
    .execute(&mut *tx)
    .await?;
    let messages = sqlx::query!("DELETE FROM outbox WHERE published_at IS NULL").execute(&mut *tx).await?;
    // The workers that were running when the backup was taken.
    sqlx::query!("UPDATE workers SET died_at = clock_timestamp() WHERE stopped_at IS NULL AND died_at IS NULL")
        .execute(&mut *tx)
        .await?;
    tx.commit().await?;
    Ok(Stopped { runs: visible(runs), paused: visible(paused), messages: messages.rows_affected() })
}

/// Settles items as sent if a relay's log shows that they were. Returns how many were not known to be sent.
/// # Errors
/// Each batch is settled completely or not at all; the call can be repeated.
pub async fn settle_sent(conn: &mut PgConnection, sent: &[(Uuid, i64)]) -> sqlx::Result<usize> {
    let mut settled = 0;
    for sent in sent.chunks(BATCH as usize) {
        let (run_ids, item_ids): (Vec<Uuid>, Vec<i64>) = sent.iter().copied().unzip();
        let items = sqlx::query_as!(
            Item,
            r#"SELECT false AS "hidden!", i.run_id, i.id, i.attempt, i.tries, i.replays, i.state AS "state: SqlState"
               FROM unnest($1::uuid[], $2::bigint[]) AS s (run_id, id) JOIN run_items i ON i.id = s.id AND i.run_id = s.run_id
               WHERE i.state = ANY(mailrun_unsent())"#,
            &run_ids,
            &item_ids,
        )
        .fetch_all(&mut *conn)
        .await?;
        let results: Vec<(Uuid, ItemResult)> =
            items.iter().map(|item| (item.run_id, item.awaited().result(ItemState::Sent, None))).collect();
        settled += apply(conn, &results).await?;
    }
    Ok(settled)
}

/// Settles every open item as unknown, released or not: the backup's cursor is older than the sends. Returns how many of them
/// are in visible runs. Calls `progress` after each batch.
///
/// Each batch is settled completely or not at all; the call can be repeated.
pub async fn settle_open(conn: &mut PgConnection, mut progress: impl FnMut(usize)) -> sqlx::Result<usize> {
    let (mut settled, mut after) = (0, 0);
    loop {
        let items = sqlx::query_as!(
            Item,
            r#"SELECT coalesce(r.hidden, false) AS "hidden!", i.run_id, i.id, i.attempt, i.tries, i.replays,
                      i.state AS "state: SqlState"
               FROM run_items i LEFT JOIN runs r ON r.id = i.run_id
               WHERE i.id > $1 AND i.state IN ('pending', 'retrying') ORDER BY i.id LIMIT $2"#,
            after,
            BATCH,
        )
        .fetch_all(&mut *conn)
        .await?;
        let Some(last) = items.last() else { return Ok(settled) };
        after = last.id;
        let unknown = |item: &Item| item.awaited().result(ItemState::Unknown, Some(MAY_HAVE_BEEN_SENT.to_owned()));
        let results: Vec<(Uuid, ItemResult)> = items.iter().map(|item| (item.run_id, unknown(item))).collect();
        apply(conn, &results).await?;
        settled += items.iter().filter(|item| !item.hidden).count();
        progress(settled);
    }
}

async fn apply(conn: &mut PgConnection, results: &[(Uuid, ItemResult)]) -> sqlx::Result<usize> {
    let reports: Vec<Report<'_>> =
        results.iter().map(|(run_id, result)| Report { run_id: Some(*run_id), result }).collect();
    Ok(progress::apply(conn, &ByPeople, &reports).await?.changed)
}
