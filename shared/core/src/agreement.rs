//! The settings that must be the same in every worker, and how to find where two workers differ.

use serde::{Deserialize, Serialize};

/// The settings that must be the same. Unknown fields, from a later version, are not compared.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Agreement {
    /// `retry.rungs_ms`, or the mailer's default: each delay has a queue.
    pub retry_delays_ms: Vec<u64>,
    /// `heartbeat.interval_ms`.
    pub heartbeat_interval_ms: u64,
    /// `heartbeat.dead_after_ms`: a worker with a longer timeout than the others still sends after they have settled its claims.
    pub dead_after_ms: u64,
    /// `fan_out.sends_per_second`.
    pub sends_per_second: Option<i32>,
    /// `amqp.item_queues`: a queue that no sender consumes is never emptied.
    pub item_queues: u16,
    /// The kinds of runs that the worker has a job for, which follow from its program: any worker may be handed any item. None:
    /// recorded by an earlier version.
    #[serde(default)]
    pub jobs: Option<Vec<String>>,
}

/// A setting with different values in two workers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The key.
    pub key: &'static str,
    /// Our value.
    pub ours: String,
    /// Theirs.
    pub theirs: String,
}

impl Agreement {
    /// The settings whose values differ.
    #[must_use]
    pub fn differences(&self, theirs: &Self) -> Vec<Difference> {
        let list = |delays: &[u64]| delays.iter().map(u64::to_string).collect::<Vec<_>>().join(",");
        let limit = |limit: Option<i32>| limit.map_or_else(|| "no limit".to_owned(), |limit| limit.to_string());
        let jobs = |agreement: &Self| agreement.jobs.as_deref().unwrap_or_default().join(",");
        let values = [
            ("retry.rungs_ms", list(&self.retry_delays_ms), list(&theirs.retry_delays_ms)),
            ("heartbeat.interval_ms", self.heartbeat_interval_ms.to_string(), theirs.heartbeat_interval_ms.to_string()),
            ("heartbeat.dead_after_ms", self.dead_after_ms.to_string(), theirs.dead_after_ms.to_string()),
            ("fan_out.sends_per_second", limit(self.sends_per_second), limit(theirs.sends_per_second)),
            ("amqp.item_queues", self.item_queues.to_string(), theirs.item_queues.to_string()),
            ("the list of jobs", jobs(self), jobs(theirs)),
        ];
        let values = values.into_iter().filter(|(key, ..)| {
            // An earlier version has no list.
            *key != "the list of jobs" || (self.jobs.is_some() && theirs.jobs.is_some())
        });
        let differ = |(_, ours, theirs): &(&str, String, String)| ours != theirs;
        values.filter(differ).map(|(key, ours, theirs)| Difference { key, ours, theirs }).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_difference_names_both_values() {
        let ours = Agreement {
            retry_delays_ms: vec![100, 200],
            heartbeat_interval_ms: 1_000,
            dead_after_ms: 8_000,
            sends_per_second: None,
            item_queues: 1,
            jobs: Some(vec!["invitations".into()]),
        };
        assert_eq!(ours.differences(&ours), []);
        assert_eq!(ours.differences(&Agreement { jobs: None, ..ours.clone() }), [], "an earlier version");
        let jobs = Agreement { jobs: Some(vec!["calls".into(), "invitations".into()]), ..ours.clone() };
        assert_eq!(ours.differences(&jobs)[0].theirs, "calls,invitations");
        let theirs = Agreement { retry_delays_ms: vec![100], sends_per_second: Some(9), ..ours.clone() };
        let difference = |key, ours: &str, theirs: &str| Difference { key, ours: ours.into(), theirs: theirs.into() };
        assert_eq!(
            ours.differences(&theirs),
            [difference("retry.rungs_ms", "100,200", "100"), difference("fan_out.sends_per_second", "no limit", "9")]
        );
    }
}
