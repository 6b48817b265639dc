//! The results: medians over the rounds, their ratios, and their output.

use std::fmt::Write as _;

use serde::Serialize;

use super::{
    cpu::{Cpu, Memory},
    depths::Depths,
    in_a_row::ConsecutiveRun,
    median::median,
    pipeline::Piped,
    raw::Raw,
    senders::Senders,
    small_run::Behind,
    smtp::Smtp,
    watchers::Watched,
};

/// One round of measurements.
#[derive(Clone, Copy, Debug)]
pub(super) struct Round {
    pub(super) ceiling: Raw,
    pub(super) pipeline: Piped,
    pub(super) naive: Raw,
}

/// The report. Rates and times are medians; a ratio is one of medians. Rates count from the POST to the run's end, unless stated
/// otherwise.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Results {
    recipients: usize,
    rounds: usize,
    /// What the servers allow, including the submission.
    ceiling_items_per_second: f64,
    /// Mailrun's rate.
    pipeline_items_per_second: f64,
    /// Mailrun's share of the ceiling.
    ratio: f64,
    /// The rate of one item at a time.
    naive_items_per_second: f64,
    /// How many times faster Mailrun is.
    naive_ratio: f64,
    /// From the POST to its response.
    submit_seconds: f64,
    /// COPY and INSERT of the same rows.
    ceiling_submit_seconds: f64,
    /// That time divided by the POST's.
    submit_ratio: f64,
    /// Mailrun's rate after the response to the POST.
    drain_items_per_second: f64,
    /// The bare pipeline without its submission.
    conveyor_ceiling_items_per_second: f64,
    drain_ratio: f64,
    /// Of Mailrun's measurement, by part.
    cpu_seconds: Cpu,
    /// Of the ceiling's measurement, by part.
    ceiling_cpu_seconds: Cpu,
    /// Mailrun's, in milliseconds.
    cpu_milliseconds_per_thousand_items: f64,
    ceiling_cpu_milliseconds_per_thousand_items: f64,
    wal_bytes_per_item: f64,
    ceiling_wal_bytes_per_item: f64,
    commits_per_item: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    statements_per_item: Option<f64>,
    /// The maximum of all rounds.
    peak_memory_bytes: Memory,
    /// The maximum observed in all rounds.
    deepest_queues: Depths,
    /// Each round's rates, to show their spread.
    ceiling_rounds: Vec<f64>,
    pipeline_rounds: Vec<f64>,
    naive_rounds: Vec<f64>,
    /// With a slow relay.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) slow_mail: Vec<Latency>,
    /// Real mail.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) smtp: Vec<Smtp>,
    /// With other numbers of sending processes.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) senders: Vec<Senders>,
    /// With people watching the page.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) watchers: Option<Watched>,
    /// Consecutive runs on one installation.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) in_a_row: Vec<ConsecutiveRun>,
    #[serde(flatten)]
    small: Option<Small>,
}

/// Mailrun with a slow relay.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Latency {
    latency_ms: u64,
    recipients: usize,
    /// After the response to the POST.
    items_per_second: f64,
    /// The maximum number of concurrent sends divided by the latency; or the ceiling, if it is lower.
    bound_items_per_second: f64,
    ratio: f64,
}

impl Latency {
    pub(super) fn new(latency_ms: u64, recipients: usize, rate: f64, by_permits: f64, ceiling: f64) -> Self {
        let bound = by_permits.min(ceiling);
        let ratio = rate / bound;
        Self { latency_ms, recipients, items_per_second: rate, bound_items_per_second: bound, ratio }
    }

    pub(super) fn items_per_second(&self) -> f64 {
        self.items_per_second
    }
}

/// Small runs behind a large one.
#[derive(Clone, Debug, Serialize)]
struct Small {
    /// From a small run's POST to its end.
    behind_a_million_seconds: f64,
    behind_a_million_worst_seconds: f64,
    small_runs: usize,
    /// The size of the large run.
    behind_recipients: usize,
    /// The large run's rate after the last small one and during the small ones.
    behind_alone_items_per_second: f64,
    behind_beside_items_per_second: f64,
}

