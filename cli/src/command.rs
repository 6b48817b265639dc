//! The commands of the installed program. None of them installs, starts or stops a server.

use std::{collections::BTreeSet, path::Path, time::Duration};

use anyhow::{Context as _, Result};
use clap::{Args, Subcommand};
use mailrun_app::{
    config::{Config, ConfigError},
    shutdown, telemetry,
};
use mailrun_ledger::{relay_stops::Fault, settle::Found, suppressions::Reason};
use mailrun_worker::{Jobs, Role};
use uuid::Uuid;

use crate::{
    backup, bounce, dead_letters, doctor, erase, ledger::Ledger, prune, relay, restored, setup, suppressions,
    test_send, unknown,
};

/// The commands of the installed program.
#[derive(Subcommand)]
pub enum Command {
    /// Run the web server
    Web,
    /// Run a worker
    Worker {
        /// Roles of this process: fan-out, send, progress
        #[arg(long, value_delimiter = ',', default_value = "fan-out,send,progress")]
        roles: Vec<Role>,
    },
    /// Migrate the database, create roles, declare the queues and mark the virtual host
    ///
    /// Requires users with the right to do all of that.
    Setup {
        /// Take over a virtual host that was marked by another installation, which must no longer exist
        #[arg(long)]
        take_over: bool,
    },
    /// Compare ledger, counters, claims, workers and queues, report faults, and repair them with --fix
    Doctor(doctor::Options),
    /// Show or replay failed and unknown invitations
    DeadLetters {
        /// Show them if omitted
        #[command(subcommand)]
        command: Option<DeadLetters>,
    },
    /// Show or change the suppression list
    Suppressions {
        /// List the addresses if omitted
        #[command(subcommand)]
        command: Option<Suppressions>,
    },
    /// Show stopped relays, or answer whether the refusals were our fault
    Relay {
        /// Show them if omitted
        #[command(subcommand)]
        command: Option<Relay>,
    },
    /// Manage the people in the ledger
    People {
        /// Choose an action
        #[command(subcommand)]
        command: People,
    },
    /// Manage invitations whose outcome is unknown
    Unknown {
        /// Choose an action
        #[command(subcommand)]
        command: Unknown,
    },
    /// Pass a bounce from standard input to the web server
    ///
    /// For the mail server that receives bounces. Exits with 75 while the web server is unavailable.
    Bounce(bounce::Options),
    /// Send one mail with the configured mailer and text, and print the result
    TestSend {
        /// The recipient
        address: String,
    },
    /// Delete old finished runs and their invitations
    ///
    /// Who was emailed stays recorded.
    Prune {
        /// Delete runs that finished more than this many days ago [default: retention.keep_days]
        #[arg(long)]
        older_than_days: Option<u32>,
    },
    /// Write the ledger to a file while all processes run
    Backup(backup::Options),
    /// Declare that the ledger was restored from a backup
    ///
    /// Settles the invitations that may have been sent since then as unknown, and pauses all runs.
    Restored(restored::Options),
    /// Query /readyz, /livez or /healthz of a process
    ///
    /// The exit code is 0 if it is healthy; otherwise the error lists the reasons.
    Health {
        /// For example http://127.0.0.1:8080/readyz
        url: String,
    },
}

#[derive(Subcommand)]
pub enum DeadLetters {
    /// Send them again, as another pass over their runs
    Replay(Replay),
}

#[derive(Subcommand)]
pub enum Suppressions {
    /// List the addresses, newest first
    List,
    /// Add addresses
    Add {
        /// The addresses
        #[arg(required = true)]
        addresses: Vec<String>,
    },
    /// Remove addresses
    Remove {
        /// The addresses
        #[arg(required_unless_present = "reason", conflicts_with = "reason")]
        addresses: Vec<String>,
        /// Remove all addresses suppressed for this reason: unsubscribed, complained, bounced or asked
        #[arg(long, requires = "since")]
        reason: Option<Reason>,
        /// Only those suppressed since: 2026-11-28, 2026-11-28T14:30 (UTC), or 90m, 2h or 3d ago
        #[arg(long, requires = "reason")]
        since: Option<String>,
    },
    /// Show the runs whose suppressions are held for review
    Held,
    /// Accept or reject the held suppressions of a run
    Review {
        /// The run
        run: Uuid,
        /// Suppress the addresses: they do not exist
        #[arg(long, required_unless_present = "reject", conflicts_with = "reject")]
        accept: bool,
        /// Drop the suppressions: the addresses exist
        #[arg(long)]
        reject: bool,
    },
}

#[derive(Subcommand)]
pub enum Relay {
    /// Show the stopped relays
    Show,
    /// Resume, and retry the refused recipients: the relay refused the sender
    ItWasUs {
        /// Only this stop [default: all]
        #[arg(long)]
        number: Option<i64>,
    },
    /// Resume, and fail the refused recipients: each was refused for a separate reason
    ItWasThem {
        /// Only this stop [default: all]
        #[arg(long)]
        number: Option<i64>,
    },
}

#[derive(Subcommand)]
pub enum People {
    /// Erase a person: name, address, and every text that contains them
    ///
    /// A keyed hash of the address is kept, so that the person is not invited twice and a suppression stays in effect.
    Erase {
        /// The address
        address: String,
    },
}

#[derive(Subcommand)]
pub enum Unknown {
    /// Settle unknown invitations whose outcome has been established
    Settle(Settle),
}

