//! Claims. Inserting the row is claiming the attempt; the primary key sees to it that only one worker ever does.

use std::time::Duration;

use sqlx::PgConnection;
use uuid::Uuid;

use crate::item::{ItemState, Standing};

/// A claim that was granted, with what is needed to carry it out.
#[derive(Clone, Debug)]
pub struct Claimed {
    /// The item.
    pub item_id: i64,
    /// The attempt.
    pub number: i32,
    /// The run.
    pub run_id: Uuid,
    /// The item's place in its run, from 1.
    pub position: i32,
    /// The recipient.
    pub email: String,
    /// The recipient's name.
    pub name: Option<String>,
    /// Why the claim is nobody's, and the attempt is not to be carried out. None: it is the worker's.
    pub withheld: Option<Withheld>,
}

/// Why an attempt will never be carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Withheld {
    /// The run was cancelled.
    Cancelled,
    /// The address was suppressed.
    Suppressed,
}

impl Withheld {
    const ALL: [Self; 2] = [Self::Cancelled, Self::Suppressed];

    /// What stands in place of a worker's id. Workers count from 1.
    fn owner(self) -> i64 {
        match self {
            Self::Cancelled => 0,
            Self::Suppressed => -1,
        }
    }

    fn of(worker_id: i64) -> Option<Self> {
        Self::ALL.into_iter().find(|why| why.owner() == worker_id)
    }
}

/// Claims attempts for a worker: those that are neither outdated nor claimed by anyone. Those not returned were refused;
/// [`find`] says why. The `WHERE` clause is [`Standing::allows`].
///
/// In a cancelled run, and for a suppressed address, the claim goes to nobody: the attempt will never be carried out, and
/// anyone may report that, now or later.
///
/// # Errors
/// The database's.
pub async fn claim(
    conn: &mut PgConnection,
    worker_id: i64,
    item_ids: &[i64],
    numbers: &[i32],
) -> sqlx::Result<Vec<Claimed>> {
    let rows = sqlx::query!(
        r#"WITH asked AS MATERIALIZED (
               SELECT asked.item_id, asked.number, i.run_id, i.position, u.email, u.name,
                      CASE WHEN r.wanted = 'cancelled' THEN $4::bigint WHEN s.email IS NOT NULL THEN $5 ELSE $1::bigint END
                      AS worker_id
               FROM unnest($2::bigint[], $3::integer[]) AS asked (item_id, number)
               JOIN run_items i ON i.id = asked.item_id
               JOIN runs r ON r.id = i.run_id
               JOIN users u ON u.id = i.user_id
               LEFT JOIN suppressions s ON s.email = u.email
               WHERE i.state <> 'sent'
                 AND (i.attempt < asked.number OR (i.attempt = asked.number AND i.state = 'pending'))
           ), claimed AS (
               INSERT INTO attempts (item_id, number, worker_id)
               SELECT item_id, number, worker_id FROM asked ORDER BY item_id, number
               ON CONFLICT DO NOTHING
               RETURNING item_id, number
           )
           SELECT item_id AS "item_id!", number AS "number!", run_id, position, email, name, worker_id AS "worker_id!"
           FROM claimed JOIN asked USING (item_id, number)"#,
        worker_id,
        item_ids,
        numbers,
        Withheld::Cancelled.owner(),
        Withheld::Suppressed.owner(),
    )
    .fetch_all(conn)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| Claimed {
            item_id: row.item_id,
            number: row.number,
            run_id: row.run_id,
            position: row.position,
            email: row.email,
            name: row.name,
            withheld: Withheld::of(row.worker_id),
        })
        .collect())
}

/// What is known of an attempt whose claim was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// The item.
    pub item_id: i64,
    /// The attempt asked for.
    pub number: i32,
    /// Where the item stands.
    pub standing: Standing,
    /// Who claimed the attempt.
    pub owner: Option<Owner>,
}

/// The holder of a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// Nobody will ever carry the attempt out.
    Nobody(Withheld),
    /// A worker has begun to.
    Worker {
        /// Its id.
        id: i64,
        /// Whether its heartbeat is fresh, and it has not ended.
        alive: bool,
    },
}

impl Owner {
    pub(super) fn new(worker_id: i64, alive: Option<bool>) -> Self {
        match Withheld::of(worker_id) {
            Some(why) => Self::Nobody(why),
            None => Self::Worker { id: worker_id, alive: alive.unwrap_or(false) },
        }
    }
}

/// Looks up attempts whose claim was refused. One that isn't returned names an item that doesn't exist.
///
/// # Errors
/// The database's.
pub async fn find(
    conn: &mut PgConnection,
    dead_after: Duration,
    item_ids: &[i64],
    numbers: &[i32],
) -> sqlx::Result<Vec<Found>> {
    let rows = sqlx::query!(
        r#"SELECT asked.item_id AS "item_id!", asked.number AS "number!", i.attempt, i.state AS "state: ItemState",
                  a.worker_id AS "worker_id?",
                  (w.stopped_at IS NULL AND w.heartbeat_at > now() - make_interval(secs => $1)) AS alive
           FROM unnest($2::bigint[], $3::integer[]) AS asked (item_id, number)
           JOIN run_items i ON i.id = asked.item_id
           LEFT JOIN attempts a ON a.item_id = asked.item_id AND a.number = asked.number
           LEFT JOIN workers w ON w.id = a.worker_id"#,
        dead_after.as_secs_f64(),
        item_ids,
        numbers,
    )
    .fetch_all(conn)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| Found {
            item_id: row.item_id,
            number: row.number,
            standing: Standing { attempt: row.attempt, state: row.state },
            owner: row.worker_id.map(|id| Owner::new(id, row.alive)),
        })
        .collect())
}

/// Where items stand, to see whether a reported outcome has been applied.
///
/// # Errors
/// The database's.
pub async fn standings(conn: &mut PgConnection, item_ids: &[i64]) -> sqlx::Result<Vec<(i64, Standing)>> {
    let rows =
        sqlx::query!(r#"SELECT id, attempt, state AS "state: ItemState" FROM run_items WHERE id = ANY($1)"#, item_ids)
            .fetch_all(conn)
            .await?;
    Ok(rows.into_iter().map(|row| (row.id, Standing { attempt: row.attempt, state: row.state })).collect())
}
