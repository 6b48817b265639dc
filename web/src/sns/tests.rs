//! Tests with our own certificate authority instead of the system's, and its files instead of Amazon's.

use std::sync::atomic::{AtomicUsize, Ordering};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use ring::{
    rand::SystemRandom,
    signature::{RSA_PKCS1_SHA256, RsaKeyPair},
};
use tokio_rustls::rustls::pki_types::{PrivateKeyDer, pem::PemObject as _};

use super::*;

const TOPIC: &str = "arn:aws:sns:eu-west-1:123456789012:bounces";
const NAME: &str = "sns.eu-west-1.amazonaws.com";
const KEY: &str = include_str!("test_key.pem");
/// Created with the same key: `openssl dgst -sha1 -sign`.
const SHA1_SIGNATURE: &str = include_str!("test_sha1.txt");

fn envelope() -> Envelope {
    serde_json::from_str(include_str!("../report/fixtures/sns_bounce.json")).unwrap()
}

fn signed(envelope: Envelope) -> Envelope {
    let key = PrivateKeyDer::from_pem_slice(KEY.as_bytes()).unwrap();
    let key = RsaKeyPair::from_pkcs8(key.secret_der()).unwrap();
    let mut signature = vec![0; key.public().modulus_len()];
    let text = envelope.signed_text();
    key.sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), text.as_bytes(), &mut signature).unwrap();
    Envelope { signature_version: "2".into(), signature: STANDARD.encode(signature), ..envelope }
}

struct Authorities {
    root: CertifiedIssuer<'static, KeyPair>,
    between: CertifiedIssuer<'static, KeyPair>,
}

impl Authorities {
    fn new() -> Self {
        let params = |name: &str| {
            let mut params = CertificateParams::default();
            params.distinguished_name.push(DnType::CommonName, name);
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params
        };
        let root = CertifiedIssuer::self_signed(params("root"), KeyPair::generate().unwrap()).unwrap();
        let between = CertifiedIssuer::signed_by(params("between"), KeyPair::generate().unwrap(), &root).unwrap();
        Self { root, between }
    }

    fn authority(&self) -> Authority {
        Authority::of(&[self.root.der().clone()])
    }

    /// The signing certificate, without intermediates.
    fn leaf(&self, name: &str, change: impl FnOnce(&mut CertificateParams)) -> String {
        let mut params = CertificateParams::new([name.to_owned()]).unwrap();
        params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
        change(&mut params);
        params.signed_by(&KeyPair::from_pem(KEY).unwrap(), &self.between).unwrap().pem()
    }

    /// The file as served.
    fn file(&self, name: &str) -> String {
        format!("{}{}", self.leaf(name, |_| {}), self.between.pem())
    }
}

/// Serves `file` for every URL and counts the fetches.
fn verifier(authority: Authority, file: String) -> (Verifier, Arc<AtomicUsize>) {
    let fetches = Arc::new(AtomicUsize::new(0));
    let fetcher: Fetcher = Box::new({
        let fetches = Arc::clone(&fetches);
        move |url| {
            assert_eq!(url.host_str(), Some(NAME));
            fetches.fetch_add(1, Ordering::Relaxed);
            let file = file.clone().into_bytes();
            Box::pin(async move { Ok(file) })
        }
    });
    (Verifier::fetching(vec![TOPIC.into()], authority, fetcher), fetches)
}

