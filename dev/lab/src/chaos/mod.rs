//! `mailrun chaos`: breaks things while a run is under way, and judges what became of every recipient.
//!
//! Each fault has a run of its own, on a private stack of its own: the real processes, a real SMTP conversation for each
//! mail, and a list that is submitted through the real form. What is drawn is drawn from a seed (`plan.rs`), a fault is
//! undone by nobody but itself (`fault.rs`), and the end is judged against what the mail server saw (`judge.rs`).

mod fault;
mod judge;
mod plan;
pub mod proxy;
mod report;
mod revision;
mod site;
mod upgrade;
mod watch;
mod weather;

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
    judge::{Remains, judge, remains},
    plan::{Choice, Moment, Plan, Strike},
    report::{Figures, Report},
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

/// A run that is not over after this time, and a little more for each recipient, is stuck.
const PATIENCE: Duration = Duration::from_secs(180);
const PATIENCE_EACH: Duration = Duration::from_millis(10);
/// The form is sent again for so long.
const FORM: Duration = Duration::from_secs(120);
/// The pause between two visits of the pages.
const VISIT_EVERY: Duration = Duration::from_secs(1);
/// One try may take so long.
const FORM_TRY: Duration = Duration::from_secs(30);

/// What `chaos` can be asked for.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// How many fictional people each run invites.
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(100..=1_000_000))]
    recipients: u32,
    /// What shall go wrong; several with commas between them.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "all")]
    fault: Vec<Choice>,
    /// The revision whose installation the fault `upgrade` begins with: a commit, a branch or a tag of this checkout.
    #[arg(long)]
    from: Option<String>,
    /// Draws the moments and all that is left to chance; without it, another one each time.
    #[arg(long)]
    seed: Option<u64>,
    /// Send again what is unknown: then people get two mails, and the judgement must find that.
    #[arg(long)]
    resend: bool,
    /// Print one JSON object with the figures on standard output, and nothing else.
    #[arg(long)]
    json: bool,
}

/// What all runs are made with.
struct Setting<'a> {
    config: &'a Config,
    file: Option<&'a Path>,
    logs: PathBuf,
    recipients: u32,
    resend: bool,
    /// What an upgrade begins with.
    revision: Option<Revision>,
}

/// Breaks, judges, and prints the figures.
///
/// # Errors
/// When something does not start, or a promise was broken.
pub async fn run(config: Config, file: Option<&Path>, options: &Options) -> Result<()> {
    let stop = shutdown::on_signal().context("the signals can't be caught")?;
    let program = own_program()?;
    let revision = match &options.from {
        Some(name) if options.fault.iter().any(|choice| matches!(choice, Choice::Upgrade | Choice::All)) => {
            let built = stop.run_until_cancelled(Revision::build(name, &mailrun_stack::home_of_checkout())).await;
            Some(built.context("the fault bench was stopped before its end")??)
        }
        Some(_) => bail!("--from is for the fault upgrade: add --fault upgrade"),
        None if options.fault.contains(&Choice::Upgrade) => {
            bail!("the fault upgrade takes --from with the revision to upgrade from")
        }
        None => None,
    };
    let seed = options.seed.unwrap_or_else(|| u64::from(rand::random::<u32>()));
    // Not the stack of the checkout: its servers are not to be killed.
    let home = std::env::temp_dir().join(format!("mailrun-chaos-{}", Uuid::new_v4().simple()));
    let Options { recipients, resend, .. } = *options;
    let order = revision.as_ref().map(|revision| revision.order);
    let setting = Setting { config: &config, file, logs: home.join("logs"), recipients, resend, revision };
    let plans = options.fault.iter().flat_map(|choice| choice.plans(order));
    let (on_three, on_one): (Vec<Plan>, Vec<Plan>) = plans.partition(|plan| plan.needs_cluster());
    let mut report = Report::new(seed);
    for (nodes, plans) in [(Nodes::One, on_one), (Nodes::Three, on_three)] {
        if plans.is_empty() {
            continue;
        }
        let tell = |step: &str| eprintln!("{step} …");
        let stack = match Stack::start_nodes(&home, &program, Duration::ZERO, nodes, tell).await {
            Ok(stack) => stack,
            Err(error) => {
                eprintln!("The logs are in {}", setting.logs.display());
                clear(&home, Some(&setting.logs));
                return Err(error.into());
            }
        };
        let judged = stop.run_until_cancelled(Box::pin(all(&stack, &setting, plans, seed, &mut report))).await;
        stack.stop().await?;
        judged.context("the fault bench was stopped before its end")?;
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
        bail!("a promise was broken; --seed {seed} repeats what was done");
    }
    Ok(())
}

