//! The image and the Compose file, checked without Docker and without a registry: what they name exists, and the program accepts
//! what they pass to it.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::{
    collections::BTreeSet,
    env, fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Output},
};

const COMPOSE: &str = include_str!("../../docker-compose.yml");
const DOCKERFILE: &str = include_str!("../../Dockerfile");

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// A setting of the Compose file, with a value for each variable in it.
fn settings() -> Vec<(String, String)> {
    let setting = |line: &str| {
        let (key, value) = line.trim().split_once(": ")?;
        let is_ours = key.starts_with("MAILRUN_") || ["DATABASE_URL", "AMQP_URL"].contains(&key);
        is_ours.then(|| (key.to_owned(), with_variables(value.trim_matches('"'))))
    };
    COMPOSE.lines().filter_map(setting).collect()
}

fn with_variables(value: &str) -> String {
    let mut parts = value.split("${");
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (_, rest) = part.split_once('}').unwrap();
        text.push_str("a-long-secret");
        text.push_str(rest);
    }
    text
}

fn run(arguments: &[String], settings: &[(String, String)]) -> Output {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_mailrun"));
    for (key, _) in env::vars().filter(|(key, _)| key.starts_with("MAILRUN_")) {
        command.env_remove(key);
    }
    command.args(arguments).envs(settings.iter().cloned()).current_dir(folder.path()).output().unwrap()
}

#[test]
fn the_program_accepts_every_command_of_the_compose_file() {
    let commands: Vec<Vec<String>> = COMPOSE
        .lines()
        .filter_map(|line| line.trim().strip_prefix("command: "))
        .map(|command| serde_json::from_str(command).unwrap())
        .collect();
    assert!(commands.len() >= 5, "{commands:?}");
    for command in commands {
        let output = run(&[command.clone(), vec!["--help".to_owned()]].concat(), &[]);
        assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

/// An unknown setting would be an error.
#[test]
fn the_program_accepts_every_setting_of_the_compose_file() {
    let settings = settings();
    assert!(settings.len() >= 15, "{settings:?}");
    // The addresses cannot be used, so the command fails after it has read the settings.
    let nowhere = [("DATABASE_URL", "postgres://u:p@127.0.0.1:1/none"), ("AMQP_URL", "amqp://u:p@127.0.0.1:1")];
    let nowhere = nowhere.map(|(key, value)| (key.to_owned(), value.to_owned()));
    let others = settings.into_iter().filter(|(key, _)| !key.ends_with("_URL"));
    let output = run(&["suppressions".to_owned()], &others.chain(nowhere).collect::<Vec<_>>());
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!error.contains("setting") && !error.contains("unknown field"), "{error}");
    assert!(!output.status.success());
}

#[test]
fn every_variable_of_the_compose_file_is_in_the_example() {
    let example = fs::read_to_string(root().join("deploy/env.example")).unwrap();
    let given: BTreeSet<&str> = example.lines().filter_map(|line| line.strip_suffix('=')).collect();
    let variables = COMPOSE.split("${").skip(1).map(|rest| rest.split([':', '}']).next().unwrap());
    assert_eq!(variables.collect::<BTreeSet<_>>(), given);
}

#[test]
fn every_file_that_the_compose_file_mounts_exists() {
    let mounted: Vec<&str> = COMPOSE
        .lines()
        .filter_map(|line| line.trim().strip_prefix("- ./"))
        .map(|mount| mount.split(':').next().unwrap())
        .collect();
    assert!(!mounted.is_empty());
    for file in mounted {
        assert!(root().join(file).is_file(), "{file}");
    }
}

/// The builder is sent only what `.dockerignore` lets through: Cargo must find the whole workspace in it.
#[test]
fn the_builder_gets_a_complete_workspace() {
    let context = tempfile::tempdir().unwrap();
    let ignore = fs::read_to_string(root().join(".dockerignore")).unwrap();
    for entry in ignore.lines().filter_map(|line| line.strip_prefix('!')) {
        let target = context.path().join(entry);
        fs::create_dir_all(target.parent().unwrap()).unwrap();
        if root().join(entry).exists() {
            symlink(root().join(entry), target).unwrap();
        }
    }
    let manifest = context.path().join("Cargo.toml");
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--offline", "--locked", "--no-deps", "--format-version", "1", "--manifest-path"])
        .arg(manifest)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(context.path().join(".sqlx").is_dir(), "the queries are checked against it");
}

#[test]
fn the_image_is_built_with_this_toolchain_and_starts_what_it_installs() {
    let toolchain = fs::read_to_string(root().join("rust-toolchain.toml")).unwrap();
    let (_, version) = toolchain.split_once("channel = \"").unwrap();
    let version = version.split('"').next().unwrap();
    assert!(
        DOCKERFILE.contains(&format!("FROM rust:{version}-"))
            || DOCKERFILE.contains(&format!("FROM rust:{}-", minor(version)))
    );
    assert!(DOCKERFILE.contains(&format!("RUSTUP_TOOLCHAIN={version}")));
    assert!(DOCKERFILE.contains("cargo build --release --locked -p mailrun "), "and nothing of the tools");
    assert!(DOCKERFILE.contains("COPY --from=build /out/mailrun /usr/local/bin/mailrun"));
    assert!(DOCKERFILE.contains("ENTRYPOINT [\"/usr/local/bin/mailrun\"]"));
}

fn minor(version: &str) -> &str {
    version.rsplit_once('.').map_or(version, |(minor, _)| minor)
}
