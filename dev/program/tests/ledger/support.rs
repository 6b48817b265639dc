//! A PostgreSQL with the ledger's schema, and builders for test data.

use std::{
    collections::HashMap,
    env,
    path::Path,
    sync::{
        LazyLock, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use mailrun_core::{
    agreement::Agreement,
    claim::Withheld,
    item::{ItemState, Key, Standing},
    message::{ItemMessage, ItemResult},
    run::Wanted,
};
use mailrun_ledger::{
    attempts::{self, Limits, Paced},
    invitations::{self, Recipient},
    migrate, open,
    progress::{self, Applied, OnSettled, Report, Settled},
    receipts::Receipt,
    settings::{DatabaseConfig, SuppressionsConfig},
    stored::{SqlState, SqlWanted},
    workers::{self, Registration},
};
use mailrun_stack::{Stack, ensure_servers, home};
use sqlx::{AssertSqlSafe, Connection as _, Decode, PgConnection, PgPool, Postgres, Type, postgres::PgPoolOptions};
use tokio::{runtime::Runtime, sync::OnceCell};
use url::Url;
use uuid::Uuid;

/// How long the servers stay up for the next test program.
const LINGER: Duration = Duration::from_secs(20);
/// The connections' name in `pg_stat_activity`.
const APPLICATION: &str = "mailrun ledger test";
/// The time limit of a wait. Exceeding it fails the test.
const TIMEOUT: Duration = Duration::from_secs(30);

/// All tests share one runtime, because the runtime drives the shared connections. Opening a connection takes longer than most
/// tests.
static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| Runtime::new().unwrap());
static SERVER: OnceCell<Server> = OnceCell::const_new();

/// The server of the databases: `DATABASE_URL`'s, else the private stack's.
struct Server {
    url: Url,
    /// The schema without data, from which databases are copied. No connection to it may be open during a copy.
    template: String,
    /// Shared by tests whose transactions are rolled back, so it stays empty.
    empty: PgPool,
    /// Unused databases. Creating one takes half a second, emptying one a few milliseconds.
    spare: Mutex<Vec<PgPool>>,
    /// Keeps the servers running.
    _stack: Option<Stack>,
}

impl Server {
    async fn start() -> Self {
        let (url, stack) = match env::var("DATABASE_URL") {
            Ok(url) => (url, None),
            Err(_) => {
                let say = |step: &str| eprintln!("{step}");
                ensure_servers(say).await.unwrap();
                let keeper = Path::new(env!("CARGO_BIN_EXE_mailrun-dev"));
                let stack = Stack::start(&home(), keeper, LINGER, say).await.unwrap();
                (stack.database_url("postgres"), Some(stack))
            }
        };
        let url: Url = url.parse().unwrap();
        tokio::spawn(drop_leftovers(url.clone()));
        let template = new_name();
        administrate(&url, format!("CREATE DATABASE \"{template}\"")).await;
        let schema = pool(&url, &template, APPLICATION);
        migrate(&schema).await.unwrap();
        schema.close().await;
        let empty = copy(&url, &template).await;
        Self { url, template, empty, spare: Mutex::default(), _stack: stack }
    }
}

fn new_name() -> String {
    format!("ledger-{}-{}", std::process::id(), Uuid::new_v4().simple())
}

/// Drops the databases of earlier test programs.
async fn drop_leftovers(url: Url) {
    let mut conn = PgConnection::connect(url.as_str()).await.unwrap();
    let names = sqlx::query_scalar("SELECT datname::text FROM pg_database WHERE datname LIKE 'ledger-%'");
    let names: Vec<String> = names.fetch_all(&mut conn).await.unwrap();
    for name in names {
        let owner = name.split('-').nth(1).unwrap_or_default();
        if !Path::new("/proc").join(owner).join("stat").exists() {
            administrate(&url, format!("DROP DATABASE IF EXISTS \"{name}\" WITH (FORCE)")).await;
        }
    }
}

async fn administrate(url: &Url, statement: String) {
    let mut conn = PgConnection::connect(url.as_str()).await.unwrap();
    sqlx::raw_sql(AssertSqlSafe(statement)).execute(&mut conn).await.unwrap();
    conn.close().await.unwrap();
}

async fn copy(url: &Url, template: &str) -> PgPool {
    let name = new_name();
    administrate(url, format!("CREATE DATABASE \"{name}\" TEMPLATE \"{template}\"")).await;
    pool(url, &name, APPLICATION)
}

/// Connections with the session settings of the processes, except that commits do not wait for the disk: no test needs to survive a
/// crash.
fn pool(url: &Url, database: &str, application: &str) -> PgPool {
    let mut url = url.clone();
    url.set_path(database);
    let config = DatabaseConfig { url: url.as_str().into(), ..DatabaseConfig::default() };
    let of_processes = open(&config, application).unwrap();
    let options = (*of_processes.connect_options()).clone().options([("synchronous_commit", "off")]);
    PgPoolOptions::new().max_connections(20).test_before_acquire(false).connect_lazy_with(options)
}

/// Deletes everything except the schema and the rows inserted by migrations.
async fn empty(ledger: &PgPool) {
    let statements = "
        DO $$ DECLARE name text; BEGIN
            FOR name IN SELECT tablename FROM pg_tables
                        WHERE schemaname = current_schema()
                          AND tablename NOT IN ('_sqlx_migrations', 'installation', 'sending_budget', 'signing_key')
                        -- Other tables refer to runs.
                        ORDER BY tablename = 'runs'
            LOOP
                EXECUTE format('DELETE FROM %I', name);
            END LOOP;
        END $$;
        UPDATE installation SET restored_epoch = 0, restored_at = NULL;
        UPDATE sending_budget SET next_due_at = now()";
    sqlx::raw_sql(statements).execute(ledger).await.unwrap();
}

async fn server() -> &'static Server {
    SERVER.get_or_init(Server::start).await
}

