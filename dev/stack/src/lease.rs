//! File locks between processes. The kernel releases them when their holder ends, for whatever reason.

use std::{
    fs::{File, OpenOptions, TryLockError},
    io,
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
    time::{Duration, Instant},
};

/// How often a waiting process tries again.
const POLL: Duration = Duration::from_millis(20);

/// A lock on a file, held until dropped.
#[derive(Debug)]
pub(crate) struct Lock {
    pub(crate) file: File,
}

/// Opens a lock file, creating it if it does not exist.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).read(true).write(true).truncate(false).mode(0o600).open(path)
}

fn taken(result: Result<(), TryLockError>) -> io::Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Locks the file exclusively; none if another process holds it.
pub(crate) fn try_exclusive(path: &Path) -> io::Result<Option<Lock>> {
    let file = open(path)?;
    Ok(taken(file.try_lock())?.then_some(Lock { file }))
}

/// A lock file for all users and processes of the machine; `None` if it cannot be opened.
pub(crate) fn open_shared_by_users(name: &str) -> Option<File> {
    // Not in TMPDIR: it may differ between processes, and each would have its own lock.
    let path = Path::new("/tmp").join(name);
    // Read access is enough for a lock, and in a shared folder another user's file cannot be opened for creation; it may appear
    // between the first two tries.
    File::open(&path)
        .or_else(|_| OpenOptions::new().create(true).append(true).open(&path))
        .or_else(|_| File::open(&path))
        .ok()
}

/// Like [`try_exclusive`], retrying for a while: another process may be probing at this moment.
pub(crate) async fn exclusive_within(path: &Path, wait: Duration) -> io::Result<Option<Lock>> {
    let end = Instant::now() + wait;
    loop {
        if let Some(lock) = try_exclusive(path)? {
            return Ok(Some(lock));
        }
        if Instant::now() >= end {
            return Ok(None);
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Locks the file shared, waiting while another process holds it exclusively.
pub(crate) async fn shared_within(path: &Path, wait: Duration) -> io::Result<Option<Lock>> {
    let end = Instant::now() + wait;
    let file = open(path)?;
    loop {
        if taken(file.try_lock_shared())? {
            return Ok(Some(Lock { file }));
        }
        if Instant::now() >= end {
            return Ok(None);
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Whether another process holds the file exclusively. Locks it shared for an instant, so that two probes do not see each other.
pub(crate) fn held_exclusively(path: &Path) -> io::Result<bool> {
    let file = open(path)?;
    Ok(!taken(file.try_lock_shared())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_shared_lock_keeps_an_exclusive_one_out_until_it_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lease");
        let one = shared_within(&path, Duration::ZERO).await.unwrap().unwrap();
        let two = shared_within(&path, Duration::ZERO).await.unwrap().unwrap();
        assert!(!held_exclusively(&path).unwrap());
        drop(one);
        assert!(try_exclusive(&path).unwrap().is_none());
        drop(two);
        let alone = try_exclusive(&path).unwrap().unwrap();
        assert!(held_exclusively(&path).unwrap());
        assert!(shared_within(&path, Duration::ZERO).await.unwrap().is_none());
        drop(alone);
    }
}
