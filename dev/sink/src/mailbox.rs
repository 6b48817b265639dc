//! The received mail: counts of everything, and the newest messages.

use std::{
    collections::{HashMap, VecDeque, hash_map::RandomState},
    hash::BuildHasher as _,
    sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use chrono::{DateTime, Utc};
use mail_parser::{HeaderName, MessageParser};

/// Limit for the total size of the kept messages.
const KEPT_BYTES: usize = 256 << 20;

/// Parses only the header that counting needs.
static ID_PARSER: LazyLock<MessageParser> =
    LazyLock::new(|| MessageParser::new().header_id(HeaderName::MessageId).default_header_ignore());

/// An accepted message.
#[derive(Debug)]
pub struct Message {
    /// Its number among all accepted messages.
    pub number: u64,
    /// When it was accepted.
    pub at: DateTime<Utc>,
    /// The envelope sender; empty for none.
    pub from: String,
    /// The envelope recipients.
    pub to: Vec<String>,
    /// Its `Message-ID`, without angle brackets.
    pub message_id: Option<String>,
    /// Its source, without dot-stuffing.
    pub raw: Vec<u8>,
}

/// Counts of received mail. A delivery is one message to one recipient.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Counts {
    /// Accepted deliveries.
    pub deliveries: u64,
    /// Distinct pairs of recipient and `Message-ID`. Messages without an ID all count as distinct.
    pub received: u64,
    /// Pairs received more than once.
    pub received_twice: u64,
    /// Deliveries per second between the first and the last; `None` before there are two times.
    pub rate: Option<f64>,
    /// Kept messages.
    pub kept: usize,
}

/// The mail a sink has accepted. The counts cover everything; only the newest messages are kept.
#[derive(Debug)]
pub struct Mailbox {
    keep: usize,
    /// Keys of the hashes in [`Held::pairs`].
    keys: [RandomState; 2],
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    /// Number of the last message. Deleting does not reset it, so that a URL never shows another message.
    number: u64,
    /// Consecutive numbers.
    kept: VecDeque<Arc<Message>>,
    kept_bytes: usize,
    /// How often each pair of recipient and `Message-ID` came, by hash, because there may be millions. 128 bits, so that no two
    /// pairs collide.
    pairs: HashMap<u128, u32>,
    deliveries: u64,
    without_id: u64,
    received_twice: u64,
    first_and_last: Option<(Instant, Instant)>,
}

impl Mailbox {
    /// An empty mailbox that keeps `keep` messages.
    #[must_use]
    pub fn new(keep: usize) -> Self {
        Self { keep, keys: [RandomState::new(), RandomState::new()], held: Mutex::default() }
    }

    /// Adds a message.
    pub(super) fn accept(&self, from: &str, to: &[String], raw: Vec<u8>) {
        let message_id = ID_PARSER.parse_headers(&raw).and_then(|headers| headers.message_id().map(str::to_owned));
        let pairs: Option<Vec<u128>> =
            message_id.as_deref().map(|id| to.iter().map(|recipient| self.hash(recipient, id)).collect());
        let mut held = self.lock();
        // Read under the lock, so that times only grow.
        let now = Instant::now();
        let first = held.first_and_last.map_or(now, |(first, _)| first);
        held.first_and_last = Some((first, now));
        held.number += 1;
        held.deliveries += to.len() as u64;
        match pairs {
            None => held.without_id += to.len() as u64,
            Some(pairs) => {
                for pair in pairs {
                    let times = held.pairs.entry(pair).or_default();
                    *times = times.saturating_add(1);
                    held.received_twice += u64::from(*times == 2);
                }
            }
        }
        if self.keep == 0 {
            return;
        }
        held.kept_bytes += raw.len();
        let message =
            Message { number: held.number, at: Utc::now(), from: from.to_owned(), to: to.to_vec(), message_id, raw };
        held.kept.push_back(Arc::new(message));
        while held.kept.len() > self.keep || held.kept_bytes > KEPT_BYTES {
            let Some(oldest) = held.kept.pop_front() else { break };
            held.kept_bytes -= oldest.raw.len();
        }
    }

