//! The results of a fault bench, as a table and as JSON.

use std::{collections::BTreeMap, fmt};

use serde::Serialize;

/// The results of one run, or of all together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(super) struct Counts {
    pub(super) recipients: u64,
    /// Faults injected.
    pub(super) faults: u64,
    /// Neither delivered nor reported: not in the ledger, never settled, or recorded as sent and not delivered.
    pub(super) lost: u64,
    /// Mails to people who already had one.
    pub(super) doubled: u64,
    pub(super) sent: u64,
    pub(super) failed: u64,
    /// Recorded as unknown.
    pub(super) unknown: u64,
    /// Delivered, and recorded as not sent.
    pub(super) untold: u64,
    /// Counters that differ from the items.
    pub(super) drift: u64,
    /// People suppressed without evidence about their mailbox.
    pub(super) suppressed_without_evidence: u64,
    /// Mails offered while the run was paused.
    pub(super) sent_while_paused: u64,
    /// Seconds over the rate limit.
    pub(super) over_rate: u64,
    /// Seconds excluded because the machine stalled in them.
    pub(super) discarded_windows: u64,
    /// Messages left on queues that should be empty.
    pub(super) left: u64,
    /// Dead letters of items that were sent since; they have no effect.
    pub(super) outdated_dead_letters: u64,
    /// Messages republished by the sweeper.
    pub(super) put_back: u64,
    /// Claims of dead workers that it gave up.
    pub(super) buried: u64,
    /// Consumer connections rebuilt by a watchdog.
    pub(super) rebuilds: u64,
    /// Runs and workers that did not end.
    pub(super) stuck: u64,
    /// Processes that ended unexpectedly in a run without faults of processes.
    pub(super) died: u64,
    /// Runs that stalled longer than allowed outside of faults.
    pub(super) late: u64,
    /// From the submission to the end.
    pub(super) seconds: f64,
    /// The longest time without a change of the counters.
    pub(super) longest_stall_seconds: f64,
    /// The longest time without a change of the counters outside of faults.
    pub(super) longest_recovery_seconds: f64,
    /// Its limit.
    pub(super) recovery_bound_seconds: f64,
    /// From the end of the last fault to the end of the run.
    pub(super) recovery_seconds: f64,
}

impl Counts {
    /// Whether a guarantee was broken.
    pub(super) fn is_bad(&self) -> bool {
        self.lost
            + self.doubled
            + self.untold
            + self.drift
            + self.suppressed_without_evidence
            + self.sent_while_paused
            + self.over_rate
            + self.left
            + self.stuck
            + self.died
            + self.late
            > 0
    }

    fn and(self, other: &Self) -> Self {
        Self {
            recipients: self.recipients + other.recipients,
            faults: self.faults + other.faults,
            lost: self.lost + other.lost,
            doubled: self.doubled + other.doubled,
            sent: self.sent + other.sent,
            failed: self.failed + other.failed,
            unknown: self.unknown + other.unknown,
            untold: self.untold + other.untold,
            drift: self.drift + other.drift,
            suppressed_without_evidence: self.suppressed_without_evidence + other.suppressed_without_evidence,
            sent_while_paused: self.sent_while_paused + other.sent_while_paused,
            over_rate: self.over_rate + other.over_rate,
            discarded_windows: self.discarded_windows + other.discarded_windows,
            left: self.left + other.left,
            outdated_dead_letters: self.outdated_dead_letters + other.outdated_dead_letters,
            put_back: self.put_back + other.put_back,
            buried: self.buried + other.buried,
            rebuilds: self.rebuilds + other.rebuilds,
            stuck: self.stuck + other.stuck,
            died: self.died + other.died,
            late: self.late + other.late,
            seconds: self.seconds + other.seconds,
            longest_stall_seconds: self.longest_stall_seconds.max(other.longest_stall_seconds),
            longest_recovery_seconds: self.longest_recovery_seconds.max(other.longest_recovery_seconds),
            recovery_bound_seconds: self.recovery_bound_seconds.max(other.recovery_bound_seconds),
            recovery_seconds: self.recovery_seconds.max(other.recovery_seconds),
        }
    }
}

