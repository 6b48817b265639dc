//! The faults, with their names and frequencies. The files beside this one implement them by subject, including how those are undone that
//! do not end by themselves.

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
    site::{ANSWER, DEAD_AFTER, HEARTBEAT, STALLED_AFTER, Site, retry_queues},
    smtp_faults::SmtpFault,
    watch::Stage,
};

/// How long the consumers of a full queue are stopped, which is shorter than the heartbeat timeout.
const FULL: Duration = Duration::from_secs(2);
/// The maximum wait between two attempts to connect to a server, or to start a process that died repeatedly.
const LONGEST_RECONNECT: Duration = Duration::from_secs(10);
/// A server may take this long to become usable after it answers.
const SERVER_RECOVERY: Duration = Duration::from_secs(10);

/// A fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Fault {
    /// kill -9 a sender
    KillSend,
    /// kill -9 the fan-out worker
    KillFanOut,
    /// kill -9 the progress worker
    KillProgress,
    /// kill -9 the web server, once during the submission
    KillWeb,
    /// SIGTERM a sender
    TermSend,
    /// SIGTERM the fan-out worker
    TermFanOut,
    /// SIGTERM the progress worker
    TermProgress,
    /// SIGTERM the web server, once during the submission
    TermWeb,
    /// SIGTERM one process after another, and each again a moment later
    TermTwice,
    /// SIGSTOP a sender for longer than its heartbeat timeout, then continue it
    StopSend,
    /// kill -9 RabbitMQ
    KillBroker,
    /// kill -9 PostgreSQL
    KillDatabase,
    /// kill -9 PostgreSQL, and again during its recovery
    KillRecovery,
    /// Stop RabbitMQ cleanly, and start it again after some seconds
    RestartBroker,
    /// Stop PostgreSQL cleanly, and start it again after some seconds
    RestartDatabase,
    /// Terminate all PostgreSQL sessions, repeatedly for some seconds
    TerminateBackends,
    /// Exhaust the connections of PostgreSQL for some seconds
    CrowdDatabase,
    /// Kill all senders and purge mailrun.items, repeatedly for some seconds
    PurgeItems,
    /// Purge the retry queues, repeatedly for some seconds
    PurgeRetry,
    /// Kill the progress worker and purge mailrun.results, repeatedly for some seconds
    PurgeResults,
    /// Purge mailrun.runs and its wait queues, repeatedly for some seconds
    PurgeRuns,
    /// Purge mailrun.dead, repeatedly for some seconds
    PurgeDead,
    /// Delete all queues, one after another
    DeleteQueue,
    /// Unbind the wait queues, retry queues and dead-letter queue repeatedly for some seconds
    MissingQueues,
    /// RabbitMQ closes each channel with a delivery unacknowledged for a second (406), for some seconds
    ConsumerTimeout,
    /// Reorder the messages of all queues for some seconds
    ReorderMessages,
    /// The mail server is down for some seconds
    MailDown,
    /// The mail server accepts 1 % of the messages and drops the connection before its reply
    MailDrops,
    /// The mail server defers all clients (421) for some seconds
    MailRefusesEveryone,
    /// The mail server denies relaying (550 to RCPT) for some seconds
    RefuseSender,
    /// The mail server reports an exceeded daily limit (550 after the message) for some seconds
    MailLimit,
    /// The mail server stops responding on some connections
    MailHangs,
    /// The mail server delays each reply to a message by two seconds, for some seconds
    MailSlow,
    /// A transaction holds an old snapshot and a lock on the counters for some seconds
    OpenTransaction,
    /// Readers hold old snapshots, each for up to a third of the run, during the whole run
    LongReaders,
    /// A rate limit applies, and the mail server repeatedly defers every 7th recipient
    LimitedDeferrals,
    /// Pause the run for some seconds while retries wait on their queues
    PauseRun,
    /// Erase some people during the run
    ErasePeople,
    /// SIGSTOP the progress worker while all senders restart cleanly
    TermSendUncounted,
    /// Delete a sender's row in the table of workers
    DeleteWorkerRow,
    /// Publish messages and results of another installation, with the same item numbers
    ForeignMessages,
    /// Post forged or inconclusive reports to the bounce hook for some seconds
    ForgedBounces,
    /// Replace the ledger by a backup of some seconds ago, and declare the restore
    Restore,
    /// Set up another installation on the same virtual host, and start a worker there
    SecondInstallation,
    /// Publish each message twice
    DuplicateMessages,
    /// RabbitMQ's memory alarm blocks publishers for some seconds
    BrokerAlarm,
    /// RabbitMQ's disk alarm blocks publishers for some seconds
    DiskAlarm,
    /// mailrun.items holds one message only, while all senders restart and are stopped for two seconds
    FullItems,
    /// mailrun.results holds one message only, while the progress worker restarts and is stopped for two seconds
    FullResults,
    /// Cut connections to RabbitMQ, repeatedly for some seconds
    CutBroker,
    /// Cut connections to PostgreSQL, repeatedly for some seconds
    CutDatabase,
    /// Cut connections to the mail server, repeatedly for some seconds
    CutMail,
    /// Delay traffic with RabbitMQ by 200 to 500 ms each way, for some seconds
    DelayBroker,
    /// Delay traffic with PostgreSQL by 200 to 500 ms each way, for some seconds
    DelayDatabase,
    /// Delay traffic with the mail server by 200 to 500 ms each way, for some seconds
    DelayMail,
    /// Silently drop traffic with RabbitMQ for longer than its heartbeat timeout
    HoleBroker,
    /// Silently drop traffic with PostgreSQL for longer than its answer timeout
    HoleDatabase,
    /// Silently drop traffic with the mail server for longer than its answer timeout
    HoleMail,
    /// kill -9 one of three RabbitMQ nodes, and another one after its recovery
    KillNode,
    /// kill -9 the node that leads mailrun.items, then the new leader
    KillLeader,
    /// kill -9 two of three nodes at once: the queues are unavailable until one of them is back
    KillMajority,
    /// SIGSTOP the node that leads mailrun.items for some seconds, with its connections open, then continue it
    StopLeader,
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

