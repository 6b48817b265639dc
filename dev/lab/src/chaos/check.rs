//! The check after a run: compares the ledger with what the mail server received and what is left on the queues.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use anyhow::{Result, ensure};
use lapin::{message::Delivery, options::BasicGetOptions, types::ShortString};
use mailrun_app::config::SmtpConfig;
use mailrun_broker::dead_letters::header_text;
use mailrun_broker::{ERROR_HEADER, REASON_HEADER, depth};
use mailrun_core::queue::DEAD;
use mailrun_core::{
    item::{ItemState, Standing, merge},
    message::{ItemMessage, ResultsMessage, decode},
    message_id::MessageIds,
    signed_id::Named,
};
use mailrun_ledger::stored::SqlState;
use mailrun_ledger::{audit, signing, sweep};
use mailrun_worker::STALE;
use sqlx::PgPool;
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::site::{DEAD_AFTER, Site, queues};
use mailrun_sink::Sink;

/// A finished run's queues are empty within this time.
const QUIET: Duration = Duration::from_secs(30);

/// The outcome of a run's recipients.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Deliveries {
    pub(super) sent: u64,
    pub(super) failed: u64,
    pub(super) unknown: u64,
    /// Not in the ledger, never settled, or recorded as sent and not delivered.
    pub(super) lost: u64,
    /// Deliveries to people who already had one.
    pub(super) doubled: u64,
    /// Delivered, and recorded in a state that means they were not.
    pub(super) untold: u64,
}

impl Deliveries {
    /// Compares each item's state with how often its mail arrived. `total` is the number of deliveries.
    fn of(recipients: u64, items: &[(ItemState, u32)], total: u64) -> Self {
        let mut deliveries = Self { lost: recipients.saturating_sub(items.len() as u64), ..Self::default() };
        let mut accounted = 0;
        for (state, times) in items {
            accounted += u64::from(*times);
            deliveries.doubled += u64::from(times.saturating_sub(1));
            match state {
                ItemState::Sent => deliveries.sent += 1,
                ItemState::Failed => deliveries.failed += 1,
                ItemState::Unknown => deliveries.unknown += 1,
                _ => {}
            }
            deliveries.lost += u64::from(state.is_open() || (*state == ItemState::Sent && *times == 0));
            deliveries.untold += u64::from(!matches!(state, ItemState::Sent | ItemState::Unknown) && *times > 0);
        }
        // A mail that belongs to no item of the run is a duplicate.
        deliveries.doubled += total.saturating_sub(accounted);
        deliveries
    }
}

/// The final state of the ledger and the mail server.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct CheckResult {
    pub(super) deliveries: Deliveries,
    /// Counters that differ from the items, and people whose flag differs from their item.
    pub(super) drift: u64,
    /// People suppressed without proof that their mailbox does not exist.
    pub(super) suppressed_without_evidence: u64,
    pub(super) repairs: Repairs,
}

/// Automatic repairs.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Repairs {
    /// Messages republished by the sweeper.
    pub(super) put_back: u64,
    /// Claims of dead workers that it gave up.
    pub(super) buried: u64,
    /// Consumer connections rebuilt by a watchdog.
    pub(super) rebuilds: u64,
}

