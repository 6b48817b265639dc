//! Consecutive runs on one installation: how the rates, the pages and the tables develop when nothing is emptied in between, and on
//! request while a session holds an old snapshot, which prevents vacuuming dead rows, and while old runs are deleted.

use std::{
    cell::Cell,
    convert::Infallible,
    fmt,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use mailrun_worker::prune::prune;
use serde::Serialize;
use sqlx::{PgConnection, PgPool, Row as _};
use tokio::time::sleep;

use super::{
    Settings,
    median::median,
    pipeline::{Mailrun, POLL, Setup},
    place::Place,
    statements::Statements,
};
use crate::people::people_at;

/// How often a page is opened after each run.
const OPENED: usize = 20;
const TABLES: [&str; 6] = ["users", "run_items", "attempts", "run_progress", "run_samples", "outbox"];
/// Text that occurs only in the senders' claim statement.
const CLAIM: &str = "INSERT INTO attempts";
/// Deletes runs that finished this long ago: not the one in progress.
const OVER_FOR: Duration = Duration::from_secs(2);
/// Time limit for a step of that, which takes some milliseconds.
const STEP: Duration = Duration::from_secs(30);

/// The requested measurements.
#[derive(Clone, Copy, Debug)]
pub(super) struct Extras {
    pub(super) runs: u32,
    pub(super) old_snapshot: bool,
    pub(super) prune: bool,
}

/// One of the runs, and the state of the installation after it.
#[derive(Clone, Debug, Serialize)]
pub(super) struct ConsecutiveRun {
    /// Its number, or what is special about it.
    name: String,
    /// From the response to the POST until the end.
    items_per_second: f64,
    submit_seconds: f64,
    /// Medians of opening the results page and the list of runs.
    results_page_milliseconds: f64,
    runs_page_milliseconds: f64,
    /// A mean; null without `pg_stat_statements`.
    claim_milliseconds: Option<f64>,
    /// Invitations of earlier runs deleted meanwhile, if requested.
    #[serde(skip_serializing_if = "Option::is_none")]
    pruned_items: Option<u64>,
    tables: Vec<Table>,
}

/// A table with its indexes, by PostgreSQL's statistics, which lag by a second or more.
#[derive(Clone, Debug, Serialize)]
struct Table {
    name: &'static str,
    bytes: i64,
    dead_tuples: i64,
    /// How often it was vacuumed so far.
    vacuums: i64,
}

/// Sends consecutive runs of `items` new people each; on request, then one during an old snapshot and one after it, and one while
/// earlier runs are deleted.
pub(super) async fn measure(
    place: &Place<'_>,
    settings: &Settings<'_>,
    items: usize,
    extras: Extras,
) -> Result<Vec<ConsecutiveRun>> {
    let mut conn = place.database().await?;
    let mailrun = Mailrun::start(place, settings, Setup::default()).await?;
    let measured = send_all(place, &mailrun, &mut conn, items, extras).await;
    mailrun.services.stop().await;
    measured
}

async fn send_all(
    place: &Place<'_>,
    mailrun: &Mailrun,
    conn: &mut PgConnection,
    items: usize,
    extras: Extras,
) -> Result<Vec<ConsecutiveRun>> {
    place.quiet(conn).await?;
    let mut runs_done = Vec::new();
    let mut add = |run: ConsecutiveRun| {
        eprintln!("{run}");
        runs_done.push(run);
    };
    for number in 1..=extras.runs {
        add(send(mailrun, conn, items, number.to_string()).await?);
    }
    if extras.old_snapshot {
        let mut old = place.database().await?;
        // With its own transaction id, like a transaction that has written: it holds back more than a reader.
        sqlx::raw_sql("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM runs; SELECT pg_current_xact_id()")
            .execute(&mut old)
            .await?;
        add(send(mailrun, conn, items, "old snapshot".to_owned()).await?);
        sqlx::raw_sql("ROLLBACK").execute(&mut old).await?;
        add(send(mailrun, conn, items, "after it".to_owned()).await?);
    }
    if extras.prune {
        let pool = PgPool::connect(&place.database_url()).await?;
        sleep(OVER_FOR).await;
        let pruned = Cell::new(0);
        let run = tokio::select! {
            run = send(mailrun, conn, items, "prune".to_owned()) => run?,
            Err(error) = prune_on(&pool, &pruned) => return Err(error),
        };
        add(ConsecutiveRun { pruned_items: Some(pruned.get()), ..run });
    }
    Ok(runs_done)
}

/// Repeatedly deletes finished runs, and counts their invitations.
async fn prune_on(pool: &PgPool, pruned: &Cell<u64>) -> Result<Infallible> {
    loop {
        let before = pruned.get();
        prune(pool, Some(OVER_FOR), STEP, |now| pruned.set(before + now.items)).await.context("pruning failed")?;
        sleep(POLL).await;
    }
}

async fn send(mailrun: &Mailrun, conn: &mut PgConnection, items: usize, name: String) -> Result<ConsecutiveRun> {
    // The addresses of each run are spread over the index, like those of real lists.
    let domain = format!("run-{}.example.org", name.replace(' ', "-"));
    let form = mailrun.visitor.fill_in(&people_at(&domain, "guest", items)).await?;
    let before = Statements::with(conn, CLAIM).await;
    let run = mailrun.submit(form).await?;
    let end = mailrun.until_over(&run, POLL).await?;
    ensure!(end.sent == items as u64, "{} of {items} invitations were sent: {}", end.sent, run.url);
    let drain = run.finished_after(conn).await?.saturating_sub(run.answered);
    let after = Statements::with(conn, CLAIM).await;
    let claims = after.zip(before).map(|(after, before)| after - before);
    let run = ConsecutiveRun {
        items_per_second: items as f64 / drain.as_secs_f64(),
        submit_seconds: run.answered.as_secs_f64(),
        results_page_milliseconds: open(mailrun, &run.url).await?,
        runs_page_milliseconds: open(mailrun, &format!("{}/runs", mailrun.services.web_url)).await?,
        claim_milliseconds: claims.and_then(|claims| claims.mean_milliseconds()),
        pruned_items: None,
        tables: tables(conn).await?,
        name,
    };
    Ok(run)
}

/// The median time of opening a page, in milliseconds.
async fn open(mailrun: &Mailrun, page: &str) -> Result<f64> {
    let mut times = Vec::with_capacity(OPENED);
    for _ in 0..OPENED {
        let started = Instant::now();
        mailrun.visitor.open(page).await?;
        times.push(started.elapsed().as_secs_f64() * 1e3);
    }
    Ok(median(times))
}

async fn tables(conn: &mut PgConnection) -> Result<Vec<Table>> {
    let mut tables = Vec::with_capacity(TABLES.len());
    for name in TABLES {
        let row = sqlx::query(
            "SELECT pg_total_relation_size(relid), n_dead_tup, vacuum_count + autovacuum_count
             FROM pg_stat_user_tables WHERE relname = $1",
        )
        .bind(name)
        .fetch_one(&mut *conn)
        .await?;
        tables.push(Table { name, bytes: row.try_get(0)?, dead_tuples: row.try_get(1)?, vacuums: row.try_get(2)? });
    }
    Ok(tables)
}

impl fmt::Display for ConsecutiveRun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes: i64 = self.tables.iter().map(|table| table.bytes).sum();
        let dead: i64 = self.tables.iter().map(|table| table.dead_tuples).sum();
        write!(
            f,
            "Consecutive run {}: {:.0} items per second, POST {:.2} s, results page {:.1} ms, list of runs {:.1} ms, ",
            self.name,
            self.items_per_second,
            self.submit_seconds,
            self.results_page_milliseconds,
            self.runs_page_milliseconds
        )?;
        if let Some(claim) = self.claim_milliseconds {
            write!(f, "claim {claim:.2} ms, ")?;
        }
        write!(f, "{} MiB, {dead} dead rows", bytes / (1024 * 1024))?;
        match self.pruned_items {
            Some(items) => write!(f, ", {items} old invitations deleted during the run"),
            None => Ok(()),
        }
    }
}
