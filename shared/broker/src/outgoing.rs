//! A message to publish, and the headers of ours that it carries.

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
/// Headers go in one frame, of 128 KB at most: a message whose headers are larger can never be published. So much of others'
/// headers is kept.
const MAX_HEADERS_BYTES: usize = 64 * 1024;
/// So much of an error is kept in the header of a dead letter.
const MAX_ERROR_CHARS: usize = 1_000;

/// Why a message in the outbox can't be published by this program.
#[derive(Debug, thiserror::Error)]
pub enum NotUnderstood {
    /// A later version's, or nobody's.
    #[error("its type is not known")]
    Kind,
    /// Not of the form that its type says.
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
    /// `message` for the queue where it belongs.
    #[must_use]
    pub fn new<M: Message>(message: &M) -> Self {
        Self { spread_by: message.spread_by(), ..Self::raw(M::QUEUE, message.kind(), encode(message)) }
    }

    /// Reads a message out of the outbox, so that nothing is published that no worker could read.
    ///
    /// # Errors
    /// Why no worker could.
    pub fn read(kind: &str, message: serde_json::Value) -> Result<Self, NotUnderstood> {
        match kind {
            kind if RunMessage::TYPES.contains(&kind) => {
                let message: RunMessage = serde_json::from_value(message)?;
                Ok(Self::new(&message))
            }
            ItemMessage::TYPE => Ok(Self::new(&serde_json::from_value::<ItemMessage>(message)?)),
            _ => Err(NotUnderstood::Kind),
        }
    }

    /// A body that is not understood, as it came.
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

    /// Results of a run, in as few messages as `batch` to a message allows; no results are no message.
    #[must_use]
    pub fn results(run_id: Uuid, results: &[ItemResult], batch: usize) -> Vec<Self> {
        let message = |results: &[ItemResult]| ResultsMessage { run_id: Some(run_id), results: results.to_vec() };
        results.chunks(batch).map(|results| Self::new(&message(results))).collect()
    }

    /// Results of any runs, each in a message of its run.
    #[must_use]
    pub fn results_by_run(results: impl IntoIterator<Item = (Uuid, ItemResult)>, batch: usize) -> Vec<Self> {
        let mut by_run: BTreeMap<Uuid, Vec<ItemResult>> = BTreeMap::new();
        for (run_id, result) in results {
            by_run.entry(run_id).or_default().push(result);
        }
        by_run.into_iter().flat_map(|(run_id, results)| Self::results(run_id, &results, batch)).collect()
    }

    /// Sends it to another queue: one that waits, or the dead letters.
    #[must_use]
    pub fn to(self, queue: impl Into<Cow<'static, str>>) -> Self {
        Self { queue: queue.into(), spread_by: None, ..self }
    }

    /// Turns it into a dead letter, with its reason where the management console shows it.
    #[must_use]
    pub fn dead(self, reason: DeadReason, error: &str) -> Self {
        let now_ms = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        // An error may quote what it is about, which may be a megabyte.
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

    /// Says in which epoch of the ledger it was published; without that, it is published in the present one.
    #[must_use]
    pub fn in_epoch(mut self, epoch: i64) -> Self {
        self.headers.insert(EPOCH_HEADER.into(), AMQPValue::LongLongInt(epoch));
        self
    }

    /// Carries over headers of a delivery, as far as they do no harm: not those with which the broker counts its rounds,
    /// since a message that still has them can be dropped as a cycle; not those that name further queues, since the message
    /// would go round for ever; and no more than fit into a frame with ours.
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

    /// Which message it is.
    #[must_use]
    pub fn id(&self) -> Uuid {
        self.id
    }

    /// The queue that it is for.
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

/// How much of a frame a header's value takes, or a little less.
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

/// The header that says why a message is dead: `failed`, `unknown` or `poison`.
pub const REASON_HEADER: &str = "x-mailrun-reason";
/// The header with the error's text.
pub const ERROR_HEADER: &str = "x-mailrun-error";
/// The header with the moment of death, in milliseconds since 1970.
pub const DIED_AT_HEADER: &str = "x-mailrun-died-at";

/// The header with the ledger's epoch in which the message was published.
pub const EPOCH_HEADER: &str = "x-mailrun-epoch";

/// The epoch that a message carries. None: it was published by hand, or by a version before epochs.
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
    fn a_message_is_published_as_what_it_is() {
        let id = "00000000-0000-0000-0000-000000000007";
        let run = Outgoing::read("mailrun.run.v1", serde_json::json!({ "run_id": id })).unwrap();
        assert_eq!(run.properties().kind().as_ref().unwrap().as_str(), "mailrun.run.v1");
        let test = Outgoing::read("mailrun.test.v1", serde_json::json!({ "test_id": id })).unwrap();
        assert_eq!(test.properties().kind().as_ref().unwrap().as_str(), "mailrun.test.v1");
        assert!(Outgoing::read("mailrun.test.v1", serde_json::json!({ "run_id": id })).is_err());
        assert!(Outgoing::read("mailrun.run.v9", serde_json::json!({ "run_id": id })).is_err());
    }
}
