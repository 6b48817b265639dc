//! Invalid messages on all queues in all forms: each becomes a dead letter once, with its reason, while a run continues.

use std::collections::{BTreeMap, BTreeSet};

use crate::support::{World, people, until};
use lapin::{
    BasicProperties, Channel, Confirmation,
    options::{BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions},
    types::{AMQPValue, ByteArray, DecimalValue, FieldArray, FieldTable, LongString},
};
use mailrun_broker::depth;
use mailrun_core::{
    item::ItemState,
    message::{ResultsMessage, decode},
};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};
use serde_json::{Value, json};
use uuid::Uuid;

/// All consumed queues, and three of those whose messages expire to one.
const QUEUES: [&str; 7] = [
    "mailrun.runs",
    "mailrun.items",
    "mailrun.items.2",
    "mailrun.results",
    "mailrun.runs.wait",
    "mailrun.runs.paused",
    "mailrun.retry.100ms",
];
/// Much larger than a frame.
const HUGE: usize = 1_500_000;
/// Valid messages with a few bytes changed, per queue.
const GARBLED: usize = 40;

/// What becomes of a message.
#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    /// Dead-lettered.
    Buried,
    /// A well-formed result of an unknown item: buried separately, and once, however often it arrives.
    BuriedOnce,
}

/// A valid message of the queue that refers to nothing.
fn right(queue: &str) -> Value {
    let id = Uuid::from_u128(0xDEAD);
    match queue {
        "mailrun.runs" | "mailrun.runs.wait" | "mailrun.runs.paused" => {
            json!({ "run_id": id, "command": { "release": { "pass": 1, "step": 2 } } })
        }
        "mailrun.results" => json!({ "results": [
            { "item_id": 999_999_999, "attempt": 1, "tries": 1, "replays": 0, "state": "retrying", "error": "busy", "due_in_ms": 5 },
        ] }),
        _ => json!({ "run_id": id, "item_id": 999_999_999, "attempt": 1, "tries": 1, "replays": 0 }),
    }
}

/// The expected end of a body without a type, by the workers' decoder.
fn end_of(queue: &str, body: &[u8]) -> End {
    match queue {
        "mailrun.results" if decode::<ResultsMessage>(None, body).is_ok() => End::BuriedOnce,
        // No run has such an id.
        _ => End::Buried,
    }
}

/// Results buried once: run, item, attempt and state.
type OnceBuried = BTreeSet<(Option<Uuid>, i64, i32, ItemState)>;

fn once_buried(body: &[u8]) -> OnceBuried {
    let Ok(message) = decode::<ResultsMessage>(None, body) else { return OnceBuried::new() };
    message.results.iter().map(|result| (message.run_id, result.item_id, result.attempt, result.state)).collect()
}

/// Bodies that are invalid on any queue.
fn wrong(queue: &str) -> Vec<Vec<u8>> {
    let body = right(queue).to_string();
    let mut bodies: Vec<Vec<u8>> =
        ["", "hello", "null", "0", "\"\"", "[]", "{}", "{\"\":{}}", "\u{feff}{}", "{\"run_id\":5}", "\0"]
            .iter()
            .map(|body| body.as_bytes().to_vec())
            .collect();
    bodies.push(body.as_bytes()[..body.len() / 2].to_vec());
    bodies.push(format!("{body}{body}").into_bytes());
    bodies.push(body.replacen('{', "{\"address\":\"ann@example.org\",", 1).into_bytes());
    // The reason would quote the invalid part.
    bodies.push(format!("{{\"{}\":1}}", "x".repeat(HUGE)).into_bytes());
    bodies.push(format!("{{\"run_id\":\"{}\"}}", "é".repeat(HUGE / 2)).into_bytes());
    bodies.push("x".repeat(HUGE).into_bytes());
    bodies.push(vec![0xFF; 300]);
    bodies.push("[".repeat(HUGE / 10).into_bytes());
    bodies
}

