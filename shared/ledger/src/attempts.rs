//! Claims. To claim an attempt is to insert its row; the primary key ensures that only one worker ever does.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::Duration,
};

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::Value;
use sqlx::{Connection as _, PgConnection};
use uuid::Uuid;

use super::{
    pacing,
    receipts::{self, Receipt},
    stored::Stored,
};
use mailrun_core::{
    claim::{Fate, Found, Owner, Withheld},
    item::{ItemState, Key, Standing},
    pacing::Rate,
    run::Wanted,
};

/// A granted claim.
#[derive(Clone, Debug)]
pub struct Granted {
    /// The claimed attempt.
    pub key: Key,
    /// The item's position in its run, from 1.
    pub position: i32,
    /// The item's own data.
    pub data: Option<Value>,
    /// Why no worker makes the attempt. `None`: the claiming worker makes it.
    pub withheld: Option<Withheld>,
}

const CANCELLED: i64 = 0;
const DELETED: i64 = -2;

/// The worker id that encodes a reason. Real worker ids start at 1. No job uses the reason code 2.
fn owner_for(why: Withheld) -> i64 {
    match why {
        Withheld::Cancelled => CANCELLED,
        Withheld::Deleted => DELETED,
        Withheld::ByJob(code) => -i64::from(code),
    }
}

/// The reason that a worker id encodes. `None`: it is the id of a worker.
fn withheld(worker_id: i64) -> Option<Withheld> {
    match worker_id {
        CANCELLED => Some(Withheld::Cancelled),
        DELETED => Some(Withheld::Deleted),
        ..0 => Some(u8::try_from(-worker_id).map_or(Withheld::Deleted, Withheld::ByJob)),
        _ => None,
    }
}

/// Keys as one array for each column, for use in a statement.
#[derive(Debug, Default)]
struct Columns {
    run_ids: Vec<Uuid>,
    item_ids: Vec<i64>,
    numbers: Vec<i32>,
}

impl Columns {
    fn of(keys: &[Key]) -> Self {
        let mut columns = Self::default();
        for key in keys {
            columns.run_ids.push(key.run_id);
            columns.item_ids.push(key.item_id);
            columns.numbers.push(key.attempt);
        }
        columns
    }
}

/// Claims attempts for a worker: those that are neither outdated nor claimed, of runs that are not paused and have one of these
/// kinds (`None`: any kind). The others were refused; [`find`] says why. The `WHERE` clause is [`Standing::allows`]. Run and
/// item must both match, because a message of another ledger may name an item id that exists here in another run.
///
/// In a cancelled run the claim goes to no worker: the attempt will never be made, and any process may report that, now or
/// later. Jobs withhold more: see [`withhold`].
///
/// The same statement writes the worker's receipt, whatever is granted.
///
/// `IS TRUE` turns the last lookup into a hash lookup. PostgreSQL expects one or two rows, and might otherwise plan a nested
/// loop join that compares every pair.
pub async fn claim(
    conn: &mut PgConnection,
    worker_id: i64,
    kinds: Option<&[String]>,
    keys: &[Key],
    receipt: &Receipt,
) -> sqlx::Result<Vec<Granted>> {
    let asked = Columns::of(keys);
    let rows = sqlx::query!(
        r#"WITH asked AS MATERIALIZED (
               SELECT asked.item_id, asked.number, i.run_id, i.position, i.data,
                      CASE WHEN r.id IS NULL THEN $6 WHEN r.wanted = 'cancelled' THEN $5 ELSE $1::bigint END AS worker_id
               FROM unnest($2::uuid[], $3::bigint[], $4::integer[]) AS asked (run_id, item_id, number)
               JOIN run_items i ON i.id = asked.item_id AND i.run_id = asked.run_id
               LEFT JOIN runs r ON r.id = i.run_id
               WHERE ((i.attempt = asked.number AND i.state = 'pending')
                      OR (i.attempt < asked.number
                          AND i.state = ANY(mailrun_unsent())))
                 AND (r.id IS NULL OR (r.wanted IN ('running', 'cancelled') AND ($10::text[] IS NULL OR r.kind = ANY($10))))
           ), claimed AS (
               INSERT INTO attempts (item_id, number, worker_id)
               SELECT item_id, number, worker_id FROM asked ORDER BY item_id, number
               ON CONFLICT DO NOTHING
               RETURNING item_id, number
           ), receipt AS (
               INSERT INTO receipts (worker_id, number, item_ids, attempts)
               SELECT $1, $7, $8::bigint[], $9::integer[] WHERE cardinality($8) > 0
           )
           SELECT item_id AS "item_id!", number AS "number!", run_id, position, data, worker_id AS "worker_id!"
           FROM asked WHERE ((item_id, number) IN (SELECT item_id, number FROM claimed)) IS TRUE"#,
        worker_id,
        &asked.run_ids,
        &asked.item_ids,
        &asked.numbers,
        CANCELLED,
        DELETED,
        receipt.number,
        &receipt.item_ids,
        &receipt.attempts,
        kinds,
    )
    .fetch_all(conn)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| Granted {
            key: Key { run_id: row.run_id, item_id: row.item_id, attempt: row.number },
            position: row.position,
            data: row.data,
            withheld: withheld(row.worker_id),
        })
        .collect())
}

