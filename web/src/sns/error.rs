//! Why messages of Amazon SNS can't be verified, or are not accepted.

use std::path::PathBuf;

/// Why Amazon SNS can't be verified as configured.
#[derive(Debug, thiserror::Error)]
pub enum SnsError {
    /// A file with certificates.
    #[error("web.sns_certificates: {path} has no certificate that can be read: {reason}")]
    Certificates {
        /// Where it should be.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The system trusts nobody.
    #[error(
        "web.sns_topics: this system has no certificate authorities; install ca-certificates, or set web.sns_certificates"
    )]
    NoAuthorities,
    /// The library.
    #[error("the connection to Amazon SNS can't be encrypted: {0}")]
    Tls(#[from] tokio_rustls::rustls::Error),
}

/// Why a message is not accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("its topic is not named in web.sns_topics")]
    Topic,
    #[error("its SigningCertURL is not an address of Amazon SNS")]
    CertificateUrl,
    #[error("its certificate is not one of Amazon SNS: {0}")]
    Certificate(&'static str),
    #[error("its SignatureVersion is neither 1 nor 2")]
    Version,
    #[error("its signature does not match")]
    Signature,
    /// It may be accepted later.
    #[error("its certificate can't be fetched: {0}")]
    Unreachable(String),
}