/// Runs a test in a transaction on an empty ledger, and rolls it back.
pub fn in_transaction(test: impl AsyncFnOnce(&mut PgConnection)) {
    RUNTIME.block_on(async {
        let mut tx = server().await.empty.begin().await.unwrap();
        test(&mut tx).await;
        tx.rollback().await.unwrap();
    });
}

/// Runs a test on an empty ledger of its own, for tests that need several connections or commits.
pub fn in_database(test: impl AsyncFnOnce(&PgPool)) {
    RUNTIME.block_on(async {
        let server = server().await;
        let spare = server.spare.lock().unwrap().pop();
        let ledger = match spare {
            Some(ledger) => ledger,
            None => copy(&server.url, &server.template).await,
        };
        test(&ledger).await;
        empty(&ledger).await;
        server.spare.lock().unwrap().push(ledger);
    });
}

/// Runs a test on a database without a schema.
pub fn in_bare_database(test: impl AsyncFnOnce(&PgPool)) {
    RUNTIME.block_on(async {
        let server = server().await;
        let bare = copy(&server.url, "template0").await;
        test(&bare).await;
        bare.close().await;
    });
}

/// Another pool on the same database, under another name in `pg_stat_activity`.
pub async fn pool_named(ledger: &PgPool, application: &str) -> PgPool {
    let database = ledger.connect_options().get_database().unwrap().to_owned();
    pool(&server().await.url, &database, application)
}

/// Adds an enum value, as a later version's migration would. It stays in the database.
pub async fn add_later_value(conn: &mut PgConnection, enumeration: &str) {
    execute(conn, format!("ALTER TYPE {enumeration} ADD VALUE IF NOT EXISTS 'later'")).await;
}

pub async fn execute(conn: &mut PgConnection, statement: impl Into<String>) -> u64 {
    let statement = statement.into();
    let done = sqlx::query(AssertSqlSafe(statement.clone())).execute(conn).await;
    done.unwrap_or_else(|error| panic!("{statement}: {error}")).rows_affected()
}

/// The single value returned by a query.
pub async fn value<T>(conn: &mut PgConnection, query: impl Into<String>) -> T
where
    T: for<'r> Decode<'r, Postgres> + Type<Postgres> + Send + Unpin,
{
    let query = query.into();
    let found = sqlx::query_scalar(AssertSqlSafe(query.clone())).fetch_one(conn).await;
    found.unwrap_or_else(|error| panic!("{query}: {error}"))
}

/// Waits until a statement in this database waits for a lock.
pub async fn until_one_waits(ledger: &PgPool) {
    let waits = "SELECT EXISTS (SELECT FROM pg_stat_activity
                                WHERE datname = current_database() AND wait_event_type = 'Lock')";
    until("a statement waits for a lock", async || value(&mut ledger.acquire().await.unwrap(), waits).await).await;
}

