//! The messages on the queues: small, versioned JSON that a person can read, and publish by hand, in the management console.
//!
//! They carry ids, never addresses: personal data stays in PostgreSQL, and a replayed message acts on current data.

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use uuid::Uuid;

use crate::item::{ItemState, Key};
use crate::queue;

/// A message on one of the queues.
pub trait Message: Serialize + DeserializeOwned {
    /// The AMQP `type`, with the version of the body's form: the oldest one, which every worker understands.
    const TYPE: &'static str;
    /// All versions that are understood, oldest first.
    const TYPES: &'static [&'static str] = &[Self::TYPE];
    /// Its queue, which is also its routing key.
    const QUEUE: &'static str;

    /// The AMQP `type` of this message: the oldest version whose workers understand all of it.
    fn kind(&self) -> &'static str {
        Self::TYPE
    }

    /// If there are several such queues, messages with the same number go to the same one.
    fn spread_by(&self) -> Option<u64> {
        None
    }

    /// Checks what the body's form does not.
    ///
    /// # Errors
    /// Which field is invalid, and why.
    fn check(&self) -> Result<(), &'static str> {
        Ok(())
    }
}

/// Why a message cannot be parsed: the reason of its dead letter.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// A later version's message: it waits for a worker that understands it.
    #[error("the message type is {found:?}, this worker understands up to {known:?}")]
    Newer {
        /// The AMQP `type` of the message.
        found: String,
        /// The newest one that is understood.
        known: &'static str,
    },
    /// Another message's type, or another system's.
    #[error("the message type is {found:?}, this worker understands {known:?}")]
    Type {
        /// The AMQP `type` of the message.
        found: String,
        /// The one that belongs on the queue.
        known: &'static str,
    },
    /// Not JSON, or not of this form.
    #[error("the body is not a valid {0} message: {1}")]
    Body(&'static str, serde_json::Error),
    /// The form is right, the content is not.
    #[error("the body is not a valid {0} message: {1}")]
    Content(&'static str, &'static str),
}

/// Reads a message's body. `kind` is its AMQP `type`; a message published by hand needs none.
///
/// # Errors
/// The reason for the dead letter.
pub fn decode<M: Message>(kind: Option<&str>, body: &[u8]) -> Result<M, DecodeError> {
    if let Some(found) = kind.filter(|found| !found.is_empty() && !M::TYPES.contains(found)) {
        let (found, known) = (found.to_owned(), M::TYPES.last().copied().unwrap_or(M::TYPE));
        return Err(if is_newer(&found, known) {
            DecodeError::Newer { found, known }
        } else {
            DecodeError::Type { found, known }
        });
    }
    let message: M = serde_json::from_slice(body).map_err(|error| DecodeError::Body(M::TYPE, error))?;
    message.check().map_err(|reason| DecodeError::Content(M::TYPE, reason))?;
    Ok(message)
}

/// Whether `found` is a later version of the same message type.
fn is_newer(found: &str, known: &str) -> bool {
    let version = |kind: &str| {
        let (name, version) = kind.rsplit_once(".v")?;
        Some((name.to_owned(), version.parse::<u32>().ok()?))
    };
    matches!((version(found), version(known)), (Some((found, new)), Some((known, old))) if found == known && new > old)
}

/// Writes a message's body.
#[must_use]
pub fn encode<M: Message>(message: &M) -> Vec<u8> {
    #[expect(clippy::expect_used, reason = "plain structs with string keys always serialise")]
    serde_json::to_vec(message).expect("a message serialises")
}

/// A command to the fan-out. `{"run_id": "…"}` alone, published by hand, restarts a stalled run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunMessage {
    /// The run.
    pub run_id: Uuid,
    /// What to do.
    #[serde(default)]
    pub command: Command,
}

/// What a [`RunMessage`] asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Command {
    /// Release the next chunk of the present pass.
    Release(Step),
    /// Begin a pass over the failed or unknown items.
    Replay(Replay),
    /// Settle every item that no worker has claimed.
    Cancel {
        /// The same command twice begins one pass.
        command_id: Uuid,
    },
    /// The run is resumed: republish what senders dropped while it was paused. Repeating it is harmless.
    Resume,
}

impl Default for Command {
    fn default() -> Self {
        Self::Release(Step::default())
    }
}

/// A position in a run. A message for another position than the present one is stale and dropped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// The pass; null: the present one.
    #[serde(default)]
    pub pass: Option<i32>,
    /// The step within it; null: the present one.
    #[serde(default)]
    pub step: Option<i32>,
}

