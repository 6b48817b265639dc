//! The commands of the installed program. None of them installs, starts or kills a server.

use std::{collections::BTreeSet, path::Path, time::Duration};

use anyhow::{Context as _, Result};
use clap::{Args, Subcommand};
use mailrun_app::{
    config::{Config, ConfigError},
    shutdown, telemetry,
};
use mailrun_ledger::{relay_stops::Fault, settle::Found, suppressions::Reason};
use mailrun_worker::Role;
use uuid::Uuid;

use crate::{
    backup, bounce, dead_letters, doctor, erase, ledger::Ledger, prune, relay, restored, setup, suppressions,
    test_send, unknown,
};

/// The commands of the installed program.
#[derive(Subcommand)]
pub enum Command {
    /// Serves the pages.
    Web,
    /// Works.
    Worker {
        /// What this process does: any of fan-out, send and progress.
        #[arg(long, value_delimiter = ',', default_value = "fan-out,send,progress")]
        roles: Vec<Role>,
    },
    /// Brings the database up to date, declares the queues and marks the virtual host, with users who may do all of that.
    Setup {
        /// Mark the virtual host as this installation's even if another one has marked it, which no longer exists.
        #[arg(long)]
        take_over: bool,
    },
    /// Compares ledger, counters, claims, workers and queues, says what is wrong, and repairs it with --fix.
    Doctor(doctor::Options),
    /// Shows what could not be sent, or sends it again.
    DeadLetters {
        /// Shows, without a command.
        #[command(subcommand)]
        command: Option<DeadLetters>,
    },
    /// The addresses that nobody writes to any more.
    Suppressions {
        /// Lists them, without a command.
        #[command(subcommand)]
        command: Option<Suppressions>,
    },
    /// Shows the relays that are stopped because of refusals that nobody could explain, or says whose fault those were.
    Relay {
        /// Shows, without a command.
        #[command(subcommand)]
        command: Option<Relay>,
    },
    /// The people in the ledger.
    People {
        /// What to do.
        #[command(subcommand)]
        command: People,
    },
    /// Invitations whose outcome is unknown.
    Unknown {
        /// What to do.
        #[command(subcommand)]
        command: Unknown,
    },
    /// Hands a bounce on standard input to the pages, for the mail server that receives them. Ends with 75 while they are down.
    Bounce(bounce::Options),
    /// Sends one mail through the configured mailer, with the configured text, and says what became of it.
    TestSend {
        /// Where to.
        address: String,
    },
    /// Deletes runs that were over for long, with their invitations. Who was emailed stays known.
    Prune {
        /// So long; without it, as long as retention.keep_days says.
        #[arg(long)]
        older_than_days: Option<u32>,
    },
    /// Writes the ledger to a file while everything runs.
    Backup(backup::Options),
    /// Declares that the ledger was restored from a backup: settles what may have been sent since, and pauses all runs.
    Restored(restored::Options),
    /// Asks a process for its /readyz, /livez or /healthz; the exit code says whether all is well, and the error what is not.
    Health {
        /// Its address, for instance http://127.0.0.1:8080/readyz.
        url: String,
    },
}

/// What `dead-letters` does.
#[derive(Subcommand)]
pub enum DeadLetters {
    /// Sends them again, as another pass over their runs.
    Replay(Replay),
}

/// What `suppressions` does.
#[derive(Subcommand)]
pub enum Suppressions {
    /// Lists them, newest first.
    List,
    /// Keeps addresses from being written to.
    Add {
        /// The addresses.
        #[arg(required = true)]
        addresses: Vec<String>,
    },
    /// Lets addresses be written to again.
    Remove {
        /// The addresses.
        #[arg(required_unless_present = "reason", conflicts_with = "reason")]
        addresses: Vec<String>,
        /// All that were suppressed for this reason: unsubscribed, complained, bounced or asked.
        #[arg(long, requires = "since")]
        reason: Option<Reason>,
        /// Of these, those since then: 2026-11-28, 2026-11-28T14:30 (UTC), or 90m, 2h or 3d ago.
        #[arg(long, requires = "reason")]
        since: Option<String>,
    },
    /// Shows the runs whose suppressions are held for review.
    Held,
    /// Decides what becomes of the suppressions of a run that are held.
    Review {
        /// The run.
        run: Uuid,
        /// The addresses do not exist: suppress them.
        #[arg(long, required_unless_present = "reject", conflicts_with = "reject")]
        accept: bool,
        /// They do: drop the suppressions.
        #[arg(long)]
        reject: bool,
    },
}