pub async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let end = Instant::now() + TIMEOUT;
    while !holds().await {
        assert!(Instant::now() < end, "never: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Numbers addresses and runs uniquely, so that open transactions of different tests never wait for each other.
static NUMBERS: AtomicU64 = AtomicU64::new(1);

pub fn address() -> String {
    format!("guest-{}@example.org", NUMBERS.fetch_add(1, Ordering::Relaxed))
}

/// A person without items.
pub async fn person(conn: &mut PgConnection, email: &str) -> i64 {
    let id = sqlx::query_scalar("INSERT INTO users (email) VALUES ($1) RETURNING id").bind(email);
    id.fetch_one(conn).await.unwrap()
}

/// An item to insert.
#[derive(Clone, Debug)]
pub struct NewItem {
    standing: Standing,
    tries: i16,
    replays: i16,
    error: Option<&'static str>,
    due_in_s: Option<f64>,
    user_id: Option<i64>,
    email: Option<String>,
    name: Option<&'static str>,
    typed: Option<&'static str>,
}

/// An item in this state, with its own person, at its first attempt.
pub fn item(state: ItemState) -> NewItem {
    NewItem {
        standing: Standing { attempt: 1, state },
        tries: 1,
        replays: 0,
        error: None,
        due_in_s: None,
        user_id: None,
        email: None,
        name: None,
        typed: None,
    }
}

impl NewItem {
    pub fn attempt(mut self, attempt: i32) -> Self {
        self.standing.attempt = attempt;
        self
    }

    pub fn counted(self, tries: i16, replays: i16) -> Self {
        Self { tries, replays, ..self }
    }

    pub fn error(self, error: &'static str) -> Self {
        Self { error: Some(error), ..self }
    }

    /// When the next attempt is due, from now; negative: in the past.
    pub fn due_in(self, seconds: f64) -> Self {
        Self { due_in_s: Some(seconds), ..self }
    }

    /// For an existing person.
    pub fn of(self, user_id: i64) -> Self {
        Self { user_id: Some(user_id), ..self }
    }

    pub fn to(self, email: &str) -> Self {
        Self { email: Some(email.to_owned()), ..self }
    }

    pub fn listed_as(self, name: &'static str, typed: &'static str) -> Self {
        Self { name: Some(name), typed: Some(typed), ..self }
    }
}

/// An inserted item.
#[derive(Clone, Debug)]
pub struct Item {
    pub id: i64,
    pub user_id: i64,
    pub email: String,
    /// The message of its current attempt.
    pub message: ItemMessage,
}

/// An inserted run.
#[derive(Clone, Debug)]
pub struct Run {
    pub id: Uuid,
    pub items: Vec<Item>,
}

impl Run {
    pub fn key(&self, index: usize, attempt: i32) -> Key {
        Key { run_id: self.id, item_id: self.items[index].id, attempt }
    }

    /// The first attempt at each item.
    pub fn keys(&self) -> Vec<Key> {
        (0..self.items.len()).map(|index| self.key(index, 1)).collect()
    }

    pub fn message(&self, index: usize) -> ItemMessage {
        self.items[index].message
    }

    /// A result of an attempt at an item.
    pub fn result(&self, index: usize, attempt: i32, state: ItemState) -> ItemResult {
        ItemMessage { attempt, ..self.message(index) }.result(state, None)
    }
}

/// A run with these items and their counters, without a pass. Its people were not emailed, unless their item is sent.
pub async fn run(conn: &mut PgConnection, items: &[NewItem]) -> Run {
    let id = Uuid::new_v4();
    let total = i32::try_from(items.len()).unwrap();
    let insert = sqlx::query("INSERT INTO runs (id, subject, body, total) VALUES ($1, 'Hello', 'Come!', $2)");
    insert.bind(id).bind(total).execute(&mut *conn).await.unwrap();
    let mut inserted = Vec::new();
    for (position, new) in (1_i32..).zip(items) {
        let email = new.email.clone().unwrap_or_else(address);
        let user_id = match new.user_id {
            Some(user_id) => user_id,
            None => person(&mut *conn, &email).await,
        };
        let item_id: i64 = sqlx::query_scalar(
            "INSERT INTO run_items (run_id, user_id, position, attempt, tries, replays, state, error, due_at, finished_at, name, typed)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, clock_timestamp() + make_interval(secs => $9),
                     CASE WHEN $7 NOT IN ('pending', 'retrying') THEN now() END, coalesce($10, ''), $11)
             RETURNING id",
        )
        .bind(id)
        .bind(user_id)
        .bind(position)
        .bind(new.standing.attempt)
        .bind(new.tries)
        .bind(new.replays)
        .bind(SqlState::from(new.standing.state))
        .bind(new.error)
        .bind(new.due_in_s)
        .bind(new.name)
        .bind(new.typed)
        .fetch_one(&mut *conn)
        .await
        .unwrap();
        if new.standing.state == ItemState::Sent {
            execute(&mut *conn, format!("UPDATE users SET emailed_at = now() WHERE id = {user_id}")).await;
        }
        let attempt = new.standing.attempt;
        let message =
            ItemMessage { run_id: id, item_id, attempt, tries: new.tries, replays: new.replays, impersonal: false };
        inserted.push(Item { id: item_id, user_id, email, message });
    }
    sqlx::query(
        "INSERT INTO run_progress (run_id, total, pending, retrying, cancelled, skipped, unknown, failed, sent, finished_at)
         SELECT $1, count(*), count(*) FILTER (WHERE state = 'pending'), count(*) FILTER (WHERE state = 'retrying'),
                count(*) FILTER (WHERE state = 'cancelled'), count(*) FILTER (WHERE state = 'skipped'),
                count(*) FILTER (WHERE state = 'unknown'), count(*) FILTER (WHERE state = 'failed'),
                count(*) FILTER (WHERE state = 'sent'),
                CASE WHEN count(*) FILTER (WHERE state IN ('pending', 'retrying')) = 0 THEN now() END
         FROM run_items WHERE run_id = $1",
    )
    .bind(id)
    .execute(conn)
    .await
    .unwrap();
    Run { id, items: inserted }
}

/// A run with an item in each of these states.
pub async fn run_of(conn: &mut PgConnection, states: &[ItemState]) -> Run {
    run(conn, &states.iter().map(|state| item(*state)).collect::<Vec<_>>()).await
}

pub async fn set_wanted(conn: &mut PgConnection, run_id: Uuid, wanted: Wanted) {
    let update = sqlx::query("UPDATE runs SET wanted = $2 WHERE id = $1").bind(run_id).bind(SqlWanted::from(wanted));
    update.execute(conn).await.unwrap();
}

/// Adds a first pass that has released the items up to this position.
pub async fn release(conn: &mut PgConnection, run_id: Uuid, cursor: i32) {
    let insert = format!(
        "INSERT INTO run_passes (run_id, number, kind, cursor, released) VALUES ('{run_id}', 1, 'first', {cursor}, {cursor})"
    );
    execute(conn, insert).await;
}

/// Makes a run's counters look as if they had not moved for this long.
pub async fn idle_for(conn: &mut PgConnection, run_id: Uuid, seconds: u32) {
    let update = "UPDATE run_progress SET updated_at = clock_timestamp() - make_interval(secs =>";
    execute(conn, format!("{update} {seconds}) WHERE run_id = '{run_id}'")).await;
}

/// A live sender.
pub async fn worker(conn: &mut PgConnection) -> i64 {
    let worker = Registration { roles: "send", host: "host", pid: 1, permits: 10, settings: &settings() };
    workers::register(conn, &worker).await.unwrap().unwrap()
}

/// The settings that must be equal in all workers.
pub fn settings() -> Agreement {
    Agreement {
        retry_delays_ms: vec![100, 200],
        heartbeat_interval_ms: 1_000,
        dead_after_ms: 8_000,
        sends_per_second: None,
        item_queues: 1,
        jobs: None,
    }
}

/// Declares a worker dead.
pub async fn kill(conn: &mut PgConnection, worker_id: i64) {
    execute(conn, format!("UPDATE workers SET died_at = clock_timestamp() WHERE id = {worker_id}")).await;
}

pub async fn suppress(conn: &mut PgConnection, email: &str) {
    let insert = sqlx::query("INSERT INTO suppressions (email, reason) VALUES ($1, 'asked')").bind(email);
    insert.execute(conn).await.unwrap();
}

/// A granted claim.
#[derive(Clone, Debug)]
pub struct Claimed {
    pub key: Key,
    pub recipient: Option<Recipient>,
    pub withheld: Option<Withheld>,
}

/// Claims attempts at invitations, without a receipt, as a sender does.
pub async fn claim(conn: &mut PgConnection, worker_id: i64, keys: &[Key]) -> Vec<Claimed> {
    let granted = attempts::claim(conn, worker_id, None, keys, &Receipt::default()).await.unwrap();
    let ids: Vec<i64> = granted.iter().map(|granted| granted.key.item_id).collect();
    let mut recipients: HashMap<_, _> = invitations::recipients(conn, &ids).await.unwrap().into_iter().collect();
    let claimed: Vec<Claimed> = granted
        .into_iter()
        .map(|granted| {
            let (recipient, withheld) = match recipients.remove(&granted.key.item_id).unwrap() {
                _ if granted.withheld.is_some() => (None, granted.withheld),
                Ok(recipient) => (Some(recipient), None),
                Err(why) => (None, Some(why)),
            };
            Claimed { key: granted.key, recipient, withheld }
        })
        .collect();
    let withheld: Vec<(Key, Withheld)> =
        claimed.iter().filter_map(|claimed| Some((claimed.key, claimed.withheld?))).collect();
    attempts::withhold(conn, &withheld).await.unwrap();
    claimed
}

/// The result of a rate-limited claim.
pub struct ClaimedPaced {
    pub claimed: Vec<Claimed>,
    pub slots: HashMap<Key, Duration>,
    pub not_due: Vec<(Key, Duration)>,
}

/// Claims attempts at invitations whose send time is within `ahead`.
pub async fn claim_paced(
    conn: &mut PgConnection,
    worker_id: i64,
    keys: &[Key],
    limits: &Limits,
    ahead: Duration,
) -> ClaimedPaced {
    let paced = Paced::lock(conn, keys, limits, ahead).await.unwrap();
    let claimed = claim(conn, worker_id, &paced.due).await;
    let granted = claimed.iter().filter(|claimed| claimed.withheld.is_none()).map(|claimed| claimed.key).collect();
    let (slots, not_due) = paced.reserve(conn, &granted).await.unwrap();
    ClaimedPaced { claimed, slots, not_due }
}

/// The changes of the invitations' job when results are counted, under the default settings.
#[derive(Default)]
pub struct Invitations(pub SuppressionsConfig);

impl OnSettled for Invitations {
    async fn on_settled(&self, conn: &mut PgConnection, settled: Vec<Settled>) -> sqlx::Result<()> {
        invitations::settled(conn, &self.0, &settled).await
    }
}

/// A receipt for attempts.
pub fn receipt(number: i64, keys: &[Key]) -> Receipt {
    Receipt {
        number,
        item_ids: keys.iter().map(|key| key.item_id).collect(),
        attempts: keys.iter().map(|key| key.attempt).collect(),
    }
}

/// Applies results of one run, under the default settings.
pub async fn apply(conn: &mut PgConnection, run_id: Uuid, results: &[ItemResult]) -> Applied {
    let reports: Vec<Report<'_>> = results.iter().map(|result| Report { run_id: Some(run_id), result }).collect();
    progress::apply(conn, &Invitations::default(), &reports).await.unwrap()
}

/// The standings of a run's items, by position.
pub async fn standings(conn: &mut PgConnection, run_id: Uuid) -> Vec<(i32, ItemState)> {
    let rows = sqlx::query_as("SELECT attempt, state FROM run_items WHERE run_id = $1 ORDER BY position").bind(run_id);
    let rows: Vec<(i32, SqlState)> = rows.fetch_all(conn).await.unwrap();
    rows.into_iter().map(|(attempt, state)| (attempt, state.into())).collect()
}

/// The states of a run's items, by position.
pub async fn states(conn: &mut PgConnection, run_id: Uuid) -> Vec<ItemState> {
    standings(conn, run_id).await.into_iter().map(|(_, state)| state).collect()
}

pub async fn counters_equal_counts(conn: &mut PgConnection) {
    let drift = mailrun_ledger::audit::drift(conn).await.unwrap();
    assert!(drift.is_empty(), "{drift:?}");
}

/// The commands in the outbox, oldest first.
pub async fn outbox(conn: &mut PgConnection, run_id: Uuid) -> Vec<serde_json::Value> {
    let rows =
        sqlx::query_scalar("SELECT message->'command' FROM outbox WHERE message->>'run_id' = $1::text ORDER BY id");
    rows.bind(run_id.to_string()).fetch_all(conn).await.unwrap()
}
