//! The names of the exchanges and queues.

use std::{borrow::Cow, iter, time::Duration};

/// The direct exchange that every message is published to; its routing keys are the queues' names.
pub const EXCHANGE: &str = "mailrun";
/// Where the broker dead-letters messages that exceed the delivery limit.
pub const DEAD_EXCHANGE: &str = "mailrun.dead";
/// Run messages, for the fan-out.
pub const RUNS: &str = "mailrun.runs";
/// Runs that wait for room in their window.
pub const RUNS_WAIT: &str = "mailrun.runs.wait";
/// Runs that are paused.
pub const RUNS_PAUSED: &str = "mailrun.runs.paused";
/// Item messages: the first queue of them, to which waiting and moved messages return.
pub const ITEMS: &str = "mailrun.items";
/// Item messages of a newer version, which wait for a worker that understands them.
pub const ITEMS_WAIT: &str = "mailrun.items.wait";
/// Results, for the progress workers.
pub const RESULTS: &str = "mailrun.results";
/// Results of a newer version.
pub const RESULTS_WAIT: &str = "mailrun.results.wait";
/// Queues of earlier versions, which are deleted.
pub const FORMER: [&str; 2] = ["mailrun.tests", "mailrun.tests.wait"];
/// The latest epoch of the ledger, in the only message: see `marker` in the crate `mailrun-broker`.
pub const EPOCH: &str = "mailrun.epoch";
/// The dead letters.
pub const DEAD: &str = "mailrun.dead";

/// The wait queue for messages of `queue` that the worker is too old to understand.
#[must_use]
pub fn waiting_room_of(queue: &str) -> &'static str {
    match queue {
        RESULTS => RESULTS_WAIT,
        RUNS => RUNS_PAUSED,
        _ => ITEMS_WAIT,
    }
}

/// The name of the queue where an item waits for `delay`: one queue for each delay, since a message expires only at the
/// head of its queue.
#[must_use]
pub fn retry_queue(delay: Duration) -> String {
    let ms = delay.as_millis();
    if ms.is_multiple_of(1000) { format!("mailrun.retry.{}s", ms / 1000) } else { format!("mailrun.retry.{ms}ms") }
}

/// The queues that item messages are spread over, because the broker uses one core for a queue. Any message may be on any of them,
/// so messages that return from a retry queue, or are moved by hand, go to the first.
#[must_use]
pub fn item_queues(count: u16) -> Vec<Cow<'static, str>> {
    let others = (2..=count).map(|number| Cow::Owned(format!("{ITEMS}.{number}")));
    iter::once(Cow::Borrowed(ITEMS)).chain(others).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_item_queue_has_the_plain_name() {
        assert_eq!(item_queues(1), ["mailrun.items"]);
        assert_eq!(item_queues(3), ["mailrun.items", "mailrun.items.2", "mailrun.items.3"]);
    }

    #[test]
    fn retry_queues_are_named_by_their_delay() {
        assert_eq!(retry_queue(Duration::from_millis(250)), "mailrun.retry.250ms");
        assert_eq!(retry_queue(Duration::from_secs(5)), "mailrun.retry.5s");
    }
}
