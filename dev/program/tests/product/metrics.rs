//! Exported metrics: each is documented, and each documented one is exported by the listed processes.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use crate::support::{World, until};
use rustix::process::Signal;

const DOCS: &str = include_str!("../../../../docs/metrics.md");
const PROCESSES: [&str; 4] = ["web", "fan-out", "send", "progress"];

/// A metric with the names of its labels.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Metric {
    name: String,
    kind: String,
    labels: BTreeSet<String>,
    meaning: String,
}

/// The documented table: each metric and the processes that export it.
fn documented() -> BTreeMap<Metric, BTreeSet<String>> {
    let rows = DOCS.lines().filter(|line| line.starts_with("| `mailrun_"));
    let words = |cell: &str| {
        let words = cell.split(',').map(|word| word.trim().trim_matches('`').to_owned());
        words.filter(|word| !word.is_empty()).collect::<BTreeSet<_>>()
    };
    rows.map(|row| {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        let [name, kind, labels, processes, meaning] = cells[..] else { panic!("five cells: {row}") };
        let processes = if processes == "all" { PROCESSES.map(str::to_owned).into() } else { words(processes) };
        let metric = Metric {
            name: name.trim_matches('`').to_owned(),
            kind: kind.to_owned(),
            labels: words(labels),
            meaning: meaning.to_owned(),
        };
        (metric, processes)
    })
    .collect()
}

/// The metrics in Prometheus' text format.
fn exported(text: &str) -> BTreeSet<Metric> {
    let mut metrics: BTreeMap<&str, Metric> = BTreeMap::new();
    let metric = |name: &str| Metric {
        name: name.to_owned(),
        kind: String::new(),
        labels: BTreeSet::new(),
        meaning: String::new(),
    };
    for line in text.lines() {
        if let Some((name, meaning)) = line.strip_prefix("# HELP ").and_then(|line| line.split_once(' ')) {
            metrics.entry(name).or_insert_with(|| metric(name)).meaning = meaning.to_owned();
        } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|line| line.split_once(' ')) {
            metrics.entry(name).or_insert_with(|| metric(name)).kind = kind.to_owned();
        } else if let Some((name, rest)) = line.split_once('{') {
            let name = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
            let labels = rest.split_once('}').unwrap().0.split("\",");
            let labels =
                labels.filter_map(|label| Some(label.split_once('=')?.0.to_owned())).filter(|name| name != "le");
            metrics.entry(name).or_insert_with(|| metric(name)).labels.extend(labels);
        }
    }
    metrics.into_values().collect()
}

/// The value of a sample, by its exported name and labels.
fn sample(text: &str, name: &str) -> f64 {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.unwrap_or_else(|| panic!("no {name} in\n{text}")).parse().unwrap()
}

/// Starts a process; returns its index and its metrics address.
async fn start(world: &mut World, args: &[&str]) -> (usize, String) {
    let addresses = |world: &World| {
        let log = world.log();
        let found = log.lines().filter_map(|line| Some(line.split_once("metrics at ")?.1.trim().to_owned()));
        found.collect::<Vec<_>>()
    };
    let before = addresses(world).len();
    let child = world.start(args);
    until("it logs its address", async || addresses(world).len() > before).await;
    (child, addresses(world)[before].trim_end_matches("/metrics").to_owned())
}

async fn get(world: &World, url: String) -> (u16, String) {
    let answer = world.client.get(url).send().await.unwrap();
    (answer.status().as_u16(), answer.text().await.unwrap())
}

async fn scrape(world: &World, address: &str) -> String {
    let (status, text) = get(world, format!("{address}/metrics")).await;
    assert_eq!(status, 200);
    text
}

