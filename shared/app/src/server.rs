//! Serves HTTP: accepts connections, no more than are wanted at once, and gives up those that are silent or old.

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

/// After the stop, requests under way get this long.
const DRAIN: Duration = Duration::from_secs(10);
/// A connection that is too old ends after its request; one whose request does not end is given up after this time. Taking in a
/// list over a slow line is what takes longest.
const LAST_REQUEST: Duration = Duration::from_secs(3_600);
/// After an error that is the system's, such as too many open files, accepting rests.
const REST: Duration = Duration::from_secs(1);

/// What connections may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// So many at once; further ones wait to be accepted.
    pub connections: usize,
    /// The head of a request must have arrived after this time, counted from the connection's begin or from the answer before:
    /// so it limits idle connections as well.
    pub header: Duration,
    /// An older connection ends with the request that it serves.
    pub age: Duration,
}

/// Serves until `stop`, then for as long as the requests under way need, up to ten seconds.
pub async fn serve(listener: TcpListener, router: Router, limits: Limits, stop: &CancellationToken) {
    let free = Arc::new(Semaphore::new(limits.connections));
    let open = TaskTracker::new();
    let accepting = async {
        loop {
            // Before the connection is accepted: one that can't be served costs nothing.
            let Ok(permit) = Arc::clone(&free).acquire_owned().await else { return };
            let (stream, peer) = accept(&listener).await;
            open.spawn(connection(stream, peer, router.clone(), limits, stop.clone(), permit));
        }
    };
    stop.run_until_cancelled(accepting).await;
    // Nobody is let wait for an answer that won't come.
    drop(listener);
    open.close();
    if timeout(DRAIN, open.wait()).await.is_err() {
        warn!(requests = open.len(), "some requests did not end in time; leaving them");
    }
}

async fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    loop {
        match listener.accept().await {
            Ok(accepted) => return accepted,
            Err(error) if is_the_client_s(&error) => {}
            Err(error) => {
                warn!(%error, "a connection can't be accepted; trying again");
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
    // Best effort: without it, an answer may wait for an acknowledgement.
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
    // How a connection ends is the client's business, and logged nowhere.
    tokio::select! {
        _ = serving.as_mut() => return,
        () = stop.cancelled() => {}
        () = sleep(limits.age) => {}
    }
    serving.as_mut().graceful_shutdown();
    let _ = timeout(LAST_REQUEST, serving).await;
}