#[tokio::test]
async fn both_signature_versions_are_verified_and_the_certificate_is_fetched_once() {
    let authorities = Authorities::new();
    let (verifier, fetches) = verifier(authorities.authority(), authorities.file(NAME));
    let version_1 = Envelope { signature: SHA1_SIGNATURE.trim().into(), ..envelope() };
    assert_eq!(verifier.verify(&version_1).await, Ok(()));
    assert_eq!(verifier.verify(&signed(envelope())).await, Ok(()));
    let crossed = Envelope { signature_version: "2".into(), ..version_1.clone() };
    assert_eq!(verifier.verify(&crossed).await, Err(Refusal::Signature));
    let unknown = Envelope { signature_version: "3".into(), ..version_1 };
    assert_eq!(verifier.verify(&unknown).await, Err(Refusal::Version));
    assert_eq!(fetches.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn a_changed_message_is_refused() {
    let authorities = Authorities::new();
    let (verifier, _) = verifier(authorities.authority(), authorities.file(NAME));
    let json = include_str!("../report/fixtures/sns_bounce.json");
    let signature = signed(envelope());
    for (from, to) in [
        ("jane@example.com\\\",\\\"richard", "eve@example.com\\\",\\\"richard"),
        ("22b80b92", "22b80b93"),
        ("16:00:01.500Z", "16:00:02.500Z"),
    ] {
        assert!(json.contains(from), "{from}");
        let changed: Envelope = serde_json::from_str(&json.replace(from, to)).unwrap();
        let changed = Envelope {
            signature: signature.signature.clone(),
            signature_version: signature.signature_version.clone(),
            ..changed
        };
        assert_eq!(verifier.verify(&changed).await, Err(Refusal::Signature), "{from}");
    }
    let nonsense = Envelope { signature: "EXAMPLE".into(), ..signature };
    assert_eq!(verifier.verify(&nonsense).await, Err(Refusal::Signature));
}

#[tokio::test]
async fn other_topics_and_urls_cause_no_request() {
    let authorities = Authorities::new();
    let (verifier, fetches) = verifier(authorities.authority(), authorities.file(NAME));
    let foreign = Envelope { topic_arn: TOPIC.replace("123456789012", "210987654321"), ..envelope() };
    assert_eq!(verifier.verify(&signed(foreign)).await, Err(Refusal::Topic));
    for url in ["http://sns.eu-west-1.amazonaws.com/a.pem", "https://evil.example/a.pem", ""] {
        let elsewhere = Envelope { signing_cert_url: url.into(), ..envelope() };
        assert_eq!(verifier.verify(&signed(elsewhere)).await, Err(Refusal::CertificateUrl), "{url}");
    }
    assert_eq!(fetches.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn a_certificate_needs_an_authority_a_name_and_a_valid_time() {
    let authorities = Authorities::new();
    let message = signed(envelope());
    for (authority, file) in [
        // Another authority; a missing intermediate; two other names; expired; not a certificate.
        (Authorities::new().authority(), authorities.file(NAME)),
        (authorities.authority(), authorities.leaf(NAME, |_| {})),
        (authorities.authority(), authorities.file("sns.us-east-1.amazonaws.com")),
        (authorities.authority(), authorities.file("mail.example.org")),
        (
            authorities.authority(),
            authorities.leaf(NAME, |params| params.not_after = rcgen::date_time_ymd(2000, 1, 1))
                + &authorities.between.pem(),
        ),
        (authorities.authority(), "nonsense".into()),
    ] {
        let (verifier, fetches) = verifier(authority, file);
        for _ in 0..2 {
            let refused = verifier.verify(&message).await.unwrap_err();
            assert!(matches!(refused, Refusal::Certificate(_)), "{refused}");
        }
        assert_eq!(fetches.load(Ordering::Relaxed), 2, "a refused certificate is not cached");
    }
    for name in ["sns.amazonaws.com", "sns-signing.eu-west-1.amazonaws.com"] {
        let (verifier, _) = verifier(authorities.authority(), authorities.file(name));
        assert_eq!(verifier.verify(&message).await, Ok(()), "{name}");
    }
}

#[tokio::test]
async fn a_failed_fetch_is_temporary() {
    let fetcher: Fetcher = Box::new(|_| Box::pin(async { Err("the response is 302 Found".into()) }));
    let verifier = Verifier::fetching(vec![TOPIC.into()], Authorities::new().authority(), fetcher);
    let refused = verifier.verify(&signed(envelope())).await.unwrap_err();
    assert_eq!(refused, Refusal::Unreachable("the response is 302 Found".into()));
}

#[tokio::test]
async fn configured_certificates_are_trusted_without_a_fetch() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sns.pem");
    let config = |path: &std::path::Path| WebConfig {
        sns_topics: vec![TOPIC.into()],
        sns_certificates: vec![path.to_owned()],
        ..WebConfig::default()
    };
    assert!(matches!(Verifier::new(&config(&path)), Err(SnsError::Certificates { .. })));
    std::fs::write(&path, "nonsense").unwrap();
    assert!(matches!(Verifier::new(&config(&path)), Err(SnsError::Certificates { .. })));
    // Two certificates, as during a rotation by Amazon.
    let authorities = Authorities::new();
    std::fs::write(&path, authorities.between.pem() + &authorities.leaf("any", |_| {})).unwrap();
    let verifier = Verifier::new(&config(&path)).unwrap().unwrap();
    let version_1 = Envelope { signature: SHA1_SIGNATURE.trim().into(), ..envelope() };
    assert_eq!(verifier.verify(&version_1).await, Ok(()));
    let elsewhere = signed(Envelope { signing_cert_url: "https://evil.example/a.pem".into(), ..envelope() });
    assert_eq!(verifier.verify(&elsewhere).await, Err(Refusal::CertificateUrl));
    assert!(Verifier::new(&WebConfig::default()).unwrap().is_none());
}
