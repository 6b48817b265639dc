//! An HTTP server that bounds the number, idle time and age of its connections.

use std::{convert::Infallible, io, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use axum::{
    Router,
    body::Body,
    extract::{ConnectInfo, Request},
};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::ServiceExt as _;
use tracing::warn;

/// How long requests in progress may take after the stop.
const DRAIN: Duration = Duration::from_secs(10);
/// How long the last request of an old connection may take before the connection is dropped. The slowest legitimate request is
/// the upload of a list over a slow line.
const LAST_REQUEST: Duration = Duration::from_secs(3_600);
/// The pause after an error of this machine, such as too many open files.
const REST: Duration = Duration::from_secs(1);

/// Limits for connections.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The maximum number of connections. Others wait in the listen queue.
    pub connections: usize,
    /// The time limit for a request head, counted from the start of the connection or from the previous response. So it also limits
    /// idle time.
    pub header: Duration,
    /// A connection older than this closes after the current request.
    pub age: Duration,
}

/// Serves until `stop`, then until the requests in progress have ended, up to ten seconds.
pub async fn serve(listener: TcpListener, router: Router, limits: Limits, stop: &CancellationToken) {
    let free = Arc::new(Semaphore::new(limits.connections));
    let open = TaskTracker::new();
    let accepting = async {
        loop {
            // Get the permit before accepting, so that a connection beyond the limit costs nothing.
            let Ok(permit) = Arc::clone(&free).acquire_owned().await else { return };
            let (stream, peer) = accept(&listener).await;
            open.spawn(connection(stream, peer, router.clone(), limits, stop.clone(), permit));
        }
    };
    stop.run_until_cancelled(accepting).await;
    // Close the listener, so that clients are refused instead of waiting for a response that never comes.
    drop(listener);
    open.close();
    if timeout(DRAIN, open.wait()).await.is_err() {
        warn!(requests = open.len(), "requests still in progress after the time limit, abandoning them");
    }
}

async fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    loop {
        match listener.accept().await {
            Ok(accepted) => return accepted,
            Err(error) if is_the_client_s(&error) => {}
            Err(error) => {
                warn!(%error, "can't accept a connection, trying again");
                sleep(REST).await;
            }
        }
    }
}

fn is_the_client_s(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

async fn connection(
    stream: TcpStream,
    peer: SocketAddr,
    router: Router,
    limits: Limits,
    stop: CancellationToken,
    _permit: OwnedSemaphorePermit,
) {
    // Best effort: with Nagle's algorithm, a response may wait for the client's TCP ack.
    let _ = stream.set_nodelay(true);
    let service = service_fn(move |request: Request<Incoming>| {
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(ConnectInfo(peer));
        let answer = router.clone().oneshot(request);
        async { Ok::<_, Infallible>(answer.await.unwrap_or_else(|never| match never {})) }
    });
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(limits.header);
    let mut serving = pin!(http.serve_connection(TokioIo::new(stream), service));
    // The result is not logged: how a connection ends is up to the client.
    tokio::select! {
        _ = serving.as_mut() => return,
        () = stop.cancelled() => {}
        () = sleep(limits.age) => {}
    }
    serving.as_mut().graceful_shutdown();
    let _ = timeout(LAST_REQUEST, serving).await;
}
