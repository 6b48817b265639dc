//! A Debian 13 tree in the user's cache, shared by all checkouts: the source of RabbitMQ 4 on a system with an older package. Its
//! programs run beside the system's.

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

/// The commands that create it as root; see the file.
const MAKE: &str = include_str!("tree.sh");

/// Includes Debian's archive keys: without them, debootstrap on Ubuntu would check no signature.
const DEBOOTSTRAP: Package = Package {
    name: "debootstrap",
    purpose: "fetch RabbitMQ 4",
    apt: &["debootstrap", "debian-archive-keyring"],
    elsewhere: "RabbitMQ 4 itself (macOS: `brew install rabbitmq`)",
    present: || {
        on_path("debootstrap").is_some() && Path::new("/usr/share/keyrings/debian-archive-keyring.gpg").is_file()
    },
};

/// Becomes a program of the tree, in its own mount namespace, in which the tree's programs and libraries are mounted over the
/// system's. Everything else is the system's: folders, users, ports, process ids. The process id stays the same, and the mounts end
/// with the process. The libraries come first, because the system's `mount` works with newer ones, but not the other way round.
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
    /// The one in the cache, if it exists.
    pub(crate) fn find() -> Option<Self> {
        Some(Self { root: folder()? }).filter(|tree| tree.root.is_dir())
    }

    /// Creates it if it does not exist, and checks that this user can run its programs.
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
            "RabbitMQ 4 is in {}, but this user cannot run it: {}. It requires root, or a system that allows all users to create \
            user and mount namespaces.",
            tree.root.display(),
            String::from_utf8_lossy(&output.stderr).trim()
        )))
    }

    async fn make(report: impl Fn(&str)) -> Result<Self, StackError> {
        ensure_packages(&[DEBOOTSTRAP], &report).await?;
        let Some(root) = folder() else {
            let why = "RabbitMQ 4 is stored in the user's cache: set HOME or XDG_CACHE_HOME.";
            return Err(StackError::Missing(why.to_owned()));
        };
        if let Some(cache) = root.parent() {
            fs::create_dir_all(cache).map_err(io_error("Creating", cache))?;
        }
        let place = root.display();
        let Some(mut command) = as_root(MAKE).await else {
            return Err(StackError::Missing(format!(
                "This user cannot download RabbitMQ 4: that requires root, or sudo without a password. As root, run \
                `debootstrap --variant=minbase --include=rabbitmq-server trixie {place}`, and start Mailrun again."
            )));
        };
        report(&format!("Downloading RabbitMQ 4 with Debian 13 to {place}: 240 MB, once"));
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
            return Err(StackError::Missing(format!("Downloading RabbitMQ 4 failed:\n{end}")));
        }
        Ok(Self { root })
    }

    /// The server's script and the port mapper, by their paths inside.
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

    /// A command that becomes a program of the tree, with `name` as its own name.
    pub(crate) fn command(&self, program: &Path, name: &OsStr) -> Command {
        let mut command = Command::new("unshare");
        if !rustix::process::geteuid().is_root() {
            command.args(["--user", "--map-root-user"]);
        }
        command.args(["--mount", "--", "bash", "-c", ENTER, "enter"]).arg(&self.root).args([name, program.as_os_str()]);
        command
    }
}

/// Its folder: outside any checkout, because all checkouts share it.
fn folder() -> Option<PathBuf> {
    let named = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = named("XDG_CACHE_HOME").or_else(|| Some(named("HOME")?.join(".cache")))?;
    Some(cache.join("mailrun/debian-13"))
}

/// The lines of debootstrap's output that show its progress.
fn step(line: &str) -> Option<&str> {
    let step = line.strip_prefix("I: ")?.strip_suffix("...")?;
    (step.ends_with(" packages") || step.ends_with(" the base system")).then_some(step)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_steps_and_not_packages() {
        assert_eq!(step("I: Unpacking the base system..."), Some("Unpacking the base system"));
        assert_eq!(step("I: Unpacking libc6:amd64..."), None);
        assert_eq!(step("I: Base system installed successfully."), None);
    }

    #[test]
    fn programs_have_their_paths_inside() {
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