    /// The current counts.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let held = self.lock();
        let seconds = held.first_and_last.map_or(0.0, |(first, last)| last.duration_since(first).as_secs_f64());
        Counts {
            deliveries: held.deliveries,
            received: held.pairs.len() as u64 + held.without_id,
            received_twice: held.received_twice,
            rate: (seconds > 0.0).then(|| (held.deliveries - 1) as f64 / seconds),
            kept: held.kept.len(),
        }
    }

    /// How often this recipient received the message with this ID, given without angle brackets.
    #[must_use]
    pub fn times(&self, recipient: &str, message_id: &str) -> u32 {
        let pair = self.hash(recipient, message_id);
        self.lock().pairs.get(&pair).copied().unwrap_or_default()
    }

    /// Up to `count` kept messages with numbers below `before`, newest first.
    #[must_use]
    pub fn newest(&self, before: Option<u64>, count: usize) -> Vec<Arc<Message>> {
        let held = self.lock();
        let end = before.map_or(held.kept.len(), |before| held.kept.partition_point(|message| message.number < before));
        held.kept.range(..end).rev().take(count).map(Arc::clone).collect()
    }

    /// A kept message.
    #[must_use]
    pub fn message(&self, number: u64) -> Option<Arc<Message>> {
        let held = self.lock();
        let index = held.kept.binary_search_by_key(&number, |message| message.number).ok()?;
        held.kept.get(index).map(Arc::clone)
    }

    /// Deletes the messages and resets the counts.
    pub fn clear(&self) {
        let mut held = self.lock();
        let before = std::mem::take(&mut *held);
        held.number = before.number;
        drop(held);
        // Freed after unlocking: ten thousand messages take a moment, and mail may already arrive.
        drop(before);
    }

    fn hash(&self, recipient: &str, message_id: &str) -> u128 {
        let [high, low] = self.keys.each_ref().map(|key| u128::from(key.hash_one((recipient, message_id))));
        high << 64 | low
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        // No panic inside leaves a state that matters more than the mail itself.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accept(mailbox: &Mailbox, to: &[&str], id: &str) {
        let to: Vec<String> = to.iter().map(ToString::to_string).collect();
        mailbox.accept("from@a.example", &to, format!("Message-ID: <{id}>\r\nSubject: Hi\r\n\r\nHello\r\n").into());
    }

    #[test]
    fn counts_a_pair_once_and_its_repetitions() {
        let mailbox = Mailbox::new(10);
        accept(&mailbox, &["a@a.example", "b@a.example"], "1@x");
        accept(&mailbox, &["a@a.example"], "2@x");
        for _ in 0..2 {
            accept(&mailbox, &["a@a.example"], "1@x");
        }
        let counts = mailbox.counts();
        assert_eq!((counts.deliveries, counts.received, counts.received_twice, counts.kept), (5, 3, 1, 4));
        assert!(counts.rate.is_some_and(|rate| rate > 0.0));
        assert_eq!([mailbox.times("a@a.example", "1@x"), mailbox.times("b@a.example", "1@x")], [3, 1]);
        assert_eq!(mailbox.times("b@a.example", "2@x"), 0);
    }

    #[test]
    fn messages_without_an_id_are_distinct() {
        let mailbox = Mailbox::new(10);
        for _ in 0..2 {
            mailbox.accept("", &["a@a.example".into()], b"Subject: Hi\r\n\r\n".to_vec());
        }
        assert_eq!((mailbox.counts().received, mailbox.counts().received_twice), (2, 0));
    }

    #[test]
    fn keeps_the_newest() {
        let mailbox = Mailbox::new(3);
        (1..=5).for_each(|number| accept(&mailbox, &["a@a.example"], &format!("{number}@x")));
        let numbers = |before, count| mailbox.newest(before, count).iter().map(|one| one.number).collect::<Vec<_>>();
        assert_eq!(numbers(None, 2), [5, 4]);
        assert_eq!(numbers(Some(4), 2), [3]);
        assert!(numbers(Some(1), 2).is_empty());
        assert_eq!(mailbox.message(3).unwrap().message_id.as_deref(), Some("3@x"));
        assert!(mailbox.message(2).is_none());
        assert_eq!(mailbox.counts().received, 5);
    }

    #[test]
    fn numbers_continue_after_deleting() {
        let mailbox = Mailbox::new(3);
        accept(&mailbox, &["a@a.example"], "1@x");
        mailbox.clear();
        assert_eq!(mailbox.counts(), Counts::default());
        accept(&mailbox, &["a@a.example"], "1@x");
        assert!(mailbox.message(1).is_none() && mailbox.message(2).is_some());
        assert_eq!(mailbox.counts().received_twice, 0);
    }

    #[test]
    fn counts_without_keeping_messages() {
        let mailbox = Mailbox::new(0);
        accept(&mailbox, &["a@a.example"], "1@x");
        assert_eq!((mailbox.counts().received, mailbox.counts().kept), (1, 0));
    }
}
