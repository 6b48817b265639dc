//! Ids that leave the system, in `Message-ID`s and unsubscribe links. Each identifies an item of a run, and only the ledger's key
//! can create or verify it. Pure.

use std::fmt;

use data_encoding::{BASE32_NOPAD, BASE32_NOPAD_NOCASE};
use hmac::{Hmac, KeyInit as _, Mac as _};
use secrecy::{ExposeSecret as _, SecretSlice};
use sha2::Sha256;
use uuid::Uuid;

/// The length of an id in characters: base32 of 40 bytes, which needs no padding.
pub const ID_CHARS: usize = 64;
/// Half of an HMAC-SHA256: 128 bits can't be guessed, and the id stays short.
pub(crate) const MAC_BYTES: usize = 16;
const ID_BYTES: usize = RUN_BYTES + ITEM_BYTES + MAC_BYTES;
const RUN_BYTES: usize = 16;
const ITEM_BYTES: usize = 8;
/// The maximum number of candidates checked in one text: each costs an HMAC, and the text comes from a stranger.
const MAX_CANDIDATES: usize = 1_000;

/// The ledger's key, and the installation that it signs for.
#[derive(Clone)]
pub struct SigningKey {
    key: SecretSlice<u8>,
    installation: Uuid,
}

impl SigningKey {
    /// `installation` is signed too, so another installation with a copy of the key verifies none of these ids.
    #[must_use]
    pub fn new(key: Vec<u8>, installation: Uuid) -> Self {
        Self { key: key.into(), installation }
    }

    /// The MAC for one purpose, without the installation.
    pub(crate) fn mac(&self, purpose: &[u8]) -> Hmac<Sha256> {
        #[expect(clippy::expect_used, reason = "HMAC takes keys of any length")]
        let mac = Hmac::<Sha256>::new_from_slice(self.key.expose_secret()).expect("a key");
        mac.chain_update(purpose)
    }
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("SigningKey").field("installation", &self.installation).finish_non_exhaustive()
    }
}

/// The run and item of an id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Named {
    /// The run.
    pub run_id: Uuid,
    /// The item. Run and item must both match: after a restore, the ledger may have given the number to another person.
    pub item_id: i64,
}

/// Writes and reads the ids of one purpose.
#[derive(Clone)]
pub(crate) struct SignedIds(Hmac<Sha256>);

impl fmt::Debug for SignedIds {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("SignedIds")
    }
}

impl SignedIds {
    /// `purpose` separates the kinds of ids: an id for another purpose does not verify.
    pub(crate) fn new(key: &SigningKey, purpose: &[u8]) -> Self {
        Self(key.mac(purpose).chain_update(key.installation.as_bytes()))
    }

    /// The id, always the same for an item: [`ID_CHARS`] lower-case letters and digits.
    pub(crate) fn write(&self, named: Named) -> String {
        let mut id = Vec::with_capacity(ID_BYTES);
        id.extend_from_slice(named.run_id.as_bytes());
        id.extend_from_slice(&named.item_id.to_be_bytes());
        let mac = self.0.clone().chain_update(&id).finalize().into_bytes();
        id.extend_from_slice(&mac[..MAC_BYTES]);
        let mut id = BASE32_NOPAD.encode(&id);
        id.make_ascii_lowercase();
        id
    }

    /// The item of an id, in upper or lower case. None: this ledger did not create it. The MAC is compared in constant time.
    pub(crate) fn read(&self, id: &str) -> Option<Named> {
        if id.len() != ID_CHARS {
            return None;
        }
        let bytes: [u8; ID_BYTES] = BASE32_NOPAD_NOCASE.decode(id.as_bytes()).ok()?.try_into().ok()?;
        let (signed, mac) = bytes.split_at(RUN_BYTES + ITEM_BYTES);
        self.0.clone().chain_update(signed).verify_truncated_left(mac).ok()?;
        let (run_id, item_id) = signed.split_first_chunk::<RUN_BYTES>()?;
        Some(Named { run_id: Uuid::from_bytes(*run_id), item_id: i64::from_be_bytes(item_id.try_into().ok()?) })
    }

    /// The items of all ids in a text, each once, in their order.
    pub(crate) fn find(&self, text: &str) -> Vec<Named> {
        let candidates = text.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| word.len() == ID_CHARS);
        let mut found = Vec::new();
        for named in candidates.take(MAX_CANDIDATES).filter_map(|word| self.read(word)) {
            if !found.contains(&named) {
                found.push(named);
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ids(key: &[u8], installation: u128, purpose: &[u8]) -> SignedIds {
        SignedIds::new(&SigningKey::new(key.to_vec(), Uuid::from_u128(installation)), purpose)
    }

    fn named() -> impl Strategy<Value = Named> {
        (any::<u128>(), any::<i64>()).prop_map(|(run, item_id)| Named { run_id: Uuid::from_u128(run), item_id })
    }

    #[test]
    fn ids_that_were_sent_stay_valid() {
        // If this text changes, every id that was ever sent becomes invalid.
        let id = ids(b"key", 3, b"purpose").write(Named { run_id: Uuid::from_u128(7), item_id: 42 });
        assert_eq!(id, "aaaaaaaaaaaaaaaaaaaaaaaaa4aaaaaaaaaaakx3apylojhxx3xs4toxvsvkefqt");
    }

    #[test]
    fn the_number_of_checked_candidates_is_bounded() {
        let ids = ids(b"key", 3, b"purpose");
        let named = Named { run_id: Uuid::from_u128(7), item_id: 42 };
        let text =
            |candidates| format!("{}{}", format!("{} ", "a".repeat(ID_CHARS)).repeat(candidates), ids.write(named));
        assert_eq!(ids.find(&text(10)), [named]);
        assert_eq!(ids.find(&text(MAX_CANDIDATES)), []);
    }

    proptest! {
        #[test]
        fn an_id_verifies_only_for_its_item_key_installation_and_purpose(
            named in named(), place in 0..ID_CHARS, other in "[a-z2-7]"
        ) {
            let ours = ids(b"key", 3, b"purpose");
            let id = ours.write(named);
            prop_assert!(id.len() == ID_CHARS && id.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit()));
            prop_assert_eq!(ours.read(&id), Some(named));
            prop_assert_eq!(ours.read(&id.to_ascii_uppercase()), Some(named));
            for foreign in [ids(b"another", 3, b"purpose"), ids(b"key", 4, b"purpose"), ids(b"key", 3, b"other")] {
                prop_assert_eq!(foreign.read(&id), None);
            }
            let mut changed = id.clone();
            changed.replace_range(place..=place, &other);
            prop_assert!(changed == id || ours.read(&changed).is_none());
        }

        #[test]
        fn an_id_is_found_anywhere_in_a_text(named in named(), before in "(\\PC{0,20}[^A-Za-z0-9])?", after in "([^A-Za-z0-9]\\PC{0,20})?") {
            let ids = ids(b"key", 3, b"purpose");
            let text = format!("{before}{id}{after} <{id}@example.org>", id = ids.write(named));
            prop_assert_eq!(ids.find(&text), [named]);
        }

        #[test]
        fn an_invented_id_does_not_verify(text in "\\PC{0,60}|[a-z2-7]{64}|a{24}[a-z2-7]{40}") {
            prop_assert_eq!(ids(b"key", 3, b"purpose").find(&text), []);
        }
    }
}
