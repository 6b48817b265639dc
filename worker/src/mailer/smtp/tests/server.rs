//! A mail server that follows a script for each connection and records what it received.
//!
//! The mail sink is no substitute. It follows the protocol; these tests need servers whose replies are cut off, doubled, injected
//! before STARTTLS, or never sent.

use std::{
    fmt,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
    sync::watch,
};
use tokio_rustls::{TlsAcceptor, rustls::HandshakeKind};

use super::super::dialogue::Stream;

/// One step of a script.
#[derive(Clone)]
pub enum Step {
    /// Sends a line.
    Say(&'static str),
    /// Waits for a line with this beginning, then sends another.
    Expect(&'static str, &'static str),
    /// Reads a message to its end, then sends a line.
    Content(&'static str),
    /// Reads a message to its end, then closes the connection.
    ContentAndDrop,
    /// Waits for BDAT, reads that many bytes, then sends a line.
    Chunk(&'static str),
    /// Reads any line or message to its end, then closes the connection.
    Drop,
    /// Sends nothing more and keeps the connection open.
    Hang,
    /// Waits until this many connections were opened, so that none ends before the others exist.
    Gather(usize),
    /// Starts TLS.
    Encrypt(TlsAcceptor),
    /// Repeats the steps since the last `Loop`: one mail after the other.
    Loop,
}

impl fmt::Debug for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Say(line) => write!(f, "say {line:?}"),
            Self::Expect(beginning, answer) => write!(f, "{beginning}: {answer:?}"),
            Self::Content(answer) => write!(f, "message: {answer:?}"),
            Self::ContentAndDrop => f.write_str("message: drop"),
            Self::Chunk(answer) => write!(f, "BDAT: {answer:?}"),
            Self::Drop => f.write_str("drop"),
            Self::Hang => f.write_str("hang"),
            Self::Gather(count) => write!(f, "gather {count}"),
            Self::Encrypt(_) => f.write_str("encrypt"),
            Self::Loop => f.write_str("loop"),
        }
    }
}

/// The server and its record.
#[derive(Clone)]
pub struct Server {
    pub port: u16,
    heard: Arc<Mutex<Vec<String>>>,
    taken: Arc<Mutex<Vec<String>>>,
    turns: Arc<AtomicUsize>,
    resumed: Arc<AtomicUsize>,
    connections: watch::Sender<usize>,
    open: Arc<AtomicUsize>,
    most_open: Arc<AtomicUsize>,
}

