//! The fault bench with short lists and the most complex faults: nobody is lost, nobody gets two mails, and it prints its results.

use std::process::{Command, Stdio};

use serde_json::Value;

#[test]
fn nobody_is_lost_and_nobody_gets_two_mails() {
    let faults = ["kill-send", "mail-drops", "terminate-backends", "cut-database", "hole-database"];
    let mut chaos = Command::new(env!("CARGO_BIN_EXE_mailrun-dev"));
    chaos.args([
        "chaos",
        "--recipients",
        "500",
        "--fault",
        &faults.join(","),
        "--at-once",
        "5",
        "--seed",
        "1",
        "--json",
    ]);
    let output = chaos.stderr(Stdio::inherit()).output().unwrap();
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{stdout}");
    assert_eq!(stdout.lines().count(), 1, "{stdout}");
    let figures: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!((&figures["recipients"], &figures["seed"]), (&2500.into(), &1.into()));
    for fault in faults {
        let one = &figures["by_fault"][fault];
        for broken in ["lost", "doubled", "untold", "drift", "left", "stuck", "late"] {
            assert_eq!(one[broken], 0, "{fault}: {figures}");
        }
        assert!(one["faults"].as_u64().is_some_and(|faults| faults >= 2), "{fault}: {figures}");
        let told: u64 = ["sent", "failed", "unknown"].iter().filter_map(|state| one[state].as_u64()).sum();
        assert_eq!(told, 500, "{fault}: {figures}");
        for time in ["longest_stall_seconds", "longest_recovery_seconds", "recovery_bound_seconds", "recovery_seconds"]
        {
            assert!(one[time].is_f64(), "{fault}: {figures}");
        }
    }
}

/// A check that never fails proves nothing.
#[test]
fn detects_two_mails_to_one_person() {
    let mut chaos = Command::new(env!("CARGO_BIN_EXE_mailrun-dev"));
    chaos.args(["chaos", "--recipients", "500", "--fault", "mail-drops", "--seed", "2", "--resend", "--json"]);
    // Its logs are kept, because a guarantee was broken.
    let folder = tempfile::tempdir().unwrap();
    let output = chaos.env("TMPDIR", folder.path()).stderr(Stdio::inherit()).output().unwrap();
    assert!(!output.status.success());
    let figures: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(figures["doubled"].as_u64().is_some_and(|doubled| doubled > 0), "{figures}");
    assert_eq!((&figures["lost"], &figures["drift"]), (&0.into(), &0.into()), "{figures}");
}

#[test]
fn only_an_upgrade_takes_a_revision() {
    let why = |args: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_mailrun-dev")).arg("chaos").args(args).output().unwrap();
        assert!(!output.status.success(), "{args:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(why(&["--fault", "upgrade"]).contains("requires --from"));
    assert!(why(&["--fault", "kill-send", "--from", "HEAD"]).contains("requires --fault upgrade"));
}

#[test]
fn refuses_an_unknown_fault() {
    let mut chaos = Command::new(env!("CARGO_BIN_EXE_mailrun-dev"));
    let output = chaos.args(["chaos", "--fault", "earthquake"]).output().unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8(output.stderr).unwrap().contains("kill-send"), "it lists the faults");
}
