//! The tokens of unsubscribe links. A token allows its holder only to suppress the recipient of one invitation, and can't be
//! forged. Pure.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use hmac::{Hmac, Mac as _};
use sha2::Sha256;
use uuid::Uuid;

use crate::{
    public_url::PublicUrl,
    signed_id::{ID_CHARS, MAC_BYTES, Named, SignedIds, SigningKey},
};

/// Separates these ids from other ids signed with the same key.
const PURPOSE: &[u8] = b"mailrun unsubscribe v2";
/// The item number in the link of a test mail. The link works, but unsubscribes nobody.
const TEST_ITEM: i64 = 0;
/// The purpose of tokens of earlier versions. Mails with them are still in mailboxes.
const FORMER_PURPOSE: &[u8] = b"mailrun unsubscribe v1";
/// The length of a former token: base64 of an item number and a MAC.
const FORMER_CHARS: usize = 32;
/// Mail programs end a link before a trailing `-` or `_`. This many may be missing from a former token.
const LOST_CHARS: usize = 2;

/// What a token identifies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Token {
    /// An invitation.
    Item(Named),
    /// An invitation by its number alone, in a mail of an earlier version. After a restore, the number may be another person's.
    Former(i64),
    /// A test mail.
    Test,
}

/// Signs and verifies tokens.
#[derive(Clone, Debug)]
pub struct Signer {
    ids: SignedIds,
    former: Hmac<Sha256>,
}

impl Signer {
    /// Uses the ledger's key.
    #[must_use]
    pub fn new(key: &SigningKey) -> Self {
        Self { ids: SignedIds::new(key, PURPOSE), former: key.mac(FORMER_PURPOSE) }
    }

    /// The token of an invitation, always the same: 64 lower-case letters and digits.
    #[must_use]
    pub fn token(&self, named: Named) -> String {
        self.ids.write(named)
    }

    /// The link in an invitation.
    #[must_use]
    pub fn link(&self, public_url: &PublicUrl, named: Named) -> String {
        public_url.page(&format!("/u/{}", self.token(named)))
    }

    /// The link in a test mail.
    #[must_use]
    pub fn test_link(&self, public_url: &PublicUrl) -> String {
        self.link(public_url, Named { run_id: Uuid::nil(), item_id: TEST_ITEM })
    }

    /// What the text after `/u/` identifies. None: this ledger did not create it. Trailing characters that a mail program added to
    /// the link, such as a full stop, a bracket or a slash, are ignored.
    #[must_use]
    pub fn read(&self, text: &str) -> Option<Token> {
        let token = leading(text, |byte| byte.is_ascii_alphanumeric());
        let token = match self.ids.read(token) {
            Some(named) => Token::Item(named),
            None => Token::Former(self.read_former(text)?),
        };
        Some(match token {
            Token::Item(Named { item_id: TEST_ITEM, .. }) | Token::Former(TEST_ITEM) => Token::Test,
            token => token,
        })
    }

    /// The items of all tokens in a text, each once. A bounce often quotes the mail with its link.
    #[must_use]
    pub fn find(&self, text: &str) -> Vec<Named> {
        self.ids.find(text)
    }

    fn read_former(&self, text: &str) -> Option<i64> {
        let is_stripped = |byte| matches!(byte, b'-' | b'_');
        let token = leading(text, |byte| byte.is_ascii_alphanumeric() || is_stripped(byte));
        if let Some((token, rest)) = token.split_at_checked(FORMER_CHARS) {
            return rest.bytes().all(is_stripped).then(|| self.verify_former(token)).flatten();
        }
        // Try the missing characters. That is safe: each carries only 6 of the MAC's 128 bits.
        let lost: &[&str] = match FORMER_CHARS - token.len() {
            1 => &["-", "_"],
            LOST_CHARS => &["--", "-_", "_-", "__"],
            _ => return None,
        };
        lost.iter().find_map(|lost| self.verify_former(&format!("{token}{lost}")))
    }

    fn verify_former(&self, token: &str) -> Option<i64> {
        let bytes = URL_SAFE_NO_PAD.decode(token).ok()?;
        let (item_id, mac) = bytes.split_first_chunk()?;
        if mac.len() != MAC_BYTES {
            return None;
        }
        self.former.clone().chain_update(item_id).verify_truncated_left(mac).ok()?;
        Some(i64::from_be_bytes(*item_id))
    }
}