/// What `relay` does.
#[derive(Subcommand)]
pub enum Relay {
    /// Shows the relays that are stopped.
    Show,
    /// The relay refused the sender: goes on, and tries the refused recipients again.
    ItWasUs {
        /// Only this stop; without it, all.
        #[arg(long)]
        number: Option<i64>,
    },
    /// Each recipient was refused for a reason of its own: goes on, and lets those fail.
    ItWasThem {
        /// Only this stop; without it, all.
        #[arg(long)]
        number: Option<i64>,
    },
}

/// What `people` does.
#[derive(Subcommand)]
pub enum People {
    /// Erases somebody: name, address, and every reply and entry in which it stands. A keyed hash stays, so that nothing is sent
    /// there twice, and a suppression holds.
    Erase {
        /// The address.
        address: String,
    },
}

/// What `unknown` does.
#[derive(Subcommand)]
pub enum Unknown {
    /// Settles them, once somebody has found out what became of them.
    Settle(Settle),
}

/// Which unknown invitations are settled, and how.
#[derive(Args)]
#[group(id = "found", required = true)]
pub struct Settle {
    /// They arrived: they count as sent.
    #[arg(long, group = "found")]
    arrived: bool,
    /// They were not sent: they count as failed, and can be retried.
    #[arg(long, group = "found")]
    not_sent: bool,
    /// Only this run's.
    #[arg(long, required_unless_present_any = ["all", "addresses"])]
    run: Option<Uuid>,
    /// Those of every run.
    #[arg(long, conflicts_with_all = ["run", "addresses"])]
    all: bool,
    /// Who found out; the current user by default.
    #[arg(long)]
    by: Option<String>,
    /// Only those to these addresses.
    addresses: Vec<String>,
}

/// Which dead letters are replayed.
#[derive(Args)]
pub struct Replay {
    /// Only this run's.
    #[arg(long, required_unless_present = "all")]
    run: Option<Uuid>,
    /// Those of every run.
    #[arg(long, conflicts_with = "run")]
    all: bool,
    /// Only those that ended with this error.
    #[arg(long)]
    error: Option<String>,
    /// Those of which nobody knows whether they went out; their recipients may get a second one.
    #[arg(long)]
    unknown: bool,
    /// Also those of runs that were restored from a backup; their recipients may get a second one.
    #[arg(long)]
    restored: bool,
}

impl Command {
    /// Whether it works on the ledger of an installation, so that the servers have to be configured.
    #[must_use]
    pub fn is_for_operators(&self) -> bool {
        !matches!(
            self,
            Self::Web
                | Self::Worker { .. }
                | Self::Setup { .. }
                | Self::Bounce(_)
                | Self::TestSend { .. }
                | Self::Health { .. }
        )
    }

    /// Carries it out, with the settings of `file`.
    ///
    /// # Errors
    /// In words for an operator.
    pub async fn run(self, file: Option<&Path>) -> Result<()> {
        self.run_with(Config::load(file)).await
    }

    /// The same with settings that were read before, or could not be: not every command needs them.
    ///
    /// # Errors
    /// In words for an operator.
    pub async fn run_with(self, config: Result<Config, ConfigError>) -> Result<()> {
        match self {
            // Its exit codes are those that mail servers understand.
            Self::Bounce(options) => std::process::exit(bounce::run(config, &options).await),
            Self::Health { url } => health(&url).await,
            command => command.run_as_configured(config?).await,
        }
    }

