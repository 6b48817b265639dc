//! The program as it is installed, on servers: built beside this one by `cargo test --workspace`, since it has tests of its own.

use std::{path::PathBuf, process::Command};

use crate::support::{MAILRUN, World};

#[tokio::test]
async fn an_operators_command_works_on_configured_servers() {
    let program = PathBuf::from(MAILRUN).with_file_name("mailrun");
    assert!(program.is_file(), "{} is missing: cargo build --workspace", program.display());
    let world = World::new(&[]).await;
    let output = Command::new(program)
        .arg("dead-letters")
        .env("DATABASE_URL", world.stack.database_url(&world.name))
        .env("AMQP_URL", world.stack.amqp_url(&world.name))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
