//! PostgreSQL's settings that determine whether accepted data survives a crash and a failover.

use mailrun_ledger::durability::Durability;

use super::report::{Finding, Report};

pub(super) const CHECK: &str = "durability";

/// Reports what a crash or a failover may lose with these settings.
pub(super) fn examine(durability: &Durability, report: &mut Report) {
    let Durability { fsync, full_page_writes, synchronous_commit, synchronous_standbys, standbys, is_standby } =
        durability;
    let crash =
        "A power failure can lose accepted lists and the record of sent invitations, so that people receive two";
    if !fsync {
        report.add(Finding::new(
            CHECK,
            "fsync is off",
            format!("PostgreSQL does not flush writes to disk. {crash}, and can corrupt the database"),
            "Set fsync = on",
        ));
    }
    if !full_page_writes {
        report.add(Finding::new(
            CHECK,
            "full_page_writes is off",
            "A page that was partly written at a power failure cannot be restored, unless the file system prevents partial writes",
            "Set full_page_writes = on",
        ));
    }
    if matches!(synchronous_commit.as_str(), "off" | "local") {
        let what = match synchronous_commit.as_str() {
            "off" => format!("Mailrun requests synchronous commits, but its session does not have them. {crash}"),
            _ => "Commits do not wait for the standbys, although Mailrun requests it".to_owned(),
        };
        report.add(Finding::new(
            CHECK,
            format!("synchronous_commit is {synchronous_commit}"),
            what,
            "Look for a connection pooler that ignores session settings, and set synchronous_commit = on there",
        ));
    }
    if *is_standby {
        report.add(Finding::new(
            CHECK,
            "PostgreSQL is a standby",
            "It accepts no writes: no list is accepted and nothing is sent",
            "Promote it, or set database.url to the primary",
        ));
    }
    if !synchronous_standbys.is_empty() && *standbys == 0 && !*is_standby {
        report.add(Finding::new(
            CHECK,
            "no standby is connected",
            format!(
                "Commits wait for one (synchronous_standby_names = '{synchronous_standbys}'), so nothing is accepted or sent"
            ),
            "Start the standby",
        ));
    }
    if *standbys > 0 && synchronous_standbys.is_empty() {
        let are = if *standbys == 1 { "The standby is".to_owned() } else { format!("All {standbys} standbys are") };
        report.remark(
            CHECK,
            format!(
                "{are} asynchronous: a failover loses the newest commits, including records of sent invitations. Before starting \
                anything on a promoted standby, see docs/cluster.md"
            ),
        );
    }
    if !report.has_found(CHECK) {
        let standby = match (synchronous_standbys.is_empty(), standbys) {
            (true, 0) => "there is no standby".to_owned(),
            (true, _) => "commits do not wait for a standby".to_owned(),
            (false, _) => format!("commits wait for a standby ({synchronous_standbys})"),
        };
        report.fine(
            CHECK,
            format!("commits are durable: fsync, full_page_writes and synchronous_commit are on; {standby}"),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sound() -> Durability {
        Durability {
            fsync: true,
            full_page_writes: true,
            synchronous_commit: "on".into(),
            synchronous_standbys: String::new(),
            standbys: 0,
            is_standby: false,
        }
    }

    fn examined(durability: &Durability) -> (usize, String) {
        let mut report = Report::default();
        examine(durability, &mut report);
        (report.remaining(), report.to_string())
    }

    #[test]
    fn every_setting_that_can_lose_a_commit_is_found() {
        assert_eq!(examined(&sound()).0, 0);
        for (wrong, words) in [
            (Durability { fsync: false, ..sound() }, "fsync is off"),
            (Durability { full_page_writes: false, ..sound() }, "full_page_writes is off"),
            (Durability { synchronous_commit: "off".into(), ..sound() }, "synchronous_commit is off"),
            (Durability { synchronous_commit: "local".into(), ..sound() }, "synchronous_commit is local"),
            (Durability { is_standby: true, ..sound() }, "is a standby"),
            (Durability { synchronous_standbys: "*".into(), ..sound() }, "no standby is connected"),
        ] {
            let (findings, text) = examined(&wrong);
            assert!(findings == 1 && text.contains(words), "{words}: {text}");
        }
    }

    #[test]
    fn reports_synchronous_and_asynchronous_standbys() {
        let (findings, text) = examined(&Durability { standbys: 2, ..sound() });
        assert!(findings == 0 && text.contains("All 2 standbys are asynchronous"), "{text}");
        let (findings, text) = examined(&Durability { standbys: 1, synchronous_standbys: "one".into(), ..sound() });
        assert!(findings == 0 && text.contains("commits wait for a standby (one)"), "{text}");
    }
}
