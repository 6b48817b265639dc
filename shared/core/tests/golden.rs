//! Messages of every published version can still be parsed. A file in `golden/` is never edited: a new form of a message gets a new
//! file, named `<message>.v<version>[.<what>].json`.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::{collections::BTreeSet, fs, path::Path};

use mailrun_core::message::{EpochMessage, ItemMessage, Message, ResultsMessage, RunMessage, decode, encode};
use serde_json::Value;

/// Whether `new` contains everything in `old`; it may contain more.
fn is_part(old: &Value, new: &Value) -> bool {
    match (old, new) {
        (Value::Object(old), Value::Object(new)) => {
            old.iter().all(|(key, value)| new.get(key).is_some_and(|new| is_part(value, new)))
        }
        (Value::Array(old), Value::Array(new)) => {
            old.len() == new.len() && old.iter().zip(new).all(|(old, new)| is_part(old, new))
        }
        _ => old == new,
    }
}

fn is_understood<M: Message>(kind: &str, body: &[u8]) -> Result<(), String> {
    let message: M = decode(Some(kind), body).map_err(|error| error.to_string())?;
    let again: Value = serde_json::from_slice(&encode(&message)).unwrap();
    if is_part(&serde_json::from_slice(body).unwrap(), &again) { Ok(()) } else { Err(format!("became {again}")) }
}

#[test]
fn every_published_version_of_a_message_is_understood() {
    let mut seen = BTreeSet::new();
    for file in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("golden")).unwrap() {
        let path = file.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let (message, rest) = name.split_once('.').unwrap();
        let kind = format!("mailrun.{message}.{}", rest.split_once('.').unwrap().0);
        let body = fs::read(&path).unwrap();
        let understood = match message {
            "run" => is_understood::<RunMessage>(&kind, &body),
            "item" => is_understood::<ItemMessage>(&kind, &body),
            "results" => is_understood::<ResultsMessage>(&kind, &body),
            "epoch" => is_understood::<EpochMessage>(&kind, &body),
            other => Err(format!("there is no message {other}")),
        };
        assert_eq!(understood, Ok(()), "{name}");
        seen.insert(kind);
    }
    let known: BTreeSet<String> = [RunMessage::TYPES, ItemMessage::TYPES, ResultsMessage::TYPES, EpochMessage::TYPES]
        .concat()
        .into_iter()
        .map(str::to_owned)
        .collect();
    assert_eq!(seen, known, "each version has a file");
}

#[test]
fn fields_of_a_later_version_are_ignored() {
    let body = br#"{"run_id":"3f0e9a52-8a53-4a0c-9c0e-6f4d1d1b7a10","item_id":1,"attempt":1,"colour":{"a":[1]}}"#;
    assert!(decode::<ItemMessage>(Some(ItemMessage::TYPE), body).is_ok());
}
