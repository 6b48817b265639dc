//! The ledger looked at as a whole: whether the counters equal the items they count, and people's flags what became of them.
//!
//! All of it holds at every commit, so what is found here was changed by hand, or lost with a disk. That is why somebody
//! else than the columns' writers may repair it: what is written is what the writer would have.

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

/// Begins to read: until the transaction ends, everything is seen as it was at its first statement, so that what is counted
/// in one table and read in another belongs together while runs go on.
///
/// # Errors
/// The database's.
pub async fn snapshot(pool: &PgPool) -> sqlx::Result<Transaction<'static, Postgres>> {
    let mut tx = pool.begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY").await?;
    without_timeout(&mut tx).await?;
    Ok(tx)
}

/// Going over the whole ledger may take longer than other statements.
async fn without_timeout(conn: &mut PgConnection) -> sqlx::Result<()> {
    sqlx::query("SET LOCAL statement_timeout = 0").execute(conn).await?;
    Ok(())
}

/// A run whose counters are not what they have to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drift {
    /// The run.
    pub run_id: Uuid,
    /// How many items the run was accepted with.
    pub accepted: i32,
    /// The counters.
    pub shown: Counters,
    /// The items.
    pub counted: Counters,
    /// Whether the run is taken for finished.
    pub finished: bool,
}

impl Drift {
    /// Each counter that is wrong: its name, what it says, and how many items there are.
    #[must_use]
    pub fn wrong(&self) -> Vec<(&'static str, i32, i32)> {
        let (shown, counted) = (self.shown, self.counted);
        let states = ItemState::ALL.map(|state| (state.name(), shown.of(state), counted.of(state)));
        let all = [("total", shown.total, counted.total)].into_iter().chain(states);
        all.filter(|(_, shown, counted)| shown != counted).collect()
    }

    /// Whether the run is taken for finished and isn't, or the other way round.
    #[must_use]
    pub fn ended_wrongly(&self) -> bool {
        self.finished != (self.counted.open() == 0)
    }

    /// Items that the run was accepted with and that are not there any more.
    #[must_use]
    pub fn missing(&self) -> i32 {
        self.accepted - self.counted.total
    }
}

/// Every run whose counters differ from its items. One with items in a state of a later version can't be judged by this one.
///
/// # Errors
/// The database's.
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

/// Counts a run anew, while results go on being applied.
///
/// Whoever applies results writes items first and counters last, by what they change, in one transaction. So the counters'
/// row is locked first, and then the items are counted by a statement of its own: it sees the items of everybody who has
/// moved the counters before, and of nobody who still waits to.
///
/// A run with items in a state of a later version is left alone: that version may count them in a counter of its own.
///
/// # Errors
/// The database's; nothing is changed then.
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

/// People whose *emailed* flag says something else than their invitation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flags {
    /// Their invitation was sent, and the flag does not say so.
    pub missing: i64,
    /// The flag says so, and their invitation was not sent.
    pub wrong: i64,
}

/// Counts them. Of people without an invitation that counts nothing can be said: it may be pruned.
///
/// # Errors
/// The database's.
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

/// Makes every flag say what became of the invitation.
///
/// # Errors
/// The database's; nothing is changed then.
pub async fn correct_flags(pool: &PgPool) -> sqlx::Result<()> {
    let mut tx = pool.begin().await?;
    without_timeout(&mut tx).await?;
    // Sent is final, so nobody can have changed it meanwhile.
    sqlx::query!(
        "UPDATE users u SET emailed_at = coalesce(i.finished_at, now())
         FROM run_items i WHERE i.user_id = u.id AND i.active AND i.state = 'sent' AND u.emailed_at IS NULL"
    )
    .execute(&mut *tx)
    .await?;
    // The items are locked, so that none becomes sent before its person's flag is off: whoever applies that result writes
    // the item first, waits here, and then sets the flag again.
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

/// A run of which something is still open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unfinished {
    /// The run.
    pub run_id: Uuid,
    /// Its kind.
    pub kind: String,
    /// What a person wants of it.
    pub wanted: Wanted,
}

/// The runs of which something is still open, oldest first.
///
/// # Errors
/// The database's.
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

/// A run that has not progressed although it has items that are due.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NoProgress {
    /// The run.
    pub run_id: Uuid,
    /// For how long, in seconds.
    pub for_s: f64,
}

/// The runs that are neither paused nor held by a closed relay, have due items, and have not progressed for `after`, or for
/// three times what their share of the installation's rate limit takes for an item.
///
/// # Errors
/// The database's.
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

/// Items that a person has to look at: each should have a dead letter, for those who look at the queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Troubled {
    /// They were not sent.
    pub failed: i64,
    /// Nobody can know whether they were.
    pub unknown: i64,
}

/// Counts them.
///
/// # Errors
/// The database's.
pub async fn troubled(conn: &mut PgConnection) -> sqlx::Result<Troubled> {
    sqlx::query_as!(
        Troubled,
        r#"SELECT count(*) FILTER (WHERE state = 'failed') AS "failed!", count(*) FILTER (WHERE state = 'unknown') AS "unknown!"
           FROM run_items i JOIN runs r ON r.id = i.run_id AND NOT r.hidden WHERE i.troubled"#
    )
    .fetch_one(conn)
    .await
}

/// An item, for a dead letter that speaks of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subject {
    /// The item.
    pub item_id: i64,
    /// Where it stands; none: in a state of a later version.
    pub standing: Option<Standing>,
    /// Whether its run has been over for a while, so that nobody is about to take the letter off.
    pub quiet: bool,
}

/// The items of these ids. One that isn't returned does not exist.
///
/// # Errors
/// The database's.
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
    fn each_difference_is_named() {
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
