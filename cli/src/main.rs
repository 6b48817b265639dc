//! The program `mailrun` as installed: the pages, the workers and the operator's commands, against the servers that are configured.

use std::{path::PathBuf, process::ExitCode};

use clap::Parser;
use mailrun::{Command, program};

/// Durable bulk invitations on RabbitMQ and PostgreSQL.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The settings file; without it, mailrun.toml in the working directory, if there is one.
    #[arg(long, global = true, env = "MAILRUN_CONFIG")]
    config: Option<PathBuf>,
    /// What to do.
    #[command(subcommand)]
    command: Command,
}

fn main() -> ExitCode {
    let Arguments { config, command } = program::parse();
    program::run(command.run(config.as_deref()))
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