/// The report of a fault bench: sums over its runs, and the maximum of times.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Report {
    seed: u64,
    #[serde(flatten)]
    all: Counts,
    /// Runs that could not be checked, with the reason, by fault. Before the long table, because the first lines are read first.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    no_judgement: BTreeMap<String, String>,
    by_fault: BTreeMap<String, Counts>,
    #[serde(skip)]
    order: Vec<String>,
}

impl Report {
    /// A report without runs.
    pub(super) fn new(seed: u64) -> Self {
        Self {
            seed,
            all: Counts::default(),
            no_judgement: BTreeMap::new(),
            by_fault: BTreeMap::new(),
            order: Vec::new(),
        }
    }

    /// Adds a run.
    pub(super) fn add(&mut self, name: String, counts: Counts) {
        self.all = self.all.and(&counts);
        self.order.push(name.clone());
        self.by_fault.insert(name, counts);
    }

    /// Adds a run that could not be checked, which counts as stuck.
    pub(super) fn add_unchecked(&mut self, name: String, recipients: u32, why: String) {
        self.no_judgement.insert(name.clone(), why);
        self.add(name, Counts { recipients: recipients.into(), stuck: 1, ..Counts::default() });
    }

    /// Whether a guarantee was broken.
    pub(super) fn is_bad(&self) -> bool {
        self.all.is_bad()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<22} {:>10} {:>6} {:>5} {:>7} {:>7} {:>6} {:>5} {:>5} {:>8} {:>8} {:>8} {:>6} {:>8}",
            "fault",
            "recipients",
            "faults",
            "lost",
            "doubled",
            "unknown",
            "drift",
            "left",
            "stuck",
            "put back",
            "stall",
            "after",
            "bound",
            "to end"
        )?;
        let rows = self.order.iter().filter_map(|name| Some((name.as_str(), self.by_fault.get(name)?)));
        for (name, one) in rows.chain([("total", &self.all)]) {
            writeln!(
                f,
                "{name:<22} {:>10} {:>6} {:>5} {:>7} {:>7} {:>6} {:>5} {:>5} {:>8} {:>6.1} s {:>6.1} s {:>4.0} s {:>6.1} s",
                one.recipients,
                one.faults,
                one.lost,
                one.doubled + one.untold,
                one.unknown,
                one.drift,
                one.left,
                one.stuck + one.died + one.late,
                one.put_back,
                one.longest_stall_seconds,
                one.longest_recovery_seconds,
                one.recovery_bound_seconds,
                one.recovery_seconds
            )?;
        }
        for (name, why) in &self.no_judgement {
            writeln!(f, "{name}: not checked, counts as stuck: {why}")?;
        }
        writeln!(f, "seed {}", self.seed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_summed_and_times_are_maxima() {
        let mut report = Report::new(7);
        let one = Counts { recipients: 10, longest_stall_seconds: 2.0, ..Counts::default() };
        report.add("kill-send".into(), one);
        report.add("mixed".into(), Counts { lost: 1, longest_stall_seconds: 1.0, ..one });
        assert_eq!((report.all.recipients, report.all.lost, report.all.longest_stall_seconds), (20, 1, 2.0));
        assert!(report.is_bad());
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!((&json["seed"], &json["by_fault"]["mixed"]["lost"]), (&7.into(), &1.into()));
        assert_eq!(report.to_string().lines().count(), 5);

        report.add_unchecked("kill-node".into(), 10, "no node answers".into());
        assert_eq!((report.all.recipients, report.all.stuck), (30, 1));
        let json = serde_json::to_string(&report).unwrap();
        assert!(json.contains(r#""no_judgement":{"kill-node":"no node answers"}"#), "{json}");
        assert!(report.to_string().contains("no node answers"));
    }
}
