//! Settles unknown items, after a person has found out whether the message arrived.

use sqlx::PgConnection;
use uuid::Uuid;

use super::progress::{self, Report};
use crate::invitations::ByPeople;
use mailrun_core::{item::ItemState, message::ItemMessage};

/// Items settled in one transaction.
const BATCH: i64 = 500;

/// What the person found out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// The message arrived.
    Arrived,
    /// It was not sent.
    NotSent,
}

/// Which unknown items to settle.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// Only items of this run; `None` for all runs.
    pub run_id: Option<Uuid>,
    /// Only items of these people; `None` for everyone. Normalized addresses.
    pub emails: Option<Vec<String>>,
}

/// Settles unknown items as sent or failed, and returns how many. They are reported as a sender would report them, so the
/// counters are updated. A late result that one was sent after all still wins.
///
/// Batches settled before the error stay settled.
pub async fn settle(conn: &mut PgConnection, which: &Selection, found: Found, by: &str) -> sqlx::Result<usize> {
    let (state, reason) = match found {
        Found::Arrived => (ItemState::Sent, format!("settled by {by}: it arrived")),
        Found::NotSent => (ItemState::Failed, format!("settled by {by}: it was not sent")),
    };
    let (mut after, mut settled) = (0, 0);
    loop {
        let rows = sqlx::query!(
            "SELECT i.id, i.run_id, i.attempt, i.tries, i.replays
             FROM run_items i JOIN runs r ON r.id = i.run_id AND NOT r.hidden
             WHERE i.troubled AND i.state = 'unknown' AND i.id > $1
               AND ($2::uuid IS NULL OR i.run_id = $2)
               AND ($3::text[] IS NULL OR i.user_id IN (SELECT id FROM users WHERE email = ANY($3)))
             ORDER BY i.id LIMIT $4",
            after,
            which.run_id,
            which.emails.as_deref(),
            BATCH,
        )
        .fetch_all(&mut *conn)
        .await?;
        let Some(last) = rows.last() else { return Ok(settled) };
        after = last.id;
        let results: Vec<_> = rows
            .iter()
            .map(|row| {
                let item = ItemMessage {
                    run_id: row.run_id,
                    item_id: row.id,
                    attempt: row.attempt,
                    tries: row.tries,
                    replays: row.replays,
                    // The result is not published.
                    impersonal: false,
                };
                (row.run_id, item.result(state, Some(reason.clone())))
            })
            .collect();
        let reports: Vec<Report<'_>> =
            results.iter().map(|(run_id, result)| Report { run_id: Some(*run_id), result }).collect();
        settled += progress::apply(&mut *conn, &ByPeople, &reports).await?.changed;
    }
}
