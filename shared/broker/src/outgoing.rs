//! A message to publish, and the headers that Mailrun adds.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    time::{SystemTime, UNIX_EPOCH},
};

use lapin::{
    BasicProperties,
    types::{AMQPValue, FieldTable, ShortString},
};
use mailrun_core::{
    message::{DeadReason, ItemMessage, ItemResult, Message, ResultsMessage, RunMessage, encode},
    outcome::FollowUp,
    queue::{self, retry_queue},
};
use uuid::Uuid;

const PERSISTENT: u8 = 2;
/// All headers must fit into one frame of 128 KB, or the message can't be published. This much is kept of a delivery's headers.
const MAX_HEADERS_BYTES: usize = 64 * 1024;
/// The length at which the error in a dead letter's header is cut.
const MAX_ERROR_CHARS: usize = 1_000;

/// Why this program can't publish a message of the outbox.
#[derive(Debug, thiserror::Error)]
pub enum NotUnderstood {
    /// An unknown type, for instance of a later version.
    #[error("its type is not known")]
    Kind,
    /// The body does not match its type.
    #[error(transparent)]
    Body(#[from] serde_json::Error),
}

/// A message to publish: persistent, mandatory, with an id.
#[derive(Clone, Debug)]
pub struct Outgoing {
    pub(crate) id: Uuid,
    pub(crate) queue: Cow<'static, str>,
    pub(crate) kind: Cow<'static, str>,
    pub(crate) body: Vec<u8>,
    pub(crate) headers: FieldTable,
    pub(crate) spread_by: Option<u64>,
}

impl Outgoing {
    /// Addresses `message` to the queue of its type.
    #[must_use]
    pub fn new<M: Message>(message: &M) -> Self {
        Self { spread_by: message.spread_by(), ..Self::raw(M::QUEUE, message.kind(), encode(message)) }
    }

    /// Parses a message of the outbox, so that no message is published that workers could not parse.
    ///
    /// # Errors
    /// Why it can't be parsed.
    pub fn read(kind: &str, message: serde_json::Value) -> Result<Self, NotUnderstood> {
        match kind {
            kind if RunMessage::TYPES.contains(&kind) => {
                let message: RunMessage = serde_json::from_value(message)?;
                Ok(Self::new(&message))
            }
            kind if ItemMessage::TYPES.contains(&kind) => {
                Ok(Self::new(&serde_json::from_value::<ItemMessage>(message)?))
            }
            _ => Err(NotUnderstood::Kind),
        }
    }

    /// A body of any form, published as it is.
    #[must_use]
    pub fn raw(queue: impl Into<Cow<'static, str>>, kind: impl Into<Cow<'static, str>>, body: Vec<u8>) -> Self {
        Self {
            id: Uuid::new_v4(),
            queue: queue.into(),
            kind: kind.into(),
            body,
            headers: FieldTable::default(),
            spread_by: None,
        }
    }

    /// Packs results of one run into messages of at most `batch` results. No results give no message.
    #[must_use]
    pub fn results(run_id: Uuid, results: &[ItemResult], batch: usize) -> Vec<Self> {
        let message = |results: &[ItemResult]| ResultsMessage { run_id: Some(run_id), results: results.to_vec() };
        results.chunks(batch).map(|results| Self::new(&message(results))).collect()
    }

    /// Packs results of any runs; each message holds results of one run.
    #[must_use]
    pub fn results_by_run(results: impl IntoIterator<Item = (Uuid, ItemResult)>, batch: usize) -> Vec<Self> {
        let mut by_run: BTreeMap<Uuid, Vec<ItemResult>> = BTreeMap::new();
        for (run_id, result) in results {
            by_run.entry(run_id).or_default().push(result);
        }
        by_run.into_iter().flat_map(|(run_id, results)| Self::results(run_id, &results, batch)).collect()
    }

    /// Redirects it to another queue, such as a wait queue or the dead-letter queue.
    #[must_use]
    pub fn to(self, queue: impl Into<Cow<'static, str>>) -> Self {
        Self { queue: queue.into(), spread_by: None, ..self }
    }

    /// Turns it into a dead letter, with the reason in headers, where the management console shows it.
    #[must_use]
    pub fn dead(self, reason: DeadReason, error: &str) -> Self {
        let now_ms = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        // An error may quote its input, which may be a megabyte.
        let error: String = error.chars().take(MAX_ERROR_CHARS).collect();
        let mut this = self.to(queue::DEAD).header(REASON_HEADER, reason.as_str()).header(ERROR_HEADER, &error);
        let now_ms = i64::try_from(now_ms).unwrap_or(i64::MAX);
        this.headers.insert(DIED_AT_HEADER.into(), AMQPValue::LongLongInt(now_ms));
        this
    }

    /// Adds a text header.
    #[must_use]
    pub fn header(mut self, key: &'static str, value: &str) -> Self {
        self.headers.insert(key.into(), AMQPValue::LongString(value.into()));
        self
    }

    /// Sets the epoch in which it was published. Otherwise it is published in the current one.
    #[must_use]
    pub fn in_epoch(mut self, epoch: i64) -> Self {
        self.headers.insert(EPOCH_HEADER.into(), AMQPValue::LongLongInt(epoch));
        self
    }

