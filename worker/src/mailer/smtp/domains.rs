//! Bounds the connections per recipient domain: large providers reject senders that open many at once.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Once this many domains are known, unused ones are removed.
const KEPT: usize = 4_096;

/// The domains that this process sends to.
pub struct Domains {
    limit: usize,
    known: Mutex<HashMap<String, Weak<Semaphore>>>,
}

impl Domains {
    /// At most `limit` mails at a time for each domain; 0: no limit.
    pub fn new(limit: usize) -> Self {
        Self { limit, known: Mutex::default() }
    }

    /// Waits until fewer than `limit` mails are being sent to `domain`. Hold the permit while sending.
    pub async fn enter(&self, domain: &str) -> Option<OwnedSemaphorePermit> {
        if self.limit == 0 {
            return None;
        }
        let semaphore = self.semaphore(domain);
        // The semaphore is never closed.
        semaphore.acquire_owned().await.ok()
    }

    fn semaphore(&self, domain: &str) -> Arc<Semaphore> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= KEPT {
            known.retain(|_, semaphore| semaphore.strong_count() > 0);
        }
        if let Some(semaphore) = known.get(domain).and_then(Weak::upgrade) {
            return semaphore;
        }
        let semaphore = Arc::new(Semaphore::new(self.limit));
        known.insert(domain.to_owned(), Arc::downgrade(&semaphore));
        semaphore
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn each_domain_has_its_own_limit() {
        let domains = Domains::new(1);
        let first = domains.enter("a").await;
        assert!(domains.enter("a").now_or_never().is_none());
        assert!(domains.enter("b").now_or_never().is_some());
        drop(first);
        assert!(domains.enter("a").now_or_never().is_some());
        assert!(Domains::new(0).enter("a").await.is_none());
    }

    #[tokio::test]
    async fn unused_domains_are_removed() {
        let domains = Domains::new(1);
        let held = domains.enter("held").await;
        for number in 0..2 * KEPT {
            domains.enter(&number.to_string()).await;
        }
        assert!(domains.known.lock().unwrap().len() <= KEPT);
        assert!(domains.enter("held").now_or_never().is_none());
        drop(held);
    }
}
