//! The faults. Each file beside this one has those of its subject: their names, how often and with what they occur, and what they do,
//! including how those are undone that do not end by themselves.

mod broker;
mod cluster;
mod database;
mod inbound;
mod ledgers;
mod mail;
mod network;
mod processes;
mod queues;
mod run_commands;
mod servers;

use std::{fmt, time::Duration};

use anyhow::Result;
use futures::future::LocalBoxFuture;
use rand::{RngExt as _, rngs::StdRng};
use tokio::sync::watch::Receiver;

pub(super) use self::run_commands::PAUSE_RUN;
use super::{
    site::{ANSWER, DEAD_AFTER, HEARTBEAT, STALLED_AFTER, Site},
    watch::Stage,
};

/// The faults by subject, in the order in which they run.
const SUBJECTS: [&[Fault]; 11] = [
    processes::FAULTS,
    servers::FAULTS,
    database::FAULTS,
    broker::FAULTS,
    queues::FAULTS,
    mail::FAULTS,
    run_commands::FAULTS,
    inbound::FAULTS,
    ledgers::FAULTS,
    network::FAULTS,
    cluster::FAULTS,
];

/// The maximum wait between two attempts to connect to a server, or to start a process that died repeatedly.
const LONGEST_RECONNECT: Duration = Duration::from_secs(10);
/// A server may take this long to become usable after it answers.
const SERVER_RECOVERY: Duration = Duration::from_secs(10);

/// Carries out a fault on an installation, with its random choices and the progress of the run.
type Strike = for<'a> fn(&'a Site<'_>, &'a mut StdRng, &'a Receiver<Stage>) -> LocalBoxFuture<'a, Result<()>>;

/// A fault.
pub(super) struct Fault {
    /// Its name on the command line and in the report.
    pub(super) name: &'static str,
    /// What it does, on the command line.
    pub(super) help: &'static str,
    /// How often it occurs within one run.
    pub(super) weight: Weight,
    /// What it affects.
    pub(super) reach: Reach,
    /// What else its run needs.
    pub(super) needs: Needs,
    /// Whether it also occurs during the submission of the form.
    pub(super) strikes_the_form: bool,
    /// Whether it leaves something of the run for others in the same run.
    leaves_a_run: bool,
    recovery: Recovery,
    strike: Strike,
}

/// How often a fault occurs within one run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Weight {
    /// Often.
    Light,
    /// A few times, because a server needs some seconds to recover.
    Heavy,
    /// During the whole run.
    Whole,
}

/// What a fault affects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reach {
    /// Its own installation.
    Installation,
    /// The servers, and so each installation on them.
    Servers,
    /// A RabbitMQ cluster, which it requires.
    Cluster,
}

/// What the run of a fault needs from its installation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Needs {
    /// Nothing more than others.
    Nothing,
    /// Each message is published twice.
    Duplicates,
    /// A rate limit applies.
    RateLimit,
}

/// What a run waits for after a fault, beside the usual.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Recovery {
    /// Nothing.
    Usual,
    /// Elections, recovery from the log, and all processes reconnect.
    Server,
    /// Both ends of a connection to RabbitMQ time out, then those that tried to connect meanwhile.
    Heartbeats,
    /// The same for a connection to another server.
    Answers,
}

impl Fault {
    /// A fault that occurs often and affects its own installation only.
    ///
    /// `strike` carries it out and returns when it is over: from then on, everything must recover by itself. A fault of the whole run is
    /// dropped when the run is over. It can fail, usually because of another fault just before.
    const fn new(name: &'static str, help: &'static str, strike: Strike) -> Self {
        Self {
            name,
            help,
            weight: Weight::Light,
            reach: Reach::Installation,
            needs: Needs::Nothing,
            strikes_the_form: false,
            leaves_a_run: true,
            recovery: Recovery::Usual,
            strike,
        }
    }

    /// It occurs a few times only.
    const fn heavy(mut self) -> Self {
        self.weight = Weight::Heavy;
        self
    }

    /// It lasts during the whole run.
    const fn whole(mut self) -> Self {
        self.weight = Weight::Whole;
        self
    }

    const fn affects(mut self, reach: Reach) -> Self {
        self.reach = reach;
        self
    }

    const fn needs(mut self, needs: Needs) -> Self {
        self.needs = needs;
        self
    }

    /// It occurs during the submission as well.
    const fn also_at_the_form(mut self) -> Self {
        self.strikes_the_form = true;
        self
    }

    /// It settles the whole run.
    const fn ends_the_run(mut self) -> Self {
        self.leaves_a_run = false;
        self
    }

    const fn recovers(mut self, recovery: Recovery) -> Self {
        self.recovery = recovery;
        self
    }

    /// All faults.
    pub(super) fn all() -> impl Iterator<Item = &'static Self> {
        SUBJECTS.into_iter().flatten()
    }

    /// Whether it can be combined with others in the same run.
    pub(super) fn mixes(&self) -> bool {
        self.reach != Reach::Cluster && self.leaves_a_run
    }

    /// The time within which a run progresses again after it: the sum of the waits that may follow each other, doubled for a busy
    /// machine.
    pub(super) fn bound(&self) -> Duration {
        2 * match self.recovery {
            Recovery::Usual => usual(),
            Recovery::Server => usual() + SERVER_RECOVERY,
            Recovery::Heartbeats => usual() + 3 * HEARTBEAT + ANSWER,
            Recovery::Answers => usual() + 3 * ANSWER,
        }
    }

    /// The same after the clean end of a process.
    pub(super) fn usual_bound() -> Duration {
        2 * usual()
    }

    /// Carries it out: see [`Fault::new`]. `stages` reports the run's progress.
    pub(super) async fn strike(&self, site: &Site<'_>, rng: &mut StdRng, stages: &Receiver<Stage>) -> Result<()> {
        (self.strike)(site, rng, stages).await
    }
}

/// A worker is declared dead, its run is swept as stalled, and the longest reconnect wait is over.
fn usual() -> Duration {
    DEAD_AFTER + STALLED_AFTER + LONGEST_RECONNECT
}

impl PartialEq for Fault {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl Eq for Fault {}

impl fmt::Debug for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

fn some_seconds(rng: &mut StdRng) -> Duration {
    Duration::from_millis(rng.random_range(1_000..3_500))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_are_unique() {
        let names: BTreeSet<_> = Fault::all().map(|fault| fault.name).collect();
        assert_eq!(names.len(), Fault::all().count());
    }
}
