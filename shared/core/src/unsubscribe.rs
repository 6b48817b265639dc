//! The tokens of unsubscribe links. A token allows its holder to suppress the person that one invitation went to, and nothing
//! else; nobody can make one up. Pure.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use hmac::{Hmac, Mac as _};
use sha2::Sha256;
use uuid::Uuid;

use crate::{
    public_url::PublicUrl,
    signed_id::{ID_CHARS, MAC_BYTES, Named, SignedIds, SigningKey},
};

/// Separates these ids from others that are signed with the same key.
const PURPOSE: &[u8] = b"mailrun unsubscribe v2";
/// In place of an item, in a mail that somebody sends to look at it: its link works, and unsubscribes nobody.
const TEST_ITEM: i64 = 0;
/// Tokens were made like this before, and mails that carry them are still in mailboxes.
const FORMER_PURPOSE: &[u8] = b"mailrun unsubscribe v1";
/// Base64 of a number and a MAC.
const FORMER_CHARS: usize = 32;
/// Mail programs end a link before `-` and `_`, so a former token may have lost so many of them.
const LOST_CHARS: usize = 2;

/// What a token names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Token {
    /// An invitation.
    Item(Named),
    /// An invitation by its number alone, in a mail of an earlier version. After a restore the number may be another person's.
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
    /// With the ledger's key.
    #[must_use]
    pub fn new(key: &SigningKey) -> Self {
        Self { ids: SignedIds::new(key, PURPOSE), former: key.mac(FORMER_PURPOSE) }
    }

    /// The token of an invitation: always the same, 64 lower-case letters and digits.
    #[must_use]
    pub fn token(&self, named: Named) -> String {
        self.ids.write(named)
    }

    /// The link that goes into an invitation.
    #[must_use]
    pub fn link(&self, public_url: &PublicUrl, named: Named) -> String {
        public_url.page(&format!("/u/{}", self.token(named)))
    }

    /// The link that goes into a test mail.
    #[must_use]
    pub fn test_link(&self, public_url: &PublicUrl) -> String {
        self.link(public_url, Named { run_id: Uuid::nil(), item_id: TEST_ITEM })
    }

    /// What the text behind `/u/` names; none: we did not make it. What a mail program took for a part of the link, such as a
    /// full stop, a bracket or a slash, is ignored.
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

    /// What the tokens in a text name, each once: a returned mail carries its link.
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
        // Each of the characters that may have been lost carries 6 bits of 128.
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

/// The first characters of a text, up to one that is not allowed; more than a token needs are not looked at.
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

    /// As earlier versions made them.
    fn former(key: &[u8], item_id: i64) -> String {
        let mac = signer(key).former.chain_update(item_id.to_be_bytes()).finalize().into_bytes();
        URL_SAFE_NO_PAD.encode([&item_id.to_be_bytes()[..], &mac[..MAC_BYTES]].concat())
    }

    #[test]
    fn links_in_mails_that_went_out_stay_valid() {
        // A change of these texts breaks every link that was ever sent.
        assert_eq!(signer(b"key").token(named(42)), "aaaaaaaaaaaaaaaaaaaaaaaaa4aaaaaaaaaaaku336gbzfqlqtkrvcj5mmnc47rr");
        assert_eq!(signer(b"key").read("AAAAAAAAACq7AzdmFRcHJIe4zqRIXDj4"), Some(Token::Former(42)));
    }

    #[test]
    fn a_link_stands_behind_the_public_address() {
        let signer = signer(b"key");
        let url = PublicUrl::try_from("https://a.example/".to_owned()).unwrap();
        assert_eq!(signer.link(&url, named(7)), format!("https://a.example/u/{}", signer.token(named(7))));
        let test = signer.test_link(&url);
        assert_eq!(signer.read(test.strip_prefix("https://a.example/u/").unwrap()), Some(Token::Test));
        assert_eq!(signer.read(&former(b"key", 0)), Some(Token::Test));
    }

    #[test]
    fn nonsense_is_no_token() {
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
        fn a_token_of_an_earlier_version_survives_them_too(item_id in 1i64.., end in "[.,)>/]{0,3}") {
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
        fn a_changed_token_is_none(item_id in 1i64.., place in 0usize..FORMER_CHARS, other in "[A-Za-z0-9_-]") {
            for token in [signer(b"key").token(named(item_id)), former(b"key", item_id)] {
                let mut changed = token.clone();
                changed.replace_range(place..=place, &other);
                prop_assert!(changed.eq_ignore_ascii_case(&token) || signer(b"key").read(&changed).is_none());
            }
        }

        #[test]
        fn nobody_makes_a_token_up(token in "\\PC{0,60}|[A-Za-z0-9_-]{30,32}|[a-z2-7]{64}|AAAAAAAA[A-Za-z0-9_-]{24}") {
            prop_assert_eq!(signer(b"key").read(&token), None);
        }
    }

    #[test]
    fn a_token_of_an_earlier_version_that_lost_its_end_is_recognised() {
        // About one in 16 ends in a character that mail programs leave out of a link.
        let ends: Vec<_> = (1..2_000).map(|item_id| (item_id, former(b"key", item_id))).collect();
        let stripped = ends.iter().filter(|(_, token)| token.ends_with(['-', '_']));
        assert!(stripped.clone().count() > 40);
        for (item_id, token) in stripped {
            let end = if token[..31].ends_with(['-', '_']) { 30 } else { 31 };
            assert_eq!(signer(b"key").read(&token[..end]), Some(Token::Former(*item_id)), "{token}");
        }
    }
}
