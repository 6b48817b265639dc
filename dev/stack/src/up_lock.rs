//! The lock that allows one `mailrun up` per folder, and tells a second one the URL of the first one's page.

use std::{
    fs,
    io::{self, Seek as _, SeekFrom, Write as _},
    path::Path,
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::{
    error::{StackError, io_error},
    folder::Folder,
    lease::{self, Lock},
};

/// A running `mailrun up`.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Running {
    /// The process id.
    pub pid: u32,
    /// The URL of its page, once it is available.
    pub web_url: Option<String>,
}

/// Why the lock was refused.
#[derive(Debug, thiserror::Error)]
pub enum UpLockRefused {
    /// Another `mailrun up` holds it.
    #[error("Mailrun already runs here: {} (pid {})", .0.web_url.as_deref().unwrap_or("its page is not available yet"), .0.pid)]
    Running(Running),
    /// The lock file cannot be used.
    #[error(transparent)]
    Stack(#[from] StackError),
}

/// Held by the one `mailrun up` of a folder.
#[derive(Debug)]
pub struct UpLock {
    lock: Lock,
}

impl UpLock {
    /// Takes the lock, or reports its holder.
    pub async fn acquire(home: &Path) -> Result<Self, UpLockRefused> {
        let path = Folder::open(home)?.path("up.lock");
        // Retried, because `running` in another process takes the lock for an instant.
        let lock =
            lease::exclusive_within(&path, Duration::from_millis(300)).await.map_err(io_error("Locking", &path))?;
        let Some(lock) = lock else {
            return Err(UpLockRefused::Running(read(&path)));
        };
        let ours = Self { lock };
        ours.write(None).map_err(io_error("Writing", &path))?;
        Ok(ours)
    }

    /// Publishes the page's URL to callers of [`running`].
    pub fn publish_web_url(&self, url: &str) -> Result<(), StackError> {
        self.write(Some(url.to_owned()))
            .map_err(|source| StackError::Io { what: "Writing the up.lock file failed".to_owned(), source })
    }

    fn write(&self, web_url: Option<String>) -> io::Result<()> {
        let content = serde_json::to_vec(&Running { pid: std::process::id(), web_url })?;
        // In place, because the lock belongs to this file; padded, so that a reader never sees the rest of a longer text.
        let mut padded = content;
        padded.resize(512.max(padded.len()), b' ');
        let mut file = &self.lock.file;
        file.seek(SeekFrom::Start(0))?;
        file.write_all(&padded)?;
        file.set_len(padded.len() as u64)
    }
}

/// The running `mailrun up` of a folder, if any.
pub fn running(home: &Path) -> Option<Running> {
    let path = home.join("up.lock");
    (path.exists() && lease::held_exclusively(&path).unwrap_or(false)).then(|| read(&path))
}

/// The content of the lock file; its holder may not have written it yet.
fn read(path: &Path) -> Running {
    fs::read(path)
        .ok()
        .and_then(|content| serde_json::from_slice(&content).ok())
        .unwrap_or(Running { pid: 0, web_url: None })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_second_one_learns_the_url_of_the_first() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(running(dir.path()), None);
        let first = UpLock::acquire(dir.path()).await.unwrap();
        first.publish_web_url("http://127.0.0.1:8080/").unwrap();
        let expected = Running { pid: std::process::id(), web_url: Some("http://127.0.0.1:8080/".to_owned()) };
        assert_eq!(running(dir.path()), Some(expected.clone()));
        match UpLock::acquire(dir.path()).await {
            Err(UpLockRefused::Running(found)) => assert_eq!(found, expected),
            other => panic!("expected a refusal, got {other:?}"),
        }
        drop(first);
        assert_eq!(running(dir.path()), None);
    }
}
