//! Buffered I/O of one connection.

use std::{io, ops::Range, slice::Iter, time::Duration};

use smtp_proto::{Error, Request, request::receiver::RequestReceiver};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    time::timeout,
};

/// How long a client may be idle (RFC 5321, 4.5.3.2.7).
pub(super) const IDLE: Duration = Duration::from_secs(300);
const BUFFER: usize = 16 << 10;

/// Why a session has ended.
pub(super) enum End {
    /// The client has disconnected, or the connection failed.
    Gone(io::Error),
    /// Closed normally, after sending pending replies.
    Closed,
    /// Closed without a reply.
    Dropped,
    /// Continues with TLS.
    Encrypt,
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> Self {
        Self::Gone(error)
    }
}

/// A connection with unread input and unsent output.
pub(super) struct Wire<S> {
    pub(super) stream: S,
    buffer: Box<[u8]>,
    /// The part of the buffer that was not parsed yet.
    unused: Range<usize>,
    requests: RequestReceiver,
    replies: Vec<u8>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Wire<S> {
    pub(super) fn new(stream: S) -> Self {
        let buffer = vec![0; BUFFER].into();
        Self { stream, buffer, unused: 0..0, requests: RequestReceiver::default(), replies: Vec::new() }
    }

    /// Consumes some of the input.
    pub(super) fn take<T>(&mut self, using: impl FnOnce(&mut Iter<'_, u8>) -> T) -> T {
        let mut bytes = self.buffer[self.unused.clone()].iter();
        let taken = using(&mut bytes);
        self.unused.start = self.unused.end - bytes.len();
        taken
    }

    /// The next request, if it is complete.
    pub(super) fn request(&mut self) -> Result<Request<String>, Error> {
        let mut bytes = self.buffer[self.unused.clone()].iter();
        let request = self.requests.ingest(&mut bytes).map(Request::into_owned);
        self.unused.start = self.unused.end - bytes.len();
        request
    }

    /// Reads more when all input was consumed. Sends replies first, so that those to pipelined requests go out together.
    pub(super) async fn fill(&mut self) -> Result<(), End> {
        self.flush().await?;
        let Ok(read) = timeout(IDLE, self.stream.read(&mut self.buffer)).await else {
            self.reply(421, "4.4.2 Idle timeout");
            return Err(End::Closed);
        };
        match read? {
            0 => Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            read => {
                self.unused = 0..read;
                Ok(())
            }
        }
    }

    /// Queues a reply with as many lines as the text has.
    pub(super) fn reply(&mut self, code: u16, text: &str) {
        let mut lines = text.lines().peekable();
        loop {
            let line = lines.next().unwrap_or_default();
            let separator = if lines.peek().is_some() { '-' } else { ' ' };
            self.replies.extend_from_slice(format!("{code}{separator}{line}\r\n").as_bytes());
            if separator == ' ' {
                return;
            }
        }
    }

    pub(super) async fn flush(&mut self) -> io::Result<()> {
        if !self.replies.is_empty() {
            self.stream.write_all(&self.replies).await?;
            self.stream.flush().await?;
            self.replies.clear();
        }
        Ok(())
    }

    /// Never replies, until the client disconnects.
    pub(super) async fn hang(&mut self) -> End {
        if let Err(error) = self.flush().await {
            return error.into();
        }
        loop {
            match self.stream.read(&mut self.buffer).await {
                Ok(0) => return End::Dropped,
                Ok(_) => {}
                Err(error) => return error.into(),
            }
        }
    }
}