/// Invalid values of the fields of a valid message.
fn wrong_fields(queue: &str) -> Vec<Vec<u8>> {
    let fields: &[(&str, &[&str])] = match queue {
        "mailrun.runs" | "mailrun.runs.wait" | "mailrun.runs.paused" => &[
            ("/run_id", &["5", "null", "\"\"", "[]"]),
            ("/command", &["null", "\"release\"", "{}", "{\"purge\":{}}", "{\"cancel\":{},\"release\":{}}"]),
            ("/command/release/step", &["2147483648", "1.5", "\"1\"", "-1e99"]),
        ],
        "mailrun.results" => &[
            ("/results", &["null", "{}", "[[]]", "[null]", "[{}]"]),
            ("/results/0/item_id", &["9223372036854775808", "-1e400", "\"1\"", "1.5"]),
            ("/results/0/attempt", &["0", "-1", "1000001", "4294967297"]),
            ("/results/0/tries", &["0", "-5", "32768"]),
            ("/results/0/replays", &["-1", "99999"]),
            ("/results/0/state", &["\"lost\"", "0", "{\"sent\":1}"]),
            ("/results/0/due_in_ms", &["-1", "9223372036854775808"]),
            ("/results/0/error", &["\"a\\u0000b\"", "[]"]),
        ],
        _ => &[
            ("/run_id", &["5", "null", "\"\"", "[]"]),
            ("/item_id", &["9223372036854775808", "-1e400", "\"1\"", "1.5"]),
            ("/attempt", &["0", "-1", "1000000", "2147483648"]),
            ("/tries", &["0", "-1", "32768"]),
            ("/replays", &["-1", "1e3"]),
        ],
    };
    let with = |path: &str, value: &str| {
        let mut body = right(queue);
        *body.pointer_mut(path).unwrap() = json!("HERE");
        body.to_string().replace("\"HERE\"", value).into_bytes()
    };
    fields.iter().flat_map(|(path, values)| values.iter().map(move |value| with(path, value))).collect()
}

fn text(text: impl Into<Vec<u8>>) -> AMQPValue {
    AMQPValue::LongString(LongString::from(text.into()))
}

/// Tables of headers.
fn headers(queue: &str) -> Vec<FieldTable> {
    let table = |entries: Vec<(&str, AMQPValue)>| {
        let mut table = FieldTable::default();
        for (key, value) in entries {
            table.insert(key.into(), value);
        }
        table
    };
    let list = |values: Vec<AMQPValue>| AMQPValue::FieldArray(FieldArray::from(values));
    let death = table(vec![("count", AMQPValue::LongLongInt(9)), ("queue", text(queue)), ("reason", text("rejected"))]);
    let mut nested = text("bottom");
    for _ in 0..50 {
        nested = AMQPValue::FieldTable(table(vec![("deeper", nested)]));
    }
    // The broker itself adds headers to messages that it moves.
    let moved_on = ["wait", "paused", "retry"].iter().any(|room| queue.contains(room));
    let huge = if moved_on { 120_000 } else { 130_900 };
    let many: Vec<String> = (0..4_000).map(|number| format!("header-{number}")).collect();
    vec![
        // Copies to the queue, repeated at each burial, would fill it.
        table(vec![("CC", list(vec![text(queue)]))]),
        table(vec![
            ("x-death", list(vec![AMQPValue::FieldTable(death)])),
            ("x-delivery-count", AMQPValue::LongLongInt(19)),
        ]),
        table(vec![
            ("x-death", text("?")),
            ("x-first-death-queue", text(queue)),
            ("x-last-death-reason", AMQPValue::Void),
        ]),
        table(vec![
            ("x-mailrun-reason", text("failed")),
            ("x-mailrun-error", AMQPValue::Boolean(true)),
            ("x-mailrun-died-at", text("")),
        ]),
        // With our headers added, they would exceed a frame.
        table(vec![("x-huge", text(vec![b'x'; huge]))]),
        table(many.iter().map(|key| (key.as_str(), text("0123456789"))).collect()),
        table(vec![("x-not-utf-8", text(vec![0xFF, 0xFE, 0])), ("", text("")), ("nested", nested)]),
        table(vec![
            ("a", AMQPValue::Boolean(true)),
            ("b", AMQPValue::ShortShortInt(-1)),
            ("c", AMQPValue::ShortShortUInt(255)),
            ("d", AMQPValue::ShortInt(-1)),
            ("e", AMQPValue::ShortUInt(65_535)),
            ("f", AMQPValue::LongInt(-1)),
            ("g", AMQPValue::LongUInt(u32::MAX)),
            ("h", AMQPValue::LongLongInt(i64::MIN)),
            ("i", AMQPValue::Float(f32::MIN_POSITIVE)),
            ("j", AMQPValue::Double(f64::MAX)),
            ("k", AMQPValue::DecimalValue(DecimalValue { scale: 255, value: u32::MAX })),
            ("l", AMQPValue::Timestamp(u64::MAX)),
            ("m", AMQPValue::ByteArray(ByteArray::from(vec![0; 9]))),
            ("n", AMQPValue::Void),
        ]),
    ]
}

