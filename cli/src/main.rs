//! The installed program `mailrun`: the web server, the workers and the operator's commands, using the configured servers.

use std::{path::PathBuf, process::ExitCode};

use clap::Parser;
use mailrun::{Command, program};

/// Durable bulk invitations on RabbitMQ and PostgreSQL
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The settings file [default: mailrun.toml in the working directory, if it exists]
    #[arg(long, global = true, env = "MAILRUN_CONFIG")]
    config: Option<PathBuf>,
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
    fn the_arguments_are_consistent() {
        Arguments::command().debug_assert();
    }
}