impl Server {
    /// Follows one script per connection; the last script also serves all later connections.
    pub async fn start(scripts: Vec<Vec<Step>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = Self {
            port: listener.local_addr().unwrap().port(),
            heard: Arc::default(),
            taken: Arc::default(),
            turns: Arc::default(),
            resumed: Arc::default(),
            connections: watch::Sender::new(0),
            open: Arc::default(),
            most_open: Arc::default(),
        };
        let this = server.clone();
        tokio::spawn(async move {
            for number in 0.. {
                let Ok((stream, _)) = listener.accept().await else { return };
                let script = scripts.get(number).or(scripts.last()).unwrap().clone();
                let open = this.open.fetch_add(1, Ordering::SeqCst) + 1;
                this.most_open.fetch_max(open, Ordering::SeqCst);
                this.connections.send_modify(|connections| *connections += 1);
                let this = this.clone();
                tokio::spawn(async move {
                    this.follow(stream, script).await;
                    this.open.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        server
    }

    /// All lines received on all connections, without the messages.
    pub fn heard(&self) -> Vec<String> {
        self.heard.lock().unwrap().clone()
    }

    /// How many received lines have this beginning.
    pub fn count(&self, beginning: &str) -> usize {
        self.heard().iter().filter(|line| line.starts_with(beginning)).count()
    }

    /// The recipients whose messages were read to their ends and not refused.
    pub fn taken(&self) -> Vec<String> {
        self.taken.lock().unwrap().clone()
    }

    /// How often the server had to wait for the client, on all connections together: the client's round trips.
    pub fn turns(&self) -> usize {
        self.turns.load(Ordering::SeqCst)
    }

    /// How many connections resumed the TLS session of an earlier one.
    pub fn resumed(&self) -> usize {
        self.resumed.load(Ordering::SeqCst)
    }

    /// How many connections were opened.
    pub fn connections(&self) -> usize {
        *self.connections.borrow()
    }

    /// The largest number of connections open at the same time.
    pub fn most_open(&self) -> usize {
        self.most_open.load(Ordering::SeqCst)
    }

    async fn follow(&self, stream: TcpStream, script: Vec<Step>) {
        let mut stream: BufReader<Box<dyn Stream>> = BufReader::new(Box::new(stream));
        let (mut next, mut begin) = (0, 0);
        while let Some(step) = script.get(next) {
            next += 1;
            match step.clone() {
                Step::Say(line) => self.say(&mut stream, line).await,
                Step::Expect(beginning, answer) => {
                    let Some(line) = self.read(&mut stream).await else { return };
                    if line.starts_with("QUIT") {
                        return self.say(&mut stream, "221 bye").await;
                    }
                    if line.starts_with("RSET") && !beginning.starts_with("RSET") {
                        self.say(&mut stream, "250 forgotten").await;
                        next -= 1;
                        continue;
                    }
                    if !line.starts_with(beginning) {
                        return self.say(&mut stream, "500 not what the script says").await;
                    }
                    self.say(&mut stream, answer).await;
                }
                Step::Content(answer) => {
                    if !self.read_message(&mut stream).await {
                        return;
                    }
                    self.take(answer);
                    self.say(&mut stream, answer).await;
                }
                Step::ContentAndDrop => {
                    if self.read_message(&mut stream).await {
                        self.take("2");
                    }
                    return;
                }
                Step::Chunk(answer) => {
                    let Some(line) = self.read(&mut stream).await else { return };
                    let Some(size) = line.strip_prefix("BDAT ").and_then(|rest| rest.strip_suffix(" LAST")) else {
                        return self.say(&mut stream, "500 not what the script says").await;
                    };
                    if stream.read_exact(&mut vec![0; size.parse().unwrap()]).await.is_err() {
                        return;
                    }
                    self.take(answer);
                    self.say(&mut stream, answer).await;
                }
                Step::Drop => {
                    self.read(&mut stream).await;
                    return;
                }
                Step::Hang => std::future::pending().await,
                Step::Gather(count) => {
                    let _ = self.connections.subscribe().wait_for(|connections| *connections >= count).await;
                }
                Step::Encrypt(acceptor) => {
                    let Ok(encrypted) = acceptor.accept(stream.into_inner()).await else { return };
                    let is_resumed = encrypted.get_ref().1.handshake_kind() == Some(HandshakeKind::Resumed);
                    self.resumed.fetch_add(usize::from(is_resumed), Ordering::SeqCst);
                    stream = BufReader::new(Box::new(encrypted));
                }
                Step::Loop => {
                    let again = begin;
                    begin = next;
                    if again > 0 {
                        (next, begin) = (again, again);
                    }
                }
            }
        }
    }

    async fn read_message(&self, stream: &mut BufReader<Box<dyn Stream>>) -> bool {
        loop {
            let mut line = String::new();
            self.wait(stream).await;
            if stream.read_line(&mut line).await.unwrap_or(0) == 0 {
                return false;
            }
            if line == ".\r\n" {
                return true;
            }
        }
    }

    /// Records the last recipient, unless its message is refused.
    fn take(&self, answer: &str) {
        let recipient =
            self.heard().into_iter().rev().find_map(|line| Some(line.strip_prefix("RCPT TO:<")?.to_owned()));
        if answer.starts_with('2') {
            self.taken.lock().unwrap().extend(recipient.map(|recipient| recipient.trim_end_matches('>').to_owned()));
        }
    }

    async fn wait(&self, stream: &mut BufReader<Box<dyn Stream>>) {
        if stream.buffer().is_empty() {
            let _ = stream.fill_buf().await;
            self.turns.fetch_add(1, Ordering::SeqCst);
        }
    }

    async fn read(&self, stream: &mut BufReader<Box<dyn Stream>>) -> Option<String> {
        let mut line = String::new();
        self.wait(stream).await;
        if stream.read_line(&mut line).await.unwrap_or(0) == 0 {
            return None;
        }
        let line = line.trim_end().to_owned();
        self.heard.lock().unwrap().push(line.clone());
        Some(line)
    }

    async fn say(&self, stream: &mut BufReader<Box<dyn Stream>>, line: &str) {
        let _ = stream.get_mut().write_all(format!("{line}\r\n").as_bytes()).await;
        let _ = stream.get_mut().flush().await;
    }
}
