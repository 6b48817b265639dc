//! Verifies that a message is from Amazon SNS and one of our topics, by topic, certificate and signature.

mod certificate;
mod error;
mod fetch;

use std::{sync::Arc, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use mailrun_app::config::WebConfig;
use moka::future::Cache;
use tokio_rustls::rustls::pki_types::{
    AlgorithmIdentifier, CertificateDer, InvalidSignature, SignatureVerificationAlgorithm, alg_id,
};
use url::Url;
use webpki::EndEntityCert;

pub(crate) use self::error::Refusal;
pub use self::error::SnsError;
use crate::report::sns::Envelope;

use self::{
    certificate::{Authority, Chain},
    fetch::Fetcher,
};

/// Certificates cached. SNS uses one at a time in each region.
const REMEMBERED: u64 = 16;
const REMEMBERED_FOR: Duration = Duration::from_secs(24 * 60 * 60);

/// Verifies messages of the configured topics.
pub(crate) struct Verifier {
    topics: Vec<String>,
    certificates: Certificates,
}

enum Certificates {
    /// From a file: nothing is fetched.
    Given(Vec<CertificateDer<'static>>),
    /// From the message's URL, if an authority signed it.
    Fetched { fetcher: Fetcher, authority: Authority, known: Cache<Url, Arc<Chain>> },
}

impl Verifier {
    /// None: no topic is configured.
    pub(crate) fn new(config: &WebConfig) -> Result<Option<Self>, SnsError> {
        if config.sns_topics.is_empty() {
            return Ok(None);
        }
        let topics = config.sns_topics.clone();
        if !config.sns_certificates.is_empty() {
            let given = config.sns_certificates.iter().map(|path| certificate::of_file(path));
            let given = given.collect::<Result<Vec<_>, _>>()?.concat();
            return Ok(Some(Self { topics, certificates: Certificates::Given(given) }));
        }
        let (authority, roots) = Authority::of_system()?;
        Ok(Some(Self::fetching(topics, authority, fetch::over_https(roots)?)))
    }

    fn fetching(topics: Vec<String>, authority: Authority, fetcher: Fetcher) -> Self {
        let known = Cache::builder().max_capacity(REMEMBERED).time_to_live(REMEMBERED_FOR).build();
        Self { topics, certificates: Certificates::Fetched { fetcher, authority, known } }
    }

    /// Verifies that Amazon SNS signed the message and that its topic is configured.
    pub(crate) async fn verify(&self, envelope: &Envelope) -> Result<(), Refusal> {
        // First, so that another topic causes no request.
        if !self.topics.contains(&envelope.topic_arn) {
            return Err(Refusal::Topic);
        }
        let algorithm: &dyn SignatureVerificationAlgorithm = match envelope.signature_version.as_str() {
            "1" => &RsaSha1,
            "2" => webpki::ring::RSA_PKCS1_2048_8192_SHA256,
            _ => return Err(Refusal::Version),
        };
        let signature = STANDARD.decode(&envelope.signature).map_err(|_| Refusal::Signature)?;
        let signed = envelope.signed_text();
        let is_signed_by = |certificate: &CertificateDer<'_>| {
            EndEntityCert::try_from(certificate)
                .is_ok_and(|certificate| certificate.verify_signature(algorithm, signed.as_bytes(), &signature).is_ok())
        };
        let url = certificate::address(&envelope.signing_cert_url).ok_or(Refusal::CertificateUrl)?;
        let verified = match &self.certificates {
            Certificates::Given(given) => given.iter().any(is_signed_by),
            Certificates::Fetched { fetcher, authority, known } => {
                let fetched = known.try_get_with(url.clone(), async {
                    let pem = fetcher(url.clone()).await.map_err(|error| Refusal::Unreachable(error.to_string()))?;
                    authority.chain(&pem, &url).map(Arc::new)
                });
                is_signed_by(&fetched.await.map_err(|refusal| (*refusal).clone())?.leaf)
            }
        };
        if verified { Ok(()) } else { Err(Refusal::Signature) }
    }
}

/// RSA with SHA-1, for signature version 1. It is no longer allowed in certificates.
#[derive(Debug)]
struct RsaSha1;

impl SignatureVerificationAlgorithm for RsaSha1 {
    fn verify_signature(&self, public_key: &[u8], message: &[u8], signature: &[u8]) -> Result<(), InvalidSignature> {
        use ring::signature::{RSA_PKCS1_2048_8192_SHA1_FOR_LEGACY_USE_ONLY, UnparsedPublicKey};
        let key = UnparsedPublicKey::new(&RSA_PKCS1_2048_8192_SHA1_FOR_LEGACY_USE_ONLY, public_key);
        key.verify(message, signature).map_err(|_| InvalidSignature)
    }

    fn public_key_alg_id(&self) -> AlgorithmIdentifier {
        alg_id::RSA_ENCRYPTION
    }

    fn signature_alg_id(&self) -> AlgorithmIdentifier {
        // sha1WithRSAEncryption (RFC 4055, 5), followed by a NULL.
        AlgorithmIdentifier::from_slice(&[0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x05, 0x05, 0x00])
    }
}

#[cfg(test)]
mod tests;