/// Which of a run's items to replay.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replay {
    /// The same command twice begins one pass.
    pub command_id: Uuid,
    /// `failed`, `unknown` or both.
    pub states: Vec<ItemState>,
    /// Only items that ended with this error; null: all.
    #[serde(default)]
    pub error: Option<String>,
}

impl Message for RunMessage {
    const TYPE: &'static str = "mailrun.run.v1";
    const TYPES: &'static [&'static str] = &[Self::TYPE, "mailrun.run.v2"];
    const QUEUE: &'static str = queue::RUNS;

    fn kind(&self) -> &'static str {
        match self.command {
            Command::Resume => Self::TYPES[1],
            Command::Release(_) | Command::Replay(_) | Command::Cancel { .. } => Self::TYPE,
        }
    }

    fn check(&self) -> Result<(), &'static str> {
        match &self.command {
            Command::Replay(replay) if replay.states.is_empty() => Err("a replay names at least one state"),
            Command::Replay(replay)
                if replay.states.iter().any(|state| !matches!(state, ItemState::Failed | ItemState::Unknown)) =>
            {
                Err("only failed and unknown items can be replayed")
            }
            Command::Replay(replay) => no_nul(replay.error.as_deref()),
            _ => Ok(()),
        }
    }
}

/// Asks for one attempt at one item.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ItemMessage {
    /// The run it belongs to.
    pub run_id: Uuid,
    /// The item.
    pub item_id: i64,
    /// The attempt asked for, from 1. At most one worker makes it.
    pub attempt: i32,
    /// Which try of the present budget this is, from 1.
    #[serde(default = "first")]
    pub tries: i16,
    /// How often a person has replayed the item.
    #[serde(default)]
    pub replays: i16,
    /// The item is about no person of the ledger. Versions before jobs cannot process it, so the message has a type that they set
    /// aside.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub impersonal: bool,
}

fn first() -> i16 {
    1
}

impl ItemMessage {
    /// The attempt that is asked for.
    #[must_use]
    pub fn key(self) -> Key {
        Key { run_id: self.run_id, item_id: self.item_id, attempt: self.attempt }
    }

    /// The next attempt of the same budget.
    #[must_use]
    pub fn next_try(self) -> Self {
        Self { attempt: self.attempt + 1, tries: self.tries.saturating_add(1), ..self }
    }

    /// The attempt that the item waits for, if `self` is its present attempt and `state` its state. The result says whether a try was
    /// charged: a waiting item has the tries of the attempt that it waits for.
    #[must_use]
    pub fn awaited(self, state: ItemState) -> Self {
        if state == ItemState::Retrying { self.again() } else { self }
    }

    /// The next attempt, without charging a try: a shutdown or a dead worker is not the item's fault.
    #[must_use]
    pub fn again(self) -> Self {
        Self { attempt: self.attempt + 1, ..self }
    }

    /// The next attempt with a fresh budget, as in a replay. A dead letter has this form.
    #[must_use]
    pub fn replayed(self) -> Self {
        Self { attempt: self.attempt + 1, tries: 1, replays: self.replays.saturating_add(1), ..self }
    }

    /// A result of this attempt.
    #[must_use]
    pub fn result(self, state: ItemState, error: Option<String>) -> ItemResult {
        ItemResult {
            item_id: self.item_id,
            attempt: self.attempt,
            tries: self.tries,
            replays: self.replays,
            state,
            error,
            due_in_ms: None,
            flagged: false,
            impersonal: self.impersonal,
        }
    }
}

impl Message for ItemMessage {
    const TYPE: &'static str = "mailrun.item.v1";
    const TYPES: &'static [&'static str] = &[Self::TYPE, "mailrun.item.v2"];
    const QUEUE: &'static str = queue::ITEMS;

    fn kind(&self) -> &'static str {
        Self::TYPES[usize::from(self.impersonal)]
    }

    fn spread_by(&self) -> Option<u64> {
        Some(self.item_id.unsigned_abs())
    }

    fn check(&self) -> Result<(), &'static str> {
        // The upper bounds leave room to count on without overflow.
        if !(1..1_000_000).contains(&self.attempt) {
            return Err("attempt is a number from 1 to 999999");
        }
        if self.tries < 1 {
            return Err("tries is a number from 1");
        }
        if self.replays < 0 {
            return Err("replays is a number from 0");
        }
        Ok(())
    }
}

