//! CPU seconds and peak memory of all participating processes, from `/proc`.

use std::ops::Sub;

use anyhow::{Context as _, Result};
use serde::Serialize;

use crate::local::Services;
use mailrun_stack::{
    Stack,
    proc::{self, Process, seconds},
};

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
        let all = proc::all().context("the bench requires /proc (Linux)")?;
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
        cpu.others = seconds(proc::busy().context("cannot read /proc/stat")?) - cpu.total();
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
            *part = proc::peak_memory(pid).unwrap_or(0).max(*part);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_counts_descendants_and_ended_ones_once() {
        let program = String::new;
        let process =
            |pid, parent, own, ended_children| Process { pid, parent, program: program(), own, ended_children };
        let all = [process(1, 0, 1, 0), process(2, 1, 10, 1000), process(3, 2, 100, 0), process(4, 1, 7, 7)];
        assert_eq!(tree(&all, 2), seconds(1110));
        assert_eq!(own(&all, 2), seconds(10));
        assert_eq!(tree(&all, 9), 0.0);
    }

    #[test]
    fn is_disturbed_if_others_use_a_tenth() {
        let (quiet, loud) = (Cpu { broker: 2.0, others: 0.1, ..Cpu::default() }, Cpu { others: 0.1, ..Cpu::default() });
        assert!(!quiet.is_disturbed() && loud.is_disturbed());
    }
}