#[tokio::test]
async fn exported_metrics_are_documented_and_correct() {
    let mut world = World::new(&[("MAILRUN_METRICS__LISTEN", "127.0.0.1:0")]).await;
    let mut addresses = BTreeMap::new();
    let web = world.log().lines().find_map(|line| Some(line.split_once("metrics at ")?.1.to_owned())).unwrap();
    addresses.insert("web", web.trim().trim_end_matches("/metrics").to_owned());
    for role in ["fan-out", "send", "progress"] {
        let (_, address) = start(&mut world, &["worker", "--roles", role]).await;
        addresses.insert(role, address);
    }
    for address in addresses.values() {
        until("it is ready", async || get(&world, format!("{address}/readyz")).await.0 == 200).await;
        assert_eq!(get(&world, format!("{address}/livez")).await, (200, "ok\n".into()));
        assert_eq!(get(&world, format!("{address}/")).await.0, 404);
    }

    let list: String = (1..=300).map(|number| format!("p{number}@example.org\n")).collect();
    let run = world.invite(&list).await;
    let over = world.until_over(&run).await;
    assert_eq!((over["sent"].as_i64(), over["failed"].as_i64()), (Some(297), Some(3)));

    let counted = scrape(&world, &addresses["progress"]).await;
    let items = |state: &str| sample(&counted, &format!("mailrun_items_total{{state=\"{state}\"}}"));
    assert_eq!((items("sent"), items("failed"), items("unknown")), (297.0, 3.0, 0.0));
    let sent = scrape(&world, &addresses["send"]).await;
    let attempts = |outcome: &str| sample(&sent, &format!("mailrun_attempts_total{{outcome=\"{outcome}\"}}"));
    assert_eq!((attempts("sent"), attempts("unknown")), (297.0, 0.0));
    // Three that never pass, and one that passes at its second try, each retried immediately at first.
    assert!(attempts("retry") >= 9.0);
    assert_eq!(sample(&sent, "mailrun_send_seconds_count"), attempts("sent") + attempts("retry"));
    assert_eq!(sample(&sent, "mailrun_messages_published_total{queue=\"mailrun.dead\"}"), 3.0);
    assert_eq!(sample(&sent, "mailrun_messages_rejected_total{reason=\"no_queue\"}"), 0.0);
    assert_eq!(sample(&sent, "mailrun_relay_state{state=\"open\"}"), 1.0);
    assert!(sample(&sent, "mailrun_claim_seconds_count") > 0.0 && sample(&sent, "mailrun_confirm_seconds_count") > 0.0);
    until("the ledger and the queues were measured", async || {
        let text = scrape(&world, &addresses["fan-out"]).await;
        text.contains("mailrun_ledger_items{state=\"sent\"} 297")
            && text.contains("mailrun_queue_messages{queue=\"mailrun.dead\"} 3")
    })
    .await;
    let fan_out = scrape(&world, &addresses["fan-out"]).await;
    assert_eq!(sample(&fan_out, "mailrun_outbox_messages"), 0.0);
    assert_eq!(sample(&fan_out, "mailrun_runs_open"), 0.0);

    let documented = documented();
    assert!(documented.len() > 20, "{documented:?}");
    let mut somewhere = BTreeSet::new();
    for (process, address) in &addresses {
        let of_process = documented.iter().filter(|(_, processes)| processes.contains(*process));
        let expected: BTreeSet<Metric> = of_process.map(|(metric, _)| metric.clone()).collect();
        let found = exported(&scrape(&world, address).await);
        // A histogram is exported after its first observation, and not every process has observations of each.
        let missing: Vec<_> = expected.difference(&found).filter(|metric| metric.kind != "histogram").collect();
        let undocumented: Vec<_> = found.difference(&expected).collect();
        assert!(
            missing.is_empty() && undocumented.is_empty(),
            "{process}: {missing:#?}\nnot documented: {undocumented:#?}"
        );
        somewhere.extend(found);
        // No address and no id.
        assert!(!scrape(&world, address).await.contains('@'));
    }
    let nowhere: Vec<_> = documented.keys().filter(|metric| !somewhere.contains(metric)).collect();
    assert!(nowhere.is_empty(), "{nowhere:#?}");
}

#[tokio::test]
async fn reports_why_a_process_is_not_ready_and_whether_it_is_alive() {
    let mut world = World::new(&[("MAILRUN_METRICS__LISTEN", "127.0.0.1:0")]).await;
    let (sender, address) = start(&mut world, &["worker", "--roles", "send"]).await;
    let ready = async |world: &World| get(world, format!("{address}/readyz")).await;
    until("it is ready", async || ready(&world).await.0 == 200).await;
    assert!(world.run_to_end(&["health", &format!("{address}/readyz")]));

    // Its queue is missing: it cannot consume.
    let channel = world.channel().await;
    channel.queue_delete("mailrun.items".into(), lapin::options::QueueDeleteOptions::default()).await.unwrap();
    until("it reports the missing queue", async || {
        let (status, reasons) = ready(&world).await;
        status == 503 && reasons.contains("mailrun.items")
    })
    .await;
    assert!(scrape(&world, &address).await.contains("mailrun_ready 0"));
    assert_eq!(get(&world, format!("{address}/livez")).await.0, 200, "a restart would not help");
    // The next connection declares it again.
    until("it is ready again", async || ready(&world).await.0 == 200).await;

    // While it drains, it is alive and not ready. After it has stopped, it cannot answer.
    world.signal(sender, Signal::TERM);
    assert!(world.until_ended(sender).await);
    assert!(!world.run_to_end(&["health", &format!("{address}/readyz")]));

    // PostgreSQL was never available.
    let nowhere = ["DATABASE_URL", "postgres://mailrun@127.0.0.1:1/none"];
    world.set(nowhere[0], nowhere[1].into());
    let (_, address) = start(&mut world, &["worker", "--roles", "send"]).await;
    let (status, reasons) = get(&world, format!("{address}/readyz")).await;
    assert_eq!(status, 503);
    assert!(reasons.contains("waiting for PostgreSQL"), "{reasons}");
    assert_eq!(get(&world, format!("{address}/livez")).await.0, 200);
    let said = world.run_to_end(&["health", &format!("{address}/readyz")]);
    assert!(!said && world.log().contains("waiting for PostgreSQL"));
}

#[tokio::test]
async fn reports_an_address_in_use() {
    let mut world = World::new(&[]).await;
    let taken = world.web.trim_start_matches("http://").to_owned();
    world.set("MAILRUN_METRICS__LISTEN", taken.clone());
    let worker = world.worker("send");
    let ended = tokio::time::timeout(Duration::from_secs(60), world.until_ended(worker)).await;
    assert_eq!(ended, Ok(false));
    assert!(world.log().contains(&format!("can't listen on {taken}")), "{}", world.log());
}
