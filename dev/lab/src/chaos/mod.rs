//! `mailrun chaos`: injects faults while a run is in progress, and checks the outcome of every recipient.
//!
//! Each fault has its own run on its own private stack: the real processes, a real SMTP session for each mail, and a list submitted
//! through the real form. Random choices are drawn from a seed (`plan.rs`), each fault undoes itself (`fault/`), and the outcome is
//! compared with what the mail server received (`check.rs`).

mod check;
mod fault;
mod plan;
mod report;
mod revision;
mod signal;
mod site;
mod smtp_faults;
mod upgrade;
mod watch;

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use futures::future::join_all;
use mailrun_app::{
    config::{Config, FanOutConfig},
    shutdown,
};
use mailrun_core::pacing::Rate;
use rand::{SeedableRng as _, rngs::StdRng};
use tokio::{
    sync::watch::{Receiver, channel},
    time::{Instant, sleep, timeout},
};
use uuid::Uuid;

use self::{
    check::{Remains, check, remains},
    plan::{Choice, Moment, Plan, Strike},
    report::{Counts, Report},
    revision::Revision,
    site::Site,
    watch::{Stage, follow},
};
use crate::{
    local::own_program,
    people::people,
    visitor::{Form, NotAccepted},
};
use mailrun_stack::{self, Nodes, Stack};

/// A run that is not over after this time, plus some for each recipient, is stuck.
const RUN_TIMEOUT: Duration = Duration::from_secs(180);
const TIMEOUT_PER_RECIPIENT: Duration = Duration::from_millis(10);
/// How long the form is submitted repeatedly.
const FORM: Duration = Duration::from_secs(120);
/// Between two visits of the pages.
const VISIT_EVERY: Duration = Duration::from_secs(1);
/// Time limit of one submission.
const FORM_TRY: Duration = Duration::from_secs(30);

/// Options of `mailrun chaos`.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Number of fictional people in each run
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(100..=1_000_000))]
    recipients: u32,
    /// Faults to inject, separated by commas
    #[arg(long, value_enum, value_delimiter = ',', default_value = "all")]
    fault: Vec<Choice>,
    /// For the fault `upgrade`, the revision to upgrade from: a commit, a branch or a tag of this checkout
    #[arg(long)]
    from: Option<String>,
    /// Seed of all random choices; by default, a new one each time
    #[arg(long)]
    seed: Option<u64>,
    /// Set send.on_unknown to resend: people then receive two mails, which the check must detect
    #[arg(long)]
    resend: bool,
    /// How many runs take place at the same time; those with faults of the servers, which they share, are always alone
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=20))]
    at_once: u8,
    /// Print one JSON object with the results on standard output, and nothing else
    #[arg(long)]
    json: bool,
}

/// The settings of all runs.
struct Setting<'a> {
    config: &'a Config,
    file: Option<&'a Path>,
    logs: PathBuf,
    recipients: u32,
    resend: bool,
    /// The program that an upgrade starts from.
    revision: Option<Revision>,
}