/// The results of some attempts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResultsMessage {
    /// The run that all of them belong to: a result whose item belongs to another run is another ledger's. Only messages of
    /// the first version lack it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run_id: Option<Uuid>,
    /// In no particular order.
    pub results: Vec<ItemResult>,
}

impl Message for ResultsMessage {
    const TYPE: &'static str = "mailrun.results.v1";
    const TYPES: &'static [&'static str] = &[Self::TYPE, "mailrun.results.v2"];
    const QUEUE: &'static str = queue::RESULTS;

    fn kind(&self) -> &'static str {
        Self::TYPES[usize::from(self.results.iter().any(|result| result.impersonal))]
    }

    fn check(&self) -> Result<(), &'static str> {
        self.results.iter().try_for_each(ItemResult::check)
    }
}

/// PostgreSQL stores no NUL in a text, so it would refuse the error each time.
fn no_nul(text: Option<&str>) -> Result<(), &'static str> {
    if text.is_some_and(|text| text.contains('\0')) { Err("error has a NUL character in it") } else { Ok(()) }
}

/// The result of one attempt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ItemResult {
    /// The item.
    pub item_id: i64,
    /// The attempt, from 1.
    pub attempt: i32,
    /// Which try of its budget it was, from 1.
    pub tries: i16,
    /// How often a person had replayed the item.
    pub replays: i16,
    /// The state it leaves the item in.
    pub state: ItemState,
    /// Why it did not succeed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// retrying: the next attempt is due after so many milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub due_in_ms: Option<i64>,
    /// failed: what the job has to note when the item is counted. For invitations: the mailbox does not exist.
    #[serde(rename = "bad_address", default, skip_serializing_if = "std::ops::Not::not")]
    pub flagged: bool,
    /// See [`ItemMessage::impersonal`].
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub impersonal: bool,
}

impl ItemResult {
    /// What follows from it must be a message that is understood: see [`ItemMessage`].
    fn check(&self) -> Result<(), &'static str> {
        if !(1..=1_000_000).contains(&self.attempt) {
            return Err("attempt is a number from 1 to 1000000");
        }
        if self.tries < 1 {
            return Err("tries is a number from 1");
        }
        if self.replays < 0 {
            return Err("replays is a number from 0");
        }
        if self.due_in_ms.is_some_and(|due_in_ms| due_in_ms < 0) {
            return Err("due_in_ms is a number from 0");
        }
        no_nul(self.error.as_deref())
    }
}

/// The ledger's latest epoch: see [`crate::epoch`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpochMessage {
    /// The ledger's epoch when this was published.
    pub epoch: i64,
    /// The ledger's installation.
    pub installation: Uuid,
}

impl Message for EpochMessage {
    const TYPE: &'static str = "mailrun.epoch.v1";
    const QUEUE: &'static str = queue::EPOCH;
}

/// Why a message is in the dead letters: the header `x-mailrun-reason`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeadReason {
    /// Out of tries, or refused for good.
    Failed,
    /// It is unknown whether the attempt had an effect.
    Unknown,
    /// Not understood.
    Poison,
}

