//! Counts from the ledger for monitoring.

use std::time::Duration;

use sqlx::PgConnection;

use mailrun_core::item::ItemState;

/// The counts at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct Gauges {
    /// Items, by state.
    pub items: [(ItemState, i64); ItemState::ALL.len()],
    /// Runs with items that are pending or retrying.
    pub open_runs: i64,
    /// Messages in the outbox that are not published.
    pub outbox_messages: i64,
    /// The age of the oldest of them.
    pub outbox_oldest: Duration,
    /// Suppressed addresses.
    pub suppressions: i64,
    /// Stopped relays that wait for an operator.
    pub relays_stopped: i64,
}

/// Reads the counts. Takes some hundred milliseconds with a million suppressions.
pub async fn read(conn: &mut PgConnection) -> sqlx::Result<Gauges> {
    let row = sqlx::query!(
        r#"SELECT (SELECT coalesce(array_agg(summed.items ORDER BY summed.place), '{}')
                   FROM (SELECT place, sum(items)::bigint AS items FROM run_counters JOIN runs ON id = run_id AND NOT hidden, unnest(counts) WITH ORDINALITY AS c (items, place)
                         GROUP BY place) summed) AS "items!",
                  (SELECT count(*) FROM run_counters JOIN runs ON id = run_id AND NOT hidden WHERE is_open) AS "open!",
                  o.messages AS "messages!", o.oldest AS "oldest!",
                  (SELECT count(*) FROM suppressions) AS "suppressions!",
                  (SELECT count(*) FROM relay_stops WHERE answered_at IS NULL) AS "relays_stopped!"
           FROM (SELECT count(*) AS messages,
                        coalesce(extract(epoch FROM clock_timestamp() - min(created_at)), 0)::double precision AS oldest
                 FROM outbox WHERE published_at IS NULL) o"#
    )
    .fetch_one(conn)
    .await?;
    let items = |state| row.items.get(state as usize).copied().unwrap_or_default();
    Ok(Gauges {
        items: ItemState::ALL.map(|state| (state, items(state))),
        open_runs: row.open,
        outbox_messages: row.messages,
        // Negative if the database's clock was set back.
        outbox_oldest: Duration::try_from_secs_f64(row.oldest).unwrap_or_default(),
        suppressions: row.suppressions,
        relays_stopped: row.relays_stopped,
    })
}