/// Invalid or meaningless properties.
fn properties() -> Vec<BasicProperties> {
    let none = BasicProperties::default;
    vec![
        none().with_content_type("text/html".into()).with_content_encoding("gzip".into()),
        none().with_priority(255).with_delivery_mode(1),
        // Long enough not to expire before consumption.
        none().with_expiration("600000".into()),
        none()
            .with_reply_to("mailrun.items".into())
            .with_correlation_id("x".repeat(255).into())
            .with_message_id("".into()),
        none().with_timestamp(u64::MAX).with_app_id("é".into()).with_type("".into()),
    ]
}

struct Publisher {
    channel: Channel,
    buried: Buried,
    published: usize,
}

/// The expected dead letters.
#[derive(Default)]
struct Buried {
    /// The count of each body.
    bodies: BTreeMap<Vec<u8>, usize>,
    /// Each of these once.
    once: OnceBuried,
}

impl Buried {
    fn total(&self) -> usize {
        self.bodies.values().sum::<usize>() + self.once.len()
    }
}

impl Publisher {
    async fn publish(&mut self, queue: &str, body: Vec<u8>, properties: BasicProperties, end: End) {
        let options = BasicPublishOptions { mandatory: true, ..Default::default() };
        let confirm =
            self.channel.basic_publish("mailrun".into(), queue.into(), options, &body, properties).await.unwrap();
        assert!(matches!(confirm.await.unwrap(), Confirmation::Ack(None)), "the broker did not take it for {queue}");
        self.published += 1;
        match end {
            End::Buried => *self.buried.bodies.entry(body).or_default() += 1,
            End::BuriedOnce => self.buried.once.extend(once_buried(&body)),
        }
    }
}

/// All messages on `mailrun.dead`, which stay there.
async fn dead_letters(world: &World) -> Vec<(BasicProperties, Vec<u8>)> {
    let channel = world.channel().await;
    let mut dead_letters = Vec::new();
    while let Some(dead_letter) = channel.basic_get("mailrun.dead".into(), BasicGetOptions::default()).await.unwrap() {
        dead_letters.push((dead_letter.properties.clone(), dead_letter.data.clone()));
    }
    channel.close(200, "done".into()).await.unwrap();
    dead_letters
}

fn header(properties: &BasicProperties, key: &str) -> String {
    match properties.headers().as_ref().and_then(|headers| headers.inner().get(key)) {
        Some(AMQPValue::LongString(text)) => text.to_string(),
        other => panic!("{key} is {other:?}"),
    }
}

