//! An older revision of Mailrun, to upgrade from: checked out in a git worktree and built there. Both stay, so that the second
//! time costs nothing.

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

/// A revision that has one of these files understands messages of other versions, later ones included.
const MARKS: [&str; 2] = ["shared/core/tests/golden.rs", "shared/tests/golden.rs"];
/// So many lines of a build that failed are shown.
const LAST_LINES: usize = 20;
/// Variables that are meant for this program, or for its own build.
const NOT_PASSED_ON: [&str; 7] = [
    "CARGO_BUILD_TARGET_DIR",
    "CARGO_TARGET_DIR",
    "DATABASE_URL",
    "GIT_DIR",
    "GIT_WORK_TREE",
    "RUSTUP_TOOLCHAIN",
    "SQLX_OFFLINE",
];

/// In which order an installation can be upgraded from a revision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// Only as `docs/upgrading.md` says: progress, fan-out, senders, pages.
    Documented,
    /// In any order, and back as well.
    Any,
}

/// An older revision that is built.
pub(super) struct Revision {
    pub(super) program: PathBuf,
    pub(super) order: Order,
}

impl Revision {
    /// Checks `name` out below `home`, the folder of the private servers, and builds it.
    ///
    /// # Errors
    /// When this is no git checkout, there is no such revision, or it can't be built.
    pub(super) async fn build(name: &str, home: &Path) -> Result<Self> {
        let checkout = git(Path::new("."), ["rev-parse", "--show-toplevel"]).await;
        let checkout =
            PathBuf::from(checkout.context("--from takes a git checkout of Mailrun: run this inside of one")?);
        let commit = format!("{name}^{{commit}}");
        let commit = git(&checkout, ["rev-parse", "--verify", "--end-of-options", &commit]).await;
        let commit = commit.with_context(|| format!("{name} is no revision of {}", checkout.display()))?;
        let folder = home.join("revisions").join(&commit);
        let source = folder.join("source");
        check_out(&checkout, &commit, &source).await?;
        let target = folder.join("target");
        let short = commit.get(..7).unwrap_or(&commit);
        eprintln!("building {short} in {}; the first time takes some minutes …", source.display());
        build(&source, &target).await.with_context(|| format!("{short} can't be built"))?;
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
    // One that was deleted by hand is still known to git.
    git(checkout, ["worktree", "prune"]).await?;
    let arguments = ["worktree", "add", "--detach", "--quiet"].map(OsStr::new);
    git(checkout, arguments.into_iter().chain([source.as_os_str(), OsStr::new(commit)])).await?;
    Ok(())
}

/// What git prints.
async fn git<I: IntoIterator<Item = impl AsRef<OsStr>>>(folder: &Path, arguments: I) -> Result<String> {
    let mut command = Command::new("git");
    command.arg("-C").arg(folder).args(arguments);
    let output = without_ours(&mut command).stdin(Stdio::null()).output().await.context("git can't be started")?;
    if !output.status.success() {
        bail!("git: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

/// Builds the program, and passes on what cargo says meanwhile.
async fn build(source: &Path, target: &Path) -> Result<()> {
    let mut command = Command::new("cargo");
    command
        .current_dir(source)
        .args(["build", "--locked", "--package", "mailrun", "--bin", "mailrun", "--target-dir"])
        .arg(target);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut cargo = without_ours(&mut command).spawn().context("cargo can't be started")?;
    let stderr = cargo.stderr.take().context("cargo's messages can't be read")?;
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
    async fn says_what_is_wrong_with_a_revision() {
        let home = tempfile::tempdir().unwrap();
        assert!(why("no-such-revision", home.path()).await.contains("no-such-revision is no revision"));
        assert!(why("--help", home.path()).await.contains("--help is no revision"));
        let source = home.path().join("source");
        std::fs::create_dir(&source).unwrap();
        let error = check_out(Path::new("."), "0000", &source).await.unwrap_err().to_string();
        assert!(error.contains("remove it"), "{error}");
    }
}
