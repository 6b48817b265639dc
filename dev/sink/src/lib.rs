//! A mail sink: an SMTP server on this machine that accepts mail, delivers none, and shows what arrived.
//!
//! It stands in for a relay in development and in tests, which can also make it misbehave.

mod login;
mod mailbox;
mod page;
mod rate_meter;
mod rule;
mod smtp;
mod wire;

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    net::{TcpListener, TcpSocket},
    sync::Mutex,
    task::JoinHandle,
    time::sleep,
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        self, ServerConfig,
        crypto::ring,
        pki_types::{CertificateDer, PrivateKeyDer},
    },
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use self::{
    login::Login,
    mailbox::{Counts, Mailbox, Message},
    page::serve as serve_page,
    rate_meter::{RateCheck, RateMeter},
    rule::{Action, Rule, Session, Stage},
};

/// Connections waiting to be accepted.
const BACKLOG: u32 = 1024;
/// Pause after an error of the listening socket, usually too many open files.
const PAUSE: Duration = Duration::from_millis(100);

/// Options of a sink.
#[derive(Clone, Debug)]
pub struct Options {
    /// A loopback address; port 0 selects any free port.
    pub listen: SocketAddr,
    /// Delay of the reply to the end of a message's data.
    pub latency: Duration,
    /// TLS, if any.
    pub tls: Option<Tls>,
    /// The only accepted login. None: any login is accepted, and none is required.
    pub login: Option<Login>,
    /// How many of the newest messages are kept; 0: none.
    pub keep: usize,
    /// The maximum size of a message, in bytes.
    pub largest: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            latency: Duration::ZERO,
            tls: None,
            login: None,
            keep: 10_000,
            largest: 25 << 20,
        }
    }
}

/// A certificate, and when it is used.
#[derive(Clone)]
pub struct Tls {
    acceptor: TlsAcceptor,
    implicit: bool,
}

impl Tls {
    /// Uses this certificate when the client sends STARTTLS.
    ///
    /// # Errors
    /// The key does not belong to the certificate.
    pub fn new(chain: Vec<CertificateDer<'static>>, key: PrivateKeyDer<'static>) -> Result<Self, rustls::Error> {
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(chain, key)?;
        Ok(Self { acceptor: Arc::new(config).into(), implicit: false })
    }

    /// Uses TLS from the first byte, as on port 465.
    #[must_use]
    pub fn implicit(self) -> Self {
        Self { implicit: true, ..self }
    }
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Tls").field("implicit", &self.implicit).finish_non_exhaustive()
    }
}

/// Why a sink cannot start.
#[derive(Debug, thiserror::Error)]
pub enum SinkError {
    /// It would accept mail from anyone on the network.
    #[error("{0} is reachable from other machines, and a mail sink accepts mail from anyone: use 127.0.0.1 or [::1]")]
    NotLoopback(SocketAddr),
    /// The port is in use.
    #[error("cannot listen on {address}: {source}; stop the process that uses it, or choose another port")]
    Listen {
        /// The configured address.
        address: SocketAddr,
        /// The system's error.
        source: io::Error,
    },
}

/// A running sink. Dropping it stops it; [`Sink::stop`] also waits until it has stopped.
#[derive(Debug)]
pub struct Sink {
    address: SocketAddr,
    shared: Arc<Shared>,
    port: Mutex<Port>,
}

/// Shared by all connections.
struct Shared {
    options: Options,
    mailbox: Arc<Mailbox>,
    rule: RwLock<Option<Rule>>,
    connections: Connections,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Shared").field("options", &self.options).finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
struct Connections {
    ever: AtomicU64,
    open: AtomicUsize,
    most: AtomicUsize,
}

/// The port of a sink.
#[derive(Debug)]
enum Port {
    /// Accepting clients.
    Open(Listening),
    /// Bound without a listener: clients are refused, and no other process can bind it.
    Held(TcpSocket),
    /// Released.
    Closed,
}

#[derive(Debug)]
struct Listening {
    /// Dropping it cancels, too.
    stop: tokio_util::sync::DropGuard,
    accepting: JoinHandle<()>,
    conversations: TaskTracker,
}

impl Sink {
    /// Starts a sink.
    ///
    /// # Errors
    /// The address is not a loopback address, or in use.
    pub async fn start(options: Options) -> Result<Self, SinkError> {
        let address = options.listen;
        if !address.ip().is_loopback() {
            return Err(SinkError::NotLoopback(address));
        }
        let listener = bind(address)
            .and_then(|socket| socket.listen(BACKLOG))
            .map_err(|source| SinkError::Listen { address, source })?;
        // The actual port, if the configured one is 0.
        let address = listener.local_addr().map_err(|source| SinkError::Listen { address, source })?;
        let shared = Arc::new(Shared {
            mailbox: Arc::new(Mailbox::new(options.keep)),
            options,
            rule: RwLock::default(),
            connections: Connections::default(),
        });
        let port = Mutex::new(Port::Open(Listening::start(listener, &shared)));
        Ok(Self { address, shared, port })
    }

