//! One side of a conversation in SMTP: a line out, an answer in, each within a time limit.
//!
//! It is our own, and small, for what hangs on it: after a message was handed over, an answer that is merely odd (a code
//! without text, a line that is not UTF-8) must not leave an invitation `unknown`; and nothing that somebody said before
//! STARTTLS may count after it.

use std::time::Duration;

use futures::FutureExt as _;
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader},
    time::timeout,
};

use super::{
    reply::Reply,
    verdict::{Failure, Stage, Trouble},
};

/// A line of an answer has 512 bytes at most (RFC 5321, 4.5.3.1.5); some servers write longer ones.
const MAX_LINE_BYTES: u64 = 8 * 1024;
/// An answer with more lines is no answer.
const MAX_LINES: usize = 200;

/// What a conversation is held over.
pub trait Stream: AsyncRead + AsyncWrite + Send + Sync + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Sync + Unpin> Stream for T {}

/// A conversation.
pub struct Dialogue {
    stream: BufReader<Box<dyn Stream>>,
}

impl Dialogue {
    /// Over a connection on which nothing was said yet.
    pub fn new(stream: impl Stream + 'static) -> Self {
        Self { stream: BufReader::new(Box::new(stream)) }
    }

    /// The connection, to go on with it otherwise.
    ///
    /// # Errors
    /// When something is left unread, which would then be taken for something else.
    pub fn into_stream(self) -> Result<Box<dyn Stream>, Trouble> {
        if self.stream.buffer().is_empty() {
            Ok(self.stream.into_inner())
        } else {
            Err(Trouble::Senseless("more than one answer".into()))
        }
    }

    /// Whether nothing is left unread: what was said ahead would be taken for the answer to the next command.
    pub fn is_clean(&self) -> bool {
        self.stream.buffer().is_empty()
    }

    /// What was said that nobody asked for. None: nothing.
    async fn unasked(&mut self) -> Option<Trouble> {
        let said = self.stream.fill_buf().now_or_never()?;
        match said {
            Ok([]) => Some(Trouble::Lost("the mail server closed it".into())),
            Err(error) => Some(Trouble::Lost(error.to_string())),
            // A server that closes may say so at any time (RFC 5321, 3.8).
            Ok(bytes) if bytes.starts_with(b"421") && bytes.contains(&b'\n') => match self.reply().await {
                Ok(reply) => Some(Trouble::Refused(reply)),
                Err(trouble) => Some(trouble),
            },
            Ok(_) => Some(Trouble::Senseless("more than one answer".into())),
        }
    }

    /// Sends a command and reads the answer. `line` has no line end, and nobody's text that was not checked for one.
    ///
    /// # Errors
    /// When there is none within `limit`. A refusal is an answer.
    pub async fn command(&mut self, stage: Stage, line: &str, limit: Duration) -> Result<Reply, Failure> {
        if let Some(trouble) = self.unasked().await {
            return Err(Failure { stage, trouble });
        }
        self.exchange(stage, format!("{line}\r\n").as_bytes(), limit).await
    }

    /// Reads an answer to what was not asked: the greeting.
    ///
    /// # Errors
    /// As for [`Self::command`].
    pub async fn listen(&mut self, stage: Stage, limit: Duration) -> Result<Reply, Failure> {
        self.exchange(stage, &[], limit).await
    }

