//! Checks the whole ledger: whether the counters equal the items, and whether people's flags match their invitations.
//!
//! Both hold after every commit. A difference was caused by a manual change or by data loss. That is why a repair may write columns
//! that belong to other processes: it writes what they would have written.

use std::time::Duration;

use sqlx::{Connection as _, PgConnection, PgPool, Postgres, Transaction};
use uuid::Uuid;

use super::{
    counters::{self, Change},
    stored::Stored,
};
use mailrun_core::{
    item::{ItemState, Standing},
    run::{Counters, Wanted},
};

/// Begins a read-only snapshot: until the transaction ends, all queries see the same moment, so that counts from different
/// tables are consistent while runs continue.
pub async fn snapshot(pool: &PgPool) -> sqlx::Result<Transaction<'static, Postgres>> {
    let mut tx = pool.begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY").await?;
    without_timeout(&mut tx).await?;
    Ok(tx)
}

/// A scan of the whole ledger may take longer than the statement timeout.
async fn without_timeout(conn: &mut PgConnection) -> sqlx::Result<()> {
    sqlx::query("SET LOCAL statement_timeout = 0").execute(conn).await?;
    Ok(())
}

/// A run whose counters are wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drift {
    /// The run.
    pub run_id: Uuid,
    /// The number of items the run was accepted with.
    pub accepted: i32,
    /// The stored counters.
    pub shown: Counters,
    /// The counts of the items.
    pub counted: Counters,
    /// Whether the run is marked as finished.
    pub finished: bool,
}

impl Drift {
    /// Each wrong counter: its name, its value, and the real count.
    #[must_use]
    pub fn wrong(&self) -> Vec<(&'static str, i32, i32)> {
        let (shown, counted) = (self.shown, self.counted);
        let states = ItemState::ALL.map(|state| (state.name(), shown.of(state), counted.of(state)));
        let all = [("total", shown.total, counted.total)].into_iter().chain(states);
        all.filter(|(_, shown, counted)| shown != counted).collect()
    }

    /// Whether the run is marked as finished and is not, or the reverse.
    #[must_use]
    pub fn ended_wrongly(&self) -> bool {
        self.finished != (self.counted.open() == 0)
    }

    /// How many of the accepted items no longer exist.
    #[must_use]
    pub fn missing(&self) -> i32 {
        self.accepted - self.counted.total
    }
}

/// All runs whose counters differ from their items. Runs with items in a state of a later version are skipped: only that
/// version can judge them.
pub async fn drift(conn: &mut PgConnection) -> sqlx::Result<Vec<Drift>> {
    let rows = sqlx::query!(
        r#"SELECT p.run_id AS "run_id!", r.total AS accepted, p.finished_at IS NOT NULL AS "finished!", p.total AS "total!",
                  p.counts AS "shown!", mailrun_count_items(p.run_id) AS "counted!"
           FROM run_counters p JOIN runs r ON r.id = p.run_id
           ORDER BY r.created_at, r.id"#
    )
    .fetch_all(conn)
    .await?;
    let all = rows.into_iter().map(|row| Drift {
        run_id: row.run_id,
        accepted: row.accepted,
        finished: row.finished,
        shown: Counters::new(row.total, &row.shown),
        counted: Counters::new(row.counted.iter().sum(), &row.counted),
    });
    let all = all.filter(|run| run.counted.total == run.counted.sum());
    Ok(all.filter(|run| run.shown != run.counted || run.ended_wrongly() || run.missing() != 0).collect())
}

