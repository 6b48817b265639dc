//! The metrics: every name that is exported, and what it means. docs/metrics.md is the same table for readers; a test compares it
//! with what the processes export.
//!
//! A stage records where the thing happens, with the macros of the crate `metrics`; nothing is recorded unless somebody is to
//! read it. Counters whose labels are known exist from the start, at 0: so a rate is right from the first event on.

use metrics::{counter, describe_counter, describe_gauge, describe_histogram};

enum Kind {
    Counter,
    Gauge,
    Histogram,
}

/// A constant with the name of each metric, and the table of all of them.
macro_rules! metrics {
    ($($constant:ident: $kind:ident = $name:literal, $meaning:literal;)*) => {
        $(#[doc = $meaning] pub const $constant: &str = $name;)*

        const ALL: &[(&str, Kind, &str)] = &[$(($constant, Kind::$kind, $meaning)),*];
    };
}

metrics! {
    INFO: Gauge = "mailrun_info", "1, with the version and the roles of the process";
    READY: Gauge = "mailrun_ready", "1 when the process can do its work, 0 when /readyz says why not";
    CONFIRM_SECONDS: Histogram = "mailrun_confirm_seconds", "From publishing a burst of messages to RabbitMQ's confirm for the last of them";
    PUBLISHED: Counter = "mailrun_messages_published_total", "Messages that RabbitMQ has on disk, by queue";
    REJECTED: Counter = "mailrun_messages_rejected_total", "Messages that RabbitMQ did not take: their queue is missing, or full";
    ITEMS: Counter = "mailrun_items_total", "Items that came into a state, as results were counted";
    RESULTS: Counter = "mailrun_results_total", "Results that changed an item, were known already, belong to no item, or wait for a later version";
    ATTEMPTS: Counter = "mailrun_attempts_total", "Attempts by what became of them; those withdrawn or put off cost no try";
    REPLIES: Counter = "mailrun_smtp_replies_total", "Answers of mail servers that ended a conversation about a mail, by class";
    CLAIM_SECONDS: Histogram = "mailrun_claim_seconds", "Claiming a batch of items in PostgreSQL";
    SEND_SECONDS: Histogram = "mailrun_send_seconds", "One send, from the mailer's begin to its answer; under a rate limit with the wait for the send time";
    PERMITS: Gauge = "mailrun_permits", "Attempts that the process may have under way at once";
    PERMITS_IN_USE: Gauge = "mailrun_permits_in_use", "Attempts under way whose outcome is not on disk yet";
    RELAY_STATE: Gauge = "mailrun_relay_state", "1 for the state the mailer is in: open, trying one mail, or closed";
    REBUILDS: Counter = "mailrun_consumer_rebuilds_total", "Connections that the watchdog gave up because nothing came over them";
    SWEEPS: Counter = "mailrun_sweeps_total", "Sweeps that came to their end, or were broken off";
    REPAIRS: Counter = "mailrun_repairs_total", "What sweeps have put right: messages put back, runs driven on, results told again, attempts given up";
    QUEUE_MESSAGES: Gauge = "mailrun_queue_messages", "Messages that wait on a queue, not counting those that a process has in hand";
    LEDGER_ITEMS: Gauge = "mailrun_ledger_items", "Items in the ledger, by state";
    RUNS_OPEN: Gauge = "mailrun_runs_open", "Runs with items that are pending or retrying";
    OUTBOX_MESSAGES: Gauge = "mailrun_outbox_messages", "Messages committed and not yet handed to RabbitMQ";
    OUTBOX_OLDEST: Gauge = "mailrun_outbox_oldest_seconds", "Age of the oldest of them, in seconds";
    SUPPRESSIONS: Gauge = "mailrun_suppressions", "Addresses that nobody writes to any more";
    RELAYS_STOPPED: Gauge = "mailrun_relays_stopped", "Relays that are stopped until an operator says whose fault the refusals were";
    REQUEST_SECONDS: Histogram = "mailrun_http_request_seconds", "Requests to the pages, by route and status";
}

/// Describes every metric to the recorder that is installed.
pub fn describe() {
    for &(name, ref kind, help) in ALL {
        match kind {
            Kind::Counter => describe_counter!(name, help),
            Kind::Gauge => describe_gauge!(name, help),
            Kind::Histogram => describe_histogram!(name, help),
        }
    }
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