impl Fault {
    /// Its name on the command line and in the report.
    pub(super) fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    /// How often it occurs within one run.
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

    /// Whether it requires a RabbitMQ cluster.
    pub(super) fn needs_cluster(self) -> bool {
        matches!(self, Self::KillNode | Self::KillLeader | Self::KillMajority | Self::StopLeader)
    }

    /// Whether it can be combined with others in the same run. A restore settles the whole run, so nothing would be left for others.
    pub(super) fn mixes(self) -> bool {
        !self.needs_cluster() && self != Self::Restore
    }

    /// Whether it also occurs during the submission of the form.
    pub(super) fn strikes_the_form(self) -> bool {
        matches!(self, Self::KillWeb | Self::TermWeb)
    }

    /// The time within which a run progresses again after it: the sum of the waits that may follow each other, doubled for a busy
    /// machine.
    pub(super) fn bound(self) -> Duration {
        // A worker is declared dead, its run is swept as stalled, and the longest reconnect wait is over.
        let usual = DEAD_AFTER + STALLED_AFTER + LONGEST_RECONNECT;
        2 * match self {
            // Elections, recovery from the log, and all processes reconnect.
            Self::KillBroker
            | Self::KillDatabase
            | Self::KillRecovery
            | Self::RestartBroker
            | Self::RestartDatabase
            | Self::KillNode
            | Self::KillLeader
            | Self::KillMajority
            | Self::StopLeader => usual + SERVER_RECOVERY,
            // Both ends time out, then those that tried to connect meanwhile.
            Self::HoleBroker => usual + 3 * HEARTBEAT + ANSWER,
            Self::HoleDatabase | Self::HoleMail => usual + 3 * ANSWER,
            _ => usual,
        }
    }

    /// Carries out the fault and returns when it is over: from then on, everything must recover by itself. `stages` reports the run's
    /// progress. A fault of the whole run is dropped when the run is over. It can fail, usually because of another fault just before.
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
            Self::StopSend => processes::stop_for(site, &a_sender(rng), some_seconds(rng)).await,
            Self::KillBroker => servers::kill(site, servers::RABBITMQ).await,
            Self::KillDatabase => servers::kill(site, servers::POSTGRESQL).await,
            Self::KillRecovery => servers::kill_in_recovery(site, rng).await,
            Self::RestartBroker => servers::restart_rabbitmq(site, some_seconds(rng)).await,
            Self::RestartDatabase => servers::restart_postgres(site, some_seconds(rng)).await,
            Self::CrowdDatabase => database::crowd(site, some_seconds(rng)).await,
            Self::TerminateBackends => database::terminate_backends(site, some_seconds(rng)).await,
            // The worker dies first, so that the broker requeues its unacknowledged messages.
            Self::PurgeItems => {
                for sender in senders() {
                    site.signal(&sender, Signal::KILL)?;
                }
                broker::purge(site, vec![queue::ITEMS.to_owned()], some_seconds(rng)).await
            }
            Self::PurgeRetry => broker::purge(site, retry_queues(), some_seconds(rng)).await,
            Self::PurgeResults => {
                site.signal("progress", Signal::KILL)?;
                broker::purge(site, vec![queue::RESULTS.to_owned()], some_seconds(rng)).await
            }
            Self::PurgeRuns => {
                let queues = [queue::RUNS, queue::RUNS_WAIT, queue::RUNS_PAUSED].map(str::to_owned);
                broker::purge(site, queues.to_vec(), some_seconds(rng)).await
            }
            Self::PurgeDead => broker::purge(site, vec![queue::DEAD.to_owned()], some_seconds(rng)).await,
            Self::DeleteQueue => queues::delete_queues(site, rng).await,
            Self::MissingQueues => queues::missing_queues(site, some_seconds(rng)).await,
            Self::ConsumerTimeout => queues::time_out(site, some_seconds(rng), HANGING).await,
            Self::ReorderMessages => queues::reorder(site, some_seconds(rng), rng).await,
            Self::MailDown => mail::down(site, some_seconds(rng)).await,
            Self::MailDrops => mail::faulty(site, SmtpFault::Drops, some_seconds(rng)).await,
            Self::MailRefusesEveryone => mail::faulty(site, SmtpFault::Busy, some_seconds(rng)).await,
            Self::RefuseSender => mail::faulty(site, SmtpFault::Refuses, some_seconds(rng)).await,
            Self::MailLimit => mail::faulty(site, SmtpFault::Limits, some_seconds(rng)).await,
            Self::MailHangs => {
                site.smtp_faults.hang(HANGING);
                Ok(())
            }
            Self::MailSlow => mail::faulty(site, SmtpFault::Slow, some_seconds(rng)).await,
            Self::OpenTransaction => database::open_transaction(site, some_seconds(rng)).await,
            Self::LongReaders => database::long_readers(site, stages, rng).await,
            // Settings of the whole run.
            Self::DuplicateMessages | Self::LimitedDeferrals => std::future::pending().await,
            Self::PauseRun => run_commands::pause(site, some_seconds(rng)).await,
            Self::ErasePeople => run_commands::erase(site).await,
            Self::TermSendUncounted => processes::term_uncounted(site, some_seconds(rng)).await,
            Self::DeleteWorkerRow => database::delete_worker_row(site).await,
            Self::ForeignMessages => queues::foreign(site, some_seconds(rng), rng).await,
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
