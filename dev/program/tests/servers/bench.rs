//! The benchmark with a list too short to be meaningful: it ends, and prints its results.

use std::process::{Command, Stdio};

use serde_json::Value;

#[test]
fn the_bench_prints_one_line_of_json() {
    let mut bench = Command::new(env!("CARGO_BIN_EXE_mailrun-dev"));
    bench.args(["bench", "--recipients", "1000", "--repeat", "1", "--json"]).stderr(Stdio::inherit());
    bench.args(["--senders", "1", "--watchers", "20", "--in-a-row", "1", "--old-snapshot", "--prune"]);
    let output = bench.output().unwrap();
    assert!(output.status.success());
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert_eq!(stdout.lines().count(), 1, "{stdout}");
    let figures: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(figures["recipients"], 1000);
    for key in [
        "ceiling_items_per_second",
        "pipeline_items_per_second",
        "naive_items_per_second",
        "ratio",
        "naive_ratio",
        "submit_seconds",
        "submit_ratio",
        "drain_items_per_second",
        "conveyor_ceiling_items_per_second",
        "wal_bytes_per_item",
        "commits_per_item",
    ] {
        assert!(figures[key].as_f64().is_some_and(|figure| figure > 0.0), "{key}: {figures}");
    }
    for part in ["broker", "database", "web", "fan_out", "send", "progress", "bench"] {
        assert!(figures["cpu_seconds"][part].is_f64(), "{part}: {figures}");
    }
    for role in ["web", "fan_out", "send", "progress"] {
        assert!(figures["peak_memory_bytes"][role].as_u64().is_some_and(|bytes| bytes > 0), "{role}: {figures}");
    }
    let senders = figures["senders"].as_array().unwrap();
    assert!(senders.iter().all(|one| one["items_per_second"].is_f64()) && senders.len() == 2, "{figures}");
    for audience in ["one", "many", "probed"] {
        let audience = &figures["watchers"][audience];
        assert!(audience["polls"].as_u64().is_some_and(|polls| polls > 0) && audience["errors"] == 0, "{figures}");
    }
    let names: Vec<&Value> = figures["in_a_row"].as_array().unwrap().iter().map(|run| &run["name"]).collect();
    assert_eq!(names, ["1", "old snapshot", "after it", "prune"]);
    assert!(figures["in_a_row"][3]["pruned_items"].is_u64(), "{figures}");
}
