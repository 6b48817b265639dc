//! The tokens of unsubscribe links. Whoever has one may keep the person that one invitation went to from being written to
//! again, and nothing else; nobody can make one up.

use std::fmt;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;

use crate::public_url::PublicUrl;

/// In place of an item, in a mail that somebody sends to look at it: its link works, and unsubscribes nobody.
pub const TEST_ITEM: i64 = 0;

/// Half of the signature: 128 bits are more than anybody can try, and the link stays short.
const SIGNATURE_BYTES: usize = 16;
/// So that a signature made for another purpose with the same key is none here.
const PURPOSE: &[u8] = b"mailrun unsubscribe v1";

/// Signs and verifies tokens.
#[derive(Clone)]
pub struct Signer(Hmac<Sha256>);

impl fmt::Debug for Signer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Signer")
    }
}

impl Signer {
    /// With the installation's key.
    #[must_use]
    pub fn new(key: &[u8]) -> Self {
        #[expect(clippy::expect_used, reason = "HMAC takes keys of any length")]
        Self(Hmac::new_from_slice(key).expect("a key"))
    }

    /// The token of an invitation: always the same, 32 characters that are safe in an address.
    #[must_use]
    pub fn token(&self, item_id: i64) -> String {
        let signature = self.signed(item_id).finalize().into_bytes();
        let mut token = item_id.to_be_bytes().to_vec();
        token.extend_from_slice(&signature[..SIGNATURE_BYTES]);
        URL_SAFE_NO_PAD.encode(token)
    }

    /// The invitation that a token is of; none: we have not made it. Takes the same time however wrong it is.
    #[must_use]
    pub fn verify(&self, token: &str) -> Option<i64> {
        let bytes = URL_SAFE_NO_PAD.decode(token).ok()?;
        let (item_id, signature) = bytes.split_first_chunk()?;
        if signature.len() != SIGNATURE_BYTES {
            return None;
        }
        let item_id = i64::from_be_bytes(*item_id);
        self.signed(item_id).verify_truncated_left(signature).ok()?;
        Some(item_id)
    }

    /// The link that goes into a mail.
    #[must_use]
    pub fn link(&self, public_url: &PublicUrl, item_id: i64) -> String {
        public_url.page(&format!("/u/{}", self.token(item_id)))
    }

    fn signed(&self, item_id: i64) -> Hmac<Sha256> {
        self.0.clone().chain_update(PURPOSE).chain_update(item_id.to_be_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn links_in_mails_that_went_out_stay_valid() {
        // A change of this text breaks every link that was ever sent.
        assert_eq!(Signer::new(b"key").token(42), "AAAAAAAAACq7AzdmFRcHJIe4zqRIXDj4");
    }

    #[test]
    fn a_link_stands_behind_the_public_address() {
        let signer = Signer::new(b"key");
        let url = PublicUrl::try_from("https://a.example/".to_owned()).unwrap();
        assert_eq!(signer.link(&url, 7), format!("https://a.example/u/{}", signer.token(7)));
    }

    #[test]
    fn nonsense_is_no_token() {
        let signer = Signer::new(b"key");
        let token = signer.token(7);
        for wrong in ["", "x", "AAAAAAAAAAc", &token[1..], &format!("{token}A"), &format!("{token}=="), "ä"] {
            assert_eq!(signer.verify(wrong), None, "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn a_token_is_good_for_its_item_and_its_key_alone(item_id: i64, place in 0usize..32, other in "[A-Za-z0-9_-]") {
            let signer = Signer::new(b"key");
            let token = signer.token(item_id);
            prop_assert_eq!(token.len(), 32);
            prop_assert_eq!(signer.verify(&token), Some(item_id));
            prop_assert_eq!(Signer::new(b"another").verify(&token), None);
            let mut changed = token.clone();
            changed.replace_range(place..=place, &other);
            prop_assert!(changed == token || signer.verify(&changed).is_none());
        }
    }

    proptest! {
        #[test]
        fn nobody_makes_a_token_up(token in "\\PC{0,60}|[A-Za-z0-9_-]{32}|AAAAAAAA[A-Za-z0-9_-]{24}") {
            prop_assert_eq!(Signer::new(b"key").verify(&token), None);
        }
    }
}