    /// Sends a message with its end, and reads the answer. `message` has CRLF at the ends of its lines.
    ///
    /// # Errors
    /// As for [`Self::command`]. `limit` holds for handing it over, and again for the answer.
    pub async fn message(&mut self, message: &[u8], limit: impl Fn() -> Duration) -> Result<Reply, Failure> {
        // Not a byte of it is sent yet.
        if let Some(trouble) = self.unasked().await {
            return Err(Failure { stage: Stage::Data, trouble });
        }
        let failed = |trouble| Failure { stage: Stage::Content, trouble };
        let hand_over = limit();
        match timeout(hand_over, self.write(&stuffed(message))).await {
            Ok(Ok(())) => {}
            // A server that has had enough says why before it hangs up.
            Ok(Err(error)) => {
                return match timeout(limit(), self.reply()).await {
                    Ok(Ok(reply)) if reply.code >= 400 => Ok(reply),
                    _ => Err(failed(Trouble::Lost(error.to_string()))),
                };
            }
            Err(_) => return Err(failed(Trouble::Slow(hand_over))),
        }
        let answer = limit();
        timeout(answer, self.reply()).await.unwrap_or(Err(Trouble::Slow(answer))).map_err(failed)
    }

    async fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.stream.write_all(bytes).await?;
        self.stream.flush().await
    }

    async fn exchange(&mut self, stage: Stage, bytes: &[u8], limit: Duration) -> Result<Reply, Failure> {
        let exchange = async {
            match self.write(bytes).await {
                Ok(()) => self.reply().await,
                // A server that has had enough says why before it hangs up.
                Err(error) => match self.reply().await {
                    Ok(reply) if reply.code >= 400 => Ok(reply),
                    _ => Err(Trouble::Lost(error.to_string())),
                },
            }
        };
        let result = timeout(limit, exchange).await.unwrap_or(Err(Trouble::Slow(limit)));
        result.map_err(|trouble| Failure { stage, trouble })
    }

    async fn reply(&mut self) -> Result<Reply, Trouble> {
        let mut answer: Option<Reply> = None;
        loop {
            let mut bytes = Vec::new();
            let mut limited = (&mut self.stream).take(MAX_LINE_BYTES);
            limited.read_until(b'\n', &mut bytes).await.map_err(|error| Trouble::Lost(error.to_string()))?;
            if bytes.is_empty() {
                return Err(Trouble::Lost("the mail server closed it".into()));
            }
            let text = String::from_utf8_lossy(&bytes);
            let line = text.trim_end_matches(['\r', '\n']);
            let read = Reply::line(line).filter(|_| bytes.ends_with(b"\n"));
            let Some((code, last, text)) = read else { return Err(Trouble::Senseless(line.to_owned())) };
            let answer = answer.get_or_insert_with(|| Reply { code, lines: Vec::new() });
            answer.lines.push(text.to_owned());
            if answer.code != code || answer.lines.len() > MAX_LINES {
                return Err(Trouble::Senseless(line.to_owned()));
            }
            if last {
                return Ok(answer.clone());
            }
        }
    }
}

