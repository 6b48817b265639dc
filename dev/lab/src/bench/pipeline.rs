//! Mailrun itself: the real processes and a run submitted through the real form, timed from the POST until the run's end.

use std::{
    ffi::OsString,
    net::SocketAddr,
    path::Path,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, ensure};
use mailrun_app::config::Config;
use sqlx::PgConnection;
use tokio::time::sleep;
use uuid::Uuid;

use super::{
    Settings,
    cpu::{Cpu, Memory},
    depths::{DepthProbe, Depths},
    people,
    place::Place,
    writes::Writes,
};
use crate::{
    local::{SENDERS, Services, own_program},
    visitor::{Form, Progress, Visitor},
};

/// As often as the page polls, or slightly more often.
pub(super) const POLL: Duration = Duration::from_millis(100);

/// Repeated, a text of two kilobytes with the recipient's name in it.
const LONG_TEXT: &str = "Dear {{ name | default(\"friend\") }}, join us on Saturday. We have cake.\n";
const LONG_TEXT_TIMES: usize = 28;

/// The set-up of Mailrun for a measurement.
#[derive(Clone, Copy, Debug)]
pub(super) struct Setup {
    /// Sending processes.
    pub(super) senders: usize,
    /// The simulated relay's latency per mail.
    pub(super) latency: Duration,
    /// A real relay instead of the simulated one.
    pub(super) relay: Option<Relay>,
}

/// A relay on this machine.
#[derive(Clone, Copy, Debug)]
pub(super) struct Relay {
    pub(super) address: SocketAddr,
    /// Connections of all senders together.
    pub(super) connections: usize,
}

impl Default for Setup {
    /// As `mailrun up` starts it, with a relay that replies immediately.
    fn default() -> Self {
        Self { senders: SENDERS, latency: Duration::ZERO, relay: None }
    }
}

impl Setup {
    /// Items per second that the permits of all senders allow.
    pub(super) fn bound(&self, config: &Config) -> f64 {
        (self.senders * config.send.permits) as f64 / self.latency.as_secs_f64()
    }
}

/// The measurement.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piped {
    pub(super) items: usize,
    /// From the POST to its response.
    pub(super) submit: Duration,
    /// From the POST to the run's end according to the ledger.
    pub(super) all: Duration,
    pub(super) cpu: Cpu,
    pub(super) writes: Writes,
    pub(super) memory: Memory,
    pub(super) deepest: Depths,
}

impl Piped {
    /// From the POST to the end.
    pub(super) fn items_per_second(&self) -> f64 {
        self.items as f64 / self.all.as_secs_f64()
    }

    /// From the response to the POST until the end.
    pub(super) fn drain_items_per_second(&self) -> f64 {
        self.items as f64 / self.all.saturating_sub(self.submit).as_secs_f64()
    }
}

/// Sends one run of `items` invitations through Mailrun with this set-up. Fails if anything does not start, or not everybody was
/// emailed.
pub(super) async fn measure(place: &Place<'_>, settings: &Settings<'_>, items: usize, setup: Setup) -> Result<Piped> {
    let mut conn = place.database().await?;
    let mailrun = Mailrun::start(place, settings, setup).await?;
    place.quiet(&mut conn).await?;
    let mut probe = DepthProbe::connect(place).await?;
    let text = setup.relay.map(|_| LONG_TEXT.repeat(LONG_TEXT_TIMES));
    let measured = probe.during(send(place, &mailrun, &mut conn, items, text.as_deref())).await;
    let memory = Memory::now(&mailrun.services);
    mailrun.services.stop().await;
    let (submit, all, cpu, before, wal_bytes) = measured?;
    // The services' sessions have ended, and have therefore reported their transactions.
    let writes = Writes { wal_bytes, ..Writes::now(&mut conn).await? - before };
    Ok(Piped { items, submit, all, cpu, writes, memory, deepest: probe.deepest })
}

