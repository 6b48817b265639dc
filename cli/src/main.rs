//! The mailrun program.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use clap::{Parser, Subcommand};
use mailrun::stack;

#[derive(Parser)]
#[command(version, about = "Invites many people by mail, reliably.")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs the private RabbitMQ and PostgreSQL for as long as anybody uses them.
    #[command(hide = true)]
    StackKeeper {
        /// The folder of the stack.
        #[arg(long)]
        home: PathBuf,
        /// How long to stay when nobody uses the stack any more.
        #[arg(long, default_value_t = 0)]
        linger_seconds: u64,
    },
}

#[tokio::main]
async fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::StackKeeper { home, linger_seconds } => stack::keep(&home, Duration::from_secs(linger_seconds)).await,
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
