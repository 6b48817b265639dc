//! `mailrun bench`: how fast Mailrun is on this machine, compared with what its servers allow and with the naive implementation.
//!
//! Everything is measured in turns on the same private servers: the ceiling (`ceiling.rs`), Mailrun itself (`pipeline.rs`) and the
//! naive pipeline (`naive.rs`). Absolute rates say more about the machine than about Mailrun; the ratios also hold elsewhere. Nothing
//! else should run meanwhile.

mod bare_pipeline;
mod ceiling;
mod cpu;
mod depths;
mod in_a_row;
mod median;
mod naive;
mod pipeline;
mod place;
mod raw;
mod report;
mod senders;
mod small_run;
mod smtp;
mod statements;
mod watchers;
mod writes;

use std::{path::Path, time::Duration};

use anyhow::{Context as _, Result};
use clap::Args;
use mailrun_app::{config::Config, shutdown};

use self::{
    cpu::Cpu,
    in_a_row::Extras,
    median::median,
    pipeline::{Piped, Setup},
    place::Place,
    report::{Latency, Results, Round},
    small_run::Behind,
};
use crate::people::people;
use mailrun_stack::{self, Stack};

/// The naive pipeline gets this many times fewer people, because it is much slower.
const NAIVE_SHARE: usize = 20;
const NAIVE_LEAST: usize = 1_000;

/// Options of `mailrun bench`.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Number of fictional people per measurement
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(1_000..=1_000_000))]
    recipients: u32,
    /// Number of rounds; medians are reported
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    repeat: u32,
    /// Print one JSON object with the results on standard output, and nothing else
    #[arg(long)]
    json: bool,
    /// Also measure how long a run of 10 takes behind a large one
    #[arg(long)]
    small_run: bool,
    /// Number of people in the large run
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u32).range(1_000..=1_000_000))]
    behind: u32,
    /// Also measure with a relay that takes this long for each mail; can be repeated
    #[arg(long)]
    latency_ms: Vec<u64>,
    /// Also measure real mail to a relay on this machine
    #[arg(long)]
    smtp: bool,
    /// The round-trip times to that relay, for example 0,20
    #[arg(long, requires = "smtp", value_delimiter = ',', default_value = "0", value_parser = clap::value_parser!(u64).range(0..=10_000))]
    rtt_ms: Vec<u64>,
    /// The connections to that relay, of all senders together
    #[arg(long, requires = "smtp", default_value_t = 40, value_parser = clap::value_parser!(u32).range(2..=1_000))]
    connections: u32,
    /// Also measure with these numbers of sending processes, for example 1,2,4
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=64))]
    senders: Vec<u32>,
    /// Also measure with this number of people watching the run's page
    #[arg(long, value_parser = clap::value_parser!(u32).range(2..=20_000))]
    watchers: Option<u32>,
    /// Also measure this number of consecutive runs on one installation
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    in_a_row: Option<u32>,
    /// Then measure a run while a session holds an old snapshot, and one after it
    #[arg(long, requires = "in_a_row")]
    old_snapshot: bool,
    /// Then measure a run while earlier ones are deleted
    #[arg(long, requires = "in_a_row")]
    prune: bool,
}

/// The settings of all measurements.
struct Settings<'a> {
    config: &'a Config,
    file: Option<&'a Path>,
    home: &'a Path,
}

/// Measures, and prints the results. Fails if a server or a service does not start, or an invitation is lost.
pub async fn run(config: Config, file: Option<&Path>, options: &Options) -> Result<()> {
    let home = mailrun_stack::home();
    if let Some(url) = mailrun_stack::running(&home).and_then(|running| running.web_url) {
        eprintln!("Warning: a running Mailrun will disturb the results: {url}");
    }
    let stop = shutdown::on_signal().context("cannot catch signals")?;
    let program = std::env::current_exe().context("the path of this program is unknown")?;
    let stack = Stack::start(&home, &program, Duration::ZERO, |step| eprintln!("{step}…")).await?;
    let settings = Settings { config: &config, file, home: &home };
    let measured = stop.run_until_cancelled(Box::pin(measure(&stack, &settings, options))).await;
    for purpose in PURPOSES {
        Place::drop_leftover(&stack, purpose).await?;
    }
    stack.stop().await?;
    let results = measured.context("the bench was interrupted")??;
    if options.json {
        println!("{}", serde_json::to_string(&results)?);
    } else {
        print!("{}", results.table());
    }
    Ok(())
}

/// The names of the places used.
const PURPOSES: [&str; 6] = ["ceiling", "pipeline", "naive", "small-run", "in-a-row", "watchers"];
/// With a slow relay, limits the duration of a measurement if nothing else is slow.
const LATENCY_SECONDS: f64 = 10.0;

