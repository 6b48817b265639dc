//! The faults: their names and how often they strike. What each does, and how it is undone where it does not pass by
//! itself, is told by subject in the files beside this one.

mod broker;
mod cluster;
mod conveyor;
mod database;
mod inbound;
mod ledgers;
mod mail;
mod network;
mod processes;
mod servers;
mod wishes;

use std::time::Duration;

use anyhow::Result;
use clap::ValueEnum;
use mailrun_core::queue;
use rand::{RngExt as _, rngs::StdRng};
use rustix::process::Signal;
use tokio::sync::watch::Receiver;

pub(super) use self::processes::{send_signal, senders};
use self::{mail::HANGING, processes::a_sender};
use super::{
    site::{ANSWER, DEAD_AFTER, HEARTBEAT, STALLED_AFTER, Site, rungs},
    watch::Stage,
    weather::Trouble,
};

/// Whose queue is full stands still for so long, which is shorter than what makes it dead.
const FULL: Duration = Duration::from_secs(2);
/// The longest wait between two tries to reach a server, or to start a process that has died again and again.
const LONGEST_RECONNECT: Duration = Duration::from_secs(10);
/// A server that answers may need so long to be of use.
const SERVER_RECOVERY: Duration = Duration::from_secs(10);

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
    /// SIGTERM to the fan-out
    TermFanOut,
    /// SIGTERM to the process that counts
    TermProgress,
    /// SIGTERM to the pages, once while the form is being sent
    TermWeb,
    /// SIGTERM to one process after the other, and to each again a moment later
    TermTwice,
    /// A sender stands still for longer than its heartbeat allows, and goes on
    StopSend,
    /// kill -9 of RabbitMQ
    KillBroker,
    /// kill -9 of PostgreSQL
    KillDatabase,
    /// kill -9 of PostgreSQL, and again while it recovers from that
    KillRecovery,
    /// RabbitMQ is stopped in good order, and started again after some seconds
    RestartBroker,
    /// PostgreSQL is stopped in good order, and started again after some seconds
    RestartDatabase,
    /// All sessions of PostgreSQL are ended, again and again for some seconds
    TerminateBackends,
    /// Others use up the connections of PostgreSQL for some seconds
    CrowdDatabase,
    /// All senders are killed, and mailrun.items is purged, again and again for some seconds
    PurgeItems,
    /// The queues of the retry schedule are purged, as long
    PurgeRetry,
    /// The process that counts is killed, and mailrun.results is purged, as long
    PurgeResults,
    /// mailrun.runs and its waiting rooms are purged, as long
    PurgeRuns,
    /// mailrun.dead is purged, as long
    PurgeDead,
    /// Every queue is deleted, one after another
    DeleteQueue,
    /// Messages for waiting rooms, retry queues and dead letters find no queue, for some seconds, whatever is declared
    MissingQueues,
    /// RabbitMQ closes each channel on which a delivery is not acknowledged within a second (406), for some seconds
    ConsumerTimeout,
    /// Messages of all queues change places, for some seconds
    ReorderMessages,
    /// The mail server is down for some seconds
    MailDown,
    /// The mail server takes in 1 % of the messages and drops the connection before it says so
    MailDrops,
    /// The mail server asks everybody to come back later (421), for some seconds
    MailRefusesEveryone,
    /// The mail server does not relay for us (550 at RCPT), for some seconds
    RefuseSender,
    /// The mail server says that a limit of the day is reached (550 after the message), for some seconds
    MailLimit,
    /// The mail server falls silent on some connections
    MailHangs,
    /// The mail server takes two seconds for each answer to a message, for some seconds
    MailSlow,
    /// A transaction holds an old snapshot, and a lock on the counters, for some seconds
    OpenTransaction,
    /// Readers hold old snapshots, each for up to a third of the run, from the beginning to the end
    LongReaders,
    /// A rate limit holds, and the mail server defers every 7th recipient again and again
    LimitedDeferrals,
    /// A person pauses the run for some seconds, while retries wait on their queues
    PauseRun,
    /// Some people are erased in the middle of the run
    ErasePeople,
    /// The progress worker is stopped while all senders restart in good order
    TermSendUncounted,
    /// The row of a sender in the table of workers is deleted
    DeleteWorkerRow,
    /// Messages and results of another installation arrive, of items with the same numbers
    ForeignMessages,
    /// Reports that are forged, or prove nothing, arrive at the bounce hook for some seconds
    ForgedBounces,
    /// The ledger is replaced by a backup of some seconds ago, and the restore is declared
    Restore,
    /// Another installation is set up on the same virtual host, and starts a worker there
    SecondInstallation,
    /// Every message is published twice
    DuplicateMessages,
    /// RabbitMQ runs out of memory and blocks its publishers for some seconds
    BrokerAlarm,
    /// RabbitMQ runs out of disk, and blocks them as well
    DiskAlarm,
    /// mailrun.items has room for one message only, while all senders start anew and stand still for two seconds
    FullItems,
    /// mailrun.results has room for one message only, while the process that counts does so
    FullResults,
    /// Connections to RabbitMQ are cut, again and again for some seconds
    CutBroker,
    /// Those to PostgreSQL
    CutDatabase,
    /// Those to the mail server
    CutMail,
    /// What goes to RabbitMQ and comes from it takes 200 to 500 ms each way, for some seconds
    DelayBroker,
    /// The same for PostgreSQL
    DelayDatabase,
    /// The same for the mail server
    DelayMail,
    /// What goes to RabbitMQ and comes from it is lost, and nobody is told, for longer than its heartbeat allows
    HoleBroker,
    /// The same for PostgreSQL, for longer than its answers may take
    HoleDatabase,
    /// The same for the mail server
    HoleMail,
    /// kill -9 of one of three nodes of RabbitMQ, and of another one when it is back
    KillNode,
    /// kill -9 of the node that leads mailrun.items, and of the one that leads it then
    KillLeader,
    /// kill -9 of two of three nodes at the same moment: the queues stand still until one of them is back
    KillMajority,
    /// The node that leads mailrun.items stands still for some seconds, with all its connections open, and goes on
    StopLeader,
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
            Self::KillBroker
            | Self::KillDatabase
            | Self::KillRecovery
            | Self::RestartBroker
            | Self::RestartDatabase
            | Self::Restore
            | Self::HoleBroker
            | Self::HoleDatabase
            | Self::HoleMail => Weight::Heavy,
            _ if self.needs_cluster() => Weight::Heavy,
            Self::DuplicateMessages | Self::LongReaders | Self::LimitedDeferrals => Weight::Whole,
            _ => Weight::Light,
        }
    }

    /// Whether it takes a cluster of RabbitMQ.
    pub(super) fn needs_cluster(self) -> bool {
        matches!(self, Self::KillNode | Self::KillLeader | Self::KillMajority | Self::StopLeader)
    }

    /// Whether it can be one of many in the same run. A restore settles the whole run, so nothing would be left for others.
    pub(super) fn mixes(self) -> bool {
        !self.needs_cluster() && self != Self::Restore
    }

    /// Whether the form itself must survive it.
    pub(super) fn strikes_the_form(self) -> bool {
        matches!(self, Self::KillWeb | Self::TermWeb)
    }

    /// When it is over, a run moves again within this time. It is the sum of the waits that may come one after the other,
    /// and as much again for a machine that has other things to do.
    pub(super) fn bound(self) -> Duration {
        // A worker is found dead, its run stalled, and the longest wait between two tries to reach a server is over.
        let usual = DEAD_AFTER + STALLED_AFTER + LONGEST_RECONNECT;
        2 * match self {
            // Elections, recovery from the log, and everybody connects anew.
            Self::KillBroker
            | Self::KillDatabase
            | Self::KillRecovery
            | Self::RestartBroker
            | Self::RestartDatabase
            | Self::KillNode
            | Self::KillLeader
            | Self::KillMajority
            | Self::StopLeader => usual + SERVER_RECOVERY,
            // Both ends find out that they wait in vain, then those that tried to connect meanwhile.
            Self::HoleBroker => usual + 3 * HEARTBEAT + ANSWER,
            Self::HoleDatabase | Self::HoleMail => usual + 3 * ANSWER,
            _ => usual,
        }
    }

    /// Makes it happen, and returns when it is over: from then on everything has to recover by itself. `stages` says how far
    /// the run is. One that is there from the beginning to the end is dropped when the run is over.
    ///
    /// # Errors
    /// When it could not be made to happen, mostly because another one has just struck.
    pub(super) async fn strike(self, site: &Site<'_>, rng: &mut StdRng, stages: &Receiver<Stage>) -> Result<()> {
        match self {
            Self::KillSend => site.signal(&a_sender(rng), Signal::KILL),
            Self::KillFanOut => site.signal("fan-out", Signal::KILL),
            Self::KillProgress => site.signal("progress", Signal::KILL),
            Self::KillWeb => site.signal("web", Signal::KILL),
            Self::TermSend => site.signal(&a_sender(rng), Signal::TERM),
            Self::TermFanOut => site.signal("fan-out", Signal::TERM),
            Self::TermProgress => site.signal("progress", Signal::TERM),
            Self::TermWeb => site.signal("web", Signal::TERM),
            Self::TermTwice => processes::term_twice(site, rng).await,
            Self::StopSend => processes::stand_still(site, &a_sender(rng), some_seconds(rng)).await,
            Self::KillBroker => servers::kill(site, servers::RABBITMQ).await,
            Self::KillDatabase => servers::kill(site, servers::POSTGRESQL).await,
            Self::KillRecovery => servers::kill_in_recovery(site, rng).await,
            Self::RestartBroker => servers::restart_rabbitmq(site, some_seconds(rng)).await,
            Self::RestartDatabase => servers::restart_postgres(site, some_seconds(rng)).await,
            Self::CrowdDatabase => database::crowd(site, some_seconds(rng)).await,
            Self::TerminateBackends => database::terminate_backends(site, some_seconds(rng)).await,
            // What a worker has in hand is not on its queue: it dies first, so that the broker puts that back.
            Self::PurgeItems => {
                for sender in senders() {
                    site.signal(&sender, Signal::KILL)?;
                }
                broker::purge(site, vec![queue::ITEMS.to_owned()], some_seconds(rng)).await
            }
            Self::PurgeRetry => broker::purge(site, rungs(), some_seconds(rng)).await,
            Self::PurgeResults => {
                site.signal("progress", Signal::KILL)?;
                broker::purge(site, vec![queue::RESULTS.to_owned()], some_seconds(rng)).await
            }
            Self::PurgeRuns => {
                let queues = [queue::RUNS, queue::RUNS_WAIT, queue::RUNS_PAUSED].map(str::to_owned);
                broker::purge(site, queues.to_vec(), some_seconds(rng)).await
            }
            Self::PurgeDead => broker::purge(site, vec![queue::DEAD.to_owned()], some_seconds(rng)).await,
            Self::DeleteQueue => conveyor::delete_queues(site, rng).await,
            Self::MissingQueues => conveyor::missing_queues(site, some_seconds(rng)).await,
            Self::ConsumerTimeout => conveyor::time_out(site, some_seconds(rng), HANGING).await,
            Self::ReorderMessages => conveyor::reorder(site, some_seconds(rng), rng).await,
            Self::MailDown => mail::down(site, some_seconds(rng)).await,
            Self::MailDrops => mail::trouble(site, Trouble::Drops, some_seconds(rng)).await,
            Self::MailRefusesEveryone => mail::trouble(site, Trouble::Busy, some_seconds(rng)).await,
            Self::RefuseSender => mail::trouble(site, Trouble::Refuses, some_seconds(rng)).await,
            Self::MailLimit => mail::trouble(site, Trouble::Limits, some_seconds(rng)).await,
            Self::MailHangs => {
                site.weather.hang(HANGING);
                Ok(())
            }
            Self::MailSlow => mail::trouble(site, Trouble::Slow, some_seconds(rng)).await,
            Self::OpenTransaction => database::open_transaction(site, some_seconds(rng)).await,
            Self::LongReaders => database::long_readers(site, stages, rng).await,
            // Settings of the whole run.
            Self::DuplicateMessages | Self::LimitedDeferrals => std::future::pending().await,
            Self::PauseRun => wishes::pause(site, some_seconds(rng)).await,
            Self::ErasePeople => wishes::erase(site).await,
            Self::TermSendUncounted => processes::term_uncounted(site, some_seconds(rng)).await,
            Self::DeleteWorkerRow => database::delete_worker_row(site).await,
            Self::ForeignMessages => conveyor::foreign(site, some_seconds(rng), rng).await,
            Self::ForgedBounces => inbound::forge(site, some_seconds(rng), rng).await,
            Self::Restore => ledgers::restore(site, some_seconds(rng)).await,
            Self::SecondInstallation => ledgers::second_installation(site).await,
            Self::BrokerAlarm => broker::memory_alarm(site, some_seconds(rng)).await,
            Self::DiskAlarm => broker::disk_alarm(site, some_seconds(rng)).await,
            Self::FullItems => broker::full(site, queue::ITEMS, &senders().collect::<Vec<_>>(), FULL).await,
            Self::FullResults => broker::full(site, queue::RESULTS, &["progress".to_owned()], FULL).await,
            Self::CutBroker => network::cut(&site.to_broker, some_seconds(rng), rng).await,
            Self::CutDatabase => network::cut(&site.to_database, some_seconds(rng), rng).await,
            Self::CutMail => network::cut(&site.to_mail, some_seconds(rng), rng).await,
            Self::DelayBroker => network::delay(&site.to_broker, some_seconds(rng), rng).await,
            Self::DelayDatabase => network::delay(&site.to_database, some_seconds(rng), rng).await,
            Self::DelayMail => network::delay(&site.to_mail, some_seconds(rng), rng).await,
            Self::HoleBroker => network::hole(&site.to_broker, some_seconds(rng)).await,
            Self::HoleDatabase => network::hole(&site.to_database, some_seconds(rng)).await,
            Self::HoleMail => network::hole(&site.to_mail, some_seconds(rng)).await,
            Self::KillNode => cluster::kill_node(site, rng).await,
            Self::KillLeader => cluster::kill_leader(site).await,
            Self::KillMajority => cluster::kill_majority(site, rng).await,
            Self::StopLeader => cluster::stop_leader(site, rng).await,
        }
    }
}

fn some_seconds(rng: &mut StdRng) -> Duration {
    Duration::from_millis(rng.random_range(1_000..3_500))
}