impl Results {
    /// Requires at least one round.
    pub(super) fn of(rounds: &[Round]) -> Self {
        let over = |figure: &dyn Fn(&Round) -> f64| rounds.iter().map(figure).collect::<Vec<f64>>();
        let middle = |figure: &dyn Fn(&Round) -> f64| median(over(figure));
        let ceiling_rounds = over(&|round| round.ceiling.items_per_second());
        let pipeline_rounds = over(&|round| round.pipeline.items_per_second());
        let naive_rounds = over(&|round| round.naive.items_per_second());
        let (ceiling, pipeline, naive) =
            (median(ceiling_rounds.clone()), median(pipeline_rounds.clone()), median(naive_rounds.clone()));
        let submit_seconds = middle(&|round| round.pipeline.submit.as_secs_f64());
        let ceiling_submit_seconds = middle(&|round| round.ceiling.submit.as_secs_f64());
        let drain = middle(&|round| round.pipeline.drain_items_per_second());
        let bare_drain = middle(&|round| round.ceiling.drain_items_per_second());
        let cpu_of = |cpu: fn(&Round) -> Cpu| {
            let all: Vec<Cpu> = rounds.iter().map(cpu).collect();
            Cpu::by_part(&all, median)
        };
        let recipients = rounds.first().map_or(0, |round| round.pipeline.items);
        let per_item = |count: i64| count as f64 / recipients as f64;
        let per_thousand = |cpu: Cpu| cpu.total() * 1e6 / recipients as f64;
        let (cpu_seconds, ceiling_cpu_seconds) =
            (cpu_of(|round| round.pipeline.cpu), cpu_of(|round| round.ceiling.cpu));
        let statements: Option<Vec<f64>> =
            rounds.iter().map(|round| round.pipeline.writes.statements.map(per_item)).collect();
        Self {
            recipients,
            rounds: rounds.len(),
            ceiling_items_per_second: ceiling,
            pipeline_items_per_second: pipeline,
            ratio: pipeline / ceiling,
            naive_items_per_second: naive,
            naive_ratio: pipeline / naive,
            submit_seconds,
            ceiling_submit_seconds,
            submit_ratio: ceiling_submit_seconds / submit_seconds,
            drain_items_per_second: drain,
            conveyor_ceiling_items_per_second: bare_drain,
            drain_ratio: drain / bare_drain,
            cpu_seconds,
            ceiling_cpu_seconds,
            cpu_milliseconds_per_thousand_items: per_thousand(cpu_seconds),
            ceiling_cpu_milliseconds_per_thousand_items: per_thousand(ceiling_cpu_seconds),
            wal_bytes_per_item: middle(&|round| per_item(round.pipeline.writes.wal_bytes)),
            ceiling_wal_bytes_per_item: middle(&|round| per_item(round.ceiling.writes.wal_bytes)),
            commits_per_item: middle(&|round| per_item(round.pipeline.writes.commits)),
            statements_per_item: statements.map(median),
            peak_memory_bytes: rounds
                .iter()
                .fold(Memory::default(), |greatest, round| greatest.max(round.pipeline.memory)),
            deepest_queues: rounds.iter().fold(Depths::default(), |deepest, round| deepest.max(round.pipeline.deepest)),
            ceiling_rounds,
            pipeline_rounds,
            naive_rounds,
            slow_mail: Vec::new(),
            smtp: Vec::new(),
            senders: Vec::new(),
            watchers: None,
            in_a_row: Vec::new(),
            small: None,
        }
    }

    /// What the servers allow without the submission.
    pub(super) fn drain_ceiling(&self) -> f64 {
        self.conveyor_ceiling_items_per_second
    }

    /// Adds small runs behind a large one.
    pub(super) fn behind(&mut self, behind: &Behind) {
        self.small = Some(Small {
            behind_a_million_seconds: median(behind.seconds.clone()),
            behind_a_million_worst_seconds: behind.seconds.iter().copied().fold(0.0, f64::max),
            small_runs: behind.seconds.len(),
            behind_recipients: behind.behind,
            behind_alone_items_per_second: behind.alone,
            behind_beside_items_per_second: behind.beside,
        });
    }