async fn measure(stack: &Stack, settings: &Settings<'_>, options: &Options) -> Result<Results> {
    let items = usize::try_from(options.recipients)?;
    let mut rounds = Vec::new();
    for number in 1..=options.repeat {
        eprintln!("Round {number} of {}", options.repeat);
        rounds.push(round(stack, settings, items).await?);
    }
    let mut results = Results::of(&rounds);
    for latency_ms in &options.latency_ms {
        results.slow_mail.push(latency(stack, settings, options, *latency_ms, results.drain_ceiling()).await?);
    }
    if options.smtp {
        let connections = usize::try_from(options.connections)?;
        results.smtp = smtp::measure(stack, settings, &options.rtt_ms, connections, items, options.repeat).await?;
    }
    results.senders = senders::measure(stack, settings, options).await?;
    if let Some(watchers) = options.watchers {
        results.watchers = Some(watchers::measure(stack, settings, items, usize::try_from(watchers)?).await?);
    }
    if let Some(runs) = options.in_a_row {
        let place = Place::create(stack, "in-a-row").await?;
        let extras = Extras { runs, old_snapshot: options.old_snapshot, prune: options.prune };
        results.in_a_row = in_a_row::measure(&place, settings, items, extras).await?;
        place.drop().await?;
    }
    if options.small_run {
        results.behind(&small_run(stack, settings, usize::try_from(options.behind)?).await?);
    }
    Ok(results)
}

async fn round(stack: &Stack, settings: &Settings<'_>, items: usize) -> Result<Round> {
    let place = Place::create(stack, "ceiling").await?;
    let ceiling = ceiling::measure(&place, items).await?;
    place.drop().await?;
    tell("ceiling", ceiling.items_per_second(), &ceiling.cpu);

    let pipeline = mailrun(stack, settings, items, Setup::default()).await?;
    tell("Mailrun", pipeline.items_per_second(), &pipeline.cpu);

    let place = Place::create(stack, "naive").await?;
    let naive = naive::measure(&place, (items / NAIVE_SHARE).max(NAIVE_LEAST)).await?;
    place.drop().await?;
    tell("naive", naive.items_per_second(), &naive.cpu);
    Ok(Round { ceiling, pipeline, naive })
}

fn tell(what: &str, items_per_second: f64, cpu: &Cpu) {
    eprintln!("  {what:<8} {items_per_second:>7.0} items/s");
    if cpu.is_disturbed() {
        eprintln!("  disturbed: other processes used {:.1} CPU seconds, the bench {:.1}", cpu.others, cpu.total());
    }
}

async fn mailrun(stack: &Stack, settings: &Settings<'_>, items: usize, setup: Setup) -> Result<Piped> {
    let place = Place::create(stack, "pipeline").await?;
    let piped = pipeline::measure(&place, settings, items, setup).await?;
    place.drop().await?;
    Ok(piped)
}

/// Items per second from the response to the POST until the end; a median.
async fn drain_rate(
    stack: &Stack,
    settings: &Settings<'_>,
    options: &Options,
    items: usize,
    setup: Setup,
) -> Result<f64> {
    let mut rates = Vec::new();
    for _ in 0..options.repeat {
        rates.push(mailrun(stack, settings, items, setup).await?.drain_items_per_second());
    }
    Ok(median(rates))
}

async fn latency(
    stack: &Stack,
    settings: &Settings<'_>,
    options: &Options,
    latency_ms: u64,
    ceiling: f64,
) -> Result<Latency> {
    let setup = Setup { latency: Duration::from_millis(latency_ms), ..Setup::default() };
    let by_permits = setup.bound(settings.config);
    let items = items_within(by_permits, options);
    let rate = drain_rate(stack, settings, options, items, setup).await?;
    let measured = Latency::new(latency_ms, items, rate, by_permits, ceiling);
    eprintln!("With {latency_ms} ms per mail: {:.0} items/s", measured.items_per_second());
    Ok(measured)
}

/// The number of people for a measurement at this rate, if only the relay is slow.
fn items_within(by_permits: f64, options: &Options) -> usize {
    (by_permits * LATENCY_SECONDS).clamp(1_000.0, f64::from(options.recipients)) as usize
}

async fn small_run(stack: &Stack, settings: &Settings<'_>, behind: usize) -> Result<Behind> {
    let place = Place::create(stack, "small-run").await?;
    let measured = small_run::measure(&place, settings, behind).await?;
    place.drop().await?;
    Ok(measured)
}
