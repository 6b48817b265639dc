//! The client side of an SMTP conversation: send a line, read a reply, each within a time limit.
//!
//! This is our own small implementation because two details matter. After a message was handed over, a reply that is merely
//! odd (a code without text, a line that is not UTF-8) must not leave an invitation `unknown`. And nothing received before
//! STARTTLS may count after it.

use std::time::Duration;

use futures::FutureExt as _;
use memchr::memmem;
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader},
    time::timeout,
};

use super::{
    reply::Reply,
    verdict::{Cause, Failure, Stage},
};

/// A reply line has at most 512 bytes (RFC 5321, 4.5.3.1.5); some servers send longer ones.
const MAX_LINE_BYTES: u64 = 8 * 1024;
/// A reply with more lines is invalid.
const MAX_LINES: usize = 200;

/// A byte stream, encrypted or not.
pub trait Stream: AsyncRead + AsyncWrite + Send + Sync + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Sync + Unpin> Stream for T {}

/// A conversation over one connection.
pub struct Dialogue {
    stream: BufReader<Box<dyn Stream>>,
}

impl Dialogue {
    /// Starts on a connection on which nothing was received yet.
    pub fn new(stream: impl Stream + 'static) -> Self {
        Self { stream: BufReader::new(Box::new(stream)) }
    }

    /// The underlying stream, for the TLS handshake.
    ///
    /// # Errors
    /// If unread bytes are left: they would be mistaken for part of the encrypted conversation.
    pub fn into_stream(self) -> Result<Box<dyn Stream>, Cause> {
        if self.stream.buffer().is_empty() {
            Ok(self.stream.into_inner())
        } else {
            Err(Cause::BadReply("more than one reply".into()))
        }
    }

    /// Whether no unread bytes are left: they would be mistaken for the reply to the next command.
    pub fn is_clean(&self) -> bool {
        self.stream.buffer().is_empty()
    }

    /// What the server sent without being asked. `None`: nothing.
    async fn unsolicited(&mut self) -> Option<Cause> {
        let said = self.stream.fill_buf().now_or_never()?;
        match said {
            Ok([]) => Some(Cause::Lost("the mail server closed the connection".into())),
            Err(error) => Some(Cause::Lost(error.to_string())),
            // A server may announce that it closes the connection at any time (RFC 5321, 3.8).
            Ok(bytes) if bytes.starts_with(b"421") && bytes.contains(&b'\n') => match self.reply().await {
                Ok(reply) => Some(Cause::Refused(reply)),
                Err(cause) => Some(cause),
            },
            Ok(_) => Some(Cause::BadReply("more than one reply".into())),
        }
    }

    /// Sends a command and reads the reply. `line` has no line end, and contains no text that was not checked for one.
    ///
    /// # Errors
    /// If there is no reply within `limit`. A refusal is a reply.
    pub async fn command(&mut self, stage: Stage, line: &str, limit: Duration) -> Result<Reply, Failure> {
        self.quiet(stage).await?;
        self.exchange(stage, format!("{line}\r\n").as_bytes(), limit).await
    }

    /// Reads a reply without sending a command: the greeting, or the reply to a command that was sent together with others.
    ///
    /// # Errors
    /// As for [`Self::command`].
    pub async fn listen(&mut self, stage: Stage, limit: Duration) -> Result<Reply, Failure> {
        self.exchange(stage, &[], limit).await
    }

    /// Sends commands together, or a message in one chunk. The replies are read with [`Self::listen`], one for each command.
    ///
    /// # Errors
    /// If they could not be sent within `limit`; the server may have replied to some of them.
    pub async fn send(&mut self, stage: Stage, bytes: &[u8], limit: Duration) -> Result<(), Failure> {
        self.quiet(Stage::Mail).await?;
        let refusal = self.hand_over(bytes, || limit).await.map_err(|cause| Failure { stage, cause })?;
        refusal.map_or(Ok(()), |reply| Err(Failure { stage, cause: Cause::Refused(reply) }))
    }