/// Withholds attempts that were just claimed: no worker will ever make them.
pub async fn withhold(conn: &mut PgConnection, claims: &[(Key, Withheld)]) -> sqlx::Result<()> {
    let keys: Vec<Key> = claims.iter().map(|(key, _)| *key).collect();
    let Columns { item_ids, numbers, .. } = Columns::of(&keys);
    let owners: Vec<i64> = claims.iter().map(|(_, why)| owner_for(*why)).collect();
    sqlx::query!(
        "UPDATE attempts a SET worker_id = withheld.owner
         FROM unnest($1::bigint[], $2::integer[], $3::bigint[]) AS withheld (item_id, number, owner)
         WHERE a.item_id = withheld.item_id AND a.number = withheld.number",
        &item_ids,
        &numbers,
        &owners,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// The rate limits that apply to a claim.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// The limits of runs that have one. If the installation has a limit, this lists every requested run.
    pub runs: BTreeMap<Uuid, Option<Rate>>,
    /// The limit of the installation.
    pub installation: Option<Rate>,
    /// By run: slots that were granted to earlier attempts and not used.
    pub unused: HashMap<Uuid, i32>,
}

/// The meters of a rate-limited claim, locked until the caller's transaction ends.
#[derive(Debug)]
pub struct Paced {
    meters: pacing::Locked,
    /// The attempts to claim: their send time is within reach.
    pub due: Vec<Key>,
    /// The other attempts, and the wait until their send time.
    pub not_due: Vec<(Key, Duration)>,
}

impl Paced {
    /// Locks the meters, and determines which attempts have a send time within `ahead`.
    pub async fn lock(conn: &mut PgConnection, keys: &[Key], limits: &Limits, ahead: Duration) -> sqlx::Result<Self> {
        let mut meters = pacing::lock(conn, &limits.runs, limits.installation).await?;
        for (run_id, slots) in &limits.unused {
            meters.unused(*run_id, *slots);
        }
        let until = meters.now + TimeDelta::from_std(ahead).unwrap_or_default();
        let (due, not_due) = split_by_slot(&meters, keys, until);
        Ok(Self { meters, due, not_due })
    }

    /// Reserves send times for the granted attempts, in the order of the request. Refused and withheld attempts take none.
    /// Returns the wait of each attempt, and what was not due.
    pub async fn reserve(
        mut self,
        conn: &mut PgConnection,
        granted: &HashSet<Key>,
    ) -> sqlx::Result<(HashMap<Key, Duration>, Vec<(Key, Duration)>)> {
        let mut slots = HashMap::new();
        for key in self.due.iter().filter(|key| granted.contains(key)) {
            if let Some(slot) = self.meters.take(key.run_id) {
                slots.insert(*key, wait(slot, self.meters.now));
            }
        }
        pacing::save(conn, &self.meters).await?;
        Ok((slots, self.not_due))
    }
}

/// The attempts with a slot by `until`, and how long the others must wait for theirs.
fn split_by_slot(meters: &pacing::Locked, keys: &[Key], until: DateTime<Utc>) -> (Vec<Key>, Vec<(Key, Duration)>) {
    let mut meters = meters.clone();
    let (mut due, mut not_due) = (Vec::new(), Vec::new());
    for key in keys {
        match meters.take(key.run_id) {
            Some(slot) if slot > until => not_due.push((*key, wait(slot, meters.now))),
            _ => due.push(*key),
        }
    }
    (due, not_due)
}

fn wait(slot: DateTime<Utc>, now: DateTime<Utc>) -> Duration {
    (slot - now).to_std().unwrap_or_default()
}

/// Reserves a send time for an attempt that is already claimed: its first one went unused, or it is offered again. Returns the wait
/// until the send time. `None`: the wait would exceed `longest`, and nothing is reserved.
pub async fn reserve(
    conn: &mut PgConnection,
    run_id: Uuid,
    limits: &Limits,
    longest: Duration,
) -> sqlx::Result<Option<Duration>> {
    let mut tx = conn.begin().await?;
    let mut meters = pacing::lock(&mut tx, &limits.runs, limits.installation).await?;
    for (run_id, slots) in &limits.unused {
        meters.unused(*run_id, *slots);
    }
    let wait = meters.next_slot(run_id).map_or(Duration::ZERO, |slot| wait(slot, meters.now));
    let reserved = wait <= longest;
    if reserved {
        meters.take(run_id);
    }
    pacing::save(&mut tx, &meters).await?;
    tx.commit().await?;
    Ok(reserved.then_some(wait))
}

/// A row of `attempts`.
pub(super) struct Held {
    pub(super) item_id: i64,
    pub(super) number: i32,
    pub(super) worker_id: Option<i64>,
    pub(super) alive: bool,
}

impl Held {
    /// The owner according to the claim alone. There may also be a receipt.
    fn owner(&self) -> Option<Owner> {
        self.worker_id.map(|id| match withheld(id) {
            Some(why) => Owner::Nobody(why),
            None => Owner::Worker { id, fate: if self.alive { Fate::Alive } else { Fate::Dead } },
        })
    }
}

/// The owners of claims, in the same order.
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

/// Looks up attempts whose claim was refused, with the kind of their run. A missing attempt names an item that does not exist
/// in this run.
pub async fn find(conn: &mut PgConnection, keys: &[Key]) -> sqlx::Result<Vec<(Found, Option<String>)>> {
    struct Row {
        run_id: Uuid,
        item_id: i64,
        number: i32,
        attempt: i32,
        state: Stored<ItemState>,
        wanted: Option<Stored<Wanted>>,
        kind: Option<String>,
        worker_id: Option<i64>,
        alive: bool,
    }
    let asked = Columns::of(keys);
    let rows = sqlx::query_as!(
        Row,
        r#"SELECT i.run_id, asked.item_id AS "item_id!", asked.number AS "number!", i.attempt, i.state AS "state: Stored<ItemState>",
                  r.wanted AS "wanted?: Stored<Wanted>", r.kind AS "kind?", a.worker_id AS "worker_id?",
                  w.id IS NOT NULL AS "alive!"
           FROM unnest($1::uuid[], $2::bigint[], $3::integer[]) AS asked (run_id, item_id, number)
           JOIN run_items i ON i.id = asked.item_id AND i.run_id = asked.run_id
           LEFT JOIN runs r ON r.id = i.run_id
           LEFT JOIN attempts a ON a.item_id = asked.item_id AND a.number = asked.number
           LEFT JOIN live_workers w ON w.id = a.worker_id"#,
        &asked.run_ids,
        &asked.item_ids,
        &asked.numbers,
    )
    .fetch_all(&mut *conn)
    .await?;
    let held =
        |row: &Row| Held { item_id: row.item_id, number: row.number, worker_id: row.worker_id, alive: row.alive };
    let owners = owners(conn, &rows.iter().map(held).collect::<Vec<_>>()).await?;
    Ok(rows
        .into_iter()
        .zip(owners)
        .map(|(row, owner)| {
            let found = Found {
                key: Key { run_id: row.run_id, item_id: row.item_id, attempt: row.number },
                standing: row.state.known().map(|state| Standing { attempt: row.attempt, state }),
                wanted: row.wanted.map(Stored::acted_on),
                owner,
            };
            (found, row.kind)
        })
        .collect())
}

/// The standings of items, to see whether a reported outcome was applied. `None`: in a state of a later version.
pub async fn standings(conn: &mut PgConnection, item_ids: &[i64]) -> sqlx::Result<Vec<(i64, Option<Standing>)>> {
    let rows = sqlx::query!(
        r#"SELECT id, attempt, state AS "state: Stored<ItemState>" FROM run_items WHERE id = ANY($1)"#,
        item_ids
    )
    .fetch_all(conn)
    .await?;
    let standing = |attempt, state: Stored<ItemState>| state.known().map(|state| Standing { attempt, state });
    Ok(rows.into_iter().map(|row| (row.id, standing(row.attempt, row.state))).collect())
}
