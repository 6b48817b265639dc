//! What has arrived: the count of everything, and the newest messages themselves.

use std::{
    collections::{HashMap, VecDeque, hash_map::RandomState},
    hash::BuildHasher as _,
    sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use chrono::{DateTime, Utc};
use mail_parser::{HeaderName, MessageParser};

/// The sources of kept messages take up no more than this, whatever their number.
const KEPT_BYTES: usize = 256 << 20;

/// Reads the one header that counting needs.
static ID_PARSER: LazyLock<MessageParser> =
    LazyLock::new(|| MessageParser::new().header_id(HeaderName::MessageId).default_header_ignore());

/// A message that was accepted.
#[derive(Debug)]
pub struct Message {
    /// Its place among all that were accepted.
    pub number: u64,
    /// When it was accepted.
    pub at: DateTime<Utc>,
    /// The sender of the envelope; empty for none.
    pub from: String,
    /// The recipients of the envelope.
    pub to: Vec<String>,
    /// Its `Message-ID`, without the angle brackets.
    pub message_id: Option<String>,
    /// As it arrived, without the dots of the transport.
    pub raw: Vec<u8>,
}

/// How much has arrived. A delivery is one message to one recipient.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Figures {
    /// Deliveries that were accepted.
    pub deliveries: u64,
    /// Different pairs of recipient and `Message-ID` among them. A message without an ID is like no other.
    pub received: u64,
    /// Pairs that came more than once.
    pub received_twice: u64,
    /// Deliveries a second between the first and the last; `None` while there are not two moments.
    pub rate: Option<f64>,
    /// Messages that are kept.
    pub kept: usize,
}

/// What a sink has accepted. The counts cover everything; of the messages, only the newest are kept.
#[derive(Debug)]
pub struct Mailbox {
    keep: usize,
    /// Keys of the hashes in [`Held::pairs`].
    keys: [RandomState; 2],
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    /// Of the last message; goes on when all is deleted, so that an address never shows another message.
    number: u64,
    /// Without a gap in the numbers.
    kept: VecDeque<Arc<Message>>,
    kept_bytes: usize,
    /// How often each pair of recipient and `Message-ID` came: by hash, as there may be millions. Of 128 bits, so that two
    /// pairs do not share one.
    pairs: HashMap<u128, u32>,
    deliveries: u64,
    without_id: u64,
    received_twice: u64,
    first_and_last: Option<(Instant, Instant)>,
}

impl Mailbox {
    /// An empty one that keeps so many messages.
    #[must_use]
    pub fn new(keep: usize) -> Self {
        Self { keep, keys: [RandomState::new(), RandomState::new()], held: Mutex::default() }
    }

    /// Puts a message in.
    pub(super) fn accept(&self, from: &str, to: &[String], raw: Vec<u8>) {
        let message_id = ID_PARSER.parse_headers(&raw).and_then(|headers| headers.message_id().map(str::to_owned));
        let pairs: Option<Vec<u128>> =
            message_id.as_deref().map(|id| to.iter().map(|recipient| self.hash(recipient, id)).collect());
        let mut held = self.lock();
        // Taken under the lock, so that they only grow.
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

    /// How much has arrived.
    #[must_use]
    pub fn figures(&self) -> Figures {
        let held = self.lock();
        let seconds = held.first_and_last.map_or(0.0, |(first, last)| last.duration_since(first).as_secs_f64());
        Figures {
            deliveries: held.deliveries,
            received: held.pairs.len() as u64 + held.without_id,
            received_twice: held.received_twice,
            rate: (seconds > 0.0).then(|| (held.deliveries - 1) as f64 / seconds),
            kept: held.kept.len(),
        }
    }

    /// How often this recipient was sent the message with this ID, given without its angle brackets.
    #[must_use]
    pub fn times(&self, recipient: &str, message_id: &str) -> u32 {
        let pair = self.hash(recipient, message_id);
        self.lock().pairs.get(&pair).copied().unwrap_or_default()
    }

    /// Up to `count` kept messages with numbers below `before`, the newest first.
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

    /// Deletes the messages, and begins to count anew.
    pub fn clear(&self) {
        let mut held = self.lock();
        let before = std::mem::take(&mut *held);
        held.number = before.number;
        drop(held);
        // Freeing ten thousand messages takes a moment, in which mail may arrive already.
        drop(before);
    }

    fn hash(&self, recipient: &str, message_id: &str) -> u128 {
        let [high, low] = self.keys.each_ref().map(|key| u128::from(key.hash_one((recipient, message_id))));
        high << 64 | low
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        // Nothing in here panics half way through a change that matters more than the mail itself.
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
    fn a_pair_counts_once_and_is_known_to_have_come_twice() {
        let mailbox = Mailbox::new(10);
        accept(&mailbox, &["a@a.example", "b@a.example"], "1@x");
        accept(&mailbox, &["a@a.example"], "2@x");
        for _ in 0..2 {
            accept(&mailbox, &["a@a.example"], "1@x");
        }
        let figures = mailbox.figures();
        assert_eq!((figures.deliveries, figures.received, figures.received_twice, figures.kept), (5, 3, 1, 4));
        assert!(figures.rate.is_some_and(|rate| rate > 0.0));
        assert_eq!([mailbox.times("a@a.example", "1@x"), mailbox.times("b@a.example", "1@x")], [3, 1]);
        assert_eq!(mailbox.times("b@a.example", "2@x"), 0);
    }

    #[test]
    fn messages_without_an_id_are_not_taken_for_the_same() {
        let mailbox = Mailbox::new(10);
        for _ in 0..2 {
            mailbox.accept("", &["a@a.example".into()], b"Subject: Hi\r\n\r\n".to_vec());
        }
        assert_eq!((mailbox.figures().received, mailbox.figures().received_twice), (2, 0));
    }

    #[test]
    fn the_newest_are_kept() {
        let mailbox = Mailbox::new(3);
        (1..=5).for_each(|number| accept(&mailbox, &["a@a.example"], &format!("{number}@x")));
        let numbers = |before, count| mailbox.newest(before, count).iter().map(|one| one.number).collect::<Vec<_>>();
        assert_eq!(numbers(None, 2), [5, 4]);
        assert_eq!(numbers(Some(4), 2), [3]);
        assert!(numbers(Some(1), 2).is_empty());
        assert_eq!(mailbox.message(3).unwrap().message_id.as_deref(), Some("3@x"));
        assert!(mailbox.message(2).is_none());
        assert_eq!(mailbox.figures().received, 5);
    }

    #[test]
    fn numbers_go_on_when_all_is_deleted() {
        let mailbox = Mailbox::new(3);
        accept(&mailbox, &["a@a.example"], "1@x");
        mailbox.clear();
        assert_eq!(mailbox.figures(), Figures::default());
        accept(&mailbox, &["a@a.example"], "1@x");
        assert!(mailbox.message(1).is_none() && mailbox.message(2).is_some());
        assert_eq!(mailbox.figures().received_twice, 0);
    }

    #[test]
    fn without_keeping_counts_stay() {
        let mailbox = Mailbox::new(0);
        accept(&mailbox, &["a@a.example"], "1@x");
        assert_eq!((mailbox.figures().received, mailbox.figures().kept), (1, 0));
    }
}