    /// Sends a message with its terminator, followed by the commands `next`, and reads the reply to the message. `message` uses
    /// CRLF line ends. `limit` applies to sending, and again to the reply.
    ///
    /// # Errors
    /// As for [`Self::command`].
    pub async fn message(
        &mut self,
        message: &[u8],
        next: &[u8],
        limit: impl Fn() -> Duration,
    ) -> Result<Reply, Failure> {
        // No byte of the message was sent yet.
        self.quiet(Stage::Data).await?;
        let failed = |cause| Failure { stage: Stage::Content, cause };
        let mut bytes = stuffed(message, next.len());
        bytes.extend_from_slice(next);
        if let Some(refusal) = self.hand_over(&bytes, &limit).await.map_err(failed)? {
            return Ok(refusal);
        }
        let answer = limit();
        timeout(answer, self.reply()).await.unwrap_or(Err(Cause::TimedOut(answer))).map_err(failed)
    }

    /// Sends bytes. If that fails, returns the refusal with which the server closed the connection, if any.
    async fn hand_over(&mut self, bytes: &[u8], limit: impl Fn() -> Duration) -> Result<Option<Reply>, Cause> {
        let within = limit();
        let Ok(written) = timeout(within, self.write(bytes)).await else { return Err(Cause::TimedOut(within)) };
        let Err(error) = written else { return Ok(None) };
        match timeout(limit(), self.reply()).await {
            Ok(Ok(reply)) if reply.code >= 400 => Ok(Some(reply)),
            _ => Err(Cause::Lost(error.to_string())),
        }
    }

    /// # Errors
    /// If the server said something without being asked.
    async fn quiet(&mut self, stage: Stage) -> Result<(), Failure> {
        self.unsolicited().await.map_or(Ok(()), |cause| Err(Failure { stage, cause }))
    }

    async fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.stream.write_all(bytes).await?;
        self.stream.flush().await
    }

    async fn exchange(&mut self, stage: Stage, bytes: &[u8], limit: Duration) -> Result<Reply, Failure> {
        let exchange = async {
            match self.write(bytes).await {
                Ok(()) => self.reply().await,
                // A server that closes the connection may have said why first.
                Err(error) => match self.reply().await {
                    Ok(reply) if reply.code >= 400 => Ok(reply),
                    _ => Err(Cause::Lost(error.to_string())),
                },
            }
        };
        let result = timeout(limit, exchange).await.unwrap_or(Err(Cause::TimedOut(limit)));
        result.map_err(|cause| Failure { stage, cause })
    }

    async fn reply(&mut self) -> Result<Reply, Cause> {
        let mut answer: Option<Reply> = None;
        loop {
            let mut bytes = Vec::new();
            let mut limited = (&mut self.stream).take(MAX_LINE_BYTES);
            limited.read_until(b'\n', &mut bytes).await.map_err(|error| Cause::Lost(error.to_string()))?;
            if bytes.is_empty() {
                return Err(Cause::Lost("the mail server closed the connection".into()));
            }
            let text = String::from_utf8_lossy(&bytes);
            let line = text.trim_end_matches(['\r', '\n']);
            let read = Reply::line(line).filter(|_| bytes.ends_with(b"\n"));
            let Some((code, last, text)) = read else { return Err(Cause::BadReply(line.to_owned())) };
            let answer = answer.get_or_insert_with(|| Reply { code, lines: Vec::new() });
            answer.lines.push(text.to_owned());
            if answer.code != code || answer.lines.len() > MAX_LINES {
                return Err(Cause::BadReply(line.to_owned()));
            }
            if last {
                return Ok(answer.clone());
            }
        }
    }
}