/// The longest prefix of allowed characters. Characters beyond the length of any token are not examined.
fn leading(text: &str, allowed: impl Fn(u8) -> bool) -> &str {
    let end = text.bytes().take(2 * ID_CHARS).take_while(|byte| allowed(*byte)).count();
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn signer(key: &[u8]) -> Signer {
        Signer::new(&SigningKey::new(key.to_vec(), Uuid::from_u128(3)))
    }

    fn named(item_id: i64) -> Named {
        Named { run_id: Uuid::from_u128(7), item_id }
    }

    fn other() -> Signer {
        signer(b"another")
    }

    /// Creates a token of an earlier version.
    fn former(key: &[u8], item_id: i64) -> String {
        let mac = signer(key).former.chain_update(item_id.to_be_bytes()).finalize().into_bytes();
        URL_SAFE_NO_PAD.encode([&item_id.to_be_bytes()[..], &mac[..MAC_BYTES]].concat())
    }

    #[test]
    fn links_in_sent_mails_stay_valid() {
        // If these texts change, every link that was ever sent becomes invalid.
        assert_eq!(signer(b"key").token(named(42)), "aaaaaaaaaaaaaaaaaaaaaaaaa4aaaaaaaaaaaku336gbzfqlqtkrvcj5mmnc47rr");
        assert_eq!(signer(b"key").read("AAAAAAAAACq7AzdmFRcHJIe4zqRIXDj4"), Some(Token::Former(42)));
    }

    #[test]
    fn a_link_is_below_the_public_address() {
        let signer = signer(b"key");
        let url = PublicUrl::try_from("https://a.example/".to_owned()).unwrap();
        assert_eq!(signer.link(&url, named(7)), format!("https://a.example/u/{}", signer.token(named(7))));
        let test = signer.test_link(&url);
        assert_eq!(signer.read(test.strip_prefix("https://a.example/u/").unwrap()), Some(Token::Test));
        assert_eq!(signer.read(&former(b"key", 0)), Some(Token::Test));
    }

    #[test]
    fn malformed_tokens_are_refused() {
        let signer = signer(b"key");
        for token in [signer.token(named(7)), former(b"key", 7)] {
            for wrong in ["", "x", "AAAAAAAAAAc", &token[1..], &format!("{token}A"), &token[..29], "ä", "-"] {
                assert_eq!(signer.read(wrong), None, "{wrong}");
            }
        }
    }

    proptest! {
        #[test]
        fn a_token_survives_mail_programs(
            item_id in 1i64.., end in "([.,)>/\\]}\"';:!?*]|%3E|\u{a0}|…){0,3}", upper: bool,
        ) {
            let signer = signer(b"key");
            let mut token = signer.token(named(item_id));
            prop_assert!(token.len() == ID_CHARS && token.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit()));
            if upper {
                token.make_ascii_uppercase();
            }
            prop_assert_eq!(signer.read(&format!("{token}{end}")), Some(Token::Item(named(item_id))));
            prop_assert_eq!(other().read(&token), None);
        }

        #[test]
        fn a_former_token_survives_mail_programs(item_id in 1i64.., end in "[.,)>/]{0,3}") {
            let signer = signer(b"key");
            let token = former(b"key", item_id);
            prop_assert_eq!(signer.read(&format!("{token}{end}")), Some(Token::Former(item_id)));
            let stripped = token.trim_end_matches(['-', '_']);
            if stripped.len() >= FORMER_CHARS - LOST_CHARS {
                prop_assert_eq!(signer.read(&format!("{stripped}{end}")), Some(Token::Former(item_id)));
            }
            prop_assert_eq!(other().read(&token), None);
        }

        #[test]
        fn a_changed_token_is_refused(item_id in 1i64.., place in 0usize..FORMER_CHARS, other in "[A-Za-z0-9_-]") {
            for token in [signer(b"key").token(named(item_id)), former(b"key", item_id)] {
                let mut changed = token.clone();
                changed.replace_range(place..=place, &other);
                prop_assert!(changed.eq_ignore_ascii_case(&token) || signer(b"key").read(&changed).is_none());
            }
        }

        #[test]
        fn an_invented_token_is_refused(token in "\\PC{0,60}|[A-Za-z0-9_-]{30,32}|[a-z2-7]{64}|AAAAAAAA[A-Za-z0-9_-]{24}") {
            prop_assert_eq!(signer(b"key").read(&token), None);
        }
    }

    #[test]
    fn a_former_token_that_lost_its_end_is_accepted() {
        // About one in 16 ends in a character that mail programs cut off.
        let ends: Vec<_> = (1..2_000).map(|item_id| (item_id, former(b"key", item_id))).collect();
        let stripped = ends.iter().filter(|(_, token)| token.ends_with(['-', '_']));
        assert!(stripped.clone().count() > 40);
        for (item_id, token) in stripped {
            let end = if token[..31].ends_with(['-', '_']) { 30 } else { 31 };
            assert_eq!(signer(b"key").read(&token[..end]), Some(Token::Former(*item_id)), "{token}");
        }
    }
}
