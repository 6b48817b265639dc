//! Why messages of Amazon SNS cannot be verified, or are refused.

use std::path::PathBuf;

/// Why the verifier cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum SnsError {
    /// A configured certificate file is unusable.
    #[error("web.sns_certificates: {path} has no readable certificate: {reason}")]
    Certificates {
        /// The configured file.
        path: PathBuf,
        /// Why it is unusable.
        reason: String,
    },
    /// The system has no certificate authorities.
    #[error(
        "web.sns_topics: this system has no certificate authorities; install ca-certificates, or set web.sns_certificates"
    )]
    NoAuthorities,
    /// The TLS library's error.
    #[error("cannot set up TLS for Amazon SNS: {0}")]
    Tls(#[from] tokio_rustls::rustls::Error),
}

/// Why a message is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("its topic is not in web.sns_topics")]
    Topic,
    #[error("its SigningCertURL is not a URL of Amazon SNS")]
    CertificateUrl,
    #[error("its certificate is not one of Amazon SNS: {0}")]
    Certificate(&'static str),
    #[error("its SignatureVersion is neither 1 nor 2")]
    Version,
    #[error("its signature does not match")]
    Signature,
    /// Temporary: the message may be accepted later.
    #[error("its certificate cannot be fetched: {0}")]
    Unreachable(String),
}
