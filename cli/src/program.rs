//! Common to all programs: argument parsing, the runtime, and the exit code.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::Parser;
use mailrun_worker::Jobs;

use crate::{bounce, command::Command};

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

/// The program: the web server, the workers and the operator's commands, with Mailrun's own jobs and these.
#[must_use]
pub fn main(jobs: Jobs) -> ExitCode {
    let Arguments { config, command } = parse();
    run(command.run(config.as_deref(), jobs))
}

/// Parses the arguments, or exits with the error.
#[must_use]
pub fn parse<Arguments: Parser>() -> Arguments {
    Arguments::try_parse().unwrap_or_else(|error| {
        // With any other exit code, a mail server would return the bounce.
        if error.use_stderr() && std::env::args().any(|argument| argument == "bounce") {
            let _ = error.print();
            std::process::exit(bounce::TEMPFAIL);
        }
        error.exit()
    })
}

/// Runs `work` and prints its error.
pub fn run(work: impl Future<Output = Result<()>>) -> ExitCode {
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("mailrun: {error}");
            return ExitCode::FAILURE;
        }
    };
    let ended = runtime.block_on(work);
    // The runtime ends with the process. Shutting it down earlier would remove what threads of the AMQP library may still wait for,
    // such as a connection being opened, and they would panic.
    std::mem::forget(runtime);
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mailrun: {error:#}");
            ExitCode::FAILURE
        }
    }
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