/// Removes the stack's folder, but for what is to be kept. What stays after all does no harm.
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

async fn all(stack: &Stack, setting: &Setting<'_>, plans: Vec<Plan>, seed: u64, report: &mut Report) {
    for plan in plans {
        let name = plan.name();
        eprintln!("{name}: inviting {} people", setting.recipients);
        let figures = match one(stack, setting, plan, seed).await {
            Ok(figures) => figures,
            Err(error) => {
                // The others are judged all the same.
                let why = format!("{error:#}");
                eprintln!("{name}: no judgement, which counts as stuck: {why}");
                report.add_without_judgement(name, setting.recipients, why);
                continue;
            }
        };
        eprintln!(
            "{name}: {} faults; {} sent, {} failed, {} unknown; lost {}, doubled {}, untold {}, drift {}, suppressed without evidence {}, while paused {}, over the rate {}, left {}, stuck {}, died {}; put back {}, buried {}, rebuilt {}; stood still for {:.1} s, and for {:.1} s with nothing wrong",
            figures.faults,
            figures.sent,
            figures.failed,
            figures.unknown,
            figures.lost,
            figures.doubled,
            figures.untold,
            figures.drift,
            figures.suppressed_without_evidence,
            figures.sent_while_paused,
            figures.over_rate,
            figures.left,
            figures.stuck,
            figures.died,
            figures.put_back,
            figures.buried,
            figures.rebuilds,
            figures.longest_stall_seconds,
            figures.longest_recovery_seconds
        );
        report.add(name, figures);
    }
}

/// What has struck: of each fault its beginning and its end.
#[derive(Default)]
struct Struck {
    times: Mutex<Vec<(Instant, Instant)>>,
    /// What had to happen, and could not be done.
    missing: AtomicU64,
}

impl Struck {
    fn add(&self, begun: Instant) {
        self.all().push((begun, Instant::now()));
    }

