//! The network between our processes and one server: a TCP proxy that can cut, delay, hold, drop and filter traffic.

use std::{
    collections::VecDeque,
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    sync::watch,
    time::{Instant, sleep, sleep_until},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// Maximum bytes forwarded at once.
const CHUNK: usize = 64 * 1024;
/// Maximum chunks on their way in one direction of a connection.
const CHUNKS: usize = 256;
/// Pause after an error of the listening socket, usually too many open files.
const PAUSE: Duration = Duration::from_millis(100);

/// Filters the bytes that a server sends over one connection: gets each chunk, and returns the bytes to forward.
pub type Filter = Box<dyn FnMut(&[u8]) -> Vec<u8> + Send>;

/// Creates the filter of each connection.
type NewFilter = Arc<dyn Fn() -> Option<Filter> + Send + Sync>;

/// The state of the network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Network {
    /// How often all connections were cut.
    cuts: u32,
    /// The delay each way.
    delay: Duration,
    /// How many holes were opened so far.
    holes: u32,
    /// How many are open.
    open_holes: u32,
    /// Whether bytes are held.
    is_held: bool,
    /// Whether the server seems to be down.
    is_down: bool,
}

/// A proxy in front of one server.
pub struct Proxy {
    address: SocketAddr,
    network: watch::Sender<Network>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Proxy {
    /// Starts a proxy in front of `server`.
    pub async fn start(server: SocketAddr) -> io::Result<Self> {
        Self::new(server, Arc::new(|| None)).await
    }

    /// The same, with a filter for each connection.
    pub async fn filtered(
        server: SocketAddr,
        new_filter: impl Fn() -> Filter + Send + Sync + 'static,
    ) -> io::Result<Self> {
        Self::new(server, Arc::new(move || Some(new_filter()))).await
    }

    async fn new(server: SocketAddr, new_filter: NewFilter) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let (network, now) = watch::channel(Network::default());
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let accepting = accept(listener, server, new_filter, now, tasks.clone(), stop.clone());
        tasks.spawn(stop.clone().run_until_cancelled_owned(accepting));
        Ok(Self { address, network, tasks, stop })
    }

    /// The address at which clients reach the server.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Cuts all connections: both ends are notified, as by a machine that has just restarted.
    pub fn cut(&self) {
        self.network.send_modify(|network| network.cuts += 1);
    }

    /// Whether the server seems to be down: all connections are cut, and new ones closed at once.
    pub fn set_down(&self, down: bool) {
        self.network.send_modify(|network| {
            network.cuts += u32::from(down);
            network.is_down = down;
        });
    }

    /// Delays bytes that arrive during `time` by `delay`; later bytes wait behind them.
    pub async fn slow(&self, delay: Duration, time: Duration) {
        self.network.send_modify(|network| network.delay += delay);
        sleep(time).await;
        self.network.send_modify(|network| network.delay -= delay);
    }

    /// Delays all bytes from now on by this time each way, like a distant server.
    pub fn delay(&self, each_way: Duration) {
        self.network.send_modify(|network| network.delay = each_way);
    }

    /// Drops all bytes for this time without notice. Existing connections stay dead, and look open from both ends.
    pub async fn hole(&self, time: Duration) {
        self.network
            .send_modify(|network| (network.holes, network.open_holes) = (network.holes + 1, network.open_holes + 1));
        sleep(time).await;
        self.network.send_modify(|network| network.open_holes -= 1);
    }

    /// Holds all bytes until [`Self::release`].
    pub fn hold(&self) {
        self.network.send_modify(|network| network.is_held = true);
    }

    /// Forwards the held bytes.
    pub fn release(&self) {
        self.network.send_modify(|network| network.is_held = false);
    }

    /// Whether bytes are held.
    pub fn is_held(&self) -> bool {
        self.network.borrow().is_held
    }

