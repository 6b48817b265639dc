//! A program's frame: arguments in, a runtime around its work, an exit code out.

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

use crate::bounce;

/// Parses the arguments, or ends the process with the error.
#[must_use]
pub fn parse<Arguments: Parser>() -> Arguments {
    Arguments::try_parse().unwrap_or_else(|error| {
        // A mail server would return the bounce for any other exit code.
        if error.use_stderr() && std::env::args().any(|argument| argument == "bounce") {
            let _ = error.print();
            std::process::exit(bounce::TEMPFAIL);
        }
        error.exit()
    })
}

/// Does the work, and prints its error.
pub fn run(work: impl Future<Output = Result<()>>) -> ExitCode {
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("mailrun: {error}");
            return ExitCode::FAILURE;
        }
    };
    let ended = runtime.block_on(work);
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
