//! Failed logins: each failure delays the answer longer, and a client with too many failures is refused for a while.

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use moka::sync::Cache;

/// Failures that a client may have in a row.
const BURST: u32 = 10;
/// After each such time, one failure is forgotten.
const REGAIN: Duration = Duration::from_secs(20);
/// Delay of the answer to the first failure. It doubles with each further one, …
const FIRST_DELAY: Duration = Duration::from_millis(250);
/// … up to this.
const LONGEST_DELAY: Duration = Duration::from_secs(4);
/// Maximum number of remembered clients.
const CLIENTS: u64 = 10_000;

/// Recent failures by client.
#[derive(Debug)]
pub(crate) struct Logins(Cache<IpAddr, Failures>);

/// A client's failures. One is forgotten after each [`REGAIN`], so only the time when the last one is forgotten is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Failures {
    forgotten_at: Instant,
}

/// The consequence of a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Failed {
    /// How long to delay the answer.
    pub(crate) delay: Duration,
    /// How many failures of the client are remembered.
    pub(crate) failures: u32,
    /// Whether further attempts are refused for now.
    pub(crate) limited: bool,
    /// Whether this attempt exceeds the limit: simultaneous attempts all pass the check before it.
    pub(crate) over_limit: bool,
}

impl Failures {
    fn count(self, now: Instant) -> u32 {
        let left = self.forgotten_at.saturating_duration_since(now);
        u32::try_from(left.as_nanos().div_ceil(REGAIN.as_nanos())).unwrap_or(u32::MAX)
    }

    /// How long the client must wait before its next attempt; none if it need not.
    fn wait(self, now: Instant) -> Option<Duration> {
        let wait = self.forgotten_at.saturating_duration_since(now).saturating_sub(REGAIN * (BURST - 1));
        (!wait.is_zero()).then_some(wait)
    }

    fn after_another(known: Option<Self>, now: Instant) -> Self {
        Self { forgotten_at: known.map_or(now, |known| known.forgotten_at.max(now)) + REGAIN }
    }
}

impl Logins {
    pub(crate) fn new() -> Self {
        Self(Cache::builder().max_capacity(CLIENTS).time_to_idle(REGAIN * 2 * BURST).build())
    }

    /// How long this client must wait before its next attempt is checked; none if it need not.
    pub(crate) fn wait(&self, client: IpAddr, now: Instant) -> Option<Duration> {
        self.0.get(&network(client))?.wait(now)
    }

    /// Counts a failure, before its answer is delayed, so that simultaneous attempts count.
    pub(crate) fn failed(&self, client: IpAddr, now: Instant) -> Failed {
        let entry = self.0.entry(network(client));
        let failures = entry.and_upsert_with(|known| Failures::after_another(known.map(moka::Entry::into_value), now));
        let failures = failures.into_value();
        let count = failures.count(now);
        let delay = FIRST_DELAY.saturating_mul(1 << count.saturating_sub(1).min(16)).min(LONGEST_DELAY);
        Failed { delay, failures: count, limited: failures.wait(now).is_some(), over_limit: count > BURST }
    }
}

/// An IPv6 client controls its whole /64.
fn network(client: IpAddr) -> IpAddr {
    match client.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6((u128::from(address) >> 64 << 64).into()),
        address => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn each_failure_delays_the_answer_longer_until_attempts_are_refused() {
        let (logins, client, now) = (Logins::new(), ip("192.0.2.7"), Instant::now());
        let failed: Vec<_> = (0..BURST).map(|_| logins.failed(client, now)).collect();
        assert!(failed.windows(2).all(|pair| pair[0].delay <= pair[1].delay));
        assert_eq!((failed[0].delay, failed[9].delay), (FIRST_DELAY, LONGEST_DELAY));
        assert!(failed[..9].iter().all(|failed| !failed.limited) && failed[9].limited);
        assert_eq!(logins.wait(client, now), Some(REGAIN));
        assert_eq!(logins.wait(ip("192.0.2.8"), now), None, "another client");
        let later = now + REGAIN;
        assert_eq!(logins.wait(client, later), None);
        assert!(logins.failed(client, later).limited, "one attempt at a time from then on");
        assert_eq!(logins.failed(client, later + REGAIN * BURST).failures, 1, "all failures are forgotten");
    }

    #[test]
    fn an_ipv6_network_is_one_client() {
        let (logins, now) = (Logins::new(), Instant::now());
        for host in 0..BURST {
            logins.failed(ip(&format!("2001:db8::{host:x}")), now);
        }
        assert!(logins.wait(ip("2001:db8::ffff"), now).is_some());
        assert!(logins.wait(ip("2001:db8:0:1::1"), now).is_none());
        assert_eq!(network(ip("::ffff:192.0.2.7")), ip("192.0.2.7"));
    }
}
