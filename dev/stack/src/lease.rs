//! File locks between processes. The kernel frees them when their holder ends, however it ends.

use std::{
    fs::{File, OpenOptions, TryLockError},
    io,
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
    time::{Duration, Instant},
};

/// How often a waiting process looks again.
const POLL: Duration = Duration::from_millis(20);

/// A lock on a file, held until it's dropped.
#[derive(Debug)]
pub(crate) struct Lock {
    pub(crate) file: File,
}

/// Opens a lock file, creating it where it's missing.
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

/// Takes the file for this process alone, or says that somebody holds it.
pub(crate) fn try_exclusive(path: &Path) -> io::Result<Option<Lock>> {
    let file = open(path)?;
    Ok(taken(file.try_lock())?.then_some(Lock { file }))
}

/// A lock file for all users and processes of the machine; `None` if it can't be had.
pub(crate) fn open_shared_by_users(name: &str) -> Option<File> {
    // Not where TMPDIR says: it may say something else to each process, and they would all have a lock of their own.
    let path = Path::new("/tmp").join(name);
    // Reading is enough for a lock, and another user's file can't be opened for creation in a shared folder; it may
    // appear between the first two tries.
    File::open(&path)
        .or_else(|_| OpenOptions::new().create(true).append(true).open(&path))
        .or_else(|_| File::open(&path))
        .ok()
}

/// Like [`try_exclusive`], trying again for a while: another process may be probing at this moment.
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

/// Shares the file with others, waiting while somebody holds it alone.
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

/// Whether somebody holds the file for itself alone. Takes it shared for an instant, so that two probes don't see each other.
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
