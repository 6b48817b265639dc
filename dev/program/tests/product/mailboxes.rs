//! One mailbox is one person, whatever lists call it; and each mail says what its own list says.

use std::path::Path;

use crate::support::World;
use mail_parser::MessageParser;
use mailrun_ledger::mailboxes::{Unified, unify};
use mailrun_sink::{Message, Options, Sink};
use sqlx::{PgPool, migrate::Migrator};

/// No send fails.
const SMOOTH: [(&str, &str); 2] =
    [("MAILRUN_MAILER__SIMULATED__DOWN_EVERY", "0"), ("MAILRUN_MAILER__SIMULATED__FLAKY_EVERY", "0")];
/// The newest migration that knows nothing of mailboxes.
const BEFORE: i64 = 12;

/// A run with an item for each person in each state, as an older version wrote it.
async fn run(pool: &PgPool, number: i64, items: &[(i64, &str)]) {
    let id = uuid::Uuid::from_u128(number as u128);
    sqlx::query(
        "INSERT INTO runs (id, subject, body, total) VALUES ($1, 'Hello', 'Hello {{ name or ''friend'' }}', $2)",
    )
    .bind(id)
    .bind(items.len() as i32)
    .execute(pool)
    .await
    .unwrap();
    for (position, (user, state)) in (1_i32..).zip(items) {
        sqlx::query(
            "INSERT INTO run_items (run_id, user_id, position, state, finished_at)
             VALUES ($1, $2, $3, $4::item_state, CASE WHEN $4 NOT IN ('pending', 'retrying') THEN now() END)",
        )
        .bind(id)
        .bind(user)
        .bind(position)
        .bind(state)
        .execute(pool)
        .await
        .unwrap();
    }
    sqlx::query(
        "INSERT INTO run_progress (run_id, total, pending, retrying, cancelled, skipped, unknown, failed, sent, finished_at)
         SELECT $1, count(*), count(*) FILTER (WHERE state = 'pending'), count(*) FILTER (WHERE state = 'retrying'),
                count(*) FILTER (WHERE state = 'cancelled'), count(*) FILTER (WHERE state = 'skipped'),
                count(*) FILTER (WHERE state = 'unknown'), count(*) FILTER (WHERE state = 'failed'),
                count(*) FILTER (WHERE state = 'sent'),
                CASE WHEN bool_and(state NOT IN ('pending', 'retrying')) THEN now() END
         FROM run_items WHERE run_id = $1",
    )
    .bind(id)
    .execute(pool)
    .await
    .unwrap();
    sqlx::query("INSERT INTO run_passes (run_id, number, kind) VALUES ($1, 1, 'first')")
        .bind(id)
        .execute(pool)
        .await
        .unwrap();
}

/// A ledger as it was left by a version that compared addresses by letter.
async fn older_ledger(pool: &PgPool) {
    let migrations = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../migrations");
    Migrator::new(migrations).await.unwrap().run_to(BEFORE, pool).await.unwrap();
    sqlx::query(
        "INSERT INTO users (id, email, name, emailed_at) OVERRIDING SYSTEM VALUE VALUES
             (1, 'ann@bücher.example', 'Ann', NULL), (2, 'ann@xn--bcher-kva.example', 'Anna', NULL),
             (3, 'bob@bücher.example', NULL, now()), (4, 'bob@xn--bcher-kva.example', 'Bob', NULL),
             (5, 'cid@bücher.example', NULL, NULL), (6, 'cid@xn--bcher-kva.example', NULL, NULL),
             (7, 'dan@bücher.example', 'Dan', NULL), (8, 'dan@xn--bcher-kva.example', NULL, NULL),
             (9, 'eve@xn--bcher-kva.example', NULL, NULL), (10, 'eve@bücher.example', NULL, NULL),
             (11, 'fay@bücher.example', 'Fay', NULL), (12, 'gus@example.org', 'Gus', NULL)",
    )
    .execute(pool)
    .await
    .unwrap();
    sqlx::query("SELECT setval('users_id_seq', 100)").execute(pool).await.unwrap();
    sqlx::query(
        "INSERT INTO suppressions (email, reason) VALUES
             ('eve@bücher.example', 'unsubscribed'), ('eve@xn--bcher-kva.example', 'bounced'), ('hal@bücher.example', 'asked')",
    )
    .execute(pool)
    .await
    .unwrap();
    run(
        pool,
        1,
        &[(1, "pending"), (3, "sent"), (5, "failed"), (7, "unknown"), (9, "pending"), (11, "pending"), (12, "pending")],
    )
    .await;
    run(pool, 2, &[(2, "pending"), (4, "pending"), (6, "pending"), (8, "pending"), (10, "cancelled")]).await;
}

