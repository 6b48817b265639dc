//! `mailrun demo`: the main use case through the real form, with a progress bar in the terminal.

mod smtp;

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use mailrun_app::{config::Config, shutdown};
use mailrun_ledger::runs;
use serde::Serialize;
use uuid::Uuid;

use mailrun_lab::{
    local::{Local, Mailing, Servers},
    visitor::{Progress, Visitor},
};
use mailrun_stack::{self, Nodes};

const POLL: Duration = Duration::from_millis(100);

/// Options of `mailrun demo`.
#[derive(Args, Clone, Copy, Debug)]
pub struct Options {
    /// Number of fictional people to invite
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    recipients: u32,
    /// Print one JSON object with the results on standard output, and nothing else
    #[arg(long)]
    json: bool,
    /// Number of nodes of the private RabbitMQ
    #[arg(long, value_enum, default_value_t)]
    nodes: Nodes,
    #[command(flatten)]
    smtp: smtp::Options,
}

/// The results of a demo.
#[derive(Debug, Serialize)]
struct Results {
    recipients: u32,
    first_pass: FirstPass,
    sent: u64,
    failed: u64,
    unknown: u64,
    /// Counted in the table of users.
    users_emailed: i64,
    retried: u64,
    /// From the POST until everything was sent, including scheduled retries and the replay.
    seconds: f64,
    /// Recipients divided by seconds.
    items_per_second: f64,
    /// From the POST until every invitation had its first try.
    first_try_seconds: f64,
    /// What the mail server observed, if there was one.
    #[serde(flatten)]
    smtp: Option<smtp::Results>,
}

#[derive(Debug, Serialize)]
struct FirstPass {
    sent: u64,
    failed: u64,
}

/// Invites, watches and retries, and compares the outcome with the request. Fails if an invitation is missing.
pub async fn run(config: Config, file: Option<&Path>, options: &Options) -> Result<()> {
    let home = mailrun_stack::home();
    let stop = shutdown::on_signal().context("cannot catch signals")?;
    let work = async {
        if let Some(url) = mailrun_stack::running(&home).and_then(|running| running.web_url) {
            eprintln!("Using the running Mailrun: {url}");
            options.smtp.refuse_a_running_mailrun()?;
            let servers = Servers::start(&config, &home, Nodes::One, |step| eprintln!("{step}…")).await?;
            let result = invite(&config, &servers, &url, options, None).await;
            servers.stop().await?;
            return result;
        }
        let server = options.smtp.start().await?;
        let mailing = server.as_ref().map_or(Mailing::AsConfigured, |server| Mailing::With(server.settings()));
        let local = Local::start(&config, file, &home, options.nodes, mailing, |step| eprintln!("{step}…")).await?;
        let invited = invite(&config, local.servers(), &local.services.web_url, options, server.as_ref());
        let watched = stop.run_until_cancelled(invited).await;
        eprintln!("Stopping…");
        local.stop().await?;
        watched.context("the demo was interrupted")?
    };
    let results = work.await?;
    if options.json {
        println!("{}", serde_json::to_string(&results)?);
    } else {
        println!(
            "{} invited in {:.1} s: first pass {} sent and {} failed, {} retried, {} sent in total.",
            results.recipients,
            results.seconds,
            results.first_pass.sent,
            results.first_pass.failed,
            results.retried,
            results.sent
        );
    }
    if let Some(smtp) = &results.smtp {
        smtp.check(results.recipients)?;
    }
    let all = u64::from(results.recipients);
    if results.sent != all || results.users_emailed != i64::from(results.recipients) {
        bail!("not everyone was emailed: {} of {all}", results.sent);
    }
    Ok(())
}

async fn invite(
    config: &Config,
    servers: &Servers,
    web_url: &str,
    options: &Options,
    server: Option<&smtp::Server>,
) -> Result<Results> {
    let visitor = Visitor::new(config, web_url)?;
    // New people for each demo, because nobody is invited twice.
    let demo = Uuid::new_v4().simple().to_string();
    let domain = format!("{}.example", &demo[..12]);
    let emails: String = (1..=options.recipients).map(|number| format!("guest-{number:06}@{domain}\n")).collect();

    let form = visitor.fill_in_limited(&emails, server.and_then(smtp::Server::rate_set)).await?;
    let started = Instant::now();
    let run = visitor.send(form).await?;
    eprintln!("Submitted in {:.2} s: {run}", started.elapsed().as_secs_f64());

    let mut first_try = None;
    let first = watch(&visitor, &run, |progress| {
        if progress.pending == 0 && first_try.is_none() {
            first_try = Some(started.elapsed());
        }
        progress.over
    })
    .await?;
    eprintln!("First pass: {} sent, {} failed", first.sent, first.failed);
    let rate_got = server.and_then(smtp::Server::rate_got);
    if let Some(server) = server {
        server.recover();
    }
    let last = if first.failed > 0 { retry(&visitor, &run, &first).await? } else { first };
    let seconds = started.elapsed().as_secs_f64();

    let pool = servers.open_ledger(config, "mailrun demo")?;
    let users_emailed = runs::emailed_in_domain(&pool, &domain).await?;
    pool.close().await;
    Ok(Results {
        recipients: options.recipients,
        first_pass: FirstPass { sent: first.sent, failed: first.failed },
        sent: last.sent,
        failed: last.failed,
        unknown: last.unknown,
        users_emailed,
        retried: first.failed,
        seconds,
        items_per_second: f64::from(options.recipients) / seconds,
        first_try_seconds: first_try.unwrap_or_default().as_secs_f64(),
        smtp: server.map(|server| server.results(rate_got)),
    })
}

/// Presses *Retry* and watches the run to its end.
async fn retry(visitor: &Visitor, run: &str, first: &Progress) -> Result<Progress> {
    visitor.retry(run).await?;
    eprintln!("Retrying {} failed invitations", first.failed);
    // The replay has begun when fewer items are failed, or some are open; before that, the run is still over.
    watch(visitor, run, |progress| progress.over && progress.failed < first.failed).await
}

/// Polls like the page, and draws the bar.
async fn watch(visitor: &Visitor, run: &str, mut is_over: impl FnMut(&Progress) -> bool) -> Result<Progress> {
    let bar = ProgressBar::no_length();
    let style = ProgressStyle::with_template("{bar:50.green/dim} {pos}/{len}  {msg}")?.progress_chars("━━─");
    bar.set_style(style);
    loop {
        let progress = visitor.progress(run).await?;
        bar.set_length(progress.total);
        bar.set_position(progress.settled());
        bar.set_message(format!("{} sent, {} retrying, {} failed", progress.sent, progress.retrying, progress.failed));
        if is_over(&progress) {
            bar.abandon();
            return Ok(progress);
        }
        tokio::time::sleep(POLL).await;
    }
}