/// Checks a run after its services have ended. `erased`: the addresses of erased people by their tombstones.
pub(super) async fn check(
    pool: &PgPool,
    sink: &Sink,
    run_id: Uuid,
    recipients: u32,
    erased: &HashMap<String, String>,
) -> Result<CheckResult> {
    let runs: i64 = sqlx::query_scalar("SELECT count(*) FROM runs").fetch_one(pool).await?;
    ensure!(runs == 1, "the form was submitted once and created {runs} runs");
    let rows: Vec<(i64, String, SqlState)> = sqlx::query_as(
        "SELECT i.id, u.email, i.state FROM run_items i JOIN users u ON u.id = i.user_id WHERE i.run_id = $1",
    )
    .bind(run_id)
    .fetch_all(pool)
    .await?;
    let domain = SmtpConfig::default().from.domain();
    let ids = MessageIds::new(&signing::key(&mut *pool.acquire().await?).await?);
    let times = |item_id, email: &str| {
        let email = erased.get(email).map_or(email, String::as_str);
        let times = |message_id: &str| sink.mailbox().times(email, message_id);
        // An older program may have sent it.
        let unsigned = format!("{item_id}.{}@{domain}", run_id.simple());
        times(&ids.write(Named { run_id, item_id }, &domain)) + times(&unsigned)
    };
    let items: Vec<(ItemState, u32)> =
        rows.iter().map(|(id, email, state)| ((*state).into(), times(*id, email))).collect();
    let deliveries = Deliveries::of(recipients.into(), &items, sink.mailbox().counts().deliveries);
    // No fault is evidence: the mail server refuses nobody as unknown, and sends no reports.
    let suppressed: i64 = sqlx::query_scalar("SELECT count(*) FROM suppressions").fetch_one(pool).await?;
    Ok(CheckResult {
        deliveries,
        drift: drift(pool).await?,
        suppressed_without_evidence: suppressed.try_into()?,
        repairs: repairs(pool, run_id).await?,
    })
}

async fn repairs(pool: &PgPool, run_id: Uuid) -> Result<Repairs> {
    let swept = sweep::repairs(pool, run_id).await?;
    let rebuilds: i64 = sqlx::query_scalar("SELECT coalesce(sum(rebuilds), 0) FROM workers").fetch_one(pool).await?;
    Ok(Repairs {
        put_back: u64::try_from(swept.driven + swept.put_back)?,
        buried: swept.buried.try_into()?,
        rebuilds: rebuilds.try_into()?,
    })
}

async fn drift(pool: &PgPool) -> sqlx::Result<u64> {
    let mut conn = pool.acquire().await?;
    let runs = audit::drift(&mut conn).await?;
    let counters: usize = runs.iter().map(|run| run.wrong().len() + usize::from(run.ended_wrongly())).sum();
    let flags = audit::flags(&mut conn).await?;
    Ok(counters as u64 + (flags.missing + flags.wrong).unsigned_abs())
}

/// What a finished run left behind while its services still ran.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Remains {
    /// Messages on queues that should be empty, and unexpected dead letters.
    pub(super) messages: u64,
    /// Dead letters of items that were sent since; replaying them has no effect.
    pub(super) outdated_dead_letters: u64,
    /// Live workers that report items in flight.
    pub(super) busy_workers: u64,
}

/// Waits until the queues of a finished run are empty, and returns what remains.
pub(super) async fn remains(site: &Site<'_>, run_id: Uuid) -> Result<Remains> {
    let (connection, mut channel) = site.channel().await?;
    let queues = queues();
    let end = Instant::now() + QUIET;
    let mut remains = Remains::default();
    loop {
        remains.messages = 0;
        for queue in &queues {
            match depth(&channel, queue).await {
                Ok(messages) => remains.messages += u64::from(messages),
                // A deleted queue is declared again on demand; the failed query has closed the channel.
                Err(_) => channel = connection.create_channel().await?,
            }
        }
        let busy: i64 = sqlx::query_scalar(
            "SELECT count(*) FROM live_workers WHERE in_flight > 0
                    AND heartbeat_at > clock_timestamp() - make_interval(secs => $1)",
        )
        .bind(DEAD_AFTER.as_secs_f64())
        .fetch_one(&site.pool)
        .await?;
        remains.busy_workers = u64::try_from(busy)?;
        if (remains.messages == 0 && remains.busy_workers == 0) || Instant::now() > end {
            break;
        }
        sleep(Duration::from_millis(200)).await;
    }
    let standings: Vec<(i64, i32, SqlState)> =
        sqlx::query_as("SELECT id, attempt, state FROM run_items").fetch_all(&site.pool).await?;
    let standings = standings
        .into_iter()
        .map(|(id, attempt, state)| (id, Standing { attempt, state: state.into() }))
        .collect::<HashMap<_, _>>();
    if depth(&channel, DEAD).await.is_err() {
        return Ok(remains);
    }
    // Nothing is acknowledged, so all messages return when the connection closes.
    let mut unexpected: BTreeMap<String, u64> = BTreeMap::new();
    while let Some(letter) = channel.basic_get(DEAD.into(), BasicGetOptions::default()).await? {
        match DeadLetterKind::of(&letter.delivery, &standings, run_id) {
            DeadLetterKind::Waits | DeadLetterKind::Foreign | DeadLetterKind::Stale => {}
            DeadLetterKind::Outdated => remains.outdated_dead_letters += 1,
            DeadLetterKind::Unexpected => *unexpected.entry(described(&letter.delivery)).or_default() += 1,
        }
    }
    for (what, count) in &unexpected {
        eprintln!("  {count} unexpected dead letters: {what}");
    }
    remains.messages += unexpected.values().sum::<u64>();
    connection.close(200, "done".into()).await?;
    Ok(remains)
}