    async fn run_as_configured(self, config: Config) -> Result<()> {
        match self {
            Command::Web => {
                telemetry::init(&config);
                Ok(mailrun_web::run(config, shutdown::on_signal_or_orphaned().context("the signals can't be caught")?)
                    .await?)
            }
            Command::Worker { roles } => {
                telemetry::init(&config);
                let roles: BTreeSet<Role> = roles.into_iter().collect();
                abort_on_panic();
                Ok(mailrun_worker::run(
                    config,
                    roles,
                    shutdown::on_signal_or_orphaned().context("the signals can't be caught")?,
                )
                .await?)
            }
            Command::Setup { take_over } => {
                telemetry::init(&config);
                setup::run(&config, take_over).await
            }
            Command::Doctor(options) => Box::pin(doctor::run(&config, &options)).await,
            Command::DeadLetters { command } => {
                let ledger = Ledger::reach(&config)?;
                match command {
                    None => dead_letters::show(&ledger).await,
                    Some(DeadLetters::Replay(replay)) => {
                        let Replay { run, error, unknown, restored, .. } = replay;
                        dead_letters::replay(&ledger, run, error, unknown, restored).await
                    }
                }
            }
            Command::Suppressions { command } => {
                let ledger = Ledger::reach(&config)?;
                match command.unwrap_or(Suppressions::List) {
                    Suppressions::List => suppressions::list(&ledger).await,
                    Suppressions::Add { addresses } => suppressions::add(&ledger, &addresses).await,
                    Suppressions::Remove { reason: Some(reason), since, .. } => {
                        suppressions::remove_since(&ledger, reason, since.as_deref().unwrap_or_default()).await
                    }
                    Suppressions::Remove { addresses, .. } => suppressions::remove(&ledger, &addresses).await,
                    Suppressions::Held => suppressions::held(&ledger).await,
                    Suppressions::Review { run, accept, .. } => suppressions::review(&ledger, run, accept).await,
                }
            }
            Command::Relay { command } => {
                let ledger = Ledger::reach(&config)?;
                match command.unwrap_or(Relay::Show) {
                    Relay::Show => relay::show(&ledger).await,
                    Relay::ItWasUs { number } => relay::answer(&ledger, number, Fault::Us).await,
                    Relay::ItWasThem { number } => relay::answer(&ledger, number, Fault::Them).await,
                }
            }
            Command::People { command: People::Erase { address } } => {
                erase::run(&config, &Ledger::reach(&config)?, &address).await
            }
            Command::Unknown { command: Unknown::Settle(settle) } => {
                let found = if settle.arrived { Found::Arrived } else { Found::NotSent };
                let ledger = Ledger::reach(&config)?;
                unknown::settle(&ledger, settle.run, &settle.addresses, found, settle.by).await
            }
            Command::TestSend { address } => {
                telemetry::init(&config);
                test_send::run(&config, &address).await
            }
            Command::Prune { older_than_days } => prune::run(&config, &Ledger::reach(&config)?, older_than_days).await,
            Command::Backup(options) => backup::run(&config, &Ledger::reach(&config)?, &options).await,
            Command::Restored(options) => restored::run(&Ledger::reach(&config)?, &options).await,
            Command::Bounce(_) | Command::Health { .. } => Ok(()),
        }
    }
}

async fn health(url: &str) -> Result<()> {
    let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(5)).build()?;
    let answer = client.get(url).send().await?;
    let status = answer.status();
    let reasons = answer.text().await.unwrap_or_default();
    anyhow::ensure!(status.is_success(), "{url} answers {status}: {}", reasons.trim());
    Ok(())
}

/// A worker that has lost one of its tasks would hold claims that nobody ever reports: it ends instead, and the others see
/// that it is dead.
fn abort_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        std::process::abort();
    }));
}
