//! CPU seconds and peak memory of all participating processes, from `/proc`.

use std::{fs, ops::Sub};

use anyhow::{Context as _, Result};
use serde::Serialize;

use crate::local::Services;
use mailrun_stack::Stack;

/// CPU seconds in user and kernel mode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(super) struct Cpu {
    /// RabbitMQ.
    pub(super) broker: f64,
    /// PostgreSQL.
    pub(super) database: f64,
    /// The web server with the outbox publisher.
    pub(super) web: f64,
    /// Fan-out.
    pub(super) fan_out: f64,
    /// All senders together.
    pub(super) send: f64,
    /// The progress worker.
    pub(super) progress: f64,
    /// This process.
    pub(super) bench: f64,
    /// All other processes of this machine, which should be idle.
    pub(super) others: f64,
}

impl Cpu {
    /// The CPU seconds used so far. Without `services`, theirs are 0. Requires `/proc` and running servers.
    pub(super) fn now(stack: &Stack, services: Option<&Services>) -> Result<Self> {
        let all = processes()?;
        let server = |pid: Option<u32>, name: &str| {
            pid.map(|pid| tree(&all, pid)).with_context(|| format!("{name} is not running"))
        };
        let pids = stack.pids().context("cannot read the state of the private servers")?;
        let mut cpu = Self {
            broker: server(pids.rabbitmq, "RabbitMQ")?,
            database: server(pids.postgres, "PostgreSQL")?,
            bench: own(&all, std::process::id()),
            ..Self::default()
        };
        for (name, pid) in services.iter().flat_map(|services| services.pids()) {
            if let Some(part) = cpu.of_service(name) {
                *part += tree(&all, pid);
            }
        }
        let machine = fs::read_to_string("/proc/stat").ok().and_then(|stat| busy(&stat));
        cpu.others = machine.context("cannot read /proc/stat")? - cpu.total();
        Ok(cpu)
    }

    fn of_service(&mut self, name: &str) -> Option<&mut f64> {
        match name {
            "web" => Some(&mut self.web),
            "fan-out" => Some(&mut self.fan_out),
            name if name.starts_with("send-") => Some(&mut self.send),
            "progress" => Some(&mut self.progress),
            _ => None,
        }
    }

    /// The measured parts with their names.
    pub(super) fn parts(&self) -> [(&'static str, f64); 7] {
        [
            ("broker", self.broker),
            ("database", self.database),
            ("web", self.web),
            ("fan-out", self.fan_out),
            ("send", self.send),
            ("progress", self.progress),
            ("bench", self.bench),
        ]
    }

    /// The sum of the measured parts.
    pub(super) fn total(&self) -> f64 {
        self.parts().iter().map(|(_, seconds)| seconds).sum()
    }

    /// Whether other processes used so much of the machine that the results are not meaningful.
    pub(super) fn is_disturbed(&self) -> bool {
        self.others > 0.1 * self.total()
    }

    /// Applies `pick` to each part of `all`.
    pub(super) fn by_part(all: &[Self], pick: impl Fn(Vec<f64>) -> f64) -> Self {
        let of = |part: fn(&Self) -> f64| pick(all.iter().map(part).collect());
        Self {
            broker: of(|cpu| cpu.broker),
            database: of(|cpu| cpu.database),
            web: of(|cpu| cpu.web),
            fan_out: of(|cpu| cpu.fan_out),
            send: of(|cpu| cpu.send),
            progress: of(|cpu| cpu.progress),
            bench: of(|cpu| cpu.bench),
            others: of(|cpu| cpu.others),
        }
    }
}

impl Sub for Cpu {
    type Output = Self;

    fn sub(self, earlier: Self) -> Self {
        Self::by_part(&[self, earlier], |both| both[0] - both[1])
    }
}

/// Peak memory by role, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Memory {
    pub(super) web: u64,
    pub(super) fan_out: u64,
    /// The maximum of the senders.
    pub(super) send: u64,
    pub(super) progress: u64,
}

impl Memory {
    /// The peak so far.
    pub(super) fn now(services: &Services) -> Self {
        let mut memory = Self::default();
        for (name, pid) in services.pids() {
            let part = match name {
                "web" => &mut memory.web,
                "fan-out" => &mut memory.fan_out,
                "progress" => &mut memory.progress,
                _ => &mut memory.send,
            };
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            *part = peak(&status).unwrap_or(0).max(*part);
        }
        memory
    }

    /// The maximum of both, for each role.
    pub(super) fn max(self, other: Self) -> Self {
        Self {
            web: self.web.max(other.web),
            fan_out: self.fan_out.max(other.fan_out),
            send: self.send.max(other.send),
            progress: self.progress.max(other.progress),
        }
    }
}

