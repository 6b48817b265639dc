//! Keeps one program running as a child of this process: starts it, waits until it answers, starts it again when it dies, and stops it on
//! request.

use std::{
    future, io,
    pin::pin,
    time::{Duration, Instant},
};

use rustix::process::Signal;
use tokio::{
    process::Child,
    time::{sleep, timeout},
};

use super::processes::signal;

/// How often a starting program is probed.
const POLL: Duration = Duration::from_millis(50);

/// A program: how it is started, probed and stopped.
pub trait Program {
    /// The signal for a clean stop.
    const STOP: Signal = Signal::TERM;
    /// Time limit for its answer.
    const ANSWER_LIMIT: Duration = Duration::MAX;
    /// Time limit for stopping it before it has answered, if that is shorter than the requested one.
    const STOP_LIMIT_BEFORE_ANSWER: Duration = Duration::MAX;
    /// The pause after its first death. It doubles with each further one, up to the longest.
    const FIRST_PAUSE: Duration;
    /// The longest pause.
    const LONGEST_PAUSE: Duration;
    /// A death after a run of this length counts as the first.
    const HEALTHY: Duration;

    /// Starts a process that is the program itself, not a parent of it.
    fn start(&mut self) -> io::Result<Child>;

    /// Whether it answers. A program without a probe answers at once.
    fn answers(&self) -> impl Future<Output = bool> + Send {
        future::ready(true)
    }
}

/// An event of a program.
#[derive(Debug)]
pub enum Event {
    /// It was started, and answers.
    Started {
        /// Its process id.
        pid: u32,
    },
    /// It died. It is started again after the pause.
    Died {
        /// How it died, continuing its name: for example, "ended unexpectedly (exit status: 1)".
        how: String,
        /// How often it died in a row.
        deaths: u32,
        /// How often in a row it died without an answer.
        failed_starts: u32,
        /// The pause.
        pause: Duration,
    },
    /// It was stopped: whether it ended by itself. Otherwise, it was killed.
    Stopped(io::Result<bool>),
}

/// A program that is kept running, as long as its next event is awaited.
#[derive(Debug)]
pub struct Supervision<P> {
    /// The program.
    pub program: P,
    child: Option<Child>,
    started: Instant,
    answered: bool,
    deaths: u32,
    failed_starts: u32,
    /// Before the next start.
    pause: Duration,
}

impl<P: Program> Supervision<P> {
    /// For a program that is not running.
    pub fn new(program: P) -> Self {
        let (started, pause) = (Instant::now(), Duration::ZERO);
        Self { program, child: None, started, answered: false, deaths: 0, failed_starts: 0, pause }
    }

    /// Starts the program now, if an error has to be known at once. Otherwise, [`Self::next`] starts it.
    pub fn start(&mut self) -> io::Result<()> {
        self.child = Some(self.spawn()?);
        Ok(())
    }

    fn spawn(&mut self) -> io::Result<Child> {
        (self.started, self.answered) = (Instant::now(), false);
        self.program.start()
    }

    /// Waits for the next event, and starts the program if it is not running. Stops it when `request` completes with the time limit for
    /// that. The process is dropped with a call that is not awaited to its end.
    pub async fn next(&mut self, request: impl Future<Output = Duration>) -> Event {
        let mut request = pin!(request);
        let mut child = match self.child.take() {
            Some(child) => child,
            None => {
                tokio::select! {
                    () = sleep(self.pause) => {}
                    _ = &mut request => return self.stopped(Ok(true)),
                }
                match self.spawn() {
                    Ok(child) => child,
                    Err(error) => return self.died(format!("did not start: {error}")),
                }
            }
        };
        tokio::select! {
            // In this order: a program without a probe has answered, even if it has ended already or is to be stopped.
            biased;
            answer = timeout(P::ANSWER_LIMIT, answer(&self.program)), if !self.answered => {
                if answer.is_err() {
                    // If this fails, the next start fails too and says why.
                    let _ = stop(&mut child, P::STOP, P::STOP_LIMIT_BEFORE_ANSWER).await;
                    return self.died(format!("did not answer within {} s", P::ANSWER_LIMIT.as_secs()));
                }
                self.answered = true;
                let pid = child.id().unwrap_or_default();
                self.child = Some(child);
                Event::Started { pid }
            }
            exit = child.wait() => match exit {
                Ok(status) => self.died(format!("ended unexpectedly ({status})")),
                Err(error) => self.died(format!("did not start: {error}")),
            },
            limit = &mut request => {
                let limit = if self.answered { limit } else { limit.min(P::STOP_LIMIT_BEFORE_ANSWER) };
                let by_itself = stop(&mut child, P::STOP, limit).await;
                self.stopped(by_itself)
            }
        }
    }

