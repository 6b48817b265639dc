//! Applies results: items and counters in one transaction, so that the counters always equal the counts of the items.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    future::Future,
};

use sqlx::{Connection as _, PgConnection, error::DatabaseError};
use uuid::Uuid;

use super::{
    audit,
    counters::{self, Change},
    people::{self, REPLY_ERASED},
    stored::{SqlState, Stored},
};
use mailrun_core::outcome::DELETED;
use mailrun_core::{
    item::{ItemState, Standing, merge},
    message::ItemResult,
};

/// A result and the run it names. Messages of the first version name none.
#[derive(Clone, Copy, Debug)]
pub struct Report<'a> {
    /// The run.
    pub run_id: Option<Uuid>,
    /// The result.
    pub result: &'a ItemResult,
}

/// The effect of a batch of results.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Results that changed an item.
    pub changed: usize,
    /// Results that were known, outdated or duplicate.
    pub absorbed: usize,
    /// How many items of each run entered each state.
    pub entered: BTreeMap<(Uuid, ItemState), u64>,
    /// Indices of results whose item does not exist in the run they name: they belong to another ledger.
    pub strange: Vec<usize>,
    /// Indices of results whose item is in a state of a later version: only that version knows how to apply them.
    pub later: Vec<usize>,
}

/// An item that was settled, for the job of its run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settled {
    /// The run.
    pub run_id: Uuid,
    /// The item.
    pub item_id: i64,
    /// The person it is about, if any.
    pub user_id: Option<i64>,
    /// Its state: sent, failed, unknown, cancelled or skipped.
    pub state: ItemState,
    /// Why it was not sent.
    pub error: Option<String>,
    /// See [`ItemResult::flagged`].
    pub flagged: bool,
}

/// The changes of jobs in the transaction that counts their results.
pub trait OnSettled {
    /// Called once for each batch that settles items, after the counters are written.
    fn on_settled(
        &self,
        conn: &mut PgConnection,
        settled: Vec<Settled>,
    ) -> impl Future<Output = sqlx::Result<()>> + Send;
}

/// An item before and after the batch.
struct Item {
    run_id: Uuid,
    user_id: Option<i64>,
    /// Whether its subject was erased.
    is_empty: bool,
    /// Whether it is in a state of a later version, and is left unchanged.
    is_later: bool,
    was: Standing,
    standing: Standing,
    /// The index of the winning result.
    winner: Option<usize>,
}

impl Item {
    fn is_sent_late(&self) -> bool {
        self.standing.state == ItemState::Sent && matches!(self.was.state, ItemState::Cancelled | ItemState::Skipped)
    }
}

/// How often a batch is merged again because something it depends on has changed.
const TRIES: u32 = 20;

