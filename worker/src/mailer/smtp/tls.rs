//! Trusted certificate authorities: those of the system, or those of a file.

use std::{path::PathBuf, sync::Arc};

use tokio_rustls::{
    TlsConnector,
    rustls::{
        self, ClientConfig, RootCertStore,
        crypto::ring,
        pki_types::{CertificateDer, pem::PemObject},
    },
};

/// TLS cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The file of certificate authorities is not usable.
    #[error("can't read the certificate authorities in {path}: {reason}")]
    Authorities {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The system has none.
    #[error("this system has no certificate authorities: install ca-certificates, or name a ca_file")]
    NoAuthorities,
    /// rustls rejected the configuration.
    #[error(transparent)]
    Tls(#[from] rustls::Error),
}

/// Encrypts connections to servers whose certificate one of the authorities has signed.
///
/// # Errors
/// If there are no authorities, or TLS cannot be set up.
pub fn connector(ca_file: Option<&PathBuf>) -> Result<TlsConnector, TlsError> {
    let mut roots = RootCertStore::empty();
    match ca_file {
        Some(path) => {
            let wrong = |reason: String| TlsError::Authorities { path: path.clone(), reason };
            for certificate in CertificateDer::pem_file_iter(path).map_err(|error| wrong(error.to_string()))? {
                let certificate = certificate.map_err(|error| wrong(error.to_string()))?;
                roots.add(certificate).map_err(|error| wrong(error.to_string()))?;
            }
            if roots.is_empty() {
                return Err(wrong("it contains no certificate".into()));
            }
        }
        None => {
            // System stores contain malformed certificates; the others suffice.
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            if roots.is_empty() {
                return Err(TlsError::NoAuthorities);
            }
        }
    }
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}