    /// The address it listens on.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The received mail, for example for [`serve_page`].
    #[must_use]
    pub fn mailbox(&self) -> &Arc<Mailbox> {
        &self.shared.mailbox
    }

    /// Distinct pairs of recipient and `Message-ID`.
    #[must_use]
    pub fn received(&self) -> u64 {
        self.shared.mailbox.counts().received
    }

    /// Pairs received more than once.
    #[must_use]
    pub fn received_twice(&self) -> u64 {
        self.shared.mailbox.counts().received_twice
    }

    /// Deliveries per second between the first and the last.
    #[must_use]
    pub fn rate(&self) -> Option<f64> {
        self.shared.mailbox.counts().rate
    }

    /// Open connections.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.shared.connections.open.load(Ordering::Relaxed)
    }

    /// The most connections open at the same time.
    #[must_use]
    pub fn most_connections(&self) -> usize {
        self.shared.connections.most.load(Ordering::Relaxed)
    }

    /// Applies `rule` from now on, also to open connections. Without a rule, everything is accepted.
    pub fn set_rule(&self, rule: impl Into<Option<Rule>>) {
        *self.shared.rule.write().unwrap_or_else(PoisonError::into_inner) = rule.into();
    }

    /// Down: closes all connections and refuses new ones. Up: accepts again on the same port. Complete when this returns.
    ///
    /// # Errors
    /// Another process has taken the port meanwhile.
    pub async fn set_down(&self, down: bool) -> io::Result<()> {
        let mut port = self.port.lock().await;
        *port = match (std::mem::replace(&mut *port, Port::Closed), down) {
            (Port::Open(listening), true) => {
                listening.stop().await;
                Port::Held(bind(self.address)?)
            }
            (Port::Held(socket), false) => Port::Open(Listening::start(socket.listen(BACKLOG)?, &self.shared)),
            (unchanged, _) => unchanged,
        };
        Ok(())
    }

    /// Closes all connections and releases the port. The received mail stays available.
    pub async fn stop(&self) {
        let mut port = self.port.lock().await;
        if let Port::Open(listening) = std::mem::replace(&mut *port, Port::Closed) {
            listening.stop().await;
        }
    }
}

/// A socket bound to this address, not yet listening.
fn bind(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // Connections of an earlier listener may still be closing.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    Ok(socket)
}

impl Listening {
    fn start(listener: TcpListener, shared: &Arc<Shared>) -> Self {
        let stop = CancellationToken::new();
        let conversations = TaskTracker::new();
        let accepting = tokio::spawn(accept(listener, Arc::clone(shared), stop.clone(), conversations.clone()));
        Self { stop: stop.drop_guard(), accepting, conversations }
    }

    async fn stop(self) {
        drop(self.stop);
        // It fails only by a panic, which has been reported.
        let _ = self.accepting.await;
        self.conversations.close();
        self.conversations.wait().await;
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>, stop: CancellationToken, conversations: TaskTracker) {
    while let Some(accepted) = stop.run_until_cancelled(listener.accept()).await {
        match accepted {
            Ok((stream, peer)) => {
                let conversation = smtp::serve(stream, peer, OpenConnection::new(Arc::clone(&shared)));
                conversations.spawn(stop.clone().run_until_cancelled_owned(conversation));
            }
            Err(error) => {
                tracing::warn!(%error, "accepting a mail client failed");
                sleep(PAUSE).await;
            }
        }
    }
}

/// Counted as open until either side closes it.
struct OpenConnection {
    shared: Arc<Shared>,
    number: u64,
    ended: AtomicBool,
}

impl OpenConnection {
    fn new(shared: Arc<Shared>) -> Self {
        let connections = &shared.connections;
        let open = connections.open.fetch_add(1, Ordering::Relaxed) + 1;
        connections.most.fetch_max(open, Ordering::Relaxed);
        let number = connections.ever.fetch_add(1, Ordering::Relaxed) + 1;
        Self { shared, number, ended: AtomicBool::new(false) }
    }

    fn ends(&self) {
        if !self.ended.swap(true, Ordering::Relaxed) {
            self.shared.connections.open.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.ends();
    }
}

impl Shared {
    /// The rule's action, if there is a rule.
    fn action(&self, stage: Stage<'_>, session: &Session) -> Action {
        // Not called under the lock, because it may set another rule.
        let rule = self.rule.read().unwrap_or_else(PoisonError::into_inner).clone();
        rule.map_or(Action::GoOn, |rule| rule(stage, session))
    }
}
