//! SCRAM verifiers (RFC 5803, RFC 7677), computed here so that no statement contains the password itself.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::{Digest as _, Sha256};

/// PostgreSQL's default.
const ITERATIONS: u32 = 4_096;

/// The verifier of an ASCII password, which needs no normalization.
pub(crate) fn verifier(password: &str, salt: [u8; 16]) -> String {
    let salted = salted(password, &salt);
    let stored = Sha256::digest(mac(&salted, &[b"Client Key"]));
    let server = mac(&salted, &[b"Server Key"]);
    let encode = |bytes: &[u8]| STANDARD.encode(bytes);
    format!("SCRAM-SHA-256${ITERATIONS}:{}${}:{}", encode(&salt), encode(&stored), encode(&server))
}

/// PBKDF2 with HMAC-SHA-256, one block.
fn salted(password: &str, salt: &[u8]) -> [u8; 32] {
    let mut last = mac(password.as_bytes(), &[salt, &1_u32.to_be_bytes()]);
    let mut all = last;
    for _ in 1..ITERATIONS {
        last = mac(password.as_bytes(), &[&last]);
        all.iter_mut().zip(last).for_each(|(all, last)| *all ^= last);
    }
    all
}

fn mac(key: &[u8], parts: &[&[u8]]) -> [u8; 32] {
    #[expect(clippy::expect_used, reason = "HMAC takes keys of any length")]
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("a key");
    parts.iter().for_each(|part| mac.update(part));
    mac.finalize().into_bytes().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verifier_equals_postgresqls() {
        // RFC 7677's example: the password "pencil".
        let salt = STANDARD.decode("W22ZaJ0SNY7soEsUEjb6gQ==").unwrap().try_into().unwrap();
        let expected = "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=:wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU=";
        assert_eq!(verifier("pencil", salt), expected);
    }
}