    fn all(&self) -> MutexGuard<'_, Vec<(Instant, Instant)>> {
        self.times.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One run under one plan.
async fn one(stack: &Stack, setting: &Setting<'_>, plan: Plan, seed: u64) -> Result<Figures> {
    let site = Box::pin(Site::create(stack, setting, plan)).await?;
    let struck = Struck::default();
    let (stage, stages) = channel(Stage::default());
    let posted_at = Instant::now();
    let strikes = plan.strikes(seed);
    let strikes = async {
        let strikes = strikes.into_iter().map(|strike| carry_out(&site, strike, posted_at, stages.clone(), &struck));
        if plan.is_in_turn() {
            for strike in strikes {
                Box::pin(strike).await;
            }
        } else {
            join_all(strikes).await;
        }
    };
    let followed = async {
        let seen = async {
            let (run_id, form) = submit(&site, setting.recipients).await?;
            let limit = PATIENCE + PATIENCE_EACH * setting.recipients;
            let followed = follow(&site.pool, run_id, limit, &stage);
            if !plan.upgrades() {
                return anyhow::Ok((run_id, followed.await, 0));
            }
            tokio::pin!(followed);
            let (seen, wrong) = visit(&site, run_id, &form, followed).await;
            Ok((run_id, seen, wrong))
        };
        let seen = seen.await;
        // Whoever still waits for his moment has missed it.
        stage.send_modify(|stage| stage.over = true);
        seen
    };
    let (_, followed) = Box::pin(futures::future::join(strikes, followed)).await;
    let (run_id, seen, wrong) = followed?;
    let mut stuck = u64::from(seen.over_at.is_none()) + wrong;
    let remains = remains(&site, run_id).await.unwrap_or_else(|error| {
        eprintln!("  the queues can't be looked at: {error:#}");
        stuck += 1;
        Remains::default()
    });
    let (weather, limit) = (Arc::clone(&site.weather), site.limit);
    let died = if plan.lets_processes_live() { site.deaths().into() } else { 0 };
    let (site, in_good_order) = site.stop().await;
    let verdict = judge(&site.pool, &site.sink, run_id, setting.recipients, &weather.erased()).await?;
    site.drop().await?;
    let kept = limit.zip(weather.meter.get()).map(|(limit, meter)| meter.judge(allowed(limit))).unwrap_or_default();
    if limit.is_some() {
        eprintln!("  {kept:?}");
    }
    stuck += struck.missing.load(Ordering::Relaxed);
    let struck = struck.all();
    let over_at = seen.over_at.unwrap_or_else(Instant::now);
    // What was there to the end has no end to recover from.
    let passed: Vec<_> = struck.iter().filter(|(_, end)| *end < over_at).copied().collect();
    let last = passed.iter().map(|(_, end)| *end).max();
    let (after, bound) = (seen.longest_stall_outside(&passed), plan.bound());
    Ok(Figures {
        recipients: setting.recipients.into(),
        faults: struck.len() as u64,
        lost: verdict.account.lost,
        doubled: verdict.account.doubled,
        sent: verdict.account.sent,
        failed: verdict.account.failed,
        unknown: verdict.account.unknown,
        untold: verdict.account.untold,
        drift: verdict.drift,
        suppressed_without_evidence: verdict.suppressed_without_evidence,
        sent_while_paused: weather.offered_while_paused(),
        over_rate: kept.over as u64,
        discarded_windows: kept.discarded as u64,
        left: remains.messages,
        outdated_dead_letters: remains.outdated_dead_letters,
        put_back: verdict.repairs.put_back,
        buried: verdict.repairs.buried,
        rebuilds: verdict.repairs.rebuilds,
        stuck: stuck + remains.busy_workers + u64::from(!in_good_order),
        died,
        seconds: (over_at - posted_at).as_secs_f64(),
        late: u64::from(after > bound),
        longest_stall_seconds: seen.longest_stall().as_secs_f64(),
        longest_recovery_seconds: after.as_secs_f64(),
        recovery_bound_seconds: bound.as_secs_f64(),
        recovery_seconds: last.map_or(0.0, |last| over_at.saturating_duration_since(last).as_secs_f64()),
    })
}

/// What a limit allows in any second: a tenth more while a hiccup is made up for, what may be late by `fan_out.rate_burst_ms`, and one
/// at either end.
fn allowed(limit: u32) -> usize {
    let burst = Rate::new(i32::try_from(limit).unwrap_or(i32::MAX)).within(FanOutConfig::default().rate_burst);
    limit as usize + limit.div_ceil(10) as usize + usize::try_from(burst).unwrap_or_default() + 2
}

/// Uses the pages, whichever program they are of, until the run has been `followed` to its end: reads them, and sends the same
/// form again, which must make no other run. How many answers were wrong; none is no wrong one, since pages are replaced.
async fn visit<T>(
    site: &Site<'_>,
    run_id: Uuid,
    form: &Form,
    mut followed: impl Future<Output = T> + Unpin,
) -> (T, u64) {
    let pages = ["/", "/runs", &format!("/runs/{run_id}"), &format!("/runs/{run_id}/progress"), "/suppressions"];
    let mut wrong = 0;
    let mut tell = |what: &str, answer: String| {
        eprintln!("  {what} answers {answer}");
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

/// Sends the form until it is accepted: always the same one, so that it makes one run however often it arrives.
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
        match answer.await.context("no answer").flatten() {
            Ok(url) => {
                let id = url.rsplit('/').next().and_then(|id| id.parse().ok());
                let id = id.with_context(|| format!("{url} is no run"))?;
                return Ok((id, form.context("no form was filled in")?));
            }
            Err(error) if Instant::now() > end => return Err(error),
            Err(error) => {
                eprintln!("  the form is sent again: {error:#}");
                sleep(Duration::from_millis(200)).await;
            }
        }
    }
}

/// Waits for a strike's moment and lets it happen, unless the run is over by then.
async fn carry_out(site: &Site<'_>, strike: Strike, posted_at: Instant, mut stages: Receiver<Stage>, struck: &Struck) {
    match strike.moment {
        Moment::AfterPost(delay) => tokio::time::sleep_until(posted_at + delay).await,
        Moment::Settled(share) => {
            // The sender lives for as long as the run is followed.
            let reached = stages.wait_for(|stage| stage.over || stage.settled >= share).await;
            if reached.map_or(true, |stage| stage.over) {
                return;
            }
        }
    }
    let (name, begun) = (strike.what.name(), Instant::now());
    eprintln!("  {name} at {:.1} s", posted_at.elapsed().as_secs_f64());
    let mut rng = StdRng::seed_from_u64(strike.seed);
    let struck_by = strike.what.strike(site, &mut rng, &stages);
    let done = if strike.what.is_whole() {
        let mut until = stages.clone();
        tokio::select! {
            done = struck_by => done,
            _ = until.wait_for(|stage| stage.over) => Ok(()),
        }
    } else {
        struck_by.await
    };
    match done {
        Ok(()) => struck.add(begun),
        Err(error) => {
            eprintln!("  {name} did not happen: {error:#}");
            struck.missing.fetch_add(u64::from(strike.what.must_happen()), Ordering::Relaxed);
        }
    }
}