impl DeadReason {
    /// The header's text.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Failed => "failed",
            Self::Unknown => "unknown",
            Self::Poison => "poison",
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Debug;

    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn a_run_message_written_by_hand_needs_only_the_run() {
        let run_id = Uuid::from_u128(7);
        let body = format!(r#"{{"run_id":"{run_id}"}}"#);
        let message: RunMessage = decode(None, body.as_bytes()).unwrap();
        assert_eq!(message, RunMessage { run_id, command: Command::Release(Step { pass: None, step: None }) });
    }

    #[test]
    fn an_item_message_written_by_hand_needs_no_budget() {
        let body = format!(r#"{{"run_id":"{}","item_id":5,"attempt":2}}"#, Uuid::from_u128(7));
        let message: ItemMessage = decode(None, body.as_bytes()).unwrap();
        assert_eq!((message.attempt, message.tries, message.replays), (2, 1, 0));
    }

    #[test]
    fn every_message_survives_the_wire() {
        let run_id = Uuid::from_u128(7);
        for command in [
            Command::Release(Step { pass: Some(2), step: Some(9) }),
            Command::Replay(Replay { command_id: run_id, states: vec![ItemState::Failed], error: None }),
            Command::Cancel { command_id: run_id },
            Command::Resume,
        ] {
            let message = RunMessage { run_id, command };
            assert_eq!(decode::<RunMessage>(Some(message.kind()), &encode(&message)).unwrap(), message);
        }
        let item = ItemMessage { run_id, item_id: 1, attempt: 1, tries: 1, replays: 0, impersonal: false };
        assert_eq!(decode::<ItemMessage>(None, &encode(&item)).unwrap(), item);
        let results = ResultsMessage {
            run_id: Some(run_id),
            results: vec![item.result(ItemState::Sent, None), item.result(ItemState::Failed, Some("no".into()))],
        };
        assert_eq!(decode::<ResultsMessage>(None, &encode(&results)).unwrap(), results);
    }

    #[test]
    fn what_is_not_understood_is_an_error_that_says_why() {
        let error = |kind, body: &str| decode::<ItemMessage>(kind, body.as_bytes()).unwrap_err().to_string();
        assert!(error(None, "hello").contains("not a valid mailrun.item.v1"));
        let newer = |kind| matches!(decode::<ItemMessage>(Some(kind), b"{}"), Err(DecodeError::Newer { .. }));
        assert!(newer("mailrun.item.v3") && newer("mailrun.item.v10"));
        assert!(!newer("mailrun.item.v0") && !newer("mailrun.run.v2") && !newer("mailrun.item.vx"));
        assert!(error(Some("mailrun.item.v3"), "{}").contains("mailrun.item.v3"));
        let run_id = Uuid::from_u128(7);
        assert!(error(None, &format!(r#"{{"run_id":"{run_id}","item_id":1,"attempt":0}}"#)).contains("from 1"));
        let replay_sent =
            format!(r#"{{"run_id":"{run_id}","command":{{"replay":{{"command_id":"{run_id}","states":["sent"]}}}}}}"#);
        assert!(decode::<RunMessage>(None, replay_sent.as_bytes()).is_err());
    }

    #[test]
    fn what_can_not_be_kept_or_go_on_is_refused() {
        let run_id = Uuid::from_u128(7);
        let item = ItemMessage { run_id, item_id: 1, attempt: 1, tries: 1, replays: 0, impersonal: false };
        let good = item.result(ItemState::Retrying, Some("busy".into()));
        let refused = |result: ItemResult| {
            let body = encode(&ResultsMessage { run_id: None, results: vec![good.clone(), result] });
            decode::<ResultsMessage>(None, &body).unwrap_err().to_string()
        };
        assert!(refused(ItemResult { tries: 0, ..good.clone() }).contains("tries"));
        assert!(refused(ItemResult { replays: -1, ..good.clone() }).contains("replays"));
        assert!(refused(ItemResult { due_in_ms: Some(-1), ..good.clone() }).contains("due_in_ms"));
        assert!(refused(ItemResult { error: Some("a\0b".into()), ..good.clone() }).contains("NUL"));
        let replay = Replay { command_id: run_id, states: vec![ItemState::Failed], error: Some("\0".into()) };
        let body = encode(&RunMessage { run_id, command: Command::Replay(replay) });
        assert!(decode::<RunMessage>(None, &body).unwrap_err().to_string().contains("NUL"));
    }

    #[test]
    fn a_body_without_bottom_is_an_error() {
        for depth in [1_000, 200_000] {
            let body = format!("{{\"results\":{}", "[".repeat(depth));
            assert!(decode::<ResultsMessage>(None, body.as_bytes()).is_err());
            let body = "{\"run_id\":".repeat(depth);
            assert!(decode::<RunMessage>(None, body.as_bytes()).is_err());
        }
    }

    fn any_state() -> impl Strategy<Value = ItemState> {
        prop::sample::select(&ItemState::ALL[..])
    }

    fn any_item() -> impl Strategy<Value = ItemMessage> {
        (any::<u128>(), any::<i64>(), 1..1_000_000, 1..=i16::MAX, 0..=i16::MAX).prop_map(
            |(run_id, item_id, attempt, tries, replays)| ItemMessage {
                run_id: Uuid::from_u128(run_id),
                item_id,
                attempt,
                tries,
                replays,
                impersonal: item_id % 2 == 0,
            },
        )
    }

    fn any_result() -> impl Strategy<Value = ItemResult> {
        (any_item(), any_state(), prop::option::of("[^\0]{0,20}"), prop::option::of(0..i64::MAX), any::<bool>())
            .prop_map(|(item, state, error, due_in_ms, flagged)| ItemResult {
                due_in_ms,
                flagged,
                ..item.result(state, error)
            })
    }

    fn any_command() -> impl Strategy<Value = Command> {
        let dead = prop::sample::select(&[ItemState::Failed, ItemState::Unknown][..]);
        prop_oneof![
            (any::<Option<i32>>(), any::<Option<i32>>()).prop_map(|(pass, step)| Command::Release(Step { pass, step })),
            any::<u128>().prop_map(|id| Command::Cancel { command_id: Uuid::from_u128(id) }),
            Just(Command::Resume),
            (any::<u128>(), prop::collection::vec(dead, 1..3), prop::option::of("[^\0]{0,20}")).prop_map(
                |(id, states, error)| Command::Replay(Replay { command_id: Uuid::from_u128(id), states, error })
            ),
        ]
    }

    /// Any JSON at all, with the words and numbers that mean something here.
    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            any::<u128>().prop_map(|id| json!(Uuid::from_u128(id))),
            prop::sample::select(&["release", "replay", "cancel", "failed", "sent", "retrying", "", "1", "\0"][..])
                .prop_map(Value::from),
            "\\PC{0,12}".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 12, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::hash_map("release|replay|cancel|states|error|attempt|[a-z]{1,3}", inner, 0..3)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    /// Puts `with` in one place of `json`, takes that away, or adds it under a name of its own.
    fn mutate(json: &mut Value, place: usize, with: Option<Value>) {
        let deeper = match json {
            Value::Object(map) if !map.is_empty() => {
                let key = map.keys().nth(place % map.len()).cloned().unwrap();
                match with {
                    None => drop(map.remove(&key)),
                    Some(with) if place.is_multiple_of(7) => drop(map.insert("also".into(), with)),
                    with => return mutate(map.get_mut(&key).unwrap(), place / 7, with),
                }
                return;
            }
            Value::Array(list) if !list.is_empty() => {
                let index = place % list.len();
                &mut list[index]
            }
            leaf => {
                *leaf = with.unwrap_or_default();
                return;
            }
        };
        mutate(deeper, place / 3, with);
    }

    /// Understood, and then the same after another trip; or refused with a reason.
    fn understood_or_refused<M: Message + PartialEq + Debug>(
        kind: Option<&str>,
        body: &[u8],
    ) -> Result<(), TestCaseError> {
        match decode::<M>(kind, body) {
            Ok(message) => prop_assert_eq!(decode::<M>(Some(M::TYPE), &encode(&message)).unwrap(), message),
            Err(reason) => prop_assert!(!reason.to_string().is_empty()),
        }
        Ok(())
    }

    fn all_kinds(kind: Option<&str>, body: &[u8]) -> Result<(), TestCaseError> {
        understood_or_refused::<RunMessage>(kind, body)?;
        understood_or_refused::<ItemMessage>(kind, body)?;
        understood_or_refused::<ResultsMessage>(kind, body)
    }

    proptest! {
        #[test]
        fn any_bytes_are_understood_or_refused(
            kind in prop::option::of("\\PC{0,30}|mailrun\\.(run|item|results)\\.v[0-9]"),
            body in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            all_kinds(kind.as_deref(), &body)?;
        }

        #[test]
        fn any_json_is_understood_or_refused(json in any_json()) {
            all_kinds(None, json.to_string().as_bytes())?;
        }

        #[test]
        fn a_message_survives_the_wire_and_what_is_like_one_is_understood_or_refused(
            run_id: u128, command in any_command(), item in any_item(), results in prop::collection::vec(any_result(), 0..4),
            place: usize, with in prop::option::of(any_json()),
        ) {
            let run = RunMessage { run_id: Uuid::from_u128(run_id), command };
            let results = ResultsMessage { run_id: Some(Uuid::from_u128(run_id)), results };
            prop_assert_eq!(&decode::<RunMessage>(None, &encode(&run)).unwrap(), &run);
            prop_assert_eq!(decode::<ItemMessage>(None, &encode(&item)).unwrap(), item);
            prop_assert_eq!(&decode::<ResultsMessage>(None, &encode(&results)).unwrap(), &results);
            for mut json in [json!(run), json!(item), json!(results)] {
                mutate(&mut json, place, with.clone());
                all_kinds(None, json.to_string().as_bytes())?;
            }
        }

        #[test]
        fn what_follows_an_attempt_is_understood(item in any_item(), state in any_state()) {
            let results = ResultsMessage { run_id: Some(item.run_id), results: vec![item.result(state, None)] };
            prop_assert!(decode::<ResultsMessage>(None, &encode(&results)).is_ok());
            prop_assume!(item.attempt < 999_999);
            for next in [item.next_try(), item.again(), item.replayed(), item.awaited(state)] {
                prop_assert_eq!(decode::<ItemMessage>(None, &encode(&next)).unwrap(), next);
            }
        }
    }
}
