//! The mailrun program: one binary for the whole system. Without a command it starts everything on this machine.

use std::{collections::BTreeSet, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result};
use clap::{Args, Parser, Subcommand};
use mailrun::{
    backup, bench, bounce, chaos, dead_letters, demo, doctor, erase, ledger::Ledger, local::with_database, mail_sink,
    prune, relay, restored, setup, stack, supervise, suppressions, test_send, unknown, up,
};
use mailrun_shared::{
    config::Config,
    shutdown,
    store::{relay_stops::Fault, settle::Found, suppressions::Reason},
    telemetry,
};
use mailrun_worker::Role;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// Durable bulk invitations on RabbitMQ and PostgreSQL.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The settings' file; without it, mailrun.toml in the working directory, if there is one.
    #[arg(long, global = true, env = "MAILRUN_CONFIG")]
    config: Option<PathBuf>,
    /// Which RabbitMQ to start on this machine, where one is started: the system's, or release 4, which is fetched if the
    /// system has another one.
    #[arg(long, global = true, env = "MAILRUN_BROKER", value_enum, default_value_t, hide_possible_values = true)]
    broker: stack::Release,
    /// What to do; without it, `up`.
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Starts everything on this machine: the servers, the pages and the workers. Ctrl-C stops it.
    Up(up::Options),
    /// Invites fictional people through the real form, shows the bar, retries what failed, and ends.
    Demo(demo::Options),
    /// Measures how fast all this is here, beside what the servers allow.
    Bench(bench::Options),
    /// Breaks things while runs are under way, and judges what became of every recipient.
    Chaos(chaos::Options),
    /// Serves the pages.
    Web,
    /// Works.
    Worker {
        /// What this process does: any of fan-out, send and progress.
        #[arg(long, value_delimiter = ',', default_value = "fan-out,send,progress")]
        roles: Vec<Role>,
    },
    /// Accepts mail, delivers none, and shows what arrived. Ctrl-C stops it.
    MailSink(mail_sink::Options),
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
    /// Runs a command with a new, empty database of the private PostgreSQL in DATABASE_URL: for the tools that check queries.
    #[command(hide = true)]
    WithDatabase {
        /// The command.
        #[arg(last = true, required = true)]
        command: Vec<std::ffi::OsString>,
    },
    /// Runs the private RabbitMQ and PostgreSQL for as long as anybody uses them.
    #[command(hide = true)]
    StackKeeper {
        /// The folder of the stack.
        #[arg(long)]
        home: PathBuf,
        /// How long to stay when nobody uses the stack any more.
        #[arg(long, default_value_t = 0)]
        linger_seconds: u64,
        /// How many nodes RabbitMQ has.
        #[arg(long, value_enum, default_value_t)]
        nodes: stack::Nodes,
    },
}

#[derive(Subcommand)]
enum DeadLetters {
    /// Sends them again, as another pass over their runs.
    Replay(Replay),
}

