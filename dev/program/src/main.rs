//! The program behind `cargo run`: all of Mailrun on this machine with private servers, and the tools that test it. It also has all commands
//! of the installed program; the operator's commands find the private servers.

mod demo;
mod mail_sink;
mod up;

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Result, bail};
use clap::{Parser, Subcommand};
use mailrun::{Jobs, program};
use mailrun_app::{config::Config, shutdown, telemetry};
use mailrun_lab::{
    bench, chaos,
    local::{Servers, with_database},
};
use mailrun_stack::{Nodes, Release, keep};

/// Mailrun on this machine: durable bulk invitations on RabbitMQ and PostgreSQL
#[derive(Parser)]
#[command(name = "mailrun-dev", version)]
struct Arguments {
    /// The settings file [default: mailrun.toml in the working directory, if it exists]
    #[arg(long, global = true, env = "MAILRUN_CONFIG")]
    config: Option<PathBuf>,
    /// RabbitMQ to start on this machine: the system's, or release 4, which is downloaded if the system has another one
    #[arg(long, global = true, env = "MAILRUN_BROKER", value_enum, default_value_t, hide_possible_values = true)]
    broker: Release,
    /// The command [default: up]
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Start everything on this machine: servers, web server and workers. Stop with Ctrl-C
    Up(up::Options),
    /// Invite fictional people through the real form, show the progress, retry failures, and exit
    Demo(demo::Options),
    /// Measure how fast Mailrun is on this machine, compared with what the servers allow
    Bench(bench::Options),
    /// Inject faults while runs are in progress, and check the outcome of every recipient
    Chaos(chaos::Options),
    /// Accept mail, deliver none, and show what arrived. Stop with Ctrl-C
    MailSink(mail_sink::Options),
    /// Run a command with a new database of the private PostgreSQL in DATABASE_URL, for tools that check queries
    #[command(hide = true)]
    WithDatabase {
        /// Migrate the database first
        #[arg(long)]
        migrated: bool,
        /// The command
        #[arg(last = true, required = true)]
        command: Vec<OsString>,
    },
    /// Run the private RabbitMQ and PostgreSQL as long as they are used
    #[command(hide = true)]
    StackKeeper {
        /// The folder of the stack
        #[arg(long)]
        home: PathBuf,
        /// How long to stay up without users
        #[arg(long, default_value_t = 0)]
        linger_seconds: u64,
        /// Number of RabbitMQ nodes
        #[arg(long, value_enum, default_value_t)]
        nodes: Nodes,
    },
    #[command(flatten)]
    Installed(mailrun::Command),
}

fn main() -> ExitCode {
    let arguments: Arguments = program::parse();
    arguments.broker.choose();
    program::run(run(arguments))
}

async fn run(arguments: Arguments) -> Result<()> {
    let file = arguments.config.as_deref();
    let config = || Config::load(file);
    match arguments.command.unwrap_or(Command::Up(up::Options::default())) {
        Command::Up(options) => up::run(config()?, file, options).await,
        Command::Demo(options) => demo::run(config()?, file, &options).await,
        Command::Bench(options) => Box::pin(bench::run(config()?, file, &options)).await,
        Command::Chaos(options) => Box::pin(chaos::run(config()?, file, &options)).await,
        Command::MailSink(options) => {
            telemetry::init(&config()?);
            mail_sink::run(options, shutdown::on_signal_or_orphaned()?).await
        }
        Command::WithDatabase { migrated, command } => with_database(migrated, &command).await,
        Command::StackKeeper { home, linger_seconds, nodes } => {
            Ok(keep(&home, Duration::from_secs(linger_seconds), nodes).await?)
        }
        Command::Installed(command) if command.is_for_operators() => on_servers_here(command, file).await,
        Command::Installed(command) => Box::pin(command.run(file, Jobs::new())).await,
    }
}

/// Runs an operator's command on the configured servers, or on the private ones of the running `up`.
async fn on_servers_here(command: mailrun::Command, file: Option<&Path>) -> Result<()> {
    let config = Config::load(file)?;
    let home = mailrun_stack::home();
    if !config.named.database && mailrun_stack::running(&home).is_none() {
        bail!("Mailrun is not running: start it with `cargo run`, or set DATABASE_URL and AMQP_URL");
    }
    // They must stay up until the command ends.
    let servers = Servers::start(&config, &home, Nodes::One, |step| eprintln!("{step}…")).await?;
    Box::pin(command.run_with(Ok(servers.name_in(config)), Jobs::new())).await
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn a_usage_error_names_this_program() {
        let error = Arguments::try_parse_from(["mailrun-dev", "up", "--nonsense"]).err().unwrap();
        assert!(error.to_string().contains("Usage: mailrun-dev up"), "{error}");
    }
}