/// What a dead letter is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DeadLetterKind {
    /// The next attempt of an item that failed or is unknown.
    Waits,
    /// Without effect: its item was sent since, or the ledger has all its results. The broker dead-letters deliveries over the limit,
    /// and other workers have done their work.
    Outdated,
    /// Of another installation's run.
    Foreign,
    /// Published before the restore.
    Stale,
    /// None of these.
    Unexpected,
}

impl DeadLetterKind {
    fn of(letter: &Delivery, standings: &HashMap<i64, Standing>, ours: Uuid) -> Self {
        if header_text(letter, ERROR_HEADER).is_some_and(|why| why == STALE) {
            return Self::Stale;
        }
        let kind = letter.properties.kind().as_ref().map(ShortString::as_str);
        if let Ok(message) = decode::<ResultsMessage>(kind, &letter.data) {
            if message.run_id.is_some_and(|run_id| run_id != ours) {
                return Self::Foreign;
            }
            let known = message.results.iter().all(|result| {
                let news = Standing { attempt: result.attempt, state: result.state };
                standings.get(&result.item_id).is_some_and(|standing| merge(*standing, news).0 == *standing)
            });
            return if known { Self::Outdated } else { Self::Unexpected };
        }
        let item = decode::<ItemMessage>(kind, &letter.data).ok();
        if item.is_some_and(|item| item.run_id != ours) {
            return Self::Foreign;
        }
        match item.and_then(|item| standings.get(&item.item_id)).map(|standing| standing.state) {
            Some(ItemState::Failed | ItemState::Unknown) => Self::Waits,
            Some(ItemState::Sent) => Self::Outdated,
            _ => Self::Unexpected,
        }
    }
}

/// The type of a dead letter and the reason for it.
fn described(letter: &Delivery) -> String {
    let kind = letter.properties.kind().as_ref().map_or("of no type", ShortString::as_str);
    // The broker's reason, if no worker put it there.
    let why = [REASON_HEADER, "x-first-death-reason"].into_iter().find_map(|header| header_text(letter, header));
    format!("{kind}, {}", why.as_deref().unwrap_or("for no reason"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_each_recipient() {
        use ItemState::{Cancelled, Failed, Pending, Sent, Unknown};
        let deliveries = Deliveries::of(5, &[(Sent, 1), (Failed, 0), (Unknown, 0), (Unknown, 1), (Cancelled, 0)], 2);
        assert_eq!(deliveries, Deliveries { sent: 1, failed: 1, unknown: 2, ..Deliveries::default() });
        // One is not in the ledger, one was never delivered, one is open.
        assert_eq!(Deliveries::of(4, &[(Sent, 0), (Pending, 0), (Sent, 1)], 1).lost, 3);
        let deliveries = Deliveries::of(3, &[(Sent, 3), (Failed, 1), (Unknown, 2)], 7);
        assert_eq!((deliveries.doubled, deliveries.untold), (4, 1), "one mail had no recipient in the run");
    }
}
