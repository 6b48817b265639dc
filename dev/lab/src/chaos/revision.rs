//! An older revision of Mailrun to upgrade from: checked out in a git worktree and built there. Both are kept, so that the next time is
//! fast.

use std::{
    collections::VecDeque,
    ffi::OsStr,
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context as _, Result, bail, ensure};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::Command,
};

/// A revision with one of these files can parse messages of other versions, including later ones.
const MARKS: [&str; 2] = ["shared/core/tests/golden.rs", "shared/tests/golden.rs"];
/// How many lines of a failed build are shown.
const LAST_LINES: usize = 20;
/// Variables meant for this program or its own build.
const NOT_PASSED_ON: [&str; 7] = [
    "CARGO_BUILD_TARGET_DIR",
    "CARGO_TARGET_DIR",
    "DATABASE_URL",
    "GIT_DIR",
    "GIT_WORK_TREE",
    "RUSTUP_TOOLCHAIN",
    "SQLX_OFFLINE",
];

/// The order in which an installation can be upgraded from a revision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// Only in the order of `docs/upgrading.md`: progress, fan-out, senders, web.
    Documented,
    /// In any order, and also back.
    Any,
}

/// A built older revision.
pub(super) struct Revision {
    pub(super) program: PathBuf,
    pub(super) order: Order,
}

impl Revision {
    /// Checks out `name` below `home`, the folder of the private servers, and builds it.
    pub(super) async fn build(name: &str, home: &Path) -> Result<Self> {
        let checkout = git(Path::new("."), ["rev-parse", "--show-toplevel"]).await;
        let checkout =
            PathBuf::from(checkout.context("--from requires a git checkout of Mailrun: run this inside one")?);
        let commit = format!("{name}^{{commit}}");
        let commit = git(&checkout, ["rev-parse", "--verify", "--end-of-options", &commit]).await;
        let commit = commit.with_context(|| format!("{name} is not a revision of {}", checkout.display()))?;
        let folder = home.join("revisions").join(&commit);
        let source = folder.join("source");
        check_out(&checkout, &commit, &source).await?;
        let target = folder.join("target");
        let short = commit.get(..7).unwrap_or(&commit);
        eprintln!("building {short} in {}; the first time takes some minutes…", source.display());
        build(&source, &target).await.with_context(|| format!("building {short} failed"))?;
        let order = if MARKS.iter().any(|mark| source.join(mark).exists()) { Order::Any } else { Order::Documented };
        Ok(Self { program: target.join("debug").join("mailrun"), order })
    }
}

/// Makes `source` a worktree of this commit, unless it is one.
async fn check_out(checkout: &Path, commit: &str, source: &Path) -> Result<()> {
    if source.exists() {
        let present = git(source, ["rev-parse", "HEAD"]).await;
        ensure!(
            present.is_ok_and(|present| present == commit),
            "{} is not a worktree of {commit}: remove it",
            source.display()
        );
        return Ok(());
    }
    // Git still knows a worktree that was deleted manually.
    git(checkout, ["worktree", "prune"]).await?;
    let arguments = ["worktree", "add", "--detach", "--quiet"].map(OsStr::new);
    git(checkout, arguments.into_iter().chain([source.as_os_str(), OsStr::new(commit)])).await?;
    Ok(())
}

/// Runs git and returns its output.
async fn git<I: IntoIterator<Item = impl AsRef<OsStr>>>(folder: &Path, arguments: I) -> Result<String> {
    let mut command = Command::new("git");
    command.arg("-C").arg(folder).args(arguments);
    let output = without_ours(&mut command).stdin(Stdio::null()).output().await.context("cannot start git")?;
    if !output.status.success() {
        bail!("git: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

/// Builds the program, forwarding cargo's messages.
async fn build(source: &Path, target: &Path) -> Result<()> {
    let mut command = Command::new("cargo");
    command
        .current_dir(source)
        .args(["build", "--locked", "--package", "mailrun", "--bin", "mailrun", "--target-dir"])
        .arg(target);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut cargo = without_ours(&mut command).spawn().context("cannot start cargo")?;
    let stderr = cargo.stderr.take().context("cannot read cargo's messages")?;
    let mut last: VecDeque<String> = VecDeque::new();
    let mut lines = BufReader::new(stderr).lines();
    while let Some(line) = lines.next_line().await? {
        eprintln!("  {line}");
        last.push_back(line);
        if last.len() > LAST_LINES {
            last.pop_front();
        }
    }
    if !cargo.wait().await?.success() {
        bail!("cargo build failed:\n{}", last.make_contiguous().join("\n"));
    }
    Ok(())
}

fn without_ours(command: &mut Command) -> &mut Command {
    for variable in NOT_PASSED_ON {
        command.env_remove(variable);
    }
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn why(name: &str, home: &Path) -> String {
        format!("{:#}", Revision::build(name, home).await.err().unwrap())
    }

    #[tokio::test]
    async fn explains_invalid_revisions() {
        let home = tempfile::tempdir().unwrap();
        assert!(why("no-such-revision", home.path()).await.contains("no-such-revision is not a revision"));
        assert!(why("--help", home.path()).await.contains("--help is not a revision"));
        let source = home.path().join("source");
        std::fs::create_dir(&source).unwrap();
        let error = check_out(Path::new("."), "0000", &source).await.unwrap_err().to_string();
        assert!(error.contains("remove it"), "{error}");
    }
}
