//! The metrics: every name that is exported, and what it means. docs/metrics.md is the same table for readers; a test compares it
//! with what the processes export.
//!
//! A stage records where the thing happens, with the macros of the crate `metrics`; nothing is recorded unless somebody is to
//! read it. Counters whose labels are known exist from the start, at 0: so a rate is right from the first event on.

use std::sync::OnceLock;

use metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge};
use metrics_exporter_prometheus::{BuildError, PrometheusBuilder, PrometheusHandle};

/// Which version runs where.
pub const INFO: &str = "mailrun_info";
/// Whether the process can do its work.
pub const READY: &str = "mailrun_ready";
/// Confirms of RabbitMQ.
pub const CONFIRM_SECONDS: &str = "mailrun_confirm_seconds";
/// Messages that RabbitMQ has taken.
pub const PUBLISHED: &str = "mailrun_messages_published_total";
/// Messages that RabbitMQ did not take.
pub const REJECTED: &str = "mailrun_messages_rejected_total";
/// Items that came into a state.
pub const ITEMS: &str = "mailrun_items_total";
/// Results, by what they did.
pub const RESULTS: &str = "mailrun_results_total";
/// Attempts that came to an end.
pub const ATTEMPTS: &str = "mailrun_attempts_total";
/// Answers of mail servers.
pub const REPLIES: &str = "mailrun_smtp_replies_total";
/// Claims.
pub const CLAIM_SECONDS: &str = "mailrun_claim_seconds";
/// Sends.
pub const SEND_SECONDS: &str = "mailrun_send_seconds";
/// Permits there are.
pub const PERMITS: &str = "mailrun_permits";
/// Permits in use.
pub const PERMITS_IN_USE: &str = "mailrun_permits_in_use";
/// Whether anything is sent.
pub const RELAY_STATE: &str = "mailrun_relay_state";
/// Connections of consumers that were of no use.
pub const REBUILDS: &str = "mailrun_consumer_rebuilds_total";
/// Sweeps.
pub const SWEEPS: &str = "mailrun_sweeps_total";
/// What sweeps have put right.
pub const REPAIRS: &str = "mailrun_repairs_total";
/// Messages that wait on a queue.
pub const QUEUE_MESSAGES: &str = "mailrun_queue_messages";
/// Items in the ledger.
pub const LEDGER_ITEMS: &str = "mailrun_ledger_items";
/// Runs that are not over.
pub const RUNS_OPEN: &str = "mailrun_runs_open";
/// Messages in the outbox.
pub const OUTBOX_MESSAGES: &str = "mailrun_outbox_messages";
/// The age of the oldest.
pub const OUTBOX_OLDEST: &str = "mailrun_outbox_oldest_seconds";
/// Addresses that nobody writes to.
pub const SUPPRESSIONS: &str = "mailrun_suppressions";
/// Relays that wait for an operator.
pub const RELAYS_STOPPED: &str = "mailrun_relays_stopped";
/// Requests to the pages.
pub const REQUEST_SECONDS: &str = "mailrun_http_request_seconds";

enum Kind {
    Counter,
    Gauge,
    Histogram,
}

use Kind::{Counter, Gauge, Histogram};

const ALL: [(&str, Kind, &str); 25] = [
    (INFO, Gauge, "1, with the version and the roles of the process"),
    (READY, Gauge, "1 when the process can do its work, 0 when /readyz says why not"),
    (CONFIRM_SECONDS, Histogram, "From publishing a burst of messages to RabbitMQ's confirm for the last of them"),
    (PUBLISHED, Counter, "Messages that RabbitMQ has on disk, by queue"),
    (REJECTED, Counter, "Messages that RabbitMQ did not take: their queue is missing, or full"),
    (ITEMS, Counter, "Items that came into a state, as results were counted"),
    (
        RESULTS,
        Counter,
        "Results that changed an item, were known already, belong to no item, or wait for a later version",
    ),
    (ATTEMPTS, Counter, "Attempts by what became of them; those withdrawn or put off cost no try"),
    (REPLIES, Counter, "Answers of mail servers that ended a conversation about a mail, by class"),
    (CLAIM_SECONDS, Histogram, "Claiming a batch of items in PostgreSQL"),
    (
        SEND_SECONDS,
        Histogram,
        "One send, from the mailer's begin to its answer; under a rate limit with the wait for the send time",
    ),
    (PERMITS, Gauge, "Attempts that the process may have under way at once"),
    (PERMITS_IN_USE, Gauge, "Attempts under way whose outcome is not on disk yet"),
    (RELAY_STATE, Gauge, "1 for the state the mailer is in: open, trying one mail, or closed"),
    (REBUILDS, Counter, "Connections that the watchdog gave up because nothing came over them"),
    (SWEEPS, Counter, "Sweeps that came to their end, or were broken off"),
    (
        REPAIRS,
        Counter,
        "What sweeps have put right: messages put back, runs driven on, results told again, attempts given up",
    ),
    (QUEUE_MESSAGES, Gauge, "Messages that wait on a queue, not counting those that a process has in hand"),
    (LEDGER_ITEMS, Gauge, "Items in the ledger, by state"),
    (RUNS_OPEN, Gauge, "Runs with items that are pending or retrying"),
    (OUTBOX_MESSAGES, Gauge, "Messages committed and not yet handed to RabbitMQ"),
    (OUTBOX_OLDEST, Gauge, "Age of the oldest of them, in seconds"),
    (SUPPRESSIONS, Gauge, "Addresses that nobody writes to any more"),
    (RELAYS_STOPPED, Gauge, "Relays that are stopped until an operator says whose fault the refusals were"),
    (REQUEST_SECONDS, Histogram, "Requests to the pages, by route and status"),
];

/// From a millisecond, which is a claim, to half a minute, which is a slow mail server.
const BUCKETS: [f64; 14] = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0];

static RECORDER: OnceLock<PrometheusHandle> = OnceLock::new();

/// Has everything recorded from now on, in the name of this process. What was asked for before is not recorded.
///
/// # Errors
/// None in practice: the buckets are not empty.
pub(crate) fn install(process: &str) -> Result<&'static PrometheusHandle, BuildError> {
    if let Some(handle) = RECORDER.get() {
        return Ok(handle);
    }
    let recorder = PrometheusBuilder::new().set_buckets(&BUCKETS)?.build_recorder();
    let handle = RECORDER.get_or_init(|| recorder.handle());
    // Otherwise there is one already, which is the one that is read.
    let _ = metrics::set_global_recorder(recorder);
    for (name, kind, help) in ALL {
        match kind {
            Counter => describe_counter!(name, help),
            Gauge => describe_gauge!(name, help),
            Histogram => describe_histogram!(name, help),
        }
    }
    gauge!(INFO, "version" => env!("CARGO_PKG_VERSION"), "process" => process.to_owned()).set(1);
    Ok(handle)
}

/// Has counters exist from the start, for each of these values of their label.
pub fn begin<V: Into<metrics::SharedString>>(
    name: &'static str,
    label: &'static str,
    values: impl IntoIterator<Item = V>,
) {
    for value in values {
        counter!(name, label => value.into()).absolute(0);
    }
}