/// Injects faults, checks, and prints the results. Fails if something does not start, or a guarantee was broken.
pub async fn run(config: Config, file: Option<&Path>, options: &Options) -> Result<()> {
    let stop = shutdown::on_signal().context("cannot catch signals")?;
    let program = own_program()?;
    let revision = match &options.from {
        Some(name) if options.fault.iter().any(|choice| matches!(choice, Choice::Upgrade | Choice::All)) => {
            let built = stop.run_until_cancelled(Revision::build(name, &mailrun_stack::home_of_checkout())).await;
            Some(built.context("the fault bench was interrupted")??)
        }
        Some(_) => bail!("--from requires --fault upgrade"),
        None if options.fault.contains(&Choice::Upgrade) => {
            bail!("the fault upgrade requires --from with the revision to upgrade from")
        }
        None => None,
    };
    let seed = options.seed.unwrap_or_else(|| u64::from(rand::random::<u32>()));
    // Not the checkout's stack: its servers must not be killed.
    let home = std::env::temp_dir().join(format!("mailrun-chaos-{}", Uuid::new_v4().simple()));
    let Options { recipients, resend, .. } = *options;
    let order = revision.as_ref().map(|revision| revision.order);
    let setting = Setting { config: &config, file, logs: home.join("logs"), recipients, resend, revision };
    let mut plans: Vec<Plan> = Vec::new();
    for plan in options.fault.iter().flat_map(|choice| choice.plans(order)) {
        if !plans.contains(&plan) {
            plans.push(plan);
        }
    }
    let (on_three, on_one): (Vec<Plan>, Vec<Plan>) = plans.into_iter().partition(|plan| plan.needs_cluster());
    let mut report = Report::new(seed);
    for (nodes, plans) in [(Nodes::One, on_one), (Nodes::Three, on_three)] {
        if plans.is_empty() {
            continue;
        }
        let tell = |step: &str| eprintln!("{step}…");
        let stack = match Stack::start_nodes(&home, &program, Duration::ZERO, nodes, tell).await {
            Ok(stack) => stack,
            Err(error) => {
                eprintln!("The logs are in {}", setting.logs.display());
                clear(&home, Some(&setting.logs));
                return Err(error.into());
            }
        };
        let checked = stop.run_until_cancelled(Box::pin(async {
            for plans in together(plans, options.at_once.into()) {
                all(&stack, &setting, plans, seed, &mut report).await;
            }
        }));
        let checked = checked.await;
        stack.stop().await?;
        checked.context("the fault bench was interrupted")?;
    }
    let good = !report.is_bad();
    if !good {
        eprintln!("The logs are in {}", setting.logs.display());
    }
    clear(&home, (!good).then_some(&setting.logs));
    if options.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{report}");
    }
    if !good {
        bail!("a guarantee was broken; repeat with --seed {seed}");
    }
    Ok(())
}

/// Removes the stack's folder, except what must be kept. Leftovers are harmless.
fn clear(home: &Path, keep: Option<&PathBuf>) {
    if keep.is_none() {
        let _ = std::fs::remove_dir_all(home);
        return;
    }
    for entry in std::fs::read_dir(home).into_iter().flatten().flatten() {
        let path = entry.path();
        if Some(&path) == keep {
            continue;
        }
        let _ = if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
    }
}

/// The plans in groups that run at the same time, of at most this many.
fn together(plans: Vec<Plan>, at_once: usize) -> Vec<Vec<Plan>> {
    let (alone, others): (Vec<Plan>, Vec<Plan>) = plans.into_iter().partition(|plan| plan.is_alone());
    others.chunks(at_once).map(<[Plan]>::to_vec).chain(alone.into_iter().map(|plan| vec![plan])).collect()
}

/// Runs these plans at the same time.
async fn all(stack: &Stack, setting: &Setting<'_>, plans: Vec<Plan>, seed: u64, report: &mut Report) {
    let runs = plans.into_iter().map(|plan| async move {
        eprintln!("{}: inviting {} people", plan.name(), setting.recipients);
        (plan.name(), Box::pin(one(stack, setting, plan, seed)).await)
    });
    for (name, counts) in join_all(runs).await {
        let counts = match counts {
            Ok(counts) => counts,
            Err(error) => {
                // The other runs are still checked.
                let why = format!("{error:#}");
                eprintln!("{name}: not checked, counts as stuck: {why}");
                report.add_unchecked(name, setting.recipients, why);
                continue;
            }
        };
        eprintln!(
            "{name}: {} faults; {} sent, {} failed, {} unknown; lost {}, doubled {}, untold {}, drift {}, suppressed without evidence {}, sent while paused {}, over the rate limit {}, left {}, stuck {}, died {}; republished {}, buried {}, rebuilt {}; longest stall {:.1} s, without a fault {:.1} s",
            counts.faults,
            counts.sent,
            counts.failed,
            counts.unknown,
            counts.lost,
            counts.doubled,
            counts.untold,
            counts.drift,
            counts.suppressed_without_evidence,
            counts.sent_while_paused,
            counts.over_rate,
            counts.left,
            counts.stuck,
            counts.died,
            counts.put_back,
            counts.buried,
            counts.rebuilds,
            counts.longest_stall_seconds,
            counts.longest_recovery_seconds
        );
        report.add(name, counts);
    }
}

/// The faults so far, each with its beginning and end.
#[derive(Default)]
struct Injected {
    times: Mutex<Vec<(Instant, Instant)>>,
    /// Required changes that failed.
    missing: AtomicU64,
}