/// The message with dot-stuffing and terminator, and room for more: a line with a single dot would end it (RFC 5321, 4.5.2).
fn stuffed(message: &[u8], more: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(message.len() + 64 + more);
    if message.starts_with(b".") {
        out.push(b'.');
    }
    let mut written = 0;
    for dot in memmem::find_iter(message, b"\n.").map(|line_end| line_end + 1) {
        out.extend_from_slice(&message[written..dot]);
        out.push(b'.');
        written = dot;
    }
    out.extend_from_slice(&message[written..]);
    if !message.ends_with(b"\r\n") {
        out.extend_from_slice(b"\r\n");
    }
    out.extend_from_slice(b".\r\n");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(5);

    async fn answer(said: &[u8]) -> Result<Reply, Cause> {
        let (ours, mut theirs) = tokio::io::duplex(64 * 1024);
        theirs.write_all(said).await.unwrap();
        drop(theirs);
        Dialogue::new(ours).listen(Stage::Greeting, LIMIT).await.map_err(|failure| failure.cause)
    }

    #[tokio::test]
    async fn replies_are_read_in_every_form_that_servers_use() {
        let reply = |code, lines: &[&str]| Ok(Reply { code, lines: lines.iter().map(|l| (*l).to_owned()).collect() });
        assert_eq!(answer(b"220 hi\r\n").await, reply(220, &["hi"]));
        assert_eq!(answer(b"250-a\r\n250-b\r\n250 c\r\n").await, reply(250, &["a", "b", "c"]));
        assert_eq!(answer(b"250\r\n").await, reply(250, &[""]));
        assert_eq!(answer(b"250 ok\n").await, reply(250, &["ok"]));
        assert_eq!(answer(b"250 caf\xe9\r\n").await, reply(250, &["caf\u{fffd}"]));
    }

    #[tokio::test]
    async fn malformed_replies_are_rejected() {
        for said in [&b"HTTP/1.1 400\r\n"[..], b"250-a\r\n251 b\r\n", b"250 o", &[b'2'; 9_000]] {
            assert!(matches!(answer(said).await, Err(Cause::BadReply(_))));
        }
        assert!(matches!(answer(&b"250-a\r\n".repeat(300)).await, Err(Cause::BadReply(_))));
        assert!(matches!(answer(b"").await, Err(Cause::Lost(_))));
        assert!(matches!(answer(b"250-a\r\n").await, Err(Cause::Lost(_))));
    }

    #[tokio::test]
    async fn bytes_sent_before_tls_are_detected() {
        let (ours, mut theirs) = tokio::io::duplex(1024);
        theirs.write_all(b"220 go\r\n250 injected\r\n").await.unwrap();
        let mut dialogue = Dialogue::new(ours);
        dialogue.listen(Stage::StartTls, LIMIT).await.unwrap();
        assert!(matches!(dialogue.into_stream(), Err(Cause::BadReply(_))));
    }

    #[tokio::test]
    async fn an_unsolicited_reply_is_not_the_next_reply() {
        let (ours, mut theirs) = tokio::io::duplex(1024);
        theirs.write_all(b"220 hi\r\n250 ahead\r\n").await.unwrap();
        let mut dialogue = Dialogue::new(ours);
        dialogue.listen(Stage::Greeting, LIMIT).await.unwrap();
        assert!(!dialogue.is_clean());
        let failure = dialogue.command(Stage::Mail, "MAIL", LIMIT).await.unwrap_err();
        assert_eq!(failure.cause, Cause::BadReply("more than one reply".into()));
        // Except for 421, which announces that the server closes the connection.
        let (ours, mut theirs) = tokio::io::duplex(1024);
        let mut dialogue = Dialogue::new(ours);
        theirs.write_all(b"421 4.4.2 idle for too long\r\n").await.unwrap();
        let failure = dialogue.command(Stage::Mail, "MAIL", LIMIT).await.unwrap_err();
        assert!(matches!(failure.cause, Cause::Refused(Reply { code: 421, .. })), "{failure}");
    }

    #[tokio::test]
    async fn a_message_is_not_started_after_a_surplus_reply() {
        let (ours, mut theirs) = tokio::io::duplex(1024);
        theirs.write_all(b"354 go\r\n250 taken\r\n").await.unwrap();
        let mut dialogue = Dialogue::new(ours);
        dialogue.listen(Stage::Data, LIMIT).await.unwrap();
        let failure = dialogue.message(b"a", b"", || LIMIT).await.unwrap_err();
        assert_eq!(failure.stage, Stage::Data);
    }

    #[test]
    fn leading_dots_are_doubled() {
        assert_eq!(stuffed(b".\r\n..a\r\nb.\r\n", 0), b"..\r\n...a\r\nb.\r\n.\r\n");
        assert_eq!(stuffed(b"a", 0), b"a\r\n.\r\n");
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_a_reply_or_an_error(said in "([245][0-9]{2}[ -]?[a-z ]{0,9}\r?\n|[\\s\\S]{0,5}){0,8}", cut in 0usize..60) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            let said = said.as_bytes();
            if let Ok(reply) = runtime.block_on(answer(&said[..cut.min(said.len())])) {
                proptest::prop_assert!((200..600).contains(&reply.code) && !reply.lines.is_empty());
            }
        }

        #[test]
        fn no_message_contains_its_terminator(message in "([a\\.]|\r\n){0,40}") {
            let sent = String::from_utf8(stuffed(message.as_bytes(), 0)).unwrap();
            proptest::prop_assert_eq!(sent.find("\r\n.\r\n").unwrap_or(0) + 5, sent.len().max(5));
        }
    }
}