/// `VmHWM` in bytes.
fn peak(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok().map(|kilobytes| kilobytes * 1024)
}

/// One line of `/proc/<pid>/stat`; times in clock ticks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Process {
    pid: u32,
    parent: u32,
    own: u64,
    /// Of its ended children, and of theirs.
    ended_children: u64,
}

fn processes() -> Result<Vec<Process>> {
    let all = fs::read_dir("/proc").context("the bench requires /proc (Linux)")?;
    // A process may end between listing and reading.
    Ok(all
        .filter_map(|entry| fs::read_to_string(entry.ok()?.path().join("stat")).ok())
        .filter_map(|stat| process(&stat))
        .collect())
}

fn process(stat: &str) -> Option<Process> {
    // The name is in parentheses, and may itself contain parentheses.
    let (pid, rest) = stat.split_once(" (")?;
    let fields: Vec<&str> = rest.rsplit_once(") ")?.1.split(' ').collect();
    let ticks = |index: usize| fields.get(index)?.parse::<u64>().ok();
    Some(Process {
        pid: pid.parse().ok()?,
        parent: fields.get(1)?.parse().ok()?,
        own: ticks(11)? + ticks(12)?,
        ended_children: ticks(13)? + ticks(14)?,
    })
}

/// CPU seconds of a process and its descendants, including ended ones.
fn tree(all: &[Process], root: u32) -> f64 {
    let mut ticks = 0;
    let mut open = vec![root];
    while let Some(pid) = open.pop() {
        ticks +=
            all.iter().filter(|process| process.pid == pid).map(|found| found.own + found.ended_children).sum::<u64>();
        open.extend(all.iter().filter(|process| process.parent == pid).map(|process| process.pid));
    }
    seconds(ticks)
}

fn own(all: &[Process], pid: u32) -> f64 {
    seconds(all.iter().filter(|process| process.pid == pid).map(|process| process.own).sum())
}

/// CPU seconds of the whole machine, from the first line of `/proc/stat`: user, nice, system, and after idle and iowait the
/// interrupts.
fn busy(stat: &str) -> Option<f64> {
    let line = stat.lines().next()?.strip_prefix("cpu ")?;
    let ticks: Vec<u64> = line.split_whitespace().filter_map(|ticks| ticks.parse().ok()).collect();
    Some(seconds([0, 1, 2, 5, 6].iter().filter_map(|index| ticks.get(*index)).sum()))
}

fn seconds(ticks: u64) -> f64 {
    ticks as f64 / rustix::param::clock_ticks_per_second() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_a_line_with_any_process_name() {
        let line = "42 (a) b (c) S 7 42 42 0 -1 4194560 100 200 0 0 11 22 33 44 20 0 1 0 5 6 7\n";
        assert_eq!(process(line), Some(Process { pid: 42, parent: 7, own: 33, ended_children: 77 }));
        assert_eq!(process("42 (short) S 7"), None);
    }

    #[test]
    fn a_tree_counts_descendants_and_ended_ones_once() {
        let process = |pid, parent, own, ended_children| Process { pid, parent, own, ended_children };
        let all = [process(1, 0, 1, 0), process(2, 1, 10, 1000), process(3, 2, 100, 0), process(4, 1, 7, 7)];
        assert_eq!(tree(&all, 2), seconds(1110));
        assert_eq!(own(&all, 2), seconds(10));
        assert_eq!(tree(&all, 9), 0.0);
    }

    #[test]
    fn busy_time_excludes_idle_time() {
        assert_eq!(busy("cpu  1 2 3 1000 1000 4 5 9 0 0\ncpu0 7 7 7\n"), Some(seconds(15)));
        let (quiet, loud) = (Cpu { broker: 2.0, others: 0.1, ..Cpu::default() }, Cpu { others: 0.1, ..Cpu::default() });
        assert!(!quiet.is_disturbed() && loud.is_disturbed());
    }

    #[test]
    fn the_peak_is_in_bytes() {
        assert_eq!(peak("Name:\tx\nVmHWM:\t   12 kB\nVmRSS:\t 3 kB\n"), Some(12 * 1024));
        assert_eq!(peak(""), None);
    }

    #[test]
    fn this_process_has_used_memory_and_time() {
        let all = processes().unwrap();
        assert!(all.iter().any(|process| process.pid == std::process::id()));
        assert!(peak(&fs::read_to_string("/proc/self/status").unwrap()).unwrap() > 0);
    }
}