impl Injected {
    fn add(&self, begun: Instant) {
        self.all().push((begun, Instant::now()));
    }

    fn all(&self) -> MutexGuard<'_, Vec<(Instant, Instant)>> {
        self.times.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One run with one plan.
async fn one(stack: &Stack, setting: &Setting<'_>, plan: Plan, seed: u64) -> Result<Counts> {
    let site = Box::pin(Site::create(stack, setting, plan.purpose())).await?;
    let injected = Injected::default();
    let (stage, stages) = channel(Stage::default());
    let posted_at = Instant::now();
    let strikes = plan.strikes(seed);
    let strikes = async {
        let strikes = strikes.into_iter().map(|strike| carry_out(&site, strike, posted_at, stages.clone(), &injected));
        if plan.is_in_turn() {
            for strike in strikes {
                Box::pin(strike).await;
            }
        } else {
            join_all(strikes).await;
        }
    };
    let followed = async {
        let observed = async {
            let (run_id, form) = submit(&site, setting.recipients).await?;
            let limit = RUN_TIMEOUT + TIMEOUT_PER_RECIPIENT * setting.recipients;
            let followed = follow(&site.pool, run_id, limit, &stage);
            if !plan.upgrades() {
                return anyhow::Ok((run_id, followed.await, 0));
            }
            tokio::pin!(followed);
            let (observed, wrong) = visit(&site, run_id, &form, followed).await;
            Ok((run_id, observed, wrong))
        };
        let observed = observed.await;
        // Faults still waiting for their moment are too late.
        stage.send_modify(|stage| stage.over = true);
        observed
    };
    let (_, followed) = Box::pin(futures::future::join(strikes, followed)).await;
    let (run_id, observed, wrong) = followed?;
    let mut stuck = u64::from(observed.over_at.is_none()) + wrong;
    let remains = remains(&site, run_id).await.unwrap_or_else(|error| {
        eprintln!("  reading the queues failed: {error:#}");
        stuck += 1;
        Remains::default()
    });
    let (smtp_faults, limit) = (Arc::clone(&site.smtp_faults), site.limit);
    let died = if plan.lets_processes_live() { site.deaths().into() } else { 0 };
    let (site, in_good_order) = site.stop().await;
    let checked = check(&site.pool, &site.sink, run_id, setting.recipients, &smtp_faults.erased()).await?;
    site.drop().await?;
    let kept = limit.zip(smtp_faults.meter.get()).map(|(limit, meter)| meter.check(allowed(limit))).unwrap_or_default();
    if limit.is_some() {
        eprintln!("  {kept:?}");
    }
    stuck += injected.missing.load(Ordering::Relaxed);
    let injected = injected.all();
    let over_at = observed.over_at.unwrap_or_else(Instant::now);
    // A fault of the whole run has no end to recover from.
    let passed: Vec<_> = injected.iter().filter(|(_, end)| *end < over_at).copied().collect();
    let last = passed.iter().map(|(_, end)| *end).max();
    let (after, bound) = (observed.longest_stall_outside(&passed), plan.bound());
    Ok(Counts {
        recipients: setting.recipients.into(),
        faults: injected.len() as u64,
        lost: checked.deliveries.lost,
        doubled: checked.deliveries.doubled,
        sent: checked.deliveries.sent,
        failed: checked.deliveries.failed,
        unknown: checked.deliveries.unknown,
        untold: checked.deliveries.untold,
        drift: checked.drift,
        suppressed_without_evidence: checked.suppressed_without_evidence,
        sent_while_paused: smtp_faults.offered_while_paused(),
        over_rate: kept.over as u64,
        discarded_windows: kept.discarded as u64,
        left: remains.messages,
        outdated_dead_letters: remains.outdated_dead_letters,
        put_back: checked.repairs.put_back,
        buried: checked.repairs.buried,
        rebuilds: checked.repairs.rebuilds,
        stuck: stuck + remains.busy_workers + u64::from(!in_good_order),
        died,
        seconds: (over_at - posted_at).as_secs_f64(),
        late: u64::from(after > bound),
        longest_stall_seconds: observed.longest_stall().as_secs_f64(),
        longest_recovery_seconds: after.as_secs_f64(),
        recovery_bound_seconds: bound.as_secs_f64(),
        recovery_seconds: last.map_or(0.0, |last| over_at.saturating_duration_since(last).as_secs_f64()),
    })
}

/// The maximum in any second under a limit: a tenth more to catch up after a delay, what may be late by `fan_out.rate_burst_ms`, and
/// one at either end.
fn allowed(limit: u32) -> usize {
    let burst = Rate::new(i32::try_from(limit).unwrap_or(i32::MAX)).within(FanOutConfig::default().rate_burst);
    limit as usize + limit.div_ceil(10) as usize + usize::try_from(burst).unwrap_or_default() + 2
}

/// Uses the pages, of either program, until the run has been `followed` to its end: reads them, and submits the same form again, which
/// must not create another run. Returns the number of wrong responses; a missing response is not wrong, because the web server is replaced.
async fn visit<T>(
    site: &Site<'_>,
    run_id: Uuid,
    form: &Form,
    mut followed: impl Future<Output = T> + Unpin,
) -> (T, u64) {
    let pages = ["/", "/runs", &format!("/runs/{run_id}"), &format!("/runs/{run_id}/progress"), "/suppressions"];
    let mut wrong = 0;
    let mut tell = |what: &str, answer: String| {
        eprintln!("  {what} returned {answer}");
        wrong += 1;
    };
    loop {
        let looked = async {
            for page in pages {
                if let Ok(status) = site.visitor.status(page).await
                    && !status.is_success()
                {
                    tell(page, status.to_string());
                }
            }
            match timeout(FORM_TRY, async { site.visitor.send(form.again()?).await }).await {
                Ok(Ok(url)) if !url.contains(&run_id.to_string()) => tell("the form", url),
                Ok(Err(error)) if error.is::<NotAccepted>() => tell("the form", error.to_string()),
                _ => {}
            }
            sleep(VISIT_EVERY).await;
        };
        tokio::select! {
            done = &mut followed => return (done, wrong),
            () = looked => {}
        }
    }
}

/// Submits the same form until it is accepted, so that it creates one run however often it arrives.
async fn submit(site: &Site<'_>, recipients: u32) -> Result<(Uuid, Form)> {
    let emails = people("guest", usize::try_from(recipients)?);
    let end = Instant::now() + FORM;
    let mut form = None;
    loop {
        let answer = timeout(FORM_TRY, async {
            let form = match &form {
                Some(form) => form,
                None => form.insert(site.visitor.fill_in(&emails).await?),
            };
            site.visitor.send(form.again()?).await
        });
        match answer.await.context("no response").flatten() {
            Ok(url) => {
                let id = url.rsplit('/').next().and_then(|id| id.parse().ok());
                let id = id.with_context(|| format!("{url} is not a run"))?;
                return Ok((id, form.context("the form was not filled in")?));
            }
            Err(error) if Instant::now() > end => return Err(error),
            Err(error) => {
                eprintln!("  submitting again: {error:#}");
                sleep(Duration::from_millis(200)).await;
            }
        }
    }
}

/// Waits for a fault's moment and injects it, unless the run is over.
async fn carry_out(
    site: &Site<'_>,
    strike: Strike,
    posted_at: Instant,
    mut stages: Receiver<Stage>,
    injected: &Injected,
) {
    match strike.moment {
        Moment::AfterPost(delay) => tokio::time::sleep_until(posted_at + delay).await,
        Moment::Settled(share) => {
            // The sender lives as long as the run is followed.
            let reached = stages.wait_for(|stage| stage.over || stage.settled >= share).await;
            if reached.map_or(true, |stage| stage.over) {
                return;
            }
        }
    }
    let (name, begun) = (strike.what.name(), Instant::now());
    eprintln!("  {name} at {:.1} s", posted_at.elapsed().as_secs_f64());
    let mut rng = StdRng::seed_from_u64(strike.seed);
    let injecting = strike.what.strike(site, &mut rng, &stages);
    let done = if strike.what.is_whole() {
        let mut until = stages.clone();
        tokio::select! {
            done = injecting => done,
            _ = until.wait_for(|stage| stage.over) => Ok(()),
        }
    } else {
        injecting.await
    };
    match done {
        Ok(()) => injected.add(begun),
        Err(error) => {
            eprintln!("  {name} failed: {error:#}");
            injected.missing.fetch_add(u64::from(strike.what.must_happen()), Ordering::Relaxed);
        }
    }
}
