//! docs/configuration.md documents every setting and its default, and no others.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use mailrun_app::config::{Config, ConfigError, Named};

const DOCUMENTATION: &str = include_str!("../../../docs/configuration.md");
const UNKNOWN: &str = "no_such_key";

fn load(toml: &str) -> Result<Config, ConfigError> {
    let file = tempfile::Builder::new().suffix(".toml").tempfile().unwrap();
    fs::write(&file, toml).unwrap();
    Config::load(Some(file.path()))
}

/// The texts between backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// The keys of a section, taken from the error about an unknown one.
fn keys(section: &str) -> BTreeSet<String> {
    let error = load(&format!("[{section}]\n{UNKNOWN} = 1\n")).unwrap_err().to_string();
    let (_, expected) = error.split_once("expected").unwrap_or_else(|| panic!("{section}: {error}"));
    quoted(expected).filter(|key| *key != section).map(str::to_owned).collect()
}

/// The documented keys by section, with their documented default.
fn documented() -> BTreeMap<&'static str, BTreeMap<&'static str, &'static str>> {
    let mut sections: BTreeMap<_, BTreeMap<_, _>> = BTreeMap::new();
    for part in DOCUMENTATION.split("\n## `[").skip(1) {
        let (section, text) = part.split_once("]`").unwrap();
        let rows = text.lines().filter_map(|line| line.strip_prefix("| `"));
        for row in rows {
            let cells: Vec<&str> = row.split(" | ").collect();
            // Skip tables whose first column does not hold keys.
            let names: Vec<&str> = cells[0].split(", ").map(|name| name.trim_matches('`')).collect();
            if names.iter().all(|name| name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_')) {
                sections.entry(section).or_default().extend(names.iter().map(|name| (*name, cells[1])));
            }
        }
    }
    sections
}

#[test]
fn documents_every_setting_and_no_other() {
    let documented = documented();
    for (section, described) in &documented {
        let is_section = |key: &String| documented.contains_key(format!("{section}.{key}").as_str());
        let keys: BTreeSet<String> = keys(section).into_iter().filter(|key| !is_section(key)).collect();
        let described: BTreeSet<String> = described.keys().map(|key| (*key).to_owned()).collect();
        assert_eq!(described, keys, "[{section}]");
    }
    let error = load(&format!("{UNKNOWN} = 1\n")).unwrap_err().to_string();
    let (_, sections) = error.split_once("expected").unwrap();
    for section in quoted(sections) {
        assert!(documented.contains_key(section), "[{section}] is not documented");
    }
}

#[test]
fn documents_the_defaults() {
    let mut toml = String::new();
    let mut stated = 0;
    for (section, described) in documented() {
        // Its keys have no defaults.
        if section == "mailer.smtp.dkim" {
            continue;
        }
        toml.push_str(&format!("[{section}]\n"));
        for (key, default) in described {
            let Some(value) = default.starts_with('`').then(|| quoted(default).next().unwrap()) else { continue };
            let is_toml = load(&format!("[{section}]\n{key} = {value}\n")).is_ok();
            let value = if is_toml { value.to_owned() } else { format!("{value:?}") };
            toml.push_str(&format!("{key} = {value}\n"));
            stated += 1;
        }
    }
    let config = Config { named: Named::default(), ..load(&toml).unwrap() };
    assert!(stated > 40, "only {stated} defaults found");
    assert_eq!(format!("{config:#?}"), format!("{:#?}", Config::default()));
}
