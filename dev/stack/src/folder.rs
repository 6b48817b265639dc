//! The folder of one private stack, with its data, logs, state and secrets.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::{
        ffi::OsStrExt as _,
        fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
};

use uuid::Uuid;

use super::error::{StackError, io_error};

/// A log larger than this is renamed when a server starts.
const LOG_LIMIT_BYTES: u64 = 5 * 1024 * 1024;

/// The folder of a private stack.
#[derive(Clone, Debug)]
pub(crate) struct Folder {
    root: PathBuf,
    marker: String,
}

impl Folder {
    /// Opens the folder, creating it if it does not exist.
    pub(crate) fn open(home: &Path) -> Result<Self, StackError> {
        fs::create_dir_all(home).map_err(io_error("Creating", home))?;
        let root = home.canonicalize().map_err(io_error("Finding", home))?;
        // Derived from the path, not stored: a copied checkout must not take the original's servers for its own.
        let id = Uuid::new_v5(&Uuid::NAMESPACE_URL, root.as_os_str().as_bytes()).simple().to_string();
        let folder = Self { root, marker: format!("mailrun-{}", &id[..12]) };
        fs::create_dir_all(folder.logs()).map_err(io_error("Creating", &folder.logs()))?;
        Ok(folder)
    }

    /// The folder itself.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// A word in the command line of each server of this folder, and of no other process.
    pub(crate) fn marker(&self, server: &str) -> String {
        format!("{}-{server}", self.marker)
    }

    /// The marker without the server's name; also the name of a folder outside the checkout, if one is needed.
    pub(crate) fn name(&self) -> &str {
        &self.marker
    }

    /// A file or folder in it.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// The folder of the logs.
    pub(crate) fn logs(&self) -> PathBuf {
        self.root.join("logs")
    }

    /// The log of one process.
    pub(crate) fn log(&self, name: &str) -> PathBuf {
        self.logs().join(format!("{name}.log"))
    }
}

/// Opens a log for appending; one that has grown large is renamed to `….old` first.
pub fn open_log(path: &Path) -> io::Result<File> {
    if fs::metadata(path).is_ok_and(|log| log.len() > LOG_LIMIT_BYTES) {
        fs::rename(path, path.with_extension("log.old"))?;
    }
    OpenOptions::new().create(true).append(true).mode(0o600).open(path)
}

/// The last lines of a log, for an error message.
pub(crate) fn tail(path: &Path, lines: usize) -> String {
    let read = || -> io::Result<String> {
        let mut file = File::open(path)?;
        let start = file.metadata()?.len().saturating_sub(16 * 1024);
        file.seek(SeekFrom::Start(start))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    match read() {
        Ok(text) => {
            let all: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
            // RabbitMQ prints its whole state in one line when it fails.
            let short = |line: &&str| line.chars().take(240).collect::<String>();
            all[all.len().saturating_sub(lines)..].iter().map(short).collect::<Vec<_>>().join("\n")
        }
        Err(error) => format!("(no log: {error})"),
    }
}

/// Writes a file that only its owner may read, atomically.
pub(crate) fn write_private(path: &Path, content: &[u8]) -> io::Result<()> {
    let new = path.with_extension(format!("new-{}", std::process::id()));
    let mut file = OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(&new)?;
    file.set_permissions(fs::Permissions::from_mode(0o600))?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&new, path)
}

/// Creates a folder that only its owner may enter.
pub(crate) fn private_dir(path: &Path) -> Result<(), StackError> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(io_error("Creating", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tail_returns_the_last_lines() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("a.log");
        fs::write(&log, "one\n\ntwo\nthree\n").unwrap();
        assert_eq!(tail(&log, 2), "two\nthree");
        assert!(tail(&dir.path().join("b.log"), 2).starts_with("(no log"));
    }

    #[test]
    fn markers_differ_between_folders() {
        let dir = tempfile::tempdir().unwrap();
        let one = Folder::open(&dir.path().join("one")).unwrap();
        let two = Folder::open(&dir.path().join("two")).unwrap();
        assert_ne!(one.marker("postgres"), two.marker("postgres"));
        assert_eq!(one.name(), Folder::open(&dir.path().join("one")).unwrap().name());
    }
}