    /// The text output.
    pub(super) fn table(&self) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = self.write_table(&mut text);
        text
    }

    fn write_table(&self, text: &mut String) -> std::fmt::Result {
        writeln!(text, "{} people, medians of {} rounds\n", self.recipients, self.rounds)?;
        writeln!(text, "{:24}{:>12}{:>12}{:>12}", "items per second", "ceiling", "Mailrun", "naive")?;
        writeln!(
            text,
            "{:24}{:>12.0}{:>12.0}{:>12.0}",
            "  from the POST",
            self.ceiling_items_per_second,
            self.pipeline_items_per_second,
            self.naive_items_per_second
        )?;
        writeln!(
            text,
            "{:24}{:>12.0}{:>12.0}",
            "  from its response", self.conveyor_ceiling_items_per_second, self.drain_items_per_second
        )?;
        writeln!(text, "{:24}{:>12.2}{:>12.2}", "POST, seconds", self.ceiling_submit_seconds, self.submit_seconds)?;
        writeln!(
            text,
            "\nMailrun reaches {:.0} % of the ceiling, and is {:.1} times faster than the naive pipeline.\n",
            self.ratio * 100.0,
            self.naive_ratio
        )?;
        writeln!(text, "{:24}{:>12}{:>12}", "CPU seconds", "ceiling", "Mailrun")?;
        for ((part, ceiling), (_, mailrun)) in
            self.ceiling_cpu_seconds.parts().into_iter().zip(self.cpu_seconds.parts())
        {
            writeln!(text, "{:24}{ceiling:>12.2}{mailrun:>12.2}", format!("  {part}"))?;
        }
        let totals = (self.ceiling_cpu_seconds.total(), self.cpu_seconds.total());
        writeln!(text, "{:24}{:>12.2}{:>12.2}", "  total", totals.0, totals.1)?;
        let others = (self.ceiling_cpu_seconds.others, self.cpu_seconds.others);
        writeln!(text, "{:24}{:>12.2}{:>12.2}", "  other processes", others.0, others.1)?;
        writeln!(
            text,
            "{:24}{:>12.0}{:>12.0}",
            "WAL bytes per item", self.ceiling_wal_bytes_per_item, self.wal_bytes_per_item
        )?;
        writeln!(text, "{:24}{:>12}{:>12.3}", "commits per item", "", self.commits_per_item)?;
        if let Some(statements) = self.statements_per_item {
            writeln!(text, "{:24}{:>12}{statements:>12.3}", "statements per item", "")?;
        }
        let megabytes = |bytes: u64| bytes / (1024 * 1024);
        let memory = self.peak_memory_bytes;
        writeln!(
            text,
            "\nPeak memory in MiB: web {}, fan-out {}, send {}, progress {}",
            megabytes(memory.web),
            megabytes(memory.fan_out),
            megabytes(memory.send),
            megabytes(memory.progress)
        )?;
        let Depths { items, results } = self.deepest_queues;
        writeln!(text, "Deepest queues: {items} items, {results} results")?;
        for slow in &self.slow_mail {
            writeln!(
                text,
                "With {} ms per mail: {:.0} items per second, {:.0} % of what the permits or the ceiling allow",
                slow.latency_ms,
                slow.items_per_second,
                slow.ratio * 100.0
            )?;
        }
        for smtp in &self.smtp {
            writeln!(text, "{}", smtp.line())?;
        }
        for senders in &self.senders {
            writeln!(text, "{senders}")?;
        }
        if let Some(watched) = &self.watchers {
            writeln!(text, "{watched}")?;
        }
        for run in &self.in_a_row {
            writeln!(text, "{run}")?;
        }
        if let Some(small) = &self.small {
            writeln!(
                text,
                "A run of 10 behind a run of {}: {:.2} s, at most {:.2} s; large run: {:.0} items per second alone, {:.0} during small runs",
                small.behind_recipients,
                small.behind_a_million_seconds,
                small.behind_a_million_worst_seconds,
                small.behind_alone_items_per_second,
                small.behind_beside_items_per_second
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::Value;

    use super::{super::writes::Writes, *};

    fn round(ceiling_s: f64, pipeline_s: f64, naive_s: f64) -> Round {
        let cpu = Cpu { broker: 2.0, send: 1.0, ..Cpu::default() };
        let writes = Writes { wal_bytes: 3_000, commits: 10, statements: None };
        let raw = |seconds: f64| Raw {
            items: 1_000,
            submit: Duration::from_secs_f64(seconds / 4.0),
            drain: Duration::from_secs_f64(seconds * 0.75),
            cpu,
            writes,
        };
        let pipeline = Piped {
            items: 1_000,
            submit: Duration::from_secs_f64(pipeline_s / 2.0),
            all: Duration::from_secs_f64(pipeline_s),
            cpu: Cpu { database: pipeline_s, ..cpu },
            writes,
            memory: Memory { web: 5, ..Memory::default() },
            deepest: Depths { items: 7, results: 2 },
        };
        Round { ceiling: raw(ceiling_s), pipeline, naive: raw(naive_s) }
    }

    #[test]
    fn the_median_is_the_middle_value() {
        assert_eq!(median(vec![9.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 9.0]), 3.0);
        assert_eq!(median(vec![7.0]), 7.0);
        assert!(median(Vec::new()).is_nan());
    }

    #[test]
    fn ratios_are_ratios_of_medians() {
        let results = Results::of(&[round(1.0, 2.0, 40.0), round(1.0, 4.0, 20.0), round(0.1, 2.0, 20.0)]);
        assert_eq!((results.recipients, results.rounds), (1_000, 3));
        assert_eq!((results.ceiling_items_per_second, results.pipeline_items_per_second), (1_000.0, 500.0));
        assert_eq!((results.ratio, results.naive_ratio), (0.5, 10.0));
        // The POST takes half of 2 s, the bare submission a quarter of 1 s.
        assert_eq!((results.submit_seconds, results.submit_ratio), (1.0, 0.25));
        assert_eq!(results.drain_items_per_second, 1_000.0);
        assert_eq!(results.cpu_seconds.database, 2.0);
        assert_eq!((results.wal_bytes_per_item, results.commits_per_item), (3.0, 0.01));
        assert_eq!(results.cpu_milliseconds_per_thousand_items, 5_000.0);
    }

    #[test]
    fn a_slow_relay_is_bounded_by_the_permits_or_the_ceiling() {
        assert_eq!(Latency::new(50, 1_000, 1_280.0, 2_560.0, 20_000.0).ratio, 0.5);
        assert_eq!(Latency::new(1, 1_000, 10_000.0, 128_000.0, 20_000.0).ratio, 0.5);
    }

    #[test]
    fn omits_what_was_not_requested() {
        let mut results = Results::of(&[round(1.0, 2.0, 40.0)]);
        let json = |results: &Results| serde_json::to_value(results).unwrap();
        assert_eq!(json(&results).get("behind_a_million_seconds"), None);
        assert_eq!(json(&results).get("statements_per_item"), None);
        assert!(!results.table().contains("behind"));
        let seconds = vec![0.1, 0.3, 0.2];
        results.behind(&Behind { behind: 1_000_000, seconds, alone: 9_000.0, beside: 8_000.0 });
        assert_eq!(json(&results)["behind_a_million_seconds"], Value::from(0.2));
        assert!(results.table().contains("A run of 10 behind a run of 1000000: 0.20 s"));
    }

    #[test]
    fn the_table_contains_the_ratios() {
        let table = Results::of(&[round(1.0, 2.0, 40.0)]).table();
        assert!(
            table.contains("Mailrun reaches 50 % of the ceiling, and is 20.0 times faster than the naive pipeline."),
            "{table}"
        );
    }
}