async fn send(
    place: &Place<'_>,
    mailrun: &Mailrun,
    conn: &mut PgConnection,
    items: usize,
    text: Option<&str>,
) -> Result<(Duration, Duration, Cpu, Writes, i64)> {
    let emails = people("guest", items);
    let form = match text {
        Some(text) => mailrun.visitor.fill_in_text(&emails, "You are invited", text).await?,
        None => mailrun.visitor.fill_in(&emails).await?,
    };
    let before = Writes::now(conn).await?;
    let cpu = Cpu::now(place.stack, Some(&mailrun.services))?;
    let run = mailrun.submit(form).await?;
    let end = mailrun.until_over(&run, POLL).await?;
    let cpu = Cpu::now(place.stack, Some(&mailrun.services))? - cpu;
    let wal_bytes = (Writes::now(conn).await? - before).wal_bytes;
    ensure!(end.sent == items as u64, "{} of {items} invitations were sent: {}", end.sent, run.url);
    Ok((run.answered, run.finished_after(conn).await?, cpu, before, wal_bytes))
}

/// A running Mailrun.
pub(super) struct Mailrun {
    pub(super) services: Services,
    pub(super) visitor: Visitor,
}

/// An accepted run.
pub(super) struct Run {
    pub(super) url: String,
    id: Uuid,
    /// Seconds since 1970, by this machine's clock, which is the ledger's.
    posted_at: f64,
    /// From the POST to its response.
    pub(super) answered: Duration,
}

impl Mailrun {
    /// Starts Mailrun with a relay that refuses nothing.
    pub(super) async fn start(place: &Place<'_>, settings: &Settings<'_>, setup: Setup) -> Result<Self> {
        let mut environment = place.environment();
        environment.extend(settings.file.map(|file| ("MAILRUN_CONFIG".into(), file.into())));
        environment.extend(match setup.relay {
            Some(relay) => smtp(relay, setup.senders),
            None => mailer(setup.latency),
        });
        let services = Services::start(
            own_program()?,
            settings.config,
            environment,
            setup.senders,
            None,
            log(settings.home),
            |_| {},
        )
        .await?;
        let visitor = Visitor::new(settings.config, &services.web_url)?;
        Ok(Self { services, visitor })
    }

    /// Submits the form.
    pub(super) async fn submit(&self, form: Form) -> Result<Run> {
        let posted_at = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64();
        let started = Instant::now();
        let url = self.visitor.send(form).await?;
        let answered = started.elapsed();
        let id =
            url.rsplit('/').next().and_then(|id| id.parse().ok()).with_context(|| format!("{url} is not a run"))?;
        Ok(Run { url, id, posted_at, answered })
    }

    /// Gets the progress once.
    pub(super) async fn progress(&self, run: &Run) -> Result<Progress> {
        self.visitor.progress(&run.url).await
    }

    /// Polls until the run is over.
    pub(super) async fn until_over(&self, run: &Run, poll: Duration) -> Result<Progress> {
        loop {
            let progress = self.progress(run).await?;
            if progress.over {
                return Ok(progress);
            }
            sleep(poll).await;
        }
    }
}

impl Run {
    /// From the POST to the end of a finished run, according to the ledger.
    pub(super) async fn finished_after(&self, conn: &mut PgConnection) -> Result<Duration> {
        let finished_at: f64 = sqlx::query_scalar(
            "SELECT extract(epoch FROM finished_at)::double precision FROM run_progress WHERE run_id = $1",
        )
        .bind(self.id)
        .fetch_one(conn)
        .await?;
        Duration::try_from_secs_f64(finished_at - self.posted_at).context("the clock was set backwards")
    }
}

/// The settings of a mailer that never fails.
fn mailer(latency: Duration) -> Vec<(OsString, OsString)> {
    [("DOWN_EVERY", 0), ("FLAKY_EVERY", 0), ("LATENCY_MS", latency.as_millis())]
        .map(|(key, value)| (format!("MAILRUN_MAILER__SIMULATED__{key}").into(), value.to_string().into()))
        .into()
}

/// The settings of a mailer that hands mail to this relay and keeps its connections.
fn smtp(relay: Relay, senders: usize) -> Vec<(OsString, OsString)> {
    let set = |name: &str, value: String| (format!("MAILRUN_MAILER__{name}").into(), value.into());
    vec![
        set("KIND", "smtp".into()),
        set("SMTP__RELAYS", format!("smtp://{}?tls=none", relay.address)),
        set("SMTP__CONNECTIONS", relay.connections.div_ceil(senders).to_string()),
        set("SMTP__MESSAGES_PER_CONNECTION", "1000000".into()),
    ]
}

fn log(home: &Path) -> std::path::PathBuf {
    home.join("logs").join("bench.log")
}
