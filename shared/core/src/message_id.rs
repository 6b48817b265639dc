//! The `Message-ID`s of invitations: unguessable, and each identifies its run and item. Pure.

use uuid::Uuid;

use crate::signed_id::{Named, SignedIds, SigningKey};

/// Separates these ids from other ids signed with the same key.
const PURPOSE: &[u8] = b"mailrun message id v1";

/// Writes, reads and finds `Message-ID`s.
///
/// An invitation has the same one in every attempt, so that mail servers and readers can recognise a duplicate. No two invitations
/// share one.
#[derive(Clone, Debug)]
pub struct MessageIds(SignedIds);

impl MessageIds {
    /// Uses the ledger's key.
    #[must_use]
    pub fn new(key: &SigningKey) -> Self {
        Self(SignedIds::new(key, PURPOSE))
    }

    /// The `Message-ID` of an invitation, without angle brackets. `domain` follows the @.
    #[must_use]
    pub fn write(&self, named: Named, domain: &str) -> String {
        format!("{}@{domain}", self.0.write(named))
    }

    /// The item of a `Message-ID`, with or without angle brackets. None: this ledger did not create it. The domain is ignored,
    /// since the setting may have changed.
    #[must_use]
    pub fn read(&self, message_id: &str) -> Option<Named> {
        let id = message_id.trim().trim_start_matches('<');
        self.0.read(id.split_once('@').map_or(id.trim_end_matches('>'), |(id, _)| id))
    }

    /// The items of all our `Message-ID`s in a text such as a bounce, a report or a relay's log, each once.
    #[must_use]
    pub fn find(&self, text: &str) -> Vec<Named> {
        self.0.find(text)
    }
}

/// The items of all `Message-ID`s of earlier versions in a text: `<item>.<run>@<domain>`. They are not signed, so use this only
/// for text that the operator trusts, such as the relay's log.
pub fn find_unsigned(text: &str) -> impl Iterator<Item = Named> {
    let parts = text.split(|letter: char| !(letter.is_ascii_alphanumeric() || letter == '.' || letter == '@'));
    parts.filter_map(|part| {
        let (id, _) = part.split_once('@')?;
        let (item_id, run_id) = id.split_once('.')?;
        let is_simple = run_id.len() == uuid::fmt::Simple::LENGTH;
        Some(Named { run_id: run_id.parse::<Uuid>().ok().filter(|_| is_simple)?, item_id: item_id.parse().ok()? })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_earlier_versions_are_found_in_a_relays_log() {
        let run_id = Uuid::from_u128(7);
        let log = format!(
            "Nov 29 04:12:00 mx postfix/cleanup[1]: 4F2: message-id=<12.{}@mail.example.org>\n => a@b.org id=13.{}@b.org S=9",
            run_id.simple(),
            run_id.simple(),
        );
        let found: Vec<i64> = find_unsigned(&log).map(|named| named.item_id).collect();
        assert_eq!(found, [12, 13]);
    }

    #[test]
    fn a_message_id_is_read_as_it_was_written() {
        let ids = MessageIds::new(&SigningKey::new(b"key".to_vec(), Uuid::nil()));
        let named = Named { run_id: Uuid::from_u128(7), item_id: 42 };
        let written = ids.write(named, "millers.example");
        assert!(written.ends_with("@millers.example") && written.len() == 80, "{written}");
        for text in [written.clone(), format!(" <{written}> "), written.to_ascii_uppercase()] {
            assert_eq!(ids.read(&text), Some(named), "{text}");
        }
        let log = format!("postfix/cleanup[17]: 4D2A: message-id=<{written}>\npostfix/smtp[18]: 4D2A: to=<a@x.org>");
        assert_eq!(ids.find(&log), [named]);
    }

    #[test]
    fn an_item_and_a_run_alone_are_not_a_message_id() {
        let ids = MessageIds::new(&SigningKey::new(b"key".to_vec(), Uuid::nil()));
        for text in ["<64001.12b06094beb35fa29ecb1750595e94db@millers.example>", "", "<>", "@"] {
            assert_eq!(ids.read(text), None, "{text}");
            assert_eq!(ids.find(text), [], "{text}");
        }
    }
}
