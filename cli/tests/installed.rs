//! The program as it is installed, without any server. That this is an integration test makes `cargo test --workspace` build the
//! program, which the tests of `dev/program` start on servers.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::process::{Command, Output};

fn run(arguments: &[&str], settings: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mailrun"));
    command.env_remove("DATABASE_URL").env_remove("AMQP_URL");
    command.args(arguments).envs(settings.iter().copied()).output().unwrap()
}

#[test]
fn offers_no_tool_and_starts_no_server() {
    let help = String::from_utf8(run(&["--help"], &[]).stdout).unwrap();
    for offered in ["web", "worker", "setup", "doctor", "dead-letters", "prune"] {
        assert!(help.contains(&format!("\n  {offered} ")), "{offered} is missing:\n{help}");
    }
    for tool in ["up", "demo", "bench", "chaos", "mail-sink", "stack-keeper", "with-database"] {
        assert!(!run(&[tool, "--help"], &[]).status.success(), "{tool} is offered");
    }
}

#[test]
fn an_operators_command_names_the_servers_that_it_needs() {
    let database = ("DATABASE_URL", "postgres://u@localhost/d");
    let broker = ("AMQP_URL", "amqp://localhost");
    for (settings, missing) in
        [(&[][..], "DATABASE_URL and AMQP_URL"), (&[database][..], "AMQP_URL"), (&[broker][..], "DATABASE_URL")]
    {
        for command in ["doctor", "dead-letters", "suppressions", "restored"] {
            let output = run(&[command], settings);
            let error = String::from_utf8(output.stderr).unwrap();
            assert!(!output.status.success() && error.contains(missing), "{command} with {settings:?}: {error}");
        }
    }
}
