//! Certificates of Amazon SNS: allowed addresses, and verification by the certificate authorities.

use std::path::Path;

use tokio_rustls::rustls::{
    RootCertStore,
    pki_types::{CertificateDer, ServerName, TrustAnchor, UnixTime, pem::PemObject as _},
};
use url::Url;
use webpki::{EndEntityCert, KeyUsage, anchor_from_trusted_cert};

use super::error::{Refusal, SnsError};

/// A verified certificate.
pub(super) struct Chain {
    pub(super) leaf: CertificateDer<'static>,
}

/// Parses a certificate's URL. It must be one of Amazon SNS: `https` on `sns.<region>.amazonaws.com` (or `.com.cn`).
pub(super) fn address(text: &str) -> Option<Url> {
    let url = Url::parse(text).ok()?;
    let plain = url.scheme() == "https"
        && url.port().is_none()
        && url.username().is_empty()
        && url.password().is_none()
        && url.query().is_none()
        && url.fragment().is_none()
        && url.path().ends_with(".pem");
    region(url.host_str()?).filter(|_| plain)?;
    Some(url)
}

/// `eu-west-1` of `sns.eu-west-1.amazonaws.com`.
fn region(host: &str) -> Option<&str> {
    let host = host.strip_suffix(".cn").unwrap_or(host);
    let region = host.strip_prefix("sns.")?.strip_suffix(".amazonaws.com")?;
    let is_region = region.len() > 2
        && region.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
    is_region.then_some(region)
}

/// The names allowed in a certificate of SNS.
fn names(url: &Url) -> Vec<String> {
    let host = url.host_str().unwrap_or_default();
    let end = if host.ends_with(".cn") { "amazonaws.com.cn" } else { "amazonaws.com" };
    let region = region(host).unwrap_or_default();
    ["sns", &format!("sns.{region}"), &format!("sns-{region}"), &format!("sns-signing.{region}")]
        .map(|name| format!("{name}.{end}"))
        .to_vec()
}

/// The trusted certificate authorities.
pub(super) struct Authority(Vec<TrustAnchor<'static>>);

impl Authority {
    /// The system's authorities, also as a root store for TLS.
    pub(super) fn of_system() -> Result<(Self, RootCertStore), SnsError> {
        let certificates = rustls_native_certs::load_native_certs().certs;
        let mut roots = RootCertStore::empty();
        // Systems contain some malformed ones; the others are enough.
        roots.add_parsable_certificates(certificates.clone());
        if roots.is_empty() {
            return Err(SnsError::NoAuthorities);
        }
        Ok((Self::of(&certificates), roots))
    }

    pub(super) fn of(certificates: &[CertificateDer<'_>]) -> Self {
        Self(certificates.iter().filter_map(|one| Some(anchor_from_trusted_cert(one).ok()?.to_owned())).collect())
    }

    /// Verifies the chain in a file fetched from `url`: the first certificate is the one that signs messages.
    pub(super) fn chain(&self, pem: &[u8], url: &Url) -> Result<Chain, Refusal> {
        let unreadable = Refusal::Certificate("it cannot be parsed");
        let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
        let certificates = certificates.map_err(|_| unreadable.clone())?;
        let (leaf, between) = certificates.split_first().ok_or(unreadable.clone())?;
        let certificate = EndEntityCert::try_from(leaf).map_err(|_| unreadable)?;
        certificate
            .verify_for_usage(
                webpki::ALL_VERIFICATION_ALGS,
                &self.0,
                between,
                UnixTime::now(),
                KeyUsage::server_auth(),
                None,
                None,
            )
            .map_err(|_| Refusal::Certificate("no trusted authority signed it, or it has expired"))?;
        let is_named = names(url).into_iter().any(|name| {
            ServerName::try_from(name).is_ok_and(|name| certificate.verify_is_valid_for_subject_name(&name).is_ok())
        });
        if !is_named {
            return Err(Refusal::Certificate("its name is not one of Amazon SNS"));
        }
        Ok(Chain { leaf: leaf.clone() })
    }
}

/// The certificates in a file. An empty file is an error.
pub(super) fn of_file(path: &Path) -> Result<Vec<CertificateDer<'static>>, SnsError> {
    let wrong = |reason: String| SnsError::Certificates { path: path.to_owned(), reason };
    let certificates = CertificateDer::pem_file_iter(path).map_err(|error| wrong(error.to_string()))?;
    let certificates: Vec<_> = certificates.collect::<Result<_, _>>().map_err(|error| wrong(error.to_string()))?;
    for certificate in &certificates {
        EndEntityCert::try_from(certificate).map_err(|error| wrong(error.to_string()))?;
    }
    if certificates.is_empty() { Err(wrong("it is empty".into())) } else { Ok(certificates) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_only_urls_of_amazon_sns() {
        for url in [
            "https://sns.eu-west-1.amazonaws.com/SimpleNotificationService-0123.pem",
            "https://sns.cn-north-1.amazonaws.com.cn/SimpleNotificationService-0123.pem",
            "https://sns.us-gov-west-1.amazonaws.com:443/a.pem",
        ] {
            assert!(address(url).is_some(), "{url}");
        }
        for url in [
            "http://sns.eu-west-1.amazonaws.com/a.pem",
            "https://sns.eu-west-1.amazonaws.com:8443/a.pem",
            "https://sns.eu-west-1.amazonaws.com.evil.example/a.pem",
            "https://evil.example/sns.eu-west-1.amazonaws.com/a.pem",
            "https://sns.eu-west-1.amazonaws.com@evil.example/a.pem",
            "https://u:p@sns.eu-west-1.amazonaws.com/a.pem",
            "https://sns.eu-west-1.amazonaws.com/a.pem?x=1",
            "https://sns.eu-west-1.amazonaws.com/a.pem#x",
            "https://sns.eu-west-1.amazonaws.com/a",
            "https://sns.amazonaws.com/a.pem",
            "https://sns..amazonaws.com/a.pem",
            "https://sns.a.b.amazonaws.com/a.pem",
            "https://xsns.eu-west-1.amazonaws.com/a.pem",
            "https://sns.eu-west-1.amazonaws.com.cn.cn/a.pem",
            "https://bucket.s3.amazonaws.com/a.pem",
            "https://127.0.0.1/a.pem",
            "file:///etc/passwd.pem",
            "nonsense",
            "",
        ] {
            assert!(address(url).is_none(), "{url}");
        }
    }
}