/// Applies a batch of results in its own transaction.
///
/// Any number of processes may do so concurrently: items are written in order of id, then counters in order of run. An item is
/// written only if its standing is still the one that was read. Otherwise another process has applied a result in the meantime,
/// and the batch is merged again. That is rare, and locking every item would cost as much as updating it.
///
/// If counters were changed by hand and do not allow the change, they are recounted once.
/// On an error nothing is applied, and the batch can be applied again.
pub async fn apply(conn: &mut PgConnection, jobs: &impl OnSettled, results: &[Report<'_>]) -> sqlx::Result<Applied> {
    let mut recounted = false;
    let mut tries = 0;
    loop {
        tries += 1;
        match apply_once(conn, jobs, results).await {
            Ok(Some(applied)) => return Ok(applied),
            Ok(None) => {}
            // The person of a late `sent` is being invited again right now.
            Err(error) if violates(&error, &["run_items_one_per_person"]) && tries < TRIES => {}
            Err(error) if violates(&error, &["run_progress_adds_up", "run_progress_not_negative"]) && !recounted => {
                recounted = true;
                let runs: BTreeSet<Uuid> =
                    read_items(&mut *conn, results).await?.into_values().map(|item| item.run_id).collect();
                for run_id in runs {
                    audit::recount(&mut *conn, run_id).await?;
                }
            }
            Err(error) => return Err(error),
        }
    }
}

fn violates(error: &sqlx::Error, constraints: &[&str]) -> bool {
    let violated = error.as_database_error().and_then(DatabaseError::constraint);
    violated.is_some_and(|violated| constraints.contains(&violated))
}

/// `None`: an item had changed since it was read; nothing is applied.
async fn apply_once(
    conn: &mut PgConnection,
    jobs: &impl OnSettled,
    results: &[Report<'_>],
) -> sqlx::Result<Option<Applied>> {
    let mut tx = conn.begin().await?;
    let mut items = read_items(&mut tx, results).await?;
    let mut applied = Applied::default();
    let mut moved: BTreeMap<Uuid, Change> = BTreeMap::new();
    for (index, Report { run_id, result }) in results.iter().enumerate() {
        let item = items.get_mut(&result.item_id).filter(|item| run_id.is_none_or(|run_id| run_id == item.run_id));
        let Some(item) = item else {
            applied.strange.push(index);
            continue;
        };
        if item.is_later {
            applied.later.push(index);
            continue;
        }
        let (next, delta) = merge(item.standing, Standing { attempt: result.attempt, state: result.state });
        if next == item.standing {
            applied.absorbed += 1;
            continue;
        }
        applied.changed += 1;
        item.standing = next;
        item.winner = Some(index);
        let moved = moved.entry(item.run_id).or_default();
        moved.items.add(delta);
        moved.repeats += i32::from(result.state == ItemState::Retrying);
    }
    if applied.changed > 0 {
        mark_overtaken(&mut tx, &items).await?;
        let erased = erased(&mut tx, &items, results).await?;
        if !update_items(&mut tx, &items, results, &erased).await? {
            tx.rollback().await?;
            return Ok(None);
        }
        update_counters(&mut tx, &moved).await?;
        let settled = settled(&items, results, &erased);
        if !settled.is_empty() {
            jobs.on_settled(&mut tx, settled).await?;
        }
        tx.commit().await?;
        for item in items.values().filter(|item| item.winner.is_some()) {
            *applied.entered.entry((item.run_id, item.standing.state)).or_default() += 1;
        }
    }
    Ok(Some(applied))
}

async fn read_items(conn: &mut PgConnection, results: &[Report<'_>]) -> sqlx::Result<HashMap<i64, Item>> {
    let ids: HashSet<i64> = results.iter().map(|report| report.result.item_id).collect();
    let ids: Vec<i64> = ids.into_iter().collect();
    let rows = sqlx::query!(
        r#"SELECT id, run_id, user_id, user_id IS NULL AND data IS NULL AS "is_empty!", attempt,
                  state AS "state: Stored<ItemState>"
           FROM run_items WHERE id = ANY($1)"#,
        &ids
    )
    .fetch_all(conn)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| {
            let state = row.state.known();
            let standing = Standing { attempt: row.attempt, state: state.unwrap_or(ItemState::Pending) };
            let (run_id, user_id, is_empty, is_later) = (row.run_id, row.user_id, row.is_empty, state.is_none());
            (row.id, Item { run_id, user_id, is_empty, is_later, was: standing, standing, winner: None })
        })
        .collect())
}

/// An item that turns out to have been sent after it was given up counts as its person's invitation, unless the person has
/// another one by now.
async fn mark_overtaken(conn: &mut PgConnection, items: &HashMap<i64, Item>) -> sqlx::Result<()> {
    let late: Vec<i64> = items.iter().filter(|(_, item)| item.is_sent_late()).map(|(id, _)| *id).collect();
    if !late.is_empty() {
        sqlx::query!(
            "UPDATE run_items i SET overtaken = true
             WHERE id = ANY($1) AND EXISTS (SELECT FROM run_items other WHERE other.user_id = i.user_id AND other.active)",
            &late,
        )
        .execute(conn)
        .await?;
    }
    Ok(())
}

/// The items whose reason must not be kept, because their person was erased after the attempt began.
async fn erased(
    conn: &mut PgConnection,
    items: &HashMap<i64, Item>,
    results: &[Report<'_>],
) -> sqlx::Result<HashSet<i64>> {
    let with_reason = items
        .iter()
        .filter(|(_, item)| item.winner.is_some_and(|index| results[index].result.error.is_some()))
        .collect::<Vec<_>>();
    let users: Vec<i64> = with_reason.iter().filter_map(|(_, item)| item.user_id).collect();
    let people: HashSet<i64> = match users.is_empty() {
        true => HashSet::new(),
        false => people::erased_of(conn, &users).await?.into_iter().collect(),
    };
    let is_erased = |item: &Item| item.is_empty || item.user_id.is_some_and(|user_id| people.contains(&user_id));
    Ok(with_reason.into_iter().filter(|(_, item)| is_erased(item)).map(|(id, _)| *id).collect())
}

/// The reason to store: never a mail server's reply about an erased person.
fn kept(error: Option<&str>, is_erased: bool) -> Option<&str> {
    error.map(|error| if is_erased && error != DELETED { REPLY_ERASED } else { error })
}

/// False: an item had changed since it was read.
async fn update_items(
    conn: &mut PgConnection,
    items: &HashMap<i64, Item>,
    results: &[Report<'_>],
    erased: &HashSet<i64>,
) -> sqlx::Result<bool> {
    let mut changed: Vec<(&ItemResult, &Item)> =
        items.values().filter_map(|item| item.winner.map(|index| (results[index].result, item))).collect();
    changed.sort_unstable_by_key(|(result, _)| result.item_id);
    let (winners, changed): (Vec<&ItemResult>, Vec<&Item>) = changed.into_iter().unzip();
    let were: Vec<Standing> = changed.iter().map(|item| item.was).collect();
    let is_erased: Vec<bool> = winners.iter().map(|result| erased.contains(&result.item_id)).collect();
    let ids: Vec<i64> = winners.iter().map(|result| result.item_id).collect();
    let old_attempts: Vec<i32> = were.iter().map(|standing| standing.attempt).collect();
    let old_states: Vec<SqlState> = were.iter().map(|standing| standing.state.into()).collect();
    let attempts: Vec<i32> = winners.iter().map(|result| result.attempt).collect();
    let tries: Vec<i16> = winners.iter().map(|result| result.tries).collect();
    let replays: Vec<i16> = winners.iter().map(|result| result.replays).collect();
    let states: Vec<SqlState> = winners.iter().map(|result| result.state.into()).collect();
    let errors: Vec<Option<&str>> =
        winners.iter().zip(is_erased).map(|(result, is_erased)| kept(result.error.as_deref(), is_erased)).collect();
    let due_in_s: Vec<Option<f64>> =
        winners.iter().map(|result| result.due_in_ms.map(|ms| ms as f64 / 1000.0)).collect();
    let updated = sqlx::query!(
        "UPDATE run_items i
         SET attempt = n.attempt, tries = n.tries, replays = n.replays, state = n.state, error = n.error,
             due_at = now() + make_interval(secs => n.due_in_s),
             finished_at = CASE WHEN n.state NOT IN ('pending', 'retrying') THEN now() END
         FROM unnest($1::bigint[], $2::integer[], $3::smallint[], $4::smallint[], $5::item_state[], $6::text[],
                     $7::double precision[], $8::integer[], $9::item_state[])
              AS n (id, attempt, tries, replays, state, error, due_in_s, old_attempt, old_state)
         WHERE i.id = n.id AND i.attempt = n.old_attempt AND i.state = n.old_state",
        &ids,
        &attempts,
        &tries,
        &replays,
        &states as _,
        &errors as _,
        &due_in_s as _,
        &old_attempts,
        &old_states as _,
    )
    .execute(conn)
    .await?;
    Ok(updated.rows_affected() == ids.len() as u64)
}

/// The items that this batch settled, in order of id.
fn settled(items: &HashMap<i64, Item>, results: &[Report<'_>], erased: &HashSet<i64>) -> Vec<Settled> {
    let mut settled: Vec<Settled> = items
        .iter()
        .filter(|(_, item)| !item.standing.state.is_open())
        .filter_map(|(id, item)| {
            let result = results[item.winner?].result;
            Some(Settled {
                run_id: item.run_id,
                item_id: *id,
                user_id: item.user_id,
                state: item.standing.state,
                error: kept(result.error.as_deref(), erased.contains(id)).map(str::to_owned),
                flagged: result.flagged,
            })
        })
        .collect();
    settled.sort_unstable_by_key(|item| item.item_id);
    settled
}

async fn update_counters(conn: &mut PgConnection, runs: &BTreeMap<Uuid, Change>) -> sqlx::Result<()> {
    for (run_id, change) in runs {
        counters::change(conn, *run_id, change).await?;
    }
    Ok(())
}

/// Whether a result was already buried.
pub async fn is_buried(conn: &mut PgConnection, report: Report<'_>) -> sqlx::Result<bool> {
    sqlx::query_scalar!(
        r#"SELECT EXISTS (SELECT FROM buried_results
                          WHERE run_id = $1 AND item_id = $2 AND attempt = $3 AND state = $4) AS "buried!""#,
        report.run_id.unwrap_or_default(),
        report.result.item_id,
        report.result.attempt,
        SqlState::from(report.result.state) as _,
    )
    .fetch_one(conn)
    .await
}

/// Records that a result is buried, so that its repetitions are dropped.
pub async fn note_buried(conn: &mut PgConnection, report: Report<'_>, reason: &str) -> sqlx::Result<()> {
    sqlx::query!(
        "INSERT INTO buried_results (run_id, item_id, attempt, state, reason) VALUES ($1, $2, $3, $4, $5)
         ON CONFLICT DO NOTHING",
        report.run_id.unwrap_or_default(),
        report.result.item_id,
        report.result.attempt,
        SqlState::from(report.result.state) as _,
        reason,
    )
    .execute(conn)
    .await?;
    Ok(())
}