/// Which unknown invitations to settle, and how.
#[derive(Args)]
#[group(skip)]
#[command(group = clap::ArgGroup::new("found").required(true))]
#[command(group = clap::ArgGroup::new("which").required(true).multiple(true))]
pub struct Settle {
    /// They arrived: settle them as sent
    #[arg(long, group = "found")]
    arrived: bool,
    /// They were not sent: settle them as failed, so that they can be retried
    #[arg(long, group = "found")]
    not_sent: bool,
    /// Only those of this run
    #[arg(long, group = "which")]
    run: Option<Uuid>,
    /// Those of all runs
    #[arg(long, group = "which", conflicts_with_all = ["run", "addresses"])]
    all: bool,
    /// Who established the outcome [default: the current user]
    #[arg(long)]
    by: Option<String>,
    /// Only those to these addresses
    #[arg(group = "which")]
    addresses: Vec<String>,
}

/// Which dead letters to replay.
#[derive(Args)]
pub struct Replay {
    /// Only those of this run
    #[arg(long, required_unless_present = "all")]
    run: Option<Uuid>,
    /// Those of all runs
    #[arg(long, conflicts_with = "run")]
    all: bool,
    /// Only those with this error
    #[arg(long)]
    error: Option<String>,
    /// Replay unknown instead of failed invitations; their recipients may receive a second mail
    #[arg(long)]
    unknown: bool,
    /// Include runs that were restored from a backup; their recipients may receive a second mail
    #[arg(long)]
    restored: bool,
}

impl Command {
    /// Whether the command works on the ledger, which requires configured servers.
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

    /// Runs the command with the settings of `file`, and with these jobs beside Mailrun's own.
    pub async fn run(self, file: Option<&Path>, jobs: Jobs) -> Result<()> {
        Box::pin(self.run_with(Config::load(file), jobs)).await
    }

    /// Runs the command with loaded settings or the error of loading them: not every command needs settings.
    pub async fn run_with(self, config: Result<Config, ConfigError>, jobs: Jobs) -> Result<()> {
        match self {
            // Its exit codes are those of mail server pipes.
            Self::Bounce(options) => std::process::exit(bounce::run(config, &options).await),
            Self::Health { url } => health(&url).await,
            command => Box::pin(command.run_as_configured(config?, jobs)).await,
        }
    }

    async fn run_as_configured(self, config: Config, jobs: Jobs) -> Result<()> {
        match self {
            Command::Web => {
                telemetry::init(&config);
                let stop = shutdown::on_signal_or_orphaned().context("cannot catch signals")?;
                Ok(Box::pin(mailrun_web::run(config, stop)).await?)
            }
            Command::Worker { roles } => {
                telemetry::init(&config);
                let roles: BTreeSet<Role> = roles.into_iter().collect();
                abort_on_panic();
                let stop = shutdown::on_signal_or_orphaned().context("cannot catch signals")?;
                Ok(Box::pin(mailrun_worker::run(config, roles, jobs, stop)).await?)
            }
            Command::Setup { take_over } => {
                telemetry::init(&config);
                setup::run(&config, take_over).await
            }
            Command::Doctor(options) => Box::pin(doctor::run(&config, jobs, &options)).await,
            Command::DeadLetters { command } => {
                let ledger = Ledger::open(&config)?;
                match command {
                    None => dead_letters::show(&ledger).await,
                    Some(DeadLetters::Replay(replay)) => {
                        let Replay { run, error, unknown, restored, .. } = replay;
                        dead_letters::replay(&ledger, run, error, unknown, restored).await
                    }
                }
            }
            Command::Suppressions { command } => {
                let ledger = Ledger::open(&config)?;
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
                let ledger = Ledger::open(&config)?;
                match command.unwrap_or(Relay::Show) {
                    Relay::Show => relay::show(&ledger).await,
                    Relay::ItWasUs { number } => relay::answer(&ledger, number, Fault::Us).await,
                    Relay::ItWasThem { number } => relay::answer(&ledger, number, Fault::Them).await,
                }
            }
            Command::People { command: People::Erase { address } } => {
                erase::run(&config, &Ledger::open(&config)?, &address).await
            }
            Command::Unknown { command: Unknown::Settle(settle) } => {
                let found = if settle.arrived { Found::Arrived } else { Found::NotSent };
                let ledger = Ledger::open(&config)?;
                unknown::settle(&ledger, settle.run, &settle.addresses, found, settle.by).await
            }
            Command::TestSend { address } => {
                telemetry::init(&config);
                test_send::run(&config, &address).await
            }
            Command::Prune { older_than_days } => prune::run(&config, &Ledger::open(&config)?, older_than_days).await,
            Command::Backup(options) => backup::run(&config, &Ledger::open(&config)?, &options).await,
            Command::Restored(options) => restored::run(&Ledger::open(&config)?, &options).await,
            Command::Bounce(_) | Command::Health { .. } => Ok(()),
        }
    }
}

async fn health(url: &str) -> Result<()> {
    let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(5)).build()?;
    let answer = client.get(url).send().await?;
    let status = answer.status();
    let reasons = answer.text().await.unwrap_or_default();
    anyhow::ensure!(status.is_success(), "{url} returned {status}: {}", reasons.trim());
    Ok(())
}

/// A worker whose task panicked would hold claims forever. It aborts instead, so that other workers detect that it is dead.
fn abort_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        std::process::abort();
    }));
}
