//! Common to all programs: argument parsing, the runtime, and the exit code.

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

use crate::bounce;

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
