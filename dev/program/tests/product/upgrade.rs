//! A ledger of each earlier schema, with unfinished runs in it, is upgraded and finishes them.

use std::{collections::BTreeMap, fs, path::Path, sync::Mutex, thread, time::Duration};

use mailrun_ledger::{audit, runs, stored::SqlState};
use sqlx::{AssertSqlSafe, PgPool, migrate::Migrator};
use tokio::runtime::Runtime;
use uuid::Uuid;

use crate::support::{World, until};

const SETTINGS: [(&str, &str); 3] = [
    // No send fails.
    ("MAILRUN_MAILER__SIMULATED__DOWN_EVERY", "0"),
    ("MAILRUN_MAILER__SIMULATED__FLAKY_EVERY", "0"),
    ("MAILRUN_SWEEP__STALLED_AFTER_MS", "1000"),
];
/// So many ledgers at a time: most of the time they wait for workers to be declared dead.
const AT_ONCE: usize = 6;
/// The run that the fixtures leave paused.
const PAUSED: Uuid = Uuid::from_u128(3);

async fn migrations() -> Migrator {
    Migrator::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../migrations")).await.unwrap()
}

/// What each version of the schema has new, by version.
fn fixtures() -> BTreeMap<i64, String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/schema");
    let files = fs::read_dir(folder).unwrap().map(|file| file.unwrap().path());
    files
        .map(|path| (path.file_stem().unwrap().to_str().unwrap().parse().unwrap(), fs::read_to_string(path).unwrap()))
        .collect()
}

/// A ledger as the version of this schema left it.
async fn fill(ledger: &PgPool, version: i64) {
    migrations().await.run_to(version, ledger).await.unwrap();
    for (_, statements) in fixtures().range(..=version) {
        sqlx::raw_sql(AssertSqlSafe(statements.clone())).execute(ledger).await.unwrap();
    }
    // Ids were given out by hand.
    let sequences = "SELECT setval(format('%I', sequencename)::regclass, 100000) FROM pg_sequences WHERE schemaname = current_schema()";
    sqlx::query(sequences).execute(ledger).await.unwrap();
}

/// An item that counts, its address, and whether a worker of the new version has attempted it.
#[derive(sqlx::FromRow)]
struct Item {
    email: String,
    state: SqlState,
    attempted: bool,
}

async fn items(ledger: &PgPool) -> Vec<Item> {
    let query = sqlx::query_as(
        "SELECT u.email, i.state, EXISTS (SELECT FROM attempts a JOIN workers w ON w.id = a.worker_id
                                          WHERE a.item_id = i.id AND w.host <> 'old') AS attempted
         FROM run_items i JOIN users u ON u.id = i.user_id WHERE NOT i.overtaken ORDER BY i.id",
    );
    query.fetch_all(ledger).await.unwrap()
}

async fn finishes_its_runs(version: i64) {
    let mut world = World::on_ledger(&SETTINGS, async |ledger| fill(ledger, version).await).await;
    world.worker("fan-out,send,progress");
    runs::set_paused(&world.pool, PAUSED, false).await.unwrap();
    let open = "SELECT count(*) FROM run_progress WHERE finished_at IS NULL";
    until(&format!("nothing of schema {version} is open"), async || {
        // Many ledgers share two cores, and looking costs time as well.
        tokio::time::sleep(Duration::from_millis(200)).await;
        sqlx::query_scalar::<_, i64>(open).fetch_one(&world.pool).await.unwrap() == 0
    })
    .await;

    let mut mailed = 0;
    for Item { email, state, attempted } in items(&world.pool).await {
        // Of a person who was erased the address does not say what is expected.
        let expected = email.split_once('@').map_or("failed", |(_, domain)| domain.split('.').next().unwrap());
        let state = format!("{state:?}").to_lowercase();
        assert_eq!(state, expected.trim_end_matches("-before"), "schema {version}: {email}");
        assert_eq!(attempted, expected == "sent", "schema {version}: {email}");
        mailed += usize::from(attempted);
    }
    let tests = usize::from(version >= 7);
    assert_eq!(world.handed_over().len(), mailed + tests, "schema {version}");
    world.assert_no_duplicates();
    world.counters_equal_counts().await;
    let flags = audit::flags(&mut world.pool.acquire().await.unwrap()).await.unwrap();
    assert_eq!(flags, audit::Flags::default(), "schema {version}");
    world.terminate_rest();
}

#[test]
fn a_ledger_of_each_earlier_schema_is_upgraded_and_finishes_its_runs() {
    let all = Runtime::new().unwrap().block_on(migrations());
    let versions: Vec<i64> = all.iter().map(|migration| migration.version).collect();
    assert!(fixtures().keys().all(|version| versions.contains(version)));
    let (_, earlier) = versions.split_last().unwrap();
    let waiting = Mutex::new(earlier.iter());
    let next = || waiting.lock().unwrap().next();
    // Threads, since setting a ledger up blocks.
    thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some(version) = next() {
                    Runtime::new().unwrap().block_on(finishes_its_runs(*version));
                }
            });
        }
    });
}
