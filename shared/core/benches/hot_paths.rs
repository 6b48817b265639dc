//! Benchmarks of the pure code that runs for each address or item, without any server.
//!
//! `cargo bench -p mailrun-core` measures; `cargo test --benches` runs each once.
#![allow(missing_docs, reason = "the macros of criterion make undocumented functions")]

use std::hint::black_box;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use mailrun_core::{
    address,
    item::{ItemState, Standing, merge},
    message::{ItemMessage, ResultsMessage, decode, encode},
    template::{Recipient, Template},
};
use uuid::Uuid;

/// The number of addresses in a list, and of results in a merge.
const MANY: u32 = 1_000;
/// The number of results in a message, the same as the default of a sender.
const BATCH: i64 = 200;

fn item(item_id: i64) -> ItemMessage {
    ItemMessage { run_id: Uuid::from_u128(7), item_id, attempt: 1, tries: 1, replays: 0, impersonal: false }
}

/// What the form does for each address.
fn addresses(criterion: &mut Criterion) {
    let plain: String = (1..=MANY).map(|number| format!("guest-{number:06}@example.org\n")).collect();
    let named: String =
        (1..=MANY).map(|number| format!("\"Guest, {number}\" <guest-{number:06}@example.org>; ")).collect();
    let mut group = criterion.benchmark_group("address::parse");
    group.throughput(Throughput::Elements(u64::from(MANY)));
    for (name, list) in [("one a line", &plain), ("with names", &named)] {
        group.bench_function(name, |bencher| {
            bencher.iter(|| address::parse(black_box(list)).filter(|entry| entry.parsed.is_ok()).count());
        });
    }
    group.finish();
}

/// What a progress worker does for each result.
fn merging(criterion: &mut Criterion) {
    let sent = Standing { attempt: 1, state: ItemState::Sent };
    let mut group = criterion.benchmark_group("item::merge");
    group.throughput(Throughput::Elements(u64::from(MANY)));
    group.bench_function("sent, then again", |bencher| {
        bencher.iter_batched_ref(
            || vec![Standing::NEW; MANY as usize],
            |items| {
                for known in items {
                    *known = merge(*known, black_box(sent)).0;
                    *known = merge(*known, black_box(sent)).0;
                }
            },
            BatchSize::SmallInput,
        );
    });
    group.finish();
}

/// Encoding and decoding messages.
fn messages(criterion: &mut Criterion) {
    let one = item(1_234_567);
    let results = ResultsMessage {
        run_id: Some(Uuid::from_u128(7)),
        results: (1..=BATCH).map(|id| item(1_234_567 + id).result(ItemState::Sent, None)).collect(),
    };
    let (one_body, results_body) = (encode(&one), encode(&results));
    let mut group = criterion.benchmark_group("message");
    group.bench_function("encode an item", |bencher| bencher.iter(|| encode(black_box(&one))));
    group.bench_function("decode an item", |bencher| {
        bencher.iter(|| decode::<ItemMessage>(None, black_box(&one_body)).is_ok());
    });
    group.bench_function("encode 200 results", |bencher| bencher.iter(|| encode(black_box(&results))));
    group.bench_function("decode 200 results", |bencher| {
        bencher.iter(|| decode::<ResultsMessage>(None, black_box(&results_body)).is_ok());
    });
    group.finish();
}

/// What a sender does for each mail.
fn rendering(criterion: &mut Criterion) {
    let ann =
        Recipient { email: "ann@example.org", name: Some("Ann"), unsubscribe_url: Some("https://example.org/u/a_b") };
    let short = "Dear {{ name }},\n\nsee https://example.org/a_b_c and **come**!\n".to_owned();
    let mut group = criterion.benchmark_group("template::render");
    for (name, text) in [("a short text", short), ("50,000 lines", "a\n".repeat(50_000))] {
        let template = Template::new("Hello {{ name }}", &text).expect("the text is valid");
        group.bench_function(name, |bencher| bencher.iter(|| template.render(black_box(&ann)).is_ok()));
    }
    group.finish();
}

criterion_group!(hot_paths, addresses, merging, messages, rendering);
criterion_main!(hot_paths);
