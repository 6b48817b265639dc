//! The faults: their names and how often they strike. What each does, and how it is undone where it does not pass by
//! itself, is told by subject in the files beside this one.

mod broker;
mod database;
mod mail;
mod processes;
mod servers;

use std::time::Duration;

use anyhow::Result;
use clap::ValueEnum;
use mailrun_shared::topology;
use rand::{RngExt as _, rngs::StdRng};
use rustix::process::Signal;

pub(super) use self::processes::send_signal;
use self::{mail::HANGING, processes::a_sender};
use super::{
    site::{RUNGS_MS, Site},
    weather::Trouble,
};

/// What can go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Fault {
    /// kill -9 of a sender
    KillSend,
    /// kill -9 of the fan-out
    KillFanOut,
    /// kill -9 of the process that counts
    KillProgress,
    /// kill -9 of the pages, once while the form is being sent
    KillWeb,
    /// SIGTERM to a sender
    TermSend,
    /// A sender stands still for longer than its heartbeat allows, and goes on
    StopSend,
    /// kill -9 of RabbitMQ
    KillBroker,
    /// kill -9 of PostgreSQL
    KillDatabase,
    /// All sessions of PostgreSQL are ended, again and again for some seconds
    TerminateBackends,
    /// All senders are killed, and mailrun.items is purged, again and again for some seconds
    PurgeItems,
    /// The queues of the retry schedule are purged, as long
    PurgeRetry,
    /// The process that counts is killed, and mailrun.results is purged, as long
    PurgeResults,
    /// mailrun.runs and mailrun.runs.wait are purged, as long
    PurgeRuns,
    /// mailrun.items is deleted
    DeleteQueue,
    /// The mail server is down for some seconds
    MailDown,
    /// The mail server takes in 1 % of the messages and drops the connection before it says so
    MailDrops,
    /// The mail server asks everybody to come back later (421), for some seconds
    MailRefusesEveryone,
    /// The mail server falls silent on some connections
    MailHangs,
    /// A transaction holds an old snapshot, and a lock on the counters, for some seconds
    OpenTransaction,
    /// Every message is published twice
    DuplicateMessages,
    /// RabbitMQ runs out of memory and blocks its publishers for some seconds
    BrokerAlarm,
}

/// How often a fault can strike within one run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Weight {
    /// Often.
    Light,
    /// A few times, since a server needs some seconds to be up again.
    Heavy,
    /// It is there from the beginning to the end.
    Whole,
}

impl Fault {
    /// Its name on the command line and in the report.
    pub(super) fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    /// How often it can strike within one run.
    pub(super) fn weight(self) -> Weight {
        match self {
            Self::KillBroker | Self::KillDatabase => Weight::Heavy,
            Self::DuplicateMessages => Weight::Whole,
            _ => Weight::Light,
        }
    }

    /// Makes it happen, and returns when it is over: from then on everything has to recover by itself.
    ///
    /// # Errors
    /// When it could not be made to happen, mostly because another one has just struck.
    pub(super) async fn strike(self, site: &Site<'_>, rng: &mut StdRng) -> Result<()> {
        match self {
            Self::KillSend => site.signal(&a_sender(rng), Signal::KILL),
            Self::KillFanOut => site.signal("fan-out", Signal::KILL),
            Self::KillProgress => site.signal("progress", Signal::KILL),
            Self::KillWeb => site.signal("web", Signal::KILL),
            Self::TermSend => site.signal(&a_sender(rng), Signal::TERM),
            Self::StopSend => processes::stand_still(site, &a_sender(rng), some_seconds(rng)).await,
            Self::KillBroker => servers::kill(site, servers::RABBITMQ).await,
            Self::KillDatabase => servers::kill(site, servers::POSTGRESQL).await,
            Self::TerminateBackends => database::terminate_backends(site, some_seconds(rng)).await,
            // What a worker has in hand is not on its queue: it dies first, so that the broker puts that back.
            Self::PurgeItems => {
                for number in 1..=crate::local::SENDERS {
                    site.signal(&format!("send-{number}"), Signal::KILL)?;
                }
                broker::purge(site, vec![topology::ITEMS.to_owned()], some_seconds(rng)).await
            }
            Self::PurgeRetry => {
                let rungs = RUNGS_MS.map(|ms| topology::retry_queue(Duration::from_millis(ms)));
                broker::purge(site, rungs.to_vec(), some_seconds(rng)).await
            }
            Self::PurgeResults => {
                site.signal("progress", Signal::KILL)?;
                broker::purge(site, vec![topology::RESULTS.to_owned()], some_seconds(rng)).await
            }
            Self::PurgeRuns => {
                let queues = vec![topology::RUNS.to_owned(), topology::RUNS_WAIT.to_owned()];
                broker::purge(site, queues, some_seconds(rng)).await
            }
            Self::DeleteQueue => broker::delete_queue(site, topology::ITEMS).await,
            Self::MailDown => mail::down(site, some_seconds(rng)).await,
            Self::MailDrops => mail::trouble(site, Trouble::Drops, some_seconds(rng)).await,
            Self::MailRefusesEveryone => mail::trouble(site, Trouble::Busy, some_seconds(rng)).await,
            Self::MailHangs => {
                site.weather.hang(HANGING);
                Ok(())
            }
            Self::OpenTransaction => database::open_transaction(site, some_seconds(rng)).await,
            // It is a setting of the whole run.
            Self::DuplicateMessages => Ok(()),
            Self::BrokerAlarm => broker::memory_alarm(site, some_seconds(rng)).await,
        }
    }
}

fn some_seconds(rng: &mut StdRng) -> Duration {
    Duration::from_millis(rng.random_range(1_000..3_500))
}
