//! The report, as text and as JSON.

use std::fmt::{self, Display};

use serde::Serialize;

/// A fault.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Finding {
    pub(super) check: &'static str,
    /// A summary of a few words.
    pub(super) subject: String,
    /// What is wrong, and what it means for the recipients.
    pub(super) what: String,
    /// What `--fix` does, or what a person must do.
    pub(super) repair: String,
    /// Whether `--fix` has repaired it.
    pub(super) repaired: bool,
}

impl Finding {
    /// A finding that is not repaired yet.
    pub(super) fn new(
        check: &'static str,
        subject: impl Into<String>,
        what: impl Into<String>,
        repair: impl Into<String>,
    ) -> Self {
        Self { check, subject: subject.into(), what: what.into(), repair: repair.into(), repaired: false }
    }

    /// Records the result of a repair.
    pub(super) fn with_repair<E: Display>(mut self, result: Result<(), E>) -> Self {
        match result {
            Ok(()) => self.repaired = true,
            Err(error) => self.repair = format!("{}. The repair failed: {error:#}", self.repair),
        }
        self
    }
}

#[derive(Clone, Debug)]
enum Line {
    Fine(&'static str, String),
    Remark(&'static str, String),
    Found(usize),
}

/// The results of all checks, in order.
#[derive(Clone, Debug, Default)]
pub(super) struct Report {
    lines: Vec<Line>,
    findings: Vec<Finding>,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Json<'a> {
    well: bool,
    findings: &'a [Finding],
    remarks: Vec<Remark<'a>>,
}

#[derive(Serialize)]
struct Remark<'a> {
    check: &'static str,
    what: &'a str,
}

impl Report {
    /// Adds a check without findings.
    pub(super) fn fine(&mut self, check: &'static str, text: impl Into<String>) {
        self.lines.push(Line::Fine(check, text.into()));
    }

    /// Adds something worth knowing that is not a fault.
    pub(super) fn remark(&mut self, check: &'static str, text: impl Into<String>) {
        self.lines.push(Line::Remark(check, text.into()));
    }

    /// Adds a fault.
    pub(super) fn add(&mut self, finding: Finding) {
        self.lines.push(Line::Found(self.findings.len()));
        self.findings.push(finding);
    }

    /// Adds a finding if a check failed.
    pub(super) fn note(&mut self, check: &'static str, result: anyhow::Result<()>) {
        if let Err(error) = result {
            let what = format!("{error:#}. Its findings are unknown");
            self.add(Finding::new(check, "the check failed", what, "Run mailrun doctor again"));
        }
    }

    /// Whether no fault remains.
    pub(super) fn is_well(&self) -> bool {
        self.remaining() == 0
    }

    /// The number of findings that are not repaired.
    pub(super) fn remaining(&self) -> usize {
        self.findings.iter().filter(|finding| !finding.repaired).count()
    }

    /// Whether `check` has findings.
    pub(super) fn has_found(&self, check: &str) -> bool {
        self.findings.iter().any(|finding| finding.check == check)
    }

    /// The report as one JSON object on one line.
    pub(super) fn json(&self) -> serde_json::Result<String> {
        let remarks = self.lines.iter().filter_map(|line| match line {
            Line::Remark(check, what) => Some(Remark { check, what }),
            _ => None,
        });
        let json = Json { well: self.is_well(), findings: &self.findings, remarks: remarks.collect() };
        serde_json::to_string(&json)
    }
}

impl Display for Report {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in &self.lines {
            let (mark, check, text) = match line {
                Line::Fine(check, text) => ("fine", *check, text),
                Line::Remark(check, text) => ("remark", *check, text),
                Line::Found(index) => {
                    let finding = &self.findings[*index];
                    (if finding.repaired { "repaired" } else { "FINDING" }, finding.check, &finding.subject)
                }
            };
            writeln!(out, "{mark:<8}  {check:<12}  {text}")?;
        }
        for finding in &self.findings {
            let Finding { check, subject, what, repair, repaired } = finding;
            let done = if *repaired { "Repaired" } else { "To do" };
            writeln!(out, "\n{check}: {subject}\n  {what}.\n  {done}: {repair}.")?;
        }
        writeln!(out)?;
        match (self.findings.len(), self.remaining()) {
            (0, _) => writeln!(out, "No faults found."),
            (_, 0) => writeln!(out, "All faults were repaired."),
            (1, _) => writeln!(out, "1 finding."),
            (all, remaining) if all == remaining => writeln!(out, "{all} findings."),
            (all, remaining) => writeln!(out, "{all} findings, {} of them repaired.", all - remaining),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_well_when_no_finding_remains() {
        let mut report = Report::default();
        report.fine("counters", "right");
        report.remark("workers", "one run is paused");
        assert!(report.is_well() && report.to_string().ends_with("No faults found.\n"));
        let finding = Finding::new("people", "a flag", "It is off", "--fix sets it");
        report.add(finding.clone().with_repair(Ok::<_, String>(())));
        assert!(report.is_well() && report.to_string().contains("repaired  people"));
        report.add(finding.with_repair(Err("no connection")));
        assert_eq!((report.is_well(), report.remaining()), (false, 1));
        let text = report.to_string();
        assert!(text.contains("--fix sets it. The repair failed: no connection."), "{text}");
        assert!(text.ends_with("2 findings, 1 of them repaired.\n"), "{text}");
    }

    #[test]
    fn json_is_one_object() {
        let mut report = Report::default();
        report.remark("workers", "one run is paused");
        report.add(Finding::new("people", "a flag", "It is off", "--fix sets it"));
        let json: serde_json::Value = serde_json::from_str(&report.json().unwrap()).unwrap();
        let expected = serde_json::json!({
            "well": false,
            "findings": [
                { "check": "people", "subject": "a flag", "what": "It is off", "repair": "--fix sets it", "repaired": false }
            ],
            "remarks": [{ "check": "workers", "what": "one run is paused" }],
        });
        assert_eq!(json, expected);
    }
}