/// Waits until no work is in progress, then compares the dead letters with the expected ones.
async fn settled(world: &World, expected: &Buried, failed: usize) {
    let channel = world.channel().await;
    for queue in QUEUES.into_iter().chain(["mailrun.retry.200ms"]) {
        // A paused run's message stays.
        let few = u32::from(queue.starts_with("mailrun.runs"));
        until(&format!("{queue} is empty"), async || depth(&channel, queue).await.unwrap() <= few).await;
    }
    let total = expected.total() + failed;
    until(&format!("there are exactly {total} dead letters"), async || {
        depth(&channel, "mailrun.dead").await.unwrap() as usize == total
    })
    .await;
    let mut poison: BTreeMap<Vec<u8>, usize> = BTreeMap::new();
    let mut found_once = OnceBuried::new();
    let mut others = 0;
    for (properties, body) in dead_letters(world).await {
        let error = header(&properties, "x-mailrun-error");
        match header(&properties, "x-mailrun-reason").as_str() {
            "poison" => {
                assert!(!error.is_empty() && error.chars().count() <= 1_000, "{error}");
                let of_results = once_buried(&body);
                if !of_results.is_empty() && !expected.bodies.contains_key(&body) {
                    found_once.extend(of_results);
                    continue;
                }
                *poison.entry(body).or_default() += 1;
            }
            "failed" => {
                assert_eq!(error, "Internet Down");
                others += 1;
            }
            other => panic!("the reason is {other}"),
        }
    }
    let shown = |body: &Vec<u8>| String::from_utf8_lossy(&body[..body.len().min(100)]).into_owned();
    for (body, count) in &expected.bodies {
        assert_eq!(poison.get(body), Some(count), "the number of {}", shown(body));
    }
    for body in poison.keys() {
        assert!(expected.bodies.contains_key(body), "{} is unexpected", shown(body));
    }
    assert_eq!((others, &found_once), (failed, &expected.once));
}

#[tokio::test]
async fn malformed_messages_are_buried_once_and_the_run_continues() {
    let mut world = World::new(&[
        ("MAILRUN_AMQP__ITEM_QUEUES", "2"),
        ("MAILRUN_MAILER__SIMULATED__LATENCY_MS", "20"),
        ("MAILRUN_SEND__PERMITS", "5"),
    ])
    .await;
    // An invitation that must stay untouched until the end.
    let held = world.invite("held@example.org").await;
    world.client.post(format!("{held}/pause")).send().await.unwrap();
    let held_id = held.rsplit('/').next().unwrap().to_owned();
    let item: i64 = sqlx::query_scalar("SELECT id FROM run_items").fetch_one(&world.pool).await.unwrap();
    let run = world.invite(&people(1000)).await;
    let workers = ["fan-out", "send", "progress"].map(|role| world.worker(role));

    let channel = world.channel().await;
    channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
    let mut publisher = Publisher { channel, buried: Buried::default(), published: 0 };
    let mut random = StdRng::seed_from_u64(7);
    for queue in QUEUES {
        for body in wrong(queue).into_iter().chain(wrong_fields(queue)) {
            let end = end_of(queue, &body);
            publisher.publish(queue, body, BasicProperties::default(), end).await;
        }
        let unknown = right(queue).to_string().into_bytes();
        publisher.publish(queue, unknown.clone(), BasicProperties::default(), end_of(queue, &unknown)).await;
        for kind in ["mailrun.item.v0", "mailrun", "é"] {
            let properties = BasicProperties::default().with_type(kind.into());
            publisher.publish(queue, unknown.clone(), properties, End::Buried).await;
        }
        for (number, properties) in properties().into_iter().enumerate() {
            publisher.publish(queue, format!("properties {number}").into_bytes(), properties, End::Buried).await;
        }
        for (number, headers) in headers(queue).into_iter().enumerate() {
            let properties = BasicProperties::default().with_headers(headers);
            publisher.publish(queue, format!("headers {number}").into_bytes(), properties, End::Buried).await;
        }
        for _ in 0..GARBLED {
            let mut body = unknown.clone();
            for _ in 0..random.random_range(1..4) {
                let place = random.random_range(0..body.len());
                match random.random_range(0..3) {
                    0 => body[place] = random.random(),
                    1 => drop(body.remove(place)),
                    _ => body.insert(place, *b"{}[]\",:-09e\\".choose(&mut random).unwrap()),
                }
            }
            let end = end_of(queue, &body);
            publisher.publish(queue, body, BasicProperties::default(), end).await;
        }
    }
    // Of an existing item, but not applicable.
    let result =
        json!({ "item_id": item, "attempt": 1, "tries": 1, "replays": 0, "state": "retrying", "due_in_ms": i64::MAX });
    let refused = json!({ "results": [result] }).to_string();
    publisher.publish("mailrun.results", refused.into_bytes(), BasicProperties::default(), End::BuriedOnce).await;
    let replay = json!({ "command_id": Uuid::from_u128(1), "states": ["failed"], "error": "\0" });
    let refused = json!({ "run_id": held_id, "command": { "replay": replay } }).to_string();
    publisher.publish("mailrun.runs", refused.into_bytes(), BasicProperties::default(), End::Buried).await;

    let end = world.until_over(&run).await;
    assert_eq!(end["text"], "990 successful, 10 failed of 1,000");
    settled(&world, &publisher.buried, 10).await;
    let untouched: (i32, String) = sqlx::query_as("SELECT attempt, state::text FROM run_items WHERE id = $1")
        .bind(item)
        .fetch_one(&world.pool)
        .await
        .unwrap();
    assert_eq!(untouched, (1, "pending".to_owned()));

    // The operator's view and actions.
    assert_eq!(world.output(&["dead-letters"], &[]).1.trim(), "10  failed    Internet Down");
    assert!(world.run_to_end(&["dead-letters", "replay", "--all"]));
    world.until_progress(&run, "all sent", |progress| progress["sent"] == 1000).await;
    settled(&world, &publisher.buried, 0).await;
    assert_eq!(world.output(&["dead-letters"], &[]).1.trim(), "There are no dead letters.");
    // "Move messages" in the console: they are still invalid, and are buried again once.
    let channel = world.channel().await;
    let total = publisher.buried.total();
    until("all are back", async || depth(&channel, "mailrun.dead").await.unwrap() as usize == total).await;
    for _ in 0..total {
        let dead_letter = channel.basic_get("mailrun.dead".into(), BasicGetOptions::default()).await.unwrap().unwrap();
        channel
            .basic_publish(
                "".into(),
                "mailrun.items".into(),
                Default::default(),
                &dead_letter.data,
                dead_letter.properties.clone(),
            )
            .await
            .unwrap();
        dead_letter.ack(Default::default()).await.unwrap();
    }
    settled(&world, &publisher.buried, 0).await;

    world.client.post(format!("{held}/resume")).send().await.unwrap();
    assert_eq!(world.until_over(&held).await["sent"], 1);
    world.counters_equal_counts().await;
    world.assert_no_duplicates();
    for worker in workers {
        assert!(world.is_running(worker), "a worker has ended");
    }
    // No process had to reconnect because of this.
    assert!(!world.log().contains("interrupted"), "a connection was lost");
    assert!(publisher.published > 600, "{}", publisher.published);
}