async fn column<T>(pool: &PgPool, query: &'static str) -> Vec<T>
where
    T: for<'r> sqlx::Decode<'r, sqlx::Postgres> + sqlx::Type<sqlx::Postgres> + Send + Unpin,
{
    sqlx::query_scalar(query).fetch_all(pool).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_ledger_with_two_spellings_of_one_mailbox_keeps_its_counts() {
    // World runs `mailrun setup` on what is there.
    let mut world = World::on_ledger(&SMOOTH, older_ledger).await;
    world.counters_equal_counts().await;
    let states = "SELECT state::text || ' ' || count(*) FROM run_items GROUP BY state ORDER BY state";
    assert_eq!(
        column::<String>(&world.pool, states).await,
        ["pending 8", "cancelled 1", "unknown 1", "failed 1", "sent 1"],
        "no item has another state"
    );
    let people = "SELECT id || ' ' || email FROM users ORDER BY id";
    assert_eq!(
        column::<String>(&world.pool, people).await,
        [
            "1 ann@xn--bcher-kva.example",
            "3 bob@xn--bcher-kva.example",
            "5 cid@xn--bcher-kva.example",
            "7 dan@xn--bcher-kva.example",
            "9 eve@xn--bcher-kva.example",
            "11 fay@xn--bcher-kva.example",
            "12 gus@example.org"
        ]
    );
    let overtaken = "SELECT user_id || ' ' || state FROM run_items WHERE overtaken ORDER BY user_id";
    assert_eq!(column::<String>(&world.pool, overtaken).await, ["1 pending", "3 pending", "5 failed", "7 pending"]);
    let suppressed = "SELECT email || ' ' || reason FROM suppressions ORDER BY number";
    assert_eq!(
        column::<String>(&world.pool, suppressed).await,
        ["eve@xn--bcher-kva.example unsubscribed", "hal@xn--bcher-kva.example asked"]
    );
    let named =
        "SELECT position || ' ' || name || ' ' || coalesce(typed, '') FROM run_items WHERE user_id = 1 ORDER BY id";
    assert_eq!(column::<String>(&world.pool, named).await, ["1 Ann ann@bücher.example", "1 Anna "]);
    // Once more, there is nothing to do.
    assert_eq!(unify(&mut world.pool.acquire().await.unwrap()).await.unwrap(), Unified::default());

    // Both runs end, and of each pair one gets one mail: ann once, cid by the second run; eve is suppressed.
    world.workers();
    for number in [1_u128, 2] {
        world.until_over(&format!("{}/runs/{}", world.web, uuid::Uuid::from_u128(number))).await;
    }
    world.counters_equal_counts().await;
    assert_eq!(
        column::<String>(&world.pool, states).await,
        ["cancelled 1", "skipped 4", "unknown 1", "failed 1", "sent 5"]
    );
    assert_eq!(world.handed_over().len(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn spellings_of_one_mailbox_are_one_person_who_is_shown_as_typed() {
    let mut world = World::new(&[]).await;
    let run = world
        .invite("Ann@Bücher.example\nann@xn--bcher-kva.example\nANN@BU\u{308}CHER.EXAMPLE\na\u{200b}nn@bücher.example")
        .await;
    assert_eq!(column::<String>(&world.pool, "SELECT email FROM users").await, ["ann@xn--bcher-kva.example"]);
    assert_eq!(column::<i32>(&world.pool, "SELECT repeated FROM runs").await, [3]);
    assert_eq!(column::<String>(&world.pool, "SELECT typed FROM run_items").await, ["Ann@Bücher.example"]);
    world.workers();
    assert_eq!(world.until_over(&run).await["sent"], 1);
    // Any spelling of it is known, and any spelling suppresses it.
    let (status, _) = world.submit(&world.token().await, "ann@bücher.example").await.unwrap_err();
    assert_eq!(status, 422);
    let (added, text) = world.output(&["suppressions", "add", "Zoe@Bücher.example"], &[]);
    assert!(added, "{text}");
    let (status, page) = world.submit(&world.token().await, "zoe@xn--bcher-kva.example").await.unwrap_err();
    assert_eq!(status, 422);
    assert!(page.contains("1 address is on the suppression list"), "{page}");
    assert!(world.output(&["suppressions", "list"], &[]).1.contains("zoe@bücher.example"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_newest_lists_name_is_used() {
    let sink = Sink::start(Options::default()).await.unwrap();
    let relay = format!("smtp://{}?tls=none", sink.address());
    let mut world = World::new(&[
        ("MAILRUN_MAILER__KIND", "smtp"),
        ("MAILRUN_MAILER__SMTP__RELAYS", &relay),
        ("MAILRUN_WEB__SUBJECT", "Hello {{ name | default(\"friend\") }}"),
    ])
    .await;
    let first = world.invite("Jrgen <juergen@d.example>, ann@d.example, Bob <bob@d.example>").await;
    world.client.post(format!("{first}/cancel")).send().await.unwrap();
    world.workers();
    world.until_over(&first).await;
    let list = "=?utf-8?Q?J=C3=BCrgen?= <Juergen@d.example>, Ann Lee, PhD <ann@d.example>, bob@d.example";
    let second = world.invite(list).await;
    assert_eq!(world.until_over(&second).await["sent"], 3);
    let said = |message: &Message| {
        let parsed = MessageParser::default().parse(&message.raw).unwrap();
        let to = parsed.to().and_then(|to| to.first()).unwrap();
        (parsed.subject().unwrap().to_owned(), to.name().map(str::to_owned), to.address().unwrap().to_owned())
    };
    let mut mails: Vec<_> = sink.mailbox().newest(None, 9).iter().map(|message| said(message)).collect();
    mails.sort();
    let mail = |hello: &str, name: Option<&str>, address: &str| {
        (format!("Hello {hello}"), name.map(str::to_owned), address.to_owned())
    };
    assert_eq!(
        mails,
        [
            mail("Ann Lee, PhD", Some("Ann Lee, PhD"), "ann@d.example"),
            mail("Jürgen", Some("Jürgen"), "Juergen@d.example"),
            mail("friend", None, "bob@d.example"),
        ]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_form_is_told_how_many_people_its_list_names() {
    let world = World::new(&[]).await;
    let list = "Ann <ann@bücher.example> Bob <bob@x.org>\nann@xn--bcher-kva.example\nnobody";
    let answer =
        world.client.post(format!("{}/invites/count", world.web)).form(&[("emails", list)]).send().await.unwrap();
    let count: serde_json::Value = answer.json().await.unwrap();
    assert_eq!(count["text"], "2 people, 1 address repeated, 1 invalid entry");
    assert_eq!((&count["people"], &count["repeated"], &count["invalid"]), (&2.into(), &1.into(), &1.into()));
    let strange = world.client.post(format!("{}/invites/count", world.web)).header("origin", "https://evil.example");
    assert_eq!(strange.form(&[("emails", list)]).send().await.unwrap().status(), 403);
    assert_eq!(column::<i64>(&world.pool, "SELECT count(*) FROM users").await, [0]);
}