/// Recounts a run while results continue to be applied.
///
/// Results are applied in one transaction that writes the items first, and changes the counters last by a difference. So this
/// locks the counters' row first and counts the items in a separate statement. That statement sees the items of every
/// transaction that has already changed the counters, and of none that is still waiting to.
///
/// A run with items in a state of a later version is skipped: that version may have its own counter for them.
/// # Errors
/// On an error nothing is changed.
pub async fn recount(conn: &mut PgConnection, run_id: Uuid) -> sqlx::Result<()> {
    let mut tx = conn.begin().await?;
    without_timeout(&mut tx).await?;
    sqlx::query!("SELECT run_id FROM run_progress WHERE run_id = $1 FOR UPDATE", run_id)
        .fetch_optional(&mut *tx)
        .await?;
    let Some(row) = sqlx::query!(
        r#"SELECT total AS "total!", counts AS "shown!", mailrun_count_items(run_id) AS "counted!" FROM run_counters WHERE run_id = $1"#,
        run_id
    )
    .fetch_optional(&mut *tx)
    .await?
    else {
        return Ok(());
    };
    let (shown, counted) =
        (Counters::new(row.total, &row.shown), Counters::new(row.counted.iter().sum(), &row.counted));
    if counted.total == counted.sum() {
        let change = Change {
            items: shown.delta(&counted),
            total: counted.total - shown.total,
            corrects: true,
            ..Change::default()
        };
        counters::change(&mut tx, run_id, &change).await?;
    }
    tx.commit().await
}

/// The number of people whose *emailed* flag contradicts their invitation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flags {
    /// The invitation was sent, and the flag is not set.
    pub missing: i64,
    /// The flag is set, and the invitation was not sent.
    pub wrong: i64,
}

/// Counts wrong flags. People without an invitation that counts are skipped: it may have been pruned.
pub async fn flags(conn: &mut PgConnection) -> sqlx::Result<Flags> {
    sqlx::query_as!(
        Flags,
        r#"SELECT count(*) FILTER (WHERE i.state = 'sent') AS "missing!", count(*) FILTER (WHERE i.state = ANY(mailrun_unsent())) AS "wrong!"
           FROM run_items i JOIN users u ON u.id = i.user_id
           WHERE i.active AND (u.emailed_at IS NOT NULL) <> (i.state = 'sent')
             AND NOT EXISTS (SELECT FROM run_items other WHERE other.user_id = i.user_id AND other.overtaken)"#
    )
    .fetch_one(conn)
    .await
}

/// Corrects all flags.
///
/// On an error nothing is changed.
pub async fn correct_flags(pool: &PgPool) -> sqlx::Result<()> {
    let mut tx = pool.begin().await?;
    without_timeout(&mut tx).await?;
    // `sent` is final, so nothing can have changed it in the meantime.
    sqlx::query!(
        "UPDATE users u SET emailed_at = coalesce(i.finished_at, now())
         FROM run_items i WHERE i.user_id = u.id AND i.active AND i.state = 'sent' AND u.emailed_at IS NULL"
    )
    .execute(&mut *tx)
    .await?;
    // The items are locked, so that none becomes `sent` before its person's flag is cleared. A process that applies such a result
    // writes the item first, waits here, and then sets the flag again.
    sqlx::query!(
        "WITH wrong AS (
             SELECT u.id FROM run_items i JOIN users u ON u.id = i.user_id
             WHERE i.active AND i.state = ANY(mailrun_unsent())
               AND u.emailed_at IS NOT NULL
               AND NOT EXISTS (SELECT FROM run_items other WHERE other.user_id = i.user_id AND other.overtaken)
             ORDER BY i.id FOR UPDATE OF i
         )
         UPDATE users u SET emailed_at = NULL FROM wrong WHERE u.id = wrong.id"
    )
    .execute(&mut *tx)
    .await?;
    tx.commit().await
}

/// A run with open items or an unfinished pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unfinished {
    /// The run.
    pub run_id: Uuid,
    /// Its kind.
    pub kind: String,
    /// Its wanted state.
    pub wanted: Wanted,
}

/// The unfinished runs, oldest first.
pub async fn unfinished(conn: &mut PgConnection) -> sqlx::Result<Vec<Unfinished>> {
    let rows = sqlx::query!(
        r#"SELECT r.id AS run_id, r.kind, r.wanted AS "wanted: Stored<Wanted>" FROM run_progress p JOIN runs r ON r.id = p.run_id
           WHERE p.finished_at IS NULL AND NOT r.hidden ORDER BY r.created_at, r.id"#
    )
    .fetch_all(conn)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| Unfinished { run_id: row.run_id, kind: row.kind, wanted: row.wanted.acted_on() })
        .collect())
}

/// A run that makes no progress although items are due.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NoProgress {
    /// The run.
    pub run_id: Uuid,
    /// How long it has made no progress, in seconds.
    pub for_s: f64,
}

