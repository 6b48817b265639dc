//! The names and meanings of all exported metrics. docs/metrics.md has the same table for readers; a test compares it with what the
//! processes export.
//!
//! Each stage records with the macros of the crate `metrics`; without a recorder they do nothing. Counters with known label values
//! start at 0, so that a rate is right from the first event on.

use metrics::{counter, describe_counter, describe_gauge, describe_histogram};

enum Kind {
    Counter,
    Gauge,
    Histogram,
}

/// Defines a constant for the name of each metric, and the table of all metrics.
macro_rules! metrics {
    ($($constant:ident: $kind:ident = $name:literal, $meaning:literal;)*) => {
        $(#[doc = $meaning] pub const $constant: &str = $name;)*

        const ALL: &[(&str, Kind, &str)] = &[$(($constant, Kind::$kind, $meaning)),*];
    };
}

metrics! {
    INFO: Gauge = "mailrun_info", "1, with the version and the roles of the process";
    READY: Gauge = "mailrun_ready", "1 if the process can work, 0 if not; /readyz gives the reasons";
    CONFIRM_SECONDS: Histogram = "mailrun_confirm_seconds", "Time from publishing a burst of messages to the last of its confirms";
    PUBLISHED: Counter = "mailrun_messages_published_total", "Messages that RabbitMQ has confirmed, by queue";
    REJECTED: Counter = "mailrun_messages_rejected_total", "Messages that RabbitMQ has rejected because their queue is missing or full";
    ITEMS: Counter = "mailrun_items_total", "Items that entered a state, counted when their results are applied";
    RESULTS: Counter = "mailrun_results_total", "Results that changed an item, were known already, belong to no item, or wait for a later version";
    ATTEMPTS: Counter = "mailrun_attempts_total", "Attempts by outcome; withdrawn and deferred ones cost no try";
    REPLIES: Counter = "mailrun_smtp_replies_total", "Final replies of relays to a mail, by class";
    CLAIM_SECONDS: Histogram = "mailrun_claim_seconds", "Time to claim a batch of items in PostgreSQL";
    SEND_SECONDS: Histogram = "mailrun_send_seconds", "Time of one send, from the start in the mailer to its outcome; under a rate limit it includes the wait for the send time";
    PERMITS: Gauge = "mailrun_permits", "Attempts that the process may have in progress at once";
    PERMITS_IN_USE: Gauge = "mailrun_permits_in_use", "Attempts in progress whose outcome is not on disk yet";
    RELAY_STATE: Gauge = "mailrun_relay_state", "1 for the current state of the mailer's gate: open, trying one mail, or closed";
    REBUILDS: Counter = "mailrun_consumer_rebuilds_total", "Consumer connections that the watchdog replaced";
    SWEEPS: Counter = "mailrun_sweeps_total", "Sweeps that completed or were aborted";
    REPAIRS: Counter = "mailrun_repairs_total", "Repairs by the sweeper: messages put back, runs driven, results told again, attempts given up";
    QUEUE_MESSAGES: Gauge = "mailrun_queue_messages", "Ready messages on a queue, without unacknowledged ones";
    LEDGER_ITEMS: Gauge = "mailrun_ledger_items", "Items in the ledger, by state";
    RUNS_OPEN: Gauge = "mailrun_runs_open", "Runs with items that are pending or retrying";
    OUTBOX_MESSAGES: Gauge = "mailrun_outbox_messages", "Committed messages that are not published to RabbitMQ yet";
    OUTBOX_OLDEST: Gauge = "mailrun_outbox_oldest_seconds", "Age of the oldest of them, in seconds";
    SUPPRESSIONS: Gauge = "mailrun_suppressions", "Addresses on the suppression list";
    RELAYS_STOPPED: Gauge = "mailrun_relays_stopped", "Relays that are stopped until an operator decides about their refusals";
    REQUEST_SECONDS: Histogram = "mailrun_http_request_seconds", "Time of an HTTP request to the pages, by route and status";
}

/// Registers the descriptions of all metrics with the installed recorder.
pub fn describe() {
    for &(name, ref kind, help) in ALL {
        match kind {
            Kind::Counter => describe_counter!(name, help),
            Kind::Gauge => describe_gauge!(name, help),
            Kind::Histogram => describe_histogram!(name, help),
        }
    }
}

/// Starts a counter at 0 for each of these values of its label.
pub fn begin<V: Into<metrics::SharedString>>(
    name: &'static str,
    label: &'static str,
    values: impl IntoIterator<Item = V>,
) {
    for value in values {
        counter!(name, label => value.into()).absolute(0);
    }
}