/// The message as it is sent: a line with a dot alone would end it, so dots that begin lines are doubled (RFC 5321, 4.5.2).
fn stuffed(message: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(message.len() + 64);
    let mut begins = true;
    for &byte in message {
        if begins && byte == b'.' {
            out.push(b'.');
        }
        begins = byte == b'\n';
        out.push(byte);
    }
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

    async fn answer(said: &[u8]) -> Result<Reply, Trouble> {
        let (ours, mut theirs) = tokio::io::duplex(64 * 1024);
        theirs.write_all(said).await.unwrap();
        drop(theirs);
        Dialogue::new(ours).listen(Stage::Greeting, LIMIT).await.map_err(|failure| failure.trouble)
    }

    #[tokio::test]
    async fn answers_are_read_however_they_are_written() {
        let reply = |code, lines: &[&str]| Ok(Reply { code, lines: lines.iter().map(|l| (*l).to_owned()).collect() });
        assert_eq!(answer(b"220 hi\r\n").await, reply(220, &["hi"]));
        assert_eq!(answer(b"250-a\r\n250-b\r\n250 c\r\n").await, reply(250, &["a", "b", "c"]));
        assert_eq!(answer(b"250\r\n").await, reply(250, &[""]));
        assert_eq!(answer(b"250 ok\n").await, reply(250, &["ok"]));
        assert_eq!(answer(b"250 caf\xe9\r\n").await, reply(250, &["caf\u{fffd}"]));
    }

    #[tokio::test]
    async fn what_is_no_answer_is_none() {
        for said in [&b"HTTP/1.1 400\r\n"[..], b"250-a\r\n251 b\r\n", b"250 o", &[b'2'; 9_000]] {
            assert!(matches!(answer(said).await, Err(Trouble::Senseless(_))));
        }
        assert!(matches!(answer(&b"250-a\r\n".repeat(300)).await, Err(Trouble::Senseless(_))));
        assert!(matches!(answer(b"").await, Err(Trouble::Lost(_))));
        assert!(matches!(answer(b"250-a\r\n").await, Err(Trouble::Lost(_))));
    }

    #[tokio::test]
    async fn what_was_said_ahead_is_found_out() {
        let (ours, mut theirs) = tokio::io::duplex(1024);
        theirs.write_all(b"220 go\r\n250 injected\r\n").await.unwrap();
        let mut dialogue = Dialogue::new(ours);
        dialogue.listen(Stage::StartTls, LIMIT).await.unwrap();
        assert!(matches!(dialogue.into_stream(), Err(Trouble::Senseless(_))));
    }

    #[tokio::test]
    async fn what_nobody_asked_for_is_no_answer() {
        let (ours, mut theirs) = tokio::io::duplex(1024);
        theirs.write_all(b"220 hi\r\n250 ahead\r\n").await.unwrap();
        let mut dialogue = Dialogue::new(ours);
        dialogue.listen(Stage::Greeting, LIMIT).await.unwrap();
        assert!(!dialogue.is_clean());
        let failure = dialogue.command(Stage::Mail, "MAIL", LIMIT).await.unwrap_err();
        assert_eq!(failure.trouble, Trouble::Senseless("more than one answer".into()));
        // A farewell is one.
        let (ours, mut theirs) = tokio::io::duplex(1024);
        let mut dialogue = Dialogue::new(ours);
        theirs.write_all(b"421 4.4.2 idle for too long\r\n").await.unwrap();
        let failure = dialogue.command(Stage::Mail, "MAIL", LIMIT).await.unwrap_err();
        assert!(matches!(failure.trouble, Trouble::Refused(Reply { code: 421, .. })), "{failure}");
    }

    #[tokio::test]
    async fn a_message_is_not_begun_after_an_answer_too_many() {
        let (ours, mut theirs) = tokio::io::duplex(1024);
        theirs.write_all(b"354 go\r\n250 taken\r\n").await.unwrap();
        let mut dialogue = Dialogue::new(ours);
        dialogue.listen(Stage::Data, LIMIT).await.unwrap();
        let failure = dialogue.message(b"a", || LIMIT).await.unwrap_err();
        assert_eq!(failure.stage, Stage::Data);
    }

    #[test]
    fn dots_do_not_end_a_message() {
        assert_eq!(stuffed(b".\r\n..a\r\nb.\r\n"), b"..\r\n...a\r\nb.\r\n.\r\n");
        assert_eq!(stuffed(b"a"), b"a\r\n.\r\n");
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_an_answer_or_trouble(said in "([245][0-9]{2}[ -]?[a-z ]{0,9}\r?\n|[\\s\\S]{0,5}){0,8}", cut in 0usize..60) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            let said = said.as_bytes();
            if let Ok(reply) = runtime.block_on(answer(&said[..cut.min(said.len())])) {
                proptest::prop_assert!((200..600).contains(&reply.code) && !reply.lines.is_empty());
            }
        }

        #[test]
        fn no_message_ends_before_its_end(message in "([a\\.]|\r\n){0,40}") {
            let sent = String::from_utf8(stuffed(message.as_bytes())).unwrap();
            proptest::prop_assert_eq!(sent.find("\r\n.\r\n").unwrap_or(0) + 5, sent.len().max(5));
        }
    }
}