/// The runs that are neither paused nor held by a closed relay, have due items, and have not progressed for `after`, or for
/// three times the interval of their share of the installation's rate limit.
pub async fn without_progress(
    conn: &mut PgConnection,
    after: Duration,
    per_second: Option<i32>,
) -> sqlx::Result<Vec<NoProgress>> {
    sqlx::query_as!(
        NoProgress,
        r#"SELECT r.id AS run_id, extract(epoch FROM clock_timestamp() - p.updated_at)::float8 AS "for_s!"
           FROM run_progress p JOIN runs r ON r.id = p.run_id
           CROSS JOIN LATERAL (SELECT count(*) AS runs FROM run_progress q JOIN runs s ON s.id = q.run_id
                               WHERE q.finished_at IS NULL AND s.wanted = 'running') active
           WHERE p.finished_at IS NULL AND r.wanted = 'running'
             AND NOT mailrun_is_recent(p.updated_at, greatest($1, coalesce(3 * active.runs / $2::float8, 0)))
             AND NOT EXISTS (SELECT FROM live_workers w WHERE w.lane_until > clock_timestamp())
             AND (p.pending > 0
                  OR EXISTS (SELECT FROM run_items i WHERE i.run_id = r.id AND i.state = 'retrying'
                             AND (i.due_at IS NULL OR i.due_at < clock_timestamp() - make_interval(secs => $1))))
           ORDER BY r.created_at, r.id"#,
        after.as_secs_f64(),
        per_second.map(f64::from),
    )
    .fetch_all(conn)
    .await
}

/// Items that need a person's attention. Each should also have a dead letter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Troubled {
    /// Not sent.
    pub failed: i64,
    /// It cannot be established whether they were sent.
    pub unknown: i64,
}

/// Counts the items that need a person's attention.
pub async fn troubled(conn: &mut PgConnection) -> sqlx::Result<Troubled> {
    sqlx::query_as!(
        Troubled,
        r#"SELECT count(*) FILTER (WHERE state = 'failed') AS "failed!", count(*) FILTER (WHERE state = 'unknown') AS "unknown!"
           FROM run_items i JOIN runs r ON r.id = i.run_id AND NOT r.hidden WHERE i.troubled"#
    )
    .fetch_one(conn)
    .await
}

/// The item of a dead letter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subject {
    /// The item.
    pub item_id: i64,
    /// Its standing. `None`: in a state of a later version.
    pub standing: Option<Standing>,
    /// Whether its run ended a while ago, so that no replay is about to remove the dead letter.
    pub quiet: bool,
}

/// The items with these ids. Missing ones do not exist.
pub async fn subjects(conn: &mut PgConnection, item_ids: &[i64], quiet_for: Duration) -> sqlx::Result<Vec<Subject>> {
    let rows = sqlx::query!(
        r#"SELECT i.id AS "id!", i.attempt AS "attempt!", i.state AS "state!: Stored<ItemState>",
                  coalesce(p.finished_at < clock_timestamp() - make_interval(secs => $2)
                           AND p.updated_at < clock_timestamp() - make_interval(secs => $2), p.run_id IS NULL) AS "quiet!"
           FROM run_items i LEFT JOIN run_progress p ON p.run_id = i.run_id
           WHERE i.id = ANY($1)"#,
        item_ids,
        quiet_for.as_secs_f64(),
    )
    .fetch_all(conn)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| Subject {
            item_id: row.id,
            standing: row.state.known().map(|state| Standing { attempt: row.attempt, state }),
            quiet: row.quiet,
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_each_difference() {
        let counted = Counters::of_items(&[(ItemState::Pending, 1), (ItemState::Sent, 8)]);
        let right = Drift { run_id: Uuid::nil(), accepted: 9, shown: counted, counted, finished: false };
        assert_eq!((right.wrong(), right.ended_wrongly(), right.missing()), (vec![], false, 0));
        let shown = Counters::of_items(&[(ItemState::Failed, 1), (ItemState::Sent, 8)]);
        let wrong = Drift { accepted: 10, shown, finished: true, ..right };
        assert_eq!(wrong.wrong(), [("pending", 0, 1), ("failed", 1, 0)]);
        assert!(wrong.ended_wrongly(), "one is open");
        assert_eq!(wrong.missing(), 1);
    }
}
