//! Claims. Inserting the row is claiming the attempt; the primary key sees to it that only one worker ever does.

use std::time::Duration;

use sqlx::PgConnection;
use uuid::Uuid;

use super::receipts::{self, Receipt};
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
/// The worker's receipt is written in the same transaction, whatever is granted.
///
/// `IS TRUE` makes the last look one into a hash table. PostgreSQL, which expects a row or two, might compare each of them with
/// each as a join.
///
/// # Errors
/// The database's.
pub async fn claim(
    conn: &mut PgConnection,
    worker_id: i64,
    item_ids: &[i64],
    numbers: &[i32],
    receipt: &Receipt,
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
           ), receipt AS (
               INSERT INTO receipts (worker_id, number, item_ids, attempts)
               SELECT $1, $6, $7::bigint[], $8::integer[] WHERE cardinality($7) > 0
           )
           SELECT item_id AS "item_id!", number AS "number!", run_id, position, email, name, worker_id AS "worker_id!"
           FROM asked WHERE ((item_id, number) IN (SELECT item_id, number FROM claimed)) IS TRUE"#,
        worker_id,
        item_ids,
        numbers,
        Withheld::Cancelled.owner(),
        Withheld::Suppressed.owner(),
        receipt.number,
        &receipt.item_ids,
        &receipt.attempts,
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
        /// What is known of it.
        fate: Fate,
    },
}

/// What is known of the worker that holds a claim, and of the attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// The worker's heartbeat is fresh, and it has not ended: it will report.
    Alive,
    /// It has ended or died, but there is a receipt: the mail server had accepted the mail.
    Accepted,
    /// It has ended or died, and left nothing but the claim.
    Dead,
}

/// A claim as it is read.
pub(super) struct Held {
    pub(super) item_id: i64,
    pub(super) number: i32,
    pub(super) worker_id: Option<i64>,
    /// None: nobody knows such a worker.
    pub(super) alive: Option<bool>,
}

impl Held {
    /// Whose it is, as far as the claim says: there may be a receipt as well.
    fn owner(&self) -> Option<Owner> {
        self.worker_id.map(|id| match Withheld::of(id) {
            Some(why) => Owner::Nobody(why),
            None => Owner::Worker { id, fate: if self.alive == Some(true) { Fate::Alive } else { Fate::Dead } },
        })
    }
}

/// The owners of claims, in their order.
pub(super) async fn owners(conn: &mut PgConnection, claims: &[Held]) -> sqlx::Result<Vec<Option<Owner>>> {
    let mut owners: Vec<Option<Owner>> = claims.iter().map(Held::owner).collect();
    let (mut workers, items): (Vec<i64>, Vec<i64>) = claims
        .iter()
        .zip(&owners)
        .filter_map(|(held, owner)| match owner {
            Some(Owner::Worker { id, fate: Fate::Dead }) => Some((*id, held.item_id)),
            _ => None,
        })
        .unzip();
    workers.sort_unstable();
    workers.dedup();
    let accepted = receipts::of_workers(conn, &workers, &items).await?;
    for (held, owner) in claims.iter().zip(&mut owners) {
        if let Some(Owner::Worker { fate: fate @ Fate::Dead, .. }) = owner
            && accepted.contains(&(held.item_id, held.number))
        {
            *fate = Fate::Accepted;
        }
    }
    Ok(owners)
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
    struct Row {
        item_id: i64,
        number: i32,
        attempt: i32,
        state: ItemState,
        worker_id: Option<i64>,
        alive: Option<bool>,
    }
    let rows = sqlx::query_as!(
        Row,
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
    .fetch_all(&mut *conn)
    .await?;
    let held =
        |row: &Row| Held { item_id: row.item_id, number: row.number, worker_id: row.worker_id, alive: row.alive };
    let owners = owners(conn, &rows.iter().map(held).collect::<Vec<_>>()).await?;
    Ok(rows
        .into_iter()
        .zip(owners)
        .map(|(row, owner)| Found {
            item_id: row.item_id,
            number: row.number,
            standing: Standing { attempt: row.attempt, state: row.state },
            owner,
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