    fn died(&mut self, how: String) -> Event {
        self.deaths = if self.started.elapsed() >= P::HEALTHY { 1 } else { self.deaths + 1 };
        // Being killed repeatedly is not the program's fault.
        self.failed_starts = if self.answered { 0 } else { self.failed_starts + 1 };
        // The exponent is bounded against overflow.
        self.pause = (P::FIRST_PAUSE * 2_u32.pow((self.deaths - 1).min(10))).min(P::LONGEST_PAUSE);
        Event::Died { how, deaths: self.deaths, failed_starts: self.failed_starts, pause: self.pause }
    }

    fn stopped(&mut self, by_itself: io::Result<bool>) -> Event {
        (self.deaths, self.pause) = (0, Duration::ZERO);
        Event::Stopped(by_itself)
    }
}

async fn answer(program: &impl Program) {
    while !program.answers().await {
        sleep(POLL).await;
    }
}

/// Stops a process cleanly, or kills it after the time limit. Returns whether it ended by itself.
async fn stop(child: &mut Child, how: Signal, limit: Duration) -> io::Result<bool> {
    // Nothing else waits for the child, so its id cannot have been reused.
    let Some(pid) = child.id() else { return Ok(true) };
    signal(pid, how)?;
    match timeout(limit, child.wait()).await {
        Ok(exit) => exit.map(|_| true),
        Err(_) => child.kill().await.map(|()| false),
    }
}

#[cfg(test)]
mod tests {
    use tokio::process::Command;

    use super::*;

    /// A shell script, and whether it answers.
    struct Script(&'static str, bool);

    impl Program for Script {
        /// One that has no effect.
        const STOP: Signal = Signal::CONT;
        const ANSWER_LIMIT: Duration = Duration::from_millis(100);
        const STOP_LIMIT_BEFORE_ANSWER: Duration = Duration::from_millis(10);
        const FIRST_PAUSE: Duration = Duration::from_millis(1);
        const LONGEST_PAUSE: Duration = Duration::from_millis(3);
        const HEALTHY: Duration = Duration::from_secs(60);

        fn start(&mut self) -> io::Result<Child> {
            Command::new("/bin/sh").args(["-c", self.0]).kill_on_drop(true).spawn()
        }

        async fn answers(&self) -> bool {
            self.1
        }
    }

    async fn death(script: &mut Supervision<Script>) -> (String, u32, u32, u128) {
        match script.next(future::pending()).await {
            Event::Died { how, deaths, failed_starts, pause } => (how, deaths, failed_starts, pause.as_millis()),
            other => panic!("expected a death, got {other:?}"),
        }
    }

    #[tokio::test]
    async fn deaths_after_an_answer_are_no_failed_starts_and_pauses_double_up_to_the_longest() {
        let mut script = Supervision::new(Script("exit 3", true));
        for (deaths, pause_ms) in [(1, 1), (2, 2), (3, 3), (4, 3)] {
            assert!(matches!(script.next(future::pending()).await, Event::Started { .. }));
            let expected = ("ended unexpectedly (exit status: 3)".to_owned(), deaths, 0, pause_ms);
            assert_eq!(death(&mut script).await, expected);
        }
        assert!(matches!(script.next(future::ready(Duration::ZERO)).await, Event::Stopped(Ok(true))));
    }

    #[tokio::test]
    async fn a_program_that_does_not_answer_is_stopped_and_started_again() {
        let mut script = Supervision::new(Script("exec sleep 60", false));
        for failed_starts in 1..=2 {
            let expected = ("did not answer within 0 s".to_owned(), failed_starts, failed_starts, failed_starts.into());
            assert_eq!(death(&mut script).await, expected);
        }
    }

    #[tokio::test]
    async fn a_program_that_has_not_answered_is_stopped_within_its_own_limit() {
        let mut script = Supervision::new(Script("exec sleep 60", false));
        script.start().unwrap();
        assert!(matches!(script.next(future::ready(Duration::MAX)).await, Event::Stopped(Ok(false))));
    }
}
