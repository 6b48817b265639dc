//! A Debian 13 in a folder of the user's cache, which all checkouts share: where RabbitMQ 4 comes from on a system that
//! packages an older one, and how programs of it run beside the system's.

use std::{
    env,
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::Stdio,
};

use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::Command,
};

use super::{
    error::{StackError, io_error},
    packages::{Package, as_root, ensure_packages, on_path, versions},
};

/// The commands that make it, run by root; see the file.
const MAKE: &str = include_str!("tree.sh");

/// Debian's archive keys come with it: on Ubuntu, debootstrap would do without, and check no signature.
const DEBOOTSTRAP: Package = Package {
    name: "debootstrap",
    purpose: "fetch RabbitMQ 4",
    apt: &["debootstrap", "debian-archive-keyring"],
    elsewhere: "RabbitMQ 4 itself (macOS: `brew install rabbitmq`)",
    present: || {
        on_path("debootstrap").is_some() && Path::new("/usr/share/keyrings/debian-archive-keyring.gpg").is_file()
    },
};

/// Becomes a program of the tree, in a mount namespace of its own, where the tree's programs and libraries lie over the
/// system's. All else is the system's: folders, users, ports, process ids. The process stays the same from here to the
/// program, and the mounts end with it, however it ends. The libraries come first, since the system's `mount` runs with
/// newer ones, but not the other way round.
const ENTER: &str = r#"
mount --rbind "$1/usr/lib" /usr/lib && mount --rbind "$1/usr/bin" /usr/bin || exit
shift
exec -a "$@"
"#;

/// A Debian 13 with RabbitMQ 4.
#[derive(Clone, Debug)]
pub(crate) struct Tree {
    root: PathBuf,
}

impl Tree {
    /// The one in the cache, if it's there.
    pub(crate) fn find() -> Option<Self> {
        Some(Self { root: folder()? }).filter(|tree| tree.root.is_dir())
    }

    /// Makes sure that it's there and that this user can run its programs.
    pub(crate) async fn ensure(report: impl Fn(&str)) -> Result<(), StackError> {
        let tree = match Self::find() {
            Some(tree) => tree,
            None => Self::make(&report).await?,
        };
        let enters = tree.command(Path::new("/usr/bin/true"), OsStr::new("true")).stdin(Stdio::null()).output().await;
        let output = enters.map_err(io_error("Starting a program of", &tree.root))?;
        if output.status.success() {
            return Ok(());
        }
        Err(StackError::Missing(format!(
            "RabbitMQ 4 lies in {}, but this user can't run it there: {}. It takes root, or a system that lets everybody \
             make user and mount namespaces.",
            tree.root.display(),
            String::from_utf8_lossy(&output.stderr).trim()
        )))
    }

    async fn make(report: impl Fn(&str)) -> Result<Self, StackError> {
        ensure_packages(&[DEBOOTSTRAP], &report).await?;
        let Some(root) = folder() else {
            let why = "RabbitMQ 4 is kept in the user's cache: set HOME, or XDG_CACHE_HOME.";
            return Err(StackError::Missing(why.to_owned()));
        };
        if let Some(cache) = root.parent() {
            fs::create_dir_all(cache).map_err(io_error("Creating", cache))?;
        }
        let place = root.display();
        let Some(mut command) = as_root(MAKE).await else {
            return Err(StackError::Missing(format!(
                "This user can't fetch RabbitMQ 4: that takes root, or sudo without a password. As root, run \
                 `debootstrap --variant=minbase --include=rabbitmq-server trixie {place}`, and start Mailrun again."
            )));
        };
        report(&format!("Fetching RabbitMQ 4, with the Debian 13 it runs on, into {place}: 240 MB, once"));
        let failed = || io_error("Starting debootstrap for", &root);
        let mut child = command.arg(&root).stdout(Stdio::piped()).spawn().map_err(failed())?;
        let mut lines = Vec::new();
        if let Some(output) = child.stdout.take() {
            let mut output = BufReader::new(output).lines();
            while let Some(line) = output.next_line().await.map_err(failed())? {
                if let Some(step) = step(&line) {
                    report(step);
                }
                lines.push(line);
            }
        }
        if !child.wait().await.map_err(failed())?.success() {
            let end = lines[lines.len().saturating_sub(10)..].join("\n");
            return Err(StackError::Missing(format!("RabbitMQ 4 could not be fetched:\n{end}")));
        }
        Ok(Self { root })
    }

    /// The server's script and the port mapper, as they are called inside.
    pub(crate) fn programs(&self) -> Option<(PathBuf, PathBuf)> {
        let newest = |parent: &str, prefix: &str, program: &str| {
            let found = versions(self.root.join(parent).to_str()?, prefix).pop()?.join(program);
            found.is_file().then_some(Path::new("/").join(found.strip_prefix(&self.root).ok()?))
        };
        Some((
            newest("usr/lib/rabbitmq/lib", "rabbitmq_server-", "sbin/rabbitmq-server")?,
            newest("usr/lib/erlang", "erts-", "bin/epmd")?,
        ))
    }

    /// The command that becomes a program of the tree, which finds `name` as its own.
    pub(crate) fn command(&self, program: &Path, name: &OsStr) -> Command {
        let mut command = Command::new("unshare");
        if !rustix::process::geteuid().is_root() {
            command.args(["--user", "--map-root-user"]);
        }
        command.args(["--mount", "--", "bash", "-c", ENTER, "enter"]).arg(&self.root).args([name, program.as_os_str()]);
        command
    }
}

/// Where it lies: outside of any checkout, since it is the same for all of them.
fn folder() -> Option<PathBuf> {
    let named = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = named("XDG_CACHE_HOME").or_else(|| Some(named("HOME")?.join(".cache")))?;
    Some(cache.join("mailrun/debian-13"))
}

/// What of debootstrap's many lines tells how far it is.
fn step(line: &str) -> Option<&str> {
    let step = line.strip_prefix("I: ")?.strip_suffix("...")?;
    (step.ends_with(" packages") || step.ends_with(" the base system")).then_some(step)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_steps_are_told_and_the_packages_are_not() {
        assert_eq!(step("I: Unpacking the base system..."), Some("Unpacking the base system"));
        assert_eq!(step("I: Unpacking libc6:amd64..."), None);
        assert_eq!(step("I: Base system installed successfully."), None);
    }

    #[test]
    fn programs_are_called_by_their_place_inside() {
        let dir = tempfile::tempdir().unwrap();
        let tree = Tree { root: dir.path().to_path_buf() };
        assert!(tree.programs().is_none());
        for file in ["rabbitmq/lib/rabbitmq_server-4.0.5/sbin/rabbitmq-server", "erlang/erts-15.2/bin/epmd"] {
            let file = dir.path().join("usr/lib").join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, "").unwrap();
        }
        let (server, epmd) = tree.programs().unwrap();
        assert_eq!(server, Path::new("/usr/lib/rabbitmq/lib/rabbitmq_server-4.0.5/sbin/rabbitmq-server"));
        assert_eq!(epmd, Path::new("/usr/lib/erlang/erts-15.2/bin/epmd"));
    }
}
