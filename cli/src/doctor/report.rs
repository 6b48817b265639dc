//! What was found, as text for people and as JSON for programs.

use std::fmt::{self, Display};

use serde::Serialize;

/// Something that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Finding {
    /// The check that found it.
    pub(super) check: &'static str,
    /// What it is about, in a few words.
    pub(super) subject: String,
    /// What is wrong, and what that means for the recipients.
    pub(super) what: String,
    /// What `--fix` does, or what a person has to.
    pub(super) repair: String,
    /// Whether `--fix` has done it.
    pub(super) repaired: bool,
}

impl Finding {
    /// Something that a person has to repair, or that [`Self::mended`] says was repaired.
    pub(super) fn new(
        check: &'static str,
        subject: impl Into<String>,
        what: impl Into<String>,
        repair: impl Into<String>,
    ) -> Self {
        Self { check, subject: subject.into(), what: what.into(), repair: repair.into(), repaired: false }
    }

    /// Notes how the repair ended.
    pub(super) fn mended<E: Display>(mut self, ended: Result<(), E>) -> Self {
        match ended {
            Ok(()) => self.repaired = true,
            Err(error) => self.repair = format!("{}. That was tried, and failed: {error:#}", self.repair),
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

/// All that was looked at, in this order.
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
    /// As it has to be.
    pub(super) fn fine(&mut self, check: &'static str, text: impl Into<String>) {
        self.lines.push(Line::Fine(check, text.into()));
    }

    /// No fault, but worth knowing.
    pub(super) fn remark(&mut self, check: &'static str, text: impl Into<String>) {
        self.lines.push(Line::Remark(check, text.into()));
    }

    /// A fault.
    pub(super) fn add(&mut self, finding: Finding) {
        self.lines.push(Line::Found(self.findings.len()));
        self.findings.push(finding);
    }

    /// Notes that a check could not be carried out to its end, if so.
    pub(super) fn note(&mut self, check: &'static str, ended: anyhow::Result<()>) {
        if let Err(error) = ended {
            let what = format!("{error:#}. What it would have found is not known");
            self.add(Finding::new(check, "the check was broken off", what, "Run mailrun doctor again"));
        }
    }

    /// Whether nothing is wrong any more.
    pub(super) fn is_well(&self) -> bool {
        self.remaining() == 0
    }

    /// Findings that were not repaired.
    pub(super) fn remaining(&self) -> usize {
        self.findings.iter().filter(|finding| !finding.repaired).count()
    }

    /// Whether `check` has found something.
    pub(super) fn has_found(&self, check: &str) -> bool {
        self.findings.iter().any(|finding| finding.check == check)
    }

    /// One object, on one line.
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
            (0, _) => writeln!(out, "All is well."),
            (_, 0) => writeln!(out, "All that was wrong is repaired."),
            (1, _) => writeln!(out, "One finding."),
            (all, remaining) if all == remaining => writeln!(out, "{all} findings."),
            (all, remaining) => writeln!(out, "{all} findings, {} of them repaired.", all - remaining),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_well_when_nothing_is_left_to_do() {
        let mut report = Report::default();
        report.fine("counters", "right");
        report.remark("workers", "one run is paused");
        assert!(report.is_well() && report.to_string().ends_with("All is well.\n"));
        let finding = Finding::new("people", "a flag", "It is off", "--fix sets it");
        report.add(finding.clone().mended(Ok::<_, String>(())));
        assert!(report.is_well() && report.to_string().contains("repaired  people"));
        report.add(finding.mended(Err("no connection")));
        assert_eq!((report.is_well(), report.remaining()), (false, 1));
        let text = report.to_string();
        assert!(text.contains("--fix sets it. That was tried, and failed: no connection."), "{text}");
        assert!(text.ends_with("2 findings, 1 of them repaired.\n"), "{text}");
    }

    #[test]
    fn a_program_reads_one_object() {
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