#[derive(Subcommand)]
enum Suppressions {
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

#[derive(Subcommand)]
enum Relay {
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

#[derive(Subcommand)]
enum People {
    /// Erases somebody: name, address, and every reply and entry in which it stands. A keyed hash stays, so that nothing is sent
    /// there twice, and a suppression holds.
    Erase {
        /// The address.
        address: String,
    },
}

#[derive(Subcommand)]
enum Unknown {
    /// Settles them, once somebody has found out what became of them.
    Settle(Settle),
}

#[derive(Args)]
#[group(id = "found", required = true)]
struct Settle {
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

#[derive(Args)]
struct Replay {
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

fn main() -> ExitCode {
    let arguments = Arguments::try_parse().unwrap_or_else(|error| {
        // A mail server would return the bounce for any other exit code.
        if error.use_stderr() && std::env::args().any(|argument| argument == "bounce") {
            let _ = error.print();
            std::process::exit(bounce::TEMPFAIL);
        }
        error.exit()
    });
    arguments.broker.choose();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("mailrun: {error}");
            return ExitCode::FAILURE;
        }
    };
    let ended = runtime.block_on(run(arguments));
    // It ends with the process. Shut down before that, it would take from the AMQP library's threads what they may still be waiting
    // for, such as a connection that is just being made, and they panic over that.
    std::mem::forget(runtime);
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mailrun: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: Arguments) -> Result<()> {
    let file = arguments.config.as_deref();
    let config = || Config::load(file);
    match arguments.command.unwrap_or(Command::Up(up::Options::default())) {
        Command::Up(options) => up::run(config()?, file, options).await,
        Command::Demo(options) => demo::run(config()?, file, &options).await,
        Command::Bench(options) => Box::pin(bench::run(config()?, file, &options)).await,
        Command::Chaos(options) => Box::pin(chaos::run(config()?, file, &options)).await,
        Command::Web => {
            let config = config()?;
            telemetry::init(&config.log);
            Ok(mailrun_web::run(config, stop_token()?).await?)
        }
        Command::Worker { roles } => {
            let config = config()?;
            telemetry::init(&config.log);
            let roles: BTreeSet<Role> = roles.into_iter().collect();
            abort_on_panic();
            Ok(mailrun_worker::run(config, roles, stop_token()?).await?)
        }
        Command::MailSink(options) => {
            telemetry::init(&config()?.log);
            mail_sink::run(options, stop_token()?).await
        }
        Command::Setup { take_over } => {
            let config = config()?;
            telemetry::init(&config.log);
            setup::run(&config, take_over).await
        }
        Command::Doctor(options) => Box::pin(doctor::run(&config()?, &options)).await,
        Command::DeadLetters { command } => {
            let ledger = Ledger::reach(&config()?).await?;
            match command {
                None => dead_letters::show(&ledger).await,
                Some(DeadLetters::Replay(replay)) => {
                    let Replay { run, error, unknown, restored, .. } = replay;
                    dead_letters::replay(&ledger, run, error, unknown, restored).await
                }
            }
        }
        Command::Suppressions { command } => {
            let ledger = Ledger::reach(&config()?).await?;
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
            let ledger = Ledger::reach(&config()?).await?;
            match command.unwrap_or(Relay::Show) {
                Relay::Show => relay::show(&ledger).await,
                Relay::ItWasUs { number } => relay::answer(&ledger, number, Fault::Us).await,
                Relay::ItWasThem { number } => relay::answer(&ledger, number, Fault::Them).await,
            }
        }
        Command::People { command: People::Erase { address } } => {
            let config = config()?;
            erase::run(&config, &Ledger::reach(&config).await?, &address).await
        }
        Command::Unknown { command: Unknown::Settle(settle) } => {
            let found = if settle.arrived { Found::Arrived } else { Found::NotSent };
            let ledger = Ledger::reach(&config()?).await?;
            unknown::settle(&ledger, settle.run, &settle.addresses, found, settle.by).await
        }
        // Its exit codes are those that mail servers understand.
        Command::Bounce(options) => std::process::exit(bounce::run(Config::load(file), &options).await),
        Command::TestSend { address } => {
            let config = config()?;
            telemetry::init(&config.log);
            test_send::run(&config, &address).await
        }
        Command::Prune { older_than_days } => {
            let config = config()?;
            prune::run(&config, &Ledger::reach(&config).await?, older_than_days).await
        }
        Command::Backup(options) => {
            let config = config()?;
            backup::run(&config, &Ledger::reach(&config).await?, &options).await
        }
        Command::Restored(options) => restored::run(&Ledger::reach(&config()?).await?, &options).await,
        Command::Health { url } => {
            let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(5)).build()?;
            let answer = client.get(&url).send().await?;
            let status = answer.status();
            let reasons = answer.text().await.unwrap_or_default();
            anyhow::ensure!(status.is_success(), "{url} answers {status}: {}", reasons.trim());
            Ok(())
        }
        Command::WithDatabase { command } => with_database(&command).await,
        Command::StackKeeper { home, linger_seconds, nodes } => {
            Ok(stack::keep(&home, Duration::from_secs(linger_seconds), nodes).await?)
        }
    }
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

/// Cancelled by a signal, or by the end of the parent that started this process.
fn stop_token() -> Result<CancellationToken> {
    let stop = shutdown::on_signal().context("the signals can't be caught")?;
    let token = stop.clone();
    tokio::spawn(async move {
        supervise::parent_gone().await;
        token.cancel();
    });
    Ok(stop)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_arguments_fit_together() {
        Arguments::command().debug_assert();
    }
}
