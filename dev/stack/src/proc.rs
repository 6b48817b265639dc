//! The only reader of `/proc`. Without it, command lines come from `ps`, and nothing else is available.

/// A process; times in clock ticks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// The process id.
    pub pid: u32,
    /// Its parent.
    pub parent: u32,
    /// The program's name, truncated by Linux to 15 bytes.
    pub program: String,
    /// Its own time.
    pub own: u64,
    /// Of its ended children, and of theirs.
    pub ended_children: u64,
}

/// A process with its command line.
#[derive(Debug)]
pub struct Command {
    /// The process id.
    pub pid: u32,
    /// The command line.
    pub line: String,
}

/// Clock ticks as seconds.
pub fn seconds(ticks: u64) -> f64 {
    ticks as f64 / rustix::param::clock_ticks_per_second() as f64
}

#[cfg(target_os = "linux")]
pub use linux::{all, busy, commands, peak_memory, process};

#[cfg(target_os = "linux")]
mod linux {
    use std::io::{self, Read as _};

    use procfs::{
        CpuTime, CurrentSI as _, KernelStats, ProcResult,
        process::{Process as Entry, all_processes},
    };

    use super::{Command, Process};

    fn id<T>(pid: T) -> u32
    where
        u32: TryFrom<T>,
    {
        u32::try_from(pid).unwrap_or_default()
    }

    fn read(entry: &Entry) -> ProcResult<Process> {
        let stat = entry.stat()?;
        Ok(Process {
            pid: id(stat.pid),
            parent: id(stat.ppid),
            own: stat.utime + stat.stime,
            ended_children: (stat.cutime + stat.cstime).try_into().unwrap_or_default(),
            program: stat.comm,
        })
    }

    fn entry(pid: u32) -> io::Result<Entry> {
        let pid = i32::try_from(pid).map_err(io::Error::other)?;
        Entry::new(pid).map_err(io::Error::other)
    }

    /// The process with this id.
    pub fn process(pid: u32) -> io::Result<Process> {
        read(&entry(pid)?).map_err(io::Error::other)
    }

    /// All processes of the machine. One may end between listing and reading.
    pub fn all() -> io::Result<Vec<Process>> {
        Ok(all_processes().map_err(io::Error::other)?.filter_map(|entry| read(&entry.ok()?).ok()).collect())
    }

    /// The command lines of all processes. Zombies have none.
    pub fn commands() -> io::Result<Vec<Command>> {
        let command = |entry: Entry| {
            let mut line = Vec::new();
            // `Entry::cmdline` fails if an argument is not UTF-8.
            entry.open_relative("cmdline").ok()?.read_to_end(&mut line).ok()?;
            let line = String::from_utf8_lossy(&line).replace('\0', " ").trim().to_owned();
            (!line.is_empty()).then(|| Command { pid: id(entry.pid()), line })
        };
        Ok(all_processes().map_err(io::Error::other)?.filter_map(|entry| command(entry.ok()?)).collect())
    }

    /// The peak memory of a process, in bytes.
    pub fn peak_memory(pid: u32) -> io::Result<u64> {
        let status = entry(pid)?.status().map_err(io::Error::other)?;
        Ok(status.vmhwm.unwrap_or(0) * 1024)
    }

    /// The busy time of the whole machine, including interrupts, in clock ticks.
    pub fn busy() -> io::Result<u64> {
        KernelStats::current().map(|stats| working(&stats.total)).map_err(io::Error::other)
    }

    fn working(time: &CpuTime) -> u64 {
        time.user + time.nice + time.system + time.irq.unwrap_or(0) + time.softirq.unwrap_or(0)
    }

    #[cfg(test)]
    mod tests {
        use procfs::FromReadSI as _;

        use super::*;

        #[test]
        fn this_process_has_used_memory_and_has_a_command_line() {
            let own = std::process::id();
            let parent = std::os::unix::process::parent_id();
            assert!(all().unwrap().iter().any(|process| (process.pid, process.parent) == (own, parent)));
            assert_eq!(process(own).unwrap().parent, parent);
            assert!(peak_memory(own).unwrap() > 0);
            assert!(commands().unwrap().iter().any(|command| command.pid == own && command.line.contains("mailrun")));
            assert!(process(u32::MAX).is_err());
        }

        #[test]
        fn the_machine_is_busy_when_it_is_not_idle() {
            let stat = "cpu  1 2 3 1000 1000 4 5 9 0 0\ncpu0 1 2 3 1000 1000 4 5 9 0 0\n\
                        ctxt 1\nbtime 1\nprocesses 1\nprocs_running 1\nprocs_blocked 0\n";
            let stats = KernelStats::from_read(stat.as_bytes(), &procfs::LocalSystemInfo).unwrap();
            assert_eq!(working(&stats.total), 15);
        }
    }
}

#[cfg(not(target_os = "linux"))]
pub use elsewhere::{all, busy, commands, peak_memory, process};

#[cfg(not(target_os = "linux"))]
mod elsewhere {
    use std::{io, process::Command as Program};

    use super::{Command, Process};

    fn unsupported<T>() -> io::Result<T> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "this needs /proc, which only Linux has"))
    }

    pub fn process(_pid: u32) -> io::Result<Process> {
        unsupported()
    }

    pub fn all() -> io::Result<Vec<Process>> {
        unsupported()
    }

    pub fn peak_memory(_pid: u32) -> io::Result<u64> {
        unsupported()
    }

    pub fn busy() -> io::Result<u64> {
        unsupported()
    }

    pub fn commands() -> io::Result<Vec<Command>> {
        let output = Program::new("ps").args(["-axww", "-o", "pid=,command="]).output()?;
        Ok(String::from_utf8_lossy(&output.stdout).lines().filter_map(super::ps_line).collect())
    }
}

#[cfg(any(test, not(target_os = "linux")))]
fn ps_line(line: &str) -> Option<Command> {
    let (pid, line) = line.trim_start().split_once(' ')?;
    Some(Command { pid: pid.parse().ok()?, line: line.trim().to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ps_lines_are_read() {
        let command = ps_line("   42 /usr/bin/epmd -port 1").unwrap();
        assert_eq!((command.pid, command.line.as_str()), (42, "/usr/bin/epmd -port 1"));
    }
}
