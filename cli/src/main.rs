//! The installed program `mailrun`: the web server, the workers and the operator's commands, using the configured servers.

use std::process::ExitCode;

use mailrun::Jobs;

fn main() -> ExitCode {
    mailrun::main(Jobs::new())
}