    /// Copies the headers of a delivery, except: the broker's own counters, since RabbitMQ may drop a message that still has them as
    /// a dead-letter cycle; `CC` and `BCC`, since the message would go to those queues again, for ever; and what does not fit into
    /// one frame together with our headers.
    #[must_use]
    pub fn with_headers_of(mut self, properties: &BasicProperties) -> Self {
        const BROKERS_OWN: [&str; 5] =
            ["x-death", "x-first-death-", "x-last-death-", "x-delivery-count", "x-acquired-count"];
        const FURTHER_QUEUES: [&str; 2] = ["CC", "BCC"];
        const OURS: [&str; 4] = [REASON_HEADER, ERROR_HEADER, DIED_AT_HEADER, EPOCH_HEADER];
        let mut room = MAX_HEADERS_BYTES;
        let headers = properties.headers().iter().flat_map(FieldTable::inner);
        let (ours, others): (Vec<_>, Vec<_>) = headers.partition(|(key, _)| OURS.contains(&key.as_str()));
        for (key, value) in ours.into_iter().chain(others) {
            let key_is_brokers = BROKERS_OWN.iter().any(|prefix| key.as_str().starts_with(prefix));
            if key_is_brokers || FURTHER_QUEUES.contains(&key.as_str()) {
                continue;
            }
            if let Some(left) = room.checked_sub(key.as_str().len() + bytes_of(value)) {
                room = left;
                self.headers.insert(key.clone(), value.clone());
            }
        }
        self
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> Uuid {
        self.id
    }

    /// Its destination queue.
    #[must_use]
    pub fn queue(&self) -> &str {
        &self.queue
    }

    /// Its body.
    #[must_use]
    pub fn body(&self) -> &[u8] {
        &self.body
    }

    /// Its AMQP properties.
    #[must_use]
    pub fn properties(&self) -> BasicProperties {
        self.properties_with(self.headers.clone())
    }

    pub(crate) fn properties_with(&self, headers: FieldTable) -> BasicProperties {
        BasicProperties::default()
            .with_delivery_mode(PERSISTENT)
            .with_content_type("application/json".into())
            .with_message_id(ShortString::from(self.id.to_string()))
            .with_type(ShortString::from(self.kind.as_ref()))
            .with_headers(headers)
    }
}

/// The size of a header's value in a frame, as a lower bound.
fn bytes_of(value: &AMQPValue) -> usize {
    8 + match value {
        AMQPValue::ShortString(text) => text.as_str().len(),
        AMQPValue::LongString(text) => text.as_bytes().len(),
        AMQPValue::ByteArray(bytes) => bytes.as_slice().len(),
        AMQPValue::FieldArray(list) => list.as_slice().iter().map(bytes_of).sum(),
        AMQPValue::FieldTable(table) => {
            table.inner().iter().map(|(key, value)| key.as_str().len() + bytes_of(value)).sum()
        }
        _ => 0,
    }
}

/// The header with the reason of a dead letter: `failed`, `unknown` or `poison`.
pub const REASON_HEADER: &str = "x-mailrun-reason";
/// The header with the error text of a dead letter.
pub const ERROR_HEADER: &str = "x-mailrun-error";
/// The header with the time at which a message became a dead letter, in milliseconds since 1970.
pub const DIED_AT_HEADER: &str = "x-mailrun-died-at";

/// The header with the ledger's epoch at the time of publishing.
pub const EPOCH_HEADER: &str = "x-mailrun-epoch";

/// The epoch of a message. None if it was published by hand, or by a version without epochs.
#[must_use]
pub fn epoch_of(properties: &BasicProperties) -> Option<i64> {
    match properties.headers().as_ref()?.inner().get(EPOCH_HEADER)? {
        AMQPValue::LongLongInt(epoch) => Some(*epoch),
        AMQPValue::LongInt(epoch) => Some((*epoch).into()),
        _ => None,
    }
}

impl From<FollowUp> for Outgoing {
    fn from(follow_up: FollowUp) -> Self {
        match follow_up {
            FollowUp::Now(item) => Self::new(&item),
            FollowUp::Wait(item, delay) => Self::new(&item).to(retry_queue(delay)),
            FollowUp::Dead(item, reason, error) => Self::new(&item).dead(reason, &error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outbox_message_is_published_with_its_type() {
        let id = "00000000-0000-0000-0000-000000000007";
        let run = Outgoing::read("mailrun.run.v1", serde_json::json!({ "run_id": id })).unwrap();
        assert_eq!(run.properties().kind().as_ref().unwrap().as_str(), "mailrun.run.v1");
        let item = serde_json::json!({ "run_id": id, "item_id": 1, "attempt": 1, "impersonal": true });
        let item = Outgoing::read("mailrun.item.v2", item).unwrap();
        assert_eq!(item.properties().kind().as_ref().unwrap().as_str(), "mailrun.item.v2");
        assert!(Outgoing::read("mailrun.item.v2", serde_json::json!({ "run_id": id })).is_err());
        assert!(
            Outgoing::read("mailrun.test.v1", serde_json::json!({ "test_id": id })).is_err(),
            "of an earlier version"
        );
        assert!(Outgoing::read("mailrun.run.v9", serde_json::json!({ "run_id": id })).is_err());
    }
}
