//! The figures of a fault bench, as a table and as JSON.

use std::{collections::BTreeMap, fmt};

use serde::Serialize;

/// What came out of one run, or of all together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(super) struct Figures {
    pub(super) recipients: u64,
    /// How many faults struck.
    pub(super) faults: u64,
    /// Neither delivered nor told of: not in the ledger, open for ever, or shown as sent and not delivered.
    pub(super) lost: u64,
    /// Mails to somebody who had got one.
    pub(super) doubled: u64,
    pub(super) sent: u64,
    pub(super) failed: u64,
    /// Shown as perhaps sent.
    pub(super) unknown: u64,
    /// Delivered, and shown as not sent.
    pub(super) untold: u64,
    /// Counters that differ from what they count.
    pub(super) drift: u64,
    /// People suppressed without evidence about their mailbox.
    pub(super) suppressed_without_evidence: u64,
    /// Mails that were offered while the run was paused.
    pub(super) sent_while_paused: u64,
    /// Seconds in which more was offered than the rate limit allows.
    pub(super) over_rate: u64,
    /// Seconds that were not judged, since the machine did not keep time in them.
    pub(super) discarded_windows: u64,
    /// Messages left on queues that should be empty.
    pub(super) left: u64,
    /// Dead letters of items that were sent after all; they do nothing.
    pub(super) outdated_dead_letters: u64,
    /// Messages that the sweeper put back.
    pub(super) put_back: u64,
    /// Claims of dead workers that it gave up.
    pub(super) buried: u64,
    /// Consumers' connections that a watchdog built anew.
    pub(super) rebuilds: u64,
    /// Runs that did not end, and workers that did not.
    pub(super) stuck: u64,
    /// Processes that ended unasked in a run in which none was ended.
    pub(super) died: u64,
    /// Runs that stood still for longer than they may when no fault is under way.
    pub(super) late: u64,
    /// From the form to the end.
    pub(super) seconds: f64,
    /// The longest time for which no counter changed.
    pub(super) longest_stall_seconds: f64,
    /// The longest time for which no counter changed while no fault was under way.
    pub(super) longest_recovery_seconds: f64,
    /// So long it may be.
    pub(super) recovery_bound_seconds: f64,
    /// From the end of the last fault to the end of the run.
    pub(super) recovery_seconds: f64,
}

impl Figures {
    /// Whether a promise was broken.
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

/// The report of a fault bench: sums over its runs, and of the times the longest.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Report {
    seed: u64,
    #[serde(flatten)]
    all: Figures,
    /// Why there is no judgement of a run, by its fault. Before the long table: the first lines of a report are read first.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    no_judgement: BTreeMap<String, String>,
    by_fault: BTreeMap<String, Figures>,
    #[serde(skip)]
    order: Vec<String>,
}

impl Report {
    /// Of no run yet.
    pub(super) fn new(seed: u64) -> Self {
        Self {
            seed,
            all: Figures::default(),
            no_judgement: BTreeMap::new(),
            by_fault: BTreeMap::new(),
            order: Vec::new(),
        }
    }

    /// Adds a run.
    pub(super) fn add(&mut self, name: String, figures: Figures) {
        self.all = self.all.and(&figures);
        self.order.push(name.clone());
        self.by_fault.insert(name, figures);
    }

    /// Adds a run of so many recipients that could not be judged, which counts as stuck.
    pub(super) fn add_without_judgement(&mut self, name: String, recipients: u32, why: String) {
        self.no_judgement.insert(name.clone(), why);
        self.add(name, Figures { recipients: recipients.into(), stuck: 1, ..Figures::default() });
    }

    /// Whether a promise was broken.
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
        for (name, one) in rows.chain([("all together", &self.all)]) {
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
            writeln!(f, "{name}: no judgement, which counts as stuck: {why}")?;
        }
        writeln!(f, "seed {}", self.seed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_add_up_and_the_longest_time_stays() {
        let mut report = Report::new(7);
        let one = Figures { recipients: 10, longest_stall_seconds: 2.0, ..Figures::default() };
        report.add("kill-send".into(), one);
        report.add("mixed".into(), Figures { lost: 1, longest_stall_seconds: 1.0, ..one });
        assert_eq!((report.all.recipients, report.all.lost, report.all.longest_stall_seconds), (20, 1, 2.0));
        assert!(report.is_bad());
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!((&json["seed"], &json["by_fault"]["mixed"]["lost"]), (&7.into(), &1.into()));
        assert_eq!(report.to_string().lines().count(), 5);

        report.add_without_judgement("kill-node".into(), 10, "no node answers".into());
        assert_eq!((report.all.recipients, report.all.stuck), (30, 1));
        let json = serde_json::to_string(&report).unwrap();
        assert!(json.contains(r#""no_judgement":{"kill-node":"no node answers"}"#), "{json}");
        assert!(report.to_string().contains("no node answers"));
    }
}