#[tokio::test]
async fn messages_of_a_newer_version_wait_for_a_newer_worker() {
    let mut world = World::new(&[]).await;
    world.workers();
    let channel = world.channel().await;
    let waiting_rooms = [
        ("mailrun.runs", "mailrun.run.v9", "mailrun.runs.paused"),
        ("mailrun.items", "mailrun.item.v9", "mailrun.items.wait"),
        ("mailrun.results", "mailrun.results.v9", "mailrun.results.wait"),
    ];
    for (queue, kind, _) in waiting_rooms {
        let properties = BasicProperties::default().with_delivery_mode(2).with_type(kind.into());
        let body = br#"{"form":"that nobody knows yet"}"#;
        channel.basic_publish("mailrun".into(), queue.into(), Default::default(), body, properties).await.unwrap();
    }
    for (_, kind, waiting_room) in waiting_rooms {
        until(kind, async || depth(&channel, waiting_room).await.unwrap() == 1).await;
    }
    // They block nothing else, and circulate unchanged.
    let run = world.invite(&people(100)).await;
    world.until_over(&run).await;
    world.terminate_all();
    for (queue, kind, _) in waiting_rooms {
        until(kind, async || depth(&channel, queue).await.unwrap() == 1).await;
        let message = channel.basic_get(queue.into(), BasicGetOptions::default()).await.unwrap().unwrap();
        assert_eq!(message.properties.kind().as_ref().map(lapin::types::ShortString::as_str), Some(kind));
        assert_eq!(message.data, br#"{"form":"that nobody knows yet"}"#);
    }
    assert_eq!(depth(&channel, "mailrun.dead").await.unwrap(), 1, "one of a hundred fails, and nothing else");
}
