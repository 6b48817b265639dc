//! Opens a TCP connection to a relay. Its addresses are raced, each with its own time limit (RFC 8305).

use std::{collections::VecDeque, io, net::SocketAddr, time::Duration};

use futures::{StreamExt as _, stream::FuturesUnordered};
use tokio::{
    net::{TcpStream, lookup_host},
    time::{sleep, timeout},
};

/// The next address is tried when the previous one has not answered within this time.
const STAGGER: Duration = Duration::from_millis(250);

/// The addresses of a host, alternating between IPv6 and IPv4.
///
/// # Errors
/// If there are none.
pub async fn addresses(host: &str, port: u16, limit: Duration) -> io::Result<VecDeque<SocketAddr>> {
    let found = timeout(limit, lookup_host((host, port))).await.unwrap_or(Err(io::ErrorKind::TimedOut.into()))?;
    let (six, four): (Vec<_>, Vec<_>) = found.partition(SocketAddr::is_ipv6);
    let addresses = in_turn(six, four);
    if addresses.is_empty() {
        return Err(io::Error::new(io::ErrorKind::NotFound, "the host has no address"));
    }
    Ok(addresses)
}

fn in_turn<T>(first: Vec<T>, second: Vec<T>) -> VecDeque<T> {
    let (mut first, mut second) = (first.into_iter(), second.into_iter());
    let mut all = VecDeque::new();
    loop {
        let before = all.len();
        all.extend(first.next());
        all.extend(second.next());
        if all.len() == before {
            return all;
        }
    }
}

/// Connects to the address that answers first. Removes it from `addresses`, and those that refused. `limit` applies to each.
///
/// # Errors
/// The last error, if no address answers.
pub async fn connect(addresses: &mut VecDeque<SocketAddr>, limit: Duration) -> io::Result<TcpStream> {
    let mut waiting = addresses.clone();
    let mut under_way = FuturesUnordered::new();
    let mut last = io::Error::from(io::ErrorKind::TimedOut);
    loop {
        if let Some(address) = waiting.pop_front() {
            under_way.push(async move {
                let connected = timeout(limit, TcpStream::connect(address)).await;
                (address, connected.unwrap_or(Err(io::ErrorKind::TimedOut.into())))
            });
        }
        tokio::select! {
            ended = under_way.next() => match ended {
                Some((address, Ok(stream))) => {
                    addresses.retain(|known| *known != address);
                    return Ok(stream);
                }
                Some((address, Err(error))) => {
                    addresses.retain(|known| *known != address);
                    last = error;
                }
                None => return Err(last),
            },
            () = sleep(STAGGER), if !waiting.is_empty() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[test]
    fn address_families_alternate() {
        assert_eq!(in_turn(vec![1, 2, 3], vec![4]), [1, 4, 2, 3]);
        assert_eq!(in_turn(vec![], vec![4, 5]), [4, 5]);
    }

    #[tokio::test]
    async fn a_silent_or_refusing_address_does_not_hide_the_next_one() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let there = listener.local_addr().unwrap();
        // Its backlog is full, so new connections get no answer.
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let silent = socket.local_addr().unwrap();
        let _full = socket.listen(1).unwrap();
        let mut held = Vec::new();
        while let Ok(Ok(stream)) = timeout(Duration::from_millis(300), TcpStream::connect(silent)).await {
            held.push(stream);
        }
        let vacant = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let limit = Duration::from_secs(60);
        let mut addresses = VecDeque::from([silent, vacant, there]);
        let stream = connect(&mut addresses, limit).await.unwrap();
        assert_eq!(stream.peer_addr().unwrap(), there);
        assert_eq!(addresses, [silent], "those that answered are not tried again");
        assert!(connect(&mut VecDeque::from([vacant]), limit).await.is_err());
        assert!(connect(&mut VecDeque::new(), limit).await.is_err());
    }
}