    /// Stops the proxy and its connections.
    pub async fn stop(self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}

async fn accept(
    listener: TcpListener,
    server: SocketAddr,
    new_filter: NewFilter,
    network: watch::Receiver<Network>,
    tasks: TaskTracker,
    stop: CancellationToken,
) {
    loop {
        match listener.accept().await {
            Ok((client, _)) => {
                let serving = serve(client, server, new_filter(), network.clone());
                tasks.spawn(stop.clone().run_until_cancelled_owned(serving));
            }
            Err(_) => sleep(PAUSE).await,
        }
    }
}

/// Forwards one connection until both ends have closed it, or it is cut.
async fn serve(
    mut client: TcpStream,
    server: SocketAddr,
    filter: Option<Filter>,
    mut network: watch::Receiver<Network>,
) {
    let born = *network.borrow_and_update();
    if born.is_down {
        return;
    }
    if born.open_holes > 0 {
        return swallow(&mut client).await;
    }
    // The server does not listen: the client's connection is closed.
    let Ok(mut server) = TcpStream::connect(server).await else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let was_cut = {
        let ((from_client, to_client), (from_server, to_server)) = (client.split(), server.split());
        let carried = futures::future::join(
            forward(from_client, to_server, None, network.clone(), born),
            forward(from_server, to_client, filter, network.clone(), born),
        );
        tokio::select! {
            _ = carried => false,
            cut = network.wait_for(|network| network.cuts != born.cuts) => cut.is_ok(),
        }
    };
    if was_cut {
        // Both ends get a reset.
        let _ = (client.set_zero_linger(), server.set_zero_linger());
    }
}

/// Forwards one direction. Also forwards its end, except on a connection that was in a hole.
async fn forward(
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    mut filter: Option<Filter>,
    mut network: watch::Receiver<Network>,
    born: Network,
) {
    let mut chunk = vec![0; CHUNK];
    // Delayed bytes, with the moment when they arrive.
    let mut on_their_way: VecDeque<(Instant, Vec<u8>)> = VecDeque::new();
    let now = network.clone();
    let is_dead = || now.borrow().holes != born.holes;
    let mut is_open = true;
    while is_open || !on_their_way.is_empty() {
        if let Some((_, bytes)) = on_their_way.pop_front_if(|(due, _)| *due <= Instant::now()) {
            if network.wait_for(|network| !network.is_held).await.is_err() {
                return;
            }
            let filtered = filter.as_mut().map(|filter| filter(&bytes));
            if !is_dead() && to.write_all(filtered.as_deref().unwrap_or(&bytes)).await.is_err() {
                return;
            }
            continue;
        }
        let due = on_their_way.front().map(|(due, _)| *due);
        tokio::select! {
            // An error also ends it.
            read = from.read(&mut chunk), if is_open && on_their_way.len() < CHUNKS => match read {
                Ok(length @ 1..) => {
                    let arrives = Instant::now() + now.borrow().delay;
                    // Never before what was sent earlier.
                    let last = on_their_way.back().map_or(arrives, |(due, _)| *due);
                    on_their_way.push_back((arrives.max(last), chunk[..length].to_vec()));
                }
                _ => is_open = false,
            },
            () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
        }
    }
    if !is_dead() {
        let _ = to.shutdown().await;
    }
}

/// Reads and discards until the other end closes.
async fn swallow(client: &mut TcpStream) {
    let mut chunk = vec![0; CHUNK];
    while let Ok(1..) = client.read(&mut chunk).await {}
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An echo server.
    async fn echo() -> SocketAddr {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut from, mut to) = client.split();
                    tokio::io::copy(&mut from, &mut to).await
                });
            }
        });
        address
    }

    async fn answers(client: &mut TcpStream) -> bool {
        client.write_all(b"hello").await.unwrap();
        let mut answer = [0; 5];
        client.read_exact(&mut answer).await.is_ok_and(|_| &answer == b"hello")
    }

    #[tokio::test]
    async fn forwards_connections_until_they_are_cut() {
        let proxy = Proxy::start(echo().await).await.unwrap();
        let mut client = TcpStream::connect(proxy.address()).await.unwrap();
        assert!(answers(&mut client).await);
        proxy.cut();
        assert_eq!(client.read(&mut [0]).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        let mut next = TcpStream::connect(proxy.address()).await.unwrap();
        assert!(answers(&mut next).await);
        proxy.stop().await;
        assert!(!matches!(next.read(&mut [0]).await, Ok(1..)));
    }

    #[tokio::test]
    async fn a_filter_keeps_its_state_for_each_connection() {
        let new_filter = || -> Filter {
            let mut number = 0;
            Box::new(move |bytes| {
                number += 1;
                [bytes, &[number]].concat()
            })
        };
        let proxy = Proxy::filtered(echo().await, new_filter).await.unwrap();
        for _ in 0..2 {
            let mut client = TcpStream::connect(proxy.address()).await.unwrap();
            for number in 1..3 {
                client.write_all(b"a").await.unwrap();
                let mut answer = [0; 2];
                client.read_exact(&mut answer).await.unwrap();
                assert_eq!(answer, [b'a', number]);
            }
        }
        proxy.stop().await;
    }

    #[tokio::test]
    async fn delayed_bytes_take_their_time_each_way_and_keep_their_order() {
        let proxy = Proxy::start(echo().await).await.unwrap();
        let delay = Duration::from_millis(30);
        proxy.delay(delay);
        let mut client = TcpStream::connect(proxy.address()).await.unwrap();
        let begun = Instant::now();
        for number in 0..50 {
            client.write_all(&[number]).await.unwrap();
            tokio::task::yield_now().await;
        }
        let mut answer = [0; 50];
        client.read_exact(&mut answer).await.unwrap();
        assert!(begun.elapsed() >= 2 * delay);
        assert!(answer.iter().copied().eq(0..50));
        proxy.stop().await;
    }

    #[tokio::test]
    async fn held_bytes_arrive_after_the_release() {
        let proxy = Proxy::start(echo().await).await.unwrap();
        let mut client = TcpStream::connect(proxy.address()).await.unwrap();
        assert!(answers(&mut client).await);
        proxy.hold();
        let mut answer = Box::pin(answers(&mut client));
        assert!(tokio::time::timeout(Duration::from_millis(50), &mut answer).await.is_err());
        proxy.release();
        assert!(answer.await);
        proxy.stop().await;
    }

    #[tokio::test]
    async fn a_hole_drops_old_and_new_connections_and_then_forwards_again() {
        let proxy = Proxy::start(echo().await).await.unwrap();
        let mut old = TcpStream::connect(proxy.address()).await.unwrap();
        assert!(answers(&mut old).await);
        let mut hole = Box::pin(proxy.hole(Duration::ZERO));
        // It opens with the first poll, and closes with the next one.
        assert!(futures::poll!(&mut hole).is_pending());
        let mut new = TcpStream::connect(proxy.address()).await.unwrap();
        new.write_all(b"hello").await.unwrap();
        // Nothing reports that the connection was accepted; it precedes the next one, which is served when the hole is closed.
        tokio::task::yield_now().await;
        hole.await;
        let mut later = TcpStream::connect(proxy.address()).await.unwrap();
        assert!(answers(&mut later).await);
        old.write_all(b"hello").await.unwrap();
        old.shutdown().await.unwrap();
        let mut answer = [0; 1];
        let silent = tokio::time::timeout(Duration::from_millis(100), old.read(&mut answer)).await;
        assert!(silent.is_err(), "not even the end is forwarded");
        proxy.stop().await;
    }
}
