//! Installs missing programs from the system's packages (Debian, Ubuntu), or says what to install.

use std::{
    env,
    fs::{self, File},
    io::IsTerminal as _,
    path::{Path, PathBuf},
    process::{Output, Stdio},
};

use tokio::process::Command;

use super::{error::StackError, lease};

/// The commands that install packages as root; see the file.
const INSTALL: &str = include_str!("install.sh");

/// A program that Mailrun needs, and the packages it comes in.
#[derive(Clone, Copy, Debug)]
pub struct Package {
    /// Its name, for people.
    pub name: &'static str,
    /// Its purpose, continuing "to …".
    pub purpose: &'static str,
    /// Its packages in Debian and Ubuntu.
    pub apt: &'static [&'static str],
    /// What to install on other systems.
    pub elsewhere: &'static str,
    /// Whether it is installed.
    pub present: fn() -> bool,
}

/// The browser of the page tests.
pub const CHROMIUM: Package = Package {
    name: "Chromium",
    purpose: "drive the pages in the browser tests",
    apt: &["chromium", "chromium-driver"],
    elsewhere: "Chromium and its chromedriver, both on PATH",
    present: || on_path("chromium").is_some() && on_path("chromedriver").is_some(),
};

/// Gives a process its own clock, for tests that set clocks.
pub const FAKETIME: Package = Package {
    name: "libfaketime",
    purpose: "set the clock of a private PostgreSQL in the clock tests",
    apt: &["faketime"],
    elsewhere: "libfaketime (macOS: `brew install libfaketime`; Fedora: `dnf install libfaketime`)",
    present: || faketime_library().is_some(),
};

/// The path of the library that gives a process its own clock.
pub fn faketime_library() -> Option<PathBuf> {
    // Debian has a folder for each architecture.
    let folders = fs::read_dir("/usr/lib").into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
    let places = folders.chain(["/usr/lib64", "/usr/lib"].map(PathBuf::from));
    places.map(|folder| folder.join("faketime/libfaketime.so.1")).find(|library| library.is_file())
}

/// Installs the missing packages. `report` gets one line per step.
pub async fn ensure_packages(packages: &[Package], report: impl Fn(&str)) -> Result<(), StackError> {
    if missing(packages).is_empty() {
        return Ok(());
    }
    // Several test programs start at once; one of them installs, and the others find it done.
    let _turn = tokio::task::spawn_blocking(install_turn).await.ok().flatten();
    let missing = missing(packages);
    if missing.is_empty() {
        return Ok(());
    }
    let apt: Vec<&str> = missing.iter().flat_map(|package| package.apt).copied().collect();
    if !Path::new("/usr/bin/apt-get").exists() {
        return Err(StackError::Missing(by_hand(&missing, None)));
    }
    let Some(mut command) = as_root(INSTALL).await else {
        return Err(StackError::Missing(by_hand(&missing, Some(&apt.join(" ")))));
    };
    command.args(&apt);
    for package in &missing {
        report(&format!("Installing {} ({}) to {}", package.name, package.apt.join(", "), package.purpose));
    }
    let output = command
        .output()
        .await
        .map_err(|source| StackError::Io { what: "Starting apt-get failed".to_owned(), source })?;
    let missing = self::missing(packages);
    if output.status.success() && missing.is_empty() {
        return Ok(());
    }
    Err(StackError::Install { command: apt_by_hand(&apt.join(" ")), output: last_lines(&output) })
}

fn missing(packages: &[Package]) -> Vec<Package> {
    packages.iter().filter(|package| !(package.present)()).copied().collect()
}

/// Finds a program on PATH, or in the administrators' folders that PATH often omits.
pub(crate) fn on_path(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/usr/local/sbin", "/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(program))
        .find(|file| file.is_file())
}

/// A shell script as root, without arguments: directly, with sudo without a password, or with sudo that asks on the terminal.
pub(crate) async fn as_root(script: &str) -> Option<Command> {
    let mut command = if rustix::process::geteuid().is_root() {
        Command::new("/bin/sh")
    } else {
        let sudo = on_path("sudo")?;
        let silent = Command::new(&sudo)
            .args(["-n", "true"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .await
            .is_ok_and(|status| status.success());
        if !silent && !std::io::stdin().is_terminal() {
            return None;
        }
        let mut command = Command::new(sudo);
        command.arg("/bin/sh");
        command
    };
    command.args(["-c", script, "mailrun"]).stdin(Stdio::null());
    Some(command)
}

/// What to do where Mailrun cannot install. `apt`: the packages, if this system has apt.
fn by_hand(missing: &[Package], apt: Option<&str>) -> String {
    let needs: Vec<_> = missing.iter().map(|package| format!("{} (to {})", package.name, package.purpose)).collect();
    let how = match apt {
        Some(apt) => format!(
            "This user cannot install it: it is not root, and sudo is missing or requires a password without a terminal. As root, run `{}`",
            apt_by_hand(apt)
        ),
        None => {
            let elsewhere: Vec<_> = missing.iter().map(|package| package.elsewhere).collect();
            format!("Mailrun can only install it with apt. Install {}", elsewhere.join(" and "))
        }
    };
    format!(
        "Missing programs: {}. {how}, and start Mailrun again. Or set DATABASE_URL and AMQP_URL to existing servers.",
        needs.join(", ")
    )
}

/// Updates the package lists first: those of a fresh system are empty.
fn apt_by_hand(apt: &str) -> String {
    format!("apt-get update && apt-get install --no-install-recommends {apt}")
}

/// Waits for the machine-wide installation lock. If it cannot be opened (for example, another user's lock file), apt's own lock applies.
fn install_turn() -> Option<File> {
    let file = lease::open_shared_by_users("mailrun-install.lock")?;
    file.lock().ok()?;
    Some(file)
}

fn last_lines(output: &Output) -> String {
    let text = format!("{}\n{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(15)..].join("\n")
}

/// The folders in `parent` whose names start with `prefix`, the highest version last.
pub(crate) fn versions(parent: &str, prefix: &str) -> Vec<PathBuf> {
    let numbers = |path: &PathBuf| -> Vec<u32> {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name[prefix.len()..].split(['.', '-']).map_while(|part| part.parse().ok()).collect()
    };
    let Ok(entries) = fs::read_dir(parent) else {
        return Vec::new();
    };
    let mut found: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(prefix)))
        .collect();
    found.sort_by_key(numbers);
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{POSTGRESQL, RABBITMQ};

    #[test]
    fn versions_are_ordered_numerically() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["server-3.9.1", "server-3.10.8", "other"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let found = versions(dir.path().to_str().unwrap(), "server-");
        assert_eq!(found.len(), 2);
        assert!(found[1].ends_with("server-3.10.8"));
    }

    #[test]
    fn the_text_for_other_systems_names_programs_and_the_alternative() {
        let text = by_hand(&[RABBITMQ, POSTGRESQL], None);
        for part in ["brew install rabbitmq", "brew install postgresql", "DATABASE_URL", "AMQP_URL"] {
            assert!(text.contains(part), "{part} missing in: {text}");
        }
        assert!(
            by_hand(&[RABBITMQ], Some("rabbitmq-server"))
                .contains("`apt-get update && apt-get install --no-install-recommends rabbitmq-server`")
        );
    }
}
