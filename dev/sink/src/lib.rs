//! A mail sink: an SMTP server on this machine that accepts mail, delivers none, and shows what arrived.
//!
//! For development, where it stands in for a mail server, and for tests, where it can also be told to misbehave.

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
    mailbox::{Figures, Mailbox, Message},
    page::serve as serve_page,
    rate_meter::{Kept, RateMeter},
    rule::{Action, Rule, Session, Stage},
};

/// Clients that connect at the same time wait here until they are accepted.
const BACKLOG: u32 = 1024;
/// After an error of the listening socket, mostly too many open files.
const PAUSE: Duration = Duration::from_millis(100);

/// How a sink is to be.
#[derive(Clone, Debug)]
pub struct Options {
    /// A loopback address; with port 0 any free port.
    pub listen: SocketAddr,
    /// It answers the end of a message's data after so long.
    pub latency: Duration,
    /// Encrypts.
    pub tls: Option<Tls>,
    /// Only who logs in with this may send. Without, any login will do, and so will none.
    pub login: Option<Login>,
    /// So many of the newest messages are kept to be looked at; 0: none.
    pub keep: usize,
    /// The largest message it takes, in bytes.
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
    /// Encrypts with this certificate, when the client asks for it with STARTTLS.
    ///
    /// # Errors
    /// When the key is not that of the certificate.
    pub fn new(chain: Vec<CertificateDer<'static>>, key: PrivateKeyDer<'static>) -> Result<Self, rustls::Error> {
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(chain, key)?;
        Ok(Self { acceptor: Arc::new(config).into(), implicit: false })
    }

    /// Encrypts from the first byte, as on port 465.
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

/// Why a sink can't be started.
#[derive(Debug, thiserror::Error)]
pub enum SinkError {
    /// It would take mail from the network, from anybody.
    #[error("{0} can be reached from other machines, and a mail sink takes what anybody sends: use 127.0.0.1 or [::1]")]
    NotLoopback(SocketAddr),
    /// The port is taken.
    #[error("can't listen on {address}: {source}; stop what is using it, or name another port")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system says.
        source: io::Error,
    },
}

/// A running sink. It ends when this is dropped; [`Sink::stop`] also waits for that.
#[derive(Debug)]
pub struct Sink {
    address: SocketAddr,
    shared: Arc<Shared>,
    port: Mutex<Port>,
}

/// What all conversations use.
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
    /// Clients are accepted.
    Open(Listening),
    /// The port is bound, and nobody listens: clients are refused, and nobody else can take it.
    Held(TcpSocket),
    /// Given back.
    Closed,
}

#[derive(Debug)]
struct Listening {
    /// Cancelled when it is dropped, too.
    stop: tokio_util::sync::DropGuard,
    accepting: JoinHandle<()>,
    conversations: TaskTracker,
}

impl Sink {
    /// Starts one.
    ///
    /// # Errors
    /// When the address is not of this machine alone, or taken.
    pub async fn start(options: Options) -> Result<Self, SinkError> {
        let address = options.listen;
        if !address.ip().is_loopback() {
            return Err(SinkError::NotLoopback(address));
        }
        let listener = bind(address)
            .and_then(|socket| socket.listen(BACKLOG))
            .map_err(|source| SinkError::Listen { address, source })?;
        // Port 0 is only known by now.
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

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What has arrived, for instance for [`serve_page`].
    #[must_use]
    pub fn mailbox(&self) -> &Arc<Mailbox> {
        &self.shared.mailbox
    }

    /// Different pairs of recipient and `Message-ID` that have arrived.
    #[must_use]
    pub fn received(&self) -> u64 {
        self.shared.mailbox.figures().received
    }

    /// Those that have arrived more than once.
    #[must_use]
    pub fn received_twice(&self) -> u64 {
        self.shared.mailbox.figures().received_twice
    }

    /// Deliveries a second between the first and the last.
    #[must_use]
    pub fn rate(&self) -> Option<f64> {
        self.shared.mailbox.figures().rate
    }

    /// Connections that are open.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.shared.connections.open.load(Ordering::Relaxed)
    }

    /// The most connections that were open at the same time.
    #[must_use]
    pub fn most_connections(&self) -> usize {
        self.shared.connections.most.load(Ordering::Relaxed)
    }

    /// Asks `rule` from now on, in open conversations too. Without one, everything is accepted.
    pub fn set_rule(&self, rule: impl Into<Option<Rule>>) {
        *self.shared.rule.write().unwrap_or_else(PoisonError::into_inner) = rule.into();
    }

    /// Down: cuts all connections and refuses new ones. Up: accepts again, on the same port. When this returns, it is so.
    ///
    /// # Errors
    /// When the port was taken by somebody else meanwhile.
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

    /// Cuts all connections, and gives the port back. What has arrived can still be looked at.
    pub async fn stop(&self) {
        let mut port = self.port.lock().await;
        if let Port::Open(listening) = std::mem::replace(&mut *port, Port::Closed) {
            listening.stop().await;
        }
    }
}

/// A socket with this address, on which nobody listens yet.
fn bind(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // The connections of a listener before may still be closing.
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
        // It ends badly only by a panic, and that has been reported.
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
                tracing::warn!(%error, "a mail client can't be accepted");
                sleep(PAUSE).await;
            }
        }
    }
}

/// Counted as open until one of both says goodbye, or it is cut.
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
    /// What the rule says, if there is one.
    fn action(&self, stage: Stage<'_>, session: &Session) -> Action {
        // Not called under the lock: it may set another rule.
        let rule = self.rule.read().unwrap_or_else(PoisonError::into_inner).clone();
        rule.map_or(Action::GoOn, |rule| rule(stage, session))
    }
}
