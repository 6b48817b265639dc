//! The program as it is installed: built beside this one, by `cargo build --workspace` and so by these tests.

use std::{
    path::PathBuf,
    process::{Command, Output},
};

use crate::support::{MAILRUN, World};

fn installed() -> Command {
    let program = PathBuf::from(MAILRUN).with_file_name("mailrun");
    assert!(program.is_file(), "{} is missing: cargo build --workspace", program.display());
    let mut command = Command::new(program);
    command.env_remove("DATABASE_URL").env_remove("AMQP_URL");
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn run(arguments: &[&str], settings: &[(&str, String)]) -> Output {
    installed().args(arguments).envs(settings.iter().map(|(key, value)| (*key, value))).output().unwrap()
}

#[test]
fn offers_no_tool_and_starts_no_server() {
    let help = text(&run(&["--help"], &[]).stdout);
    for offered in ["web", "worker", "setup", "doctor", "dead-letters", "prune"] {
        assert!(help.contains(&format!("\n  {offered} ")), "{offered} is missing:\n{help}");
    }
    for tool in ["up", "demo", "bench", "chaos", "mail-sink", "stack-keeper", "with-database"] {
        assert!(!run(&[tool, "--help"], &[]).status.success(), "{tool} is offered");
    }
}

#[test]
fn an_operators_command_names_the_servers_that_it_needs() {
    for (set, missing) in
        [(None, "DATABASE_URL and AMQP_URL"), (Some("DATABASE_URL"), "AMQP_URL"), (Some("AMQP_URL"), "DATABASE_URL")]
    {
        let url = |key: &str| if key == "DATABASE_URL" { "postgres://u@localhost/d" } else { "amqp://localhost" };
        let settings: Vec<(&str, String)> = set.into_iter().map(|key| (key, url(key).to_owned())).collect();
        for command in ["doctor", "dead-letters", "suppressions", "restored"] {
            let output = run(&[command], &settings);
            let error = text(&output.stderr);
            assert!(!output.status.success() && error.contains(missing), "{command} with {set:?}: {error}");
        }
    }
}

#[tokio::test]
async fn an_operators_command_works_on_configured_servers() {
    let world = World::new(&[]).await;
    let settings =
        [("DATABASE_URL", world.stack.database_url(&world.name)), ("AMQP_URL", world.stack.amqp_url(&world.name))];
    let output = run(&["dead-letters"], &settings);
    assert!(output.status.success(), "{}", text(&output.stderr));
}
