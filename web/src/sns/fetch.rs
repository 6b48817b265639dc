//! Fetches a certificate over HTTPS: one GET without redirects, bounded in size and time.

use std::{error::Error, io, pin::Pin, sync::Arc, time::Duration};

use axum::body::Bytes;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::{Request, StatusCode, client::conn::http1, header::HOST};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, sync::Semaphore, time::timeout};
use tokio_rustls::{
    TlsConnector,
    rustls::{ClientConfig, RootCertStore, crypto::ring, pki_types::ServerName},
};
use url::Url;

/// A file with a chain has a few kilobytes.
const MAX_BYTES: usize = 100_000;
const TIME_LIMIT: Duration = Duration::from_secs(10);
/// Anyone can cause requests to Amazon, so few run at a time.
const MAX_CONCURRENT: usize = 2;

type BoxError = Box<dyn Error + Send + Sync>;
type Fetched = Pin<Box<dyn Future<Output = Result<Vec<u8>, BoxError>> + Send>>;
pub(super) type Fetcher = Box<dyn Fn(Url) -> Fetched + Send + Sync>;

/// Fetches from servers with a certificate of one of `roots`.
pub(super) fn over_https(roots: RootCertStore) -> Result<Fetcher, tokio_rustls::rustls::Error> {
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let connector = TlsConnector::from(Arc::new(config));
    let permits = Arc::new(Semaphore::new(MAX_CONCURRENT));
    Ok(Box::new(move |url| {
        let (connector, permits) = (connector.clone(), Arc::clone(&permits));
        Box::pin(async move {
            let _permit = permits.try_acquire().map_err(|_| io::Error::other("too many fetches in progress"))?;
            timeout(TIME_LIMIT, get(&connector, &url)).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
        })
    }))
}

async fn get(connector: &TlsConnector, url: &Url) -> Result<Vec<u8>, BoxError> {
    let host = url.host_str().unwrap_or_default();
    let stream = TcpStream::connect((host, url.port_or_known_default().unwrap_or(443))).await?;
    let stream = connector.connect(ServerName::try_from(host.to_owned())?, stream).await?;
    let (mut requests, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let request = Request::get(url.path()).header(HOST, host).body(Empty::<Bytes>::new())?;
    let answer = async {
        let answer = requests.send_request(request).await?;
        // Redirects are refused like any other status.
        if answer.status() != StatusCode::OK {
            return Err(io::Error::other(format!("the response is {}", answer.status())).into());
        }
        Ok(Limited::new(answer.into_body(), MAX_BYTES).collect().await?.to_bytes().to_vec())
    };
    tokio::pin!(answer);
    tokio::select! {
        // The response may be complete when the connection ends.
        biased;
        answer = &mut answer => answer,
        ended = connection => {
            ended?;
            answer.await
        }
    }
}
