//! The conversation with one mail client: RFC 5321, parsed by `smtp-proto`. What is accepted goes into the mailbox.

use std::{io, net::SocketAddr, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use smtp_proto::{
    AUTH_LOGIN, AUTH_PLAIN, AUTH_XOAUTH2, Error, MAIL_SMTPUTF8, MailFrom, Request,
    request::receiver::{DataReceiver, DummyDataReceiver, DummyLineReceiver, LineReceiver},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt as _},
    net::TcpStream,
    time::{sleep, timeout},
};

use super::{
    Action, Login, OpenConnection, Session, Shared, Stage, Tls,
    wire::{End, Wire},
};

/// A client may be silent for so long (RFC 5321, 4.5.3.2.7).
pub(super) const IDLE: Duration = Duration::from_secs(300);
/// As many as RFC 5321 (4.5.3.1.8) asks for, and some more.
const MOST_RECIPIENTS: usize = 1000;
const CLOSING: u16 = 421;

/// Serves a client until one of both ends it.
pub(super) async fn serve(stream: TcpStream, peer: SocketAddr, connection: OpenConnection) {
    let session = Session::new(connection.number, peer);
    // The client is gone, which is all that an error here means.
    let _ = converse(stream, session, &connection).await;
}

async fn converse(stream: TcpStream, session: Session, connection: &OpenConnection) -> io::Result<()> {
    // Replies are small and waited for.
    stream.set_nodelay(true)?;
    match &connection.shared.options.tls {
        Some(tls) if tls.implicit => {
            let stream = encrypt(stream, tls).await?;
            Conversation::new(stream, session.encrypted(), connection).begin().await?;
        }
        tls => {
            let asked = Conversation::new(stream, session, connection).begin().await?;
            if let (Some((stream, session)), Some(tls)) = (asked, tls) {
                // What the client sent after STARTTLS without waiting is forgotten with the old conversation: it came unencrypted.
                let stream = encrypt(stream, tls).await?;
                Conversation::new(stream, session.encrypted(), connection).go_on().await?;
            }
        }
    }
    Ok(())
}

type Encrypted = Box<tokio_rustls::server::TlsStream<TcpStream>>;

async fn encrypt(stream: TcpStream, tls: &Tls) -> io::Result<Encrypted> {
    Ok(Box::new(timeout(IDLE, tls.acceptor.accept(stream)).await??))
}

struct Conversation<'a, S> {
    wire: Wire<S>,
    session: Session,
    connection: &'a OpenConnection,
    shared: &'a Shared,
    /// The message under way may have addresses beyond ASCII.
    utf8: bool,
}

/// What the rule made of a stage.
#[derive(PartialEq, Eq)]
enum Verdict {
    GoOn,
    /// It has been answered.
    Refused,
    AcceptThenDrop,
}

impl<'a, S: AsyncRead + AsyncWrite + Unpin> Conversation<'a, S> {
    fn new(stream: S, session: Session, connection: &'a OpenConnection) -> Self {
        Self { wire: Wire::new(stream), session, connection, shared: &connection.shared, utf8: false }
    }

    /// Greets and goes on.
    async fn begin(mut self) -> io::Result<Option<(S, Session)>> {
        let greeted = match self.verdict(Stage::Connect).await {
            Ok(Verdict::GoOn) => {
                self.wire.reply(220, "localhost ESMTP Mailrun mail sink");
                return self.go_on().await;
            }
            Ok(_) => End::Closed,
            Err(end) => end,
        };
        self.end(greeted).await
    }

    /// Talks to the end, or until the client asks to encrypt.
    async fn go_on(mut self) -> io::Result<Option<(S, Session)>> {
        loop {
            if let Err(end) = self.next().await {
                return self.end(end).await;
            }
        }
    }

    async fn end(mut self, end: End) -> io::Result<Option<(S, Session)>> {
        match end {
            End::Gone(error) => return Err(error),
            End::Dropped => {}
            End::Closed => {
                self.wire.flush().await?;
                self.wire.stream.shutdown().await?;
            }
            End::Encrypt => {
                self.wire.flush().await?;
                return Ok(Some((self.wire.stream, self.session)));
            }
        }
        Ok(None)
    }

    /// Answers one request.
    async fn next(&mut self) -> Result<(), End> {
        let request = match self.request().await? {
            Ok(request) => request,
            Err(error) => {
                let (code, text) = complaint(&error);
                self.wire.reply(code, &text);
                return Ok(());
            }
        };
        match request {
            Request::Ehlo { host } => self.hello(host, true).await?,
            Request::Helo { host } => self.hello(host, false).await?,
            Request::StartTls => self.start_tls()?,
            Request::Auth { mechanism, initial_response } => self.auth(mechanism, &initial_response).await?,
            Request::Mail { from } => self.mail(from).await?,
            Request::Rcpt { to } => self.rcpt(to.address).await?,
            Request::Data => self.data().await?,
            Request::Rset => {
                self.session.reset();
                self.wire.reply(250, "2.0.0 Forgotten");
            }
            Request::Noop { .. } => self.wire.reply(250, "2.0.0 Fine"),
            Request::Vrfy { .. } => self.wire.reply(252, "2.1.5 Anybody is accepted"),
            Request::Help { .. } => self.wire.reply(214, "2.0.0 Mail is accepted here, shown, and not delivered"),
            Request::Quit => {
                // Before the client hears it, since it may open the next one then.
                self.connection.ends();
                self.wire.reply(221, "2.0.0 Goodbye");
                return Err(End::Closed);
            }
            other => self.wire.reply(502, &format!("5.5.1 {} is not implemented", other.name())),
        }
        Ok(())
    }

    async fn request(&mut self) -> Result<Result<Request<String>, Error>, End> {
        loop {
            match self.wire.request() {
                Err(Error::NeedsMoreData { .. }) => self.wire.fill().await?,
                Err(Error::ResponseTooLong) => {
                    let mut rest = DummyLineReceiver::default();
                    while !self.wire.take(|bytes| rest.ingest(bytes)) {
                        self.wire.fill().await?;
                    }
                    return Ok(Err(Error::ResponseTooLong));
                }
                parsed => return Ok(parsed),
            }
        }
    }

    async fn hello(&mut self, host: String, extended: bool) -> Result<(), End> {
        self.session.reset();
        self.session.hello = Some(host);
        if self.verdict(Stage::Hello).await? != Verdict::GoOn {
            self.session.hello = None;
            return Ok(());
        }
        if !extended {
            self.wire.reply(250, "localhost");
            return Ok(());
        }
        let mut lines = format!(
            "localhost\nPIPELINING\n8BITMIME\nSMTPUTF8\nSIZE {}\nENHANCEDSTATUSCODES\nAUTH PLAIN LOGIN XOAUTH2",
            self.shared.options.largest
        );
        if self.can_encrypt() {
            lines.push_str("\nSTARTTLS");
        }
        self.wire.reply(250, &lines);
        Ok(())
    }

    fn can_encrypt(&self) -> bool {
        self.shared.options.tls.is_some() && !self.session.tls
    }

    fn start_tls(&mut self) -> Result<(), End> {
        if self.can_encrypt() {
            self.wire.reply(220, "2.0.0 Go ahead");
            return Err(End::Encrypt);
        }
        let why = if self.session.tls { "5.5.1 This is encrypted" } else { "5.5.1 There is no certificate" };
        self.wire.reply(if self.session.tls { 503 } else { 502 }, why);
        Ok(())
    }

    async fn auth(&mut self, mechanism: u64, initial: &str) -> Result<(), End> {
        if !self.greeted() {
            return Ok(());
        }
        if self.session.user.is_some() || self.session.sender.is_some() {
            self.wire.reply(503, "5.5.1 Not now");
            return Ok(());
        }
        let login = match mechanism {
            AUTH_PLAIN => self.response(initial, "").await?.as_deref().and_then(Login::from_plain),
            AUTH_XOAUTH2 => self.response(initial, "").await?.as_deref().and_then(Login::from_xoauth2),
            AUTH_LOGIN => match self.response(initial, "Username:").await? {
                Some(user) => self.response("", "Password:").await?.map(|secret| Login { user, secret }),
                None => None,
            },
            _ => {
                self.wire.reply(504, "5.5.4 Use PLAIN, LOGIN or XOAUTH2");
                return Ok(());
            }
        };
        let Some(login) = login else {
            self.wire.reply(501, "5.5.2 Not understood");
            return Ok(());
        };
        self.session.user = Some(login.user.clone());
        if self.verdict(Stage::Auth).await? != Verdict::GoOn {
            self.session.user = None;
        } else if self.shared.options.login.as_ref().is_some_and(|wanted| *wanted != login) {
            self.session.user = None;
            self.wire.reply(535, "5.7.8 That is not the login");
        } else {
            self.wire.reply(235, "2.7.0 Welcome");
        }
        Ok(())
    }

    /// One response of a login, asked for unless it came with the request. `None`: unreadable, or cancelled by the client.
    async fn response(&mut self, initial: &str, challenge: &str) -> Result<Option<String>, End> {
        let encoded = if initial.is_empty() {
            self.wire.reply(334, &STANDARD.encode(challenge));
            let mut line = LineReceiver::new(());
            while !self.wire.take(|bytes| line.ingest(bytes)) {
                self.wire.fill().await?;
            }
            line.buf
        } else {
            initial.as_bytes().to_vec()
        };
        // An initial response that is empty is written as an equals sign.
        let encoded = if encoded == b"=" { Vec::new() } else { encoded };
        Ok(STANDARD.decode(encoded).ok().and_then(|response| String::from_utf8(response).ok()))
    }

    async fn mail(&mut self, from: MailFrom<String>) -> Result<(), End> {
        let options = &self.shared.options;
        let utf8 = from.flags & MAIL_SMTPUTF8 != 0;
        if !self.greeted() {
            return Ok(());
        }
        if options.login.is_some() && self.session.user.is_none() {
            self.wire.reply(530, "5.7.0 Log in first");
        } else if self.session.sender.is_some() {
            self.wire.reply(503, "5.5.1 A message is under way");
        } else if from.size > options.largest {
            self.wire.reply(552, &too_large(options.largest));
        } else if self.readable(&from.address, utf8) {
            self.utf8 = utf8;
            self.session.sender = Some(from.address);
            if self.verdict(Stage::Mail).await? == Verdict::GoOn {
                self.wire.reply(250, "2.1.0 Sender noted");
            } else {
                self.session.sender = None;
            }
        }
        Ok(())
    }

    async fn rcpt(&mut self, address: String) -> Result<(), End> {
        if self.session.sender.is_none() {
            self.wire.reply(503, "5.5.1 Name the sender first");
        } else if address.is_empty() {
            self.wire.reply(501, "5.1.3 That is no address");
        } else if self.session.recipients.len() >= MOST_RECIPIENTS {
            self.wire.reply(452, "4.5.3 Too many recipients");
        } else if self.readable(&address, self.utf8) && self.verdict(Stage::Rcpt(&address)).await? == Verdict::GoOn {
            self.session.recipients.push(address);
            self.wire.reply(250, "2.1.5 Recipient noted");
        }
        Ok(())
    }

    /// Whether an address may be in a message, with SMTPUTF8 or without; if not, that has been said.
    fn readable(&mut self, address: &str, utf8: bool) -> bool {
        let readable = utf8 || address.is_ascii();
        if !readable {
            self.wire.reply(553, "5.6.7 An address beyond ASCII needs SMTPUTF8");
        }
        readable
    }

    async fn data(&mut self) -> Result<(), End> {
        if self.session.recipients.is_empty() {
            self.wire.reply(503, "5.5.1 Name a recipient first");
            return Ok(());
        }
        if self.verdict(Stage::Data).await? != Verdict::GoOn {
            return Ok(());
        }
        self.wire.reply(354, "Go ahead, and end with a dot");
        let message = self.message().await?;
        let latency = self.shared.options.latency;
        if !latency.is_zero() {
            sleep(latency).await;
        }
        let Some(message) = message else {
            self.wire.reply(552, &too_large(self.shared.options.largest));
            self.session.reset();
            return Ok(());
        };
        let verdict = self.verdict(Stage::Message).await?;
        if verdict != Verdict::Refused {
            let sender = self.session.sender.as_deref().unwrap_or_default();
            self.shared.mailbox.accept(sender, &self.session.recipients, message);
            self.session.accepted += 1;
        }
        self.session.reset();
        match verdict {
            Verdict::Refused => {}
            Verdict::GoOn => self.wire.reply(250, "2.0.0 Accepted"),
            Verdict::AcceptThenDrop => return Err(End::Dropped),
        }
        Ok(())
    }

    /// Reads a message up to its last dot; `None` if it is too large.
    async fn message(&mut self) -> Result<Option<Vec<u8>>, End> {
        let mut message = Vec::new();
        let mut receiver = DataReceiver::new();
        // The line before the message has ended: a dot may come at once.
        receiver.ingest(&mut b"\r\n".iter(), &mut message);
        message.clear();
        while !self.wire.take(|bytes| receiver.ingest(bytes, &mut message)) {
            if message.len() > self.shared.options.largest {
                drop(message);
                let mut rest = DummyDataReceiver::new_data(&receiver);
                loop {
                    self.wire.fill().await?;
                    if self.wire.take(|bytes| rest.ingest(bytes)) {
                        return Ok(None);
                    }
                }
            }
            self.wire.fill().await?;
        }
        Ok((message.len() <= self.shared.options.largest).then_some(message))
    }

    /// Whether the client has said who it is; if not, that has been said.
    fn greeted(&mut self) -> bool {
        let greeted = self.session.hello.is_some();
        if !greeted {
            self.wire.reply(503, "5.5.1 Say EHLO first");
        }
        greeted
    }

    /// Asks the rule, and does what it says.
    async fn verdict(&mut self, stage: Stage<'_>) -> Result<Verdict, End> {
        match self.shared.action(stage, &self.session) {
            Action::GoOn => Ok(Verdict::GoOn),
            Action::Wait(time) => {
                sleep(time).await;
                Ok(Verdict::GoOn)
            }
            Action::Reply(code, text) => {
                self.wire.reply(code, &text);
                if code == CLOSING { Err(End::Closed) } else { Ok(Verdict::Refused) }
            }
            Action::AcceptThenDrop if stage == Stage::Message => Ok(Verdict::AcceptThenDrop),
            Action::Drop | Action::AcceptThenDrop => {
                // What was asked before this stage has been answered.
                self.wire.flush().await?;
                Err(End::Dropped)
            }
            Action::Hang => Err(self.wire.hang().await),
        }
    }
}

fn too_large(largest: usize) -> String {
    format!("5.3.4 A message may have up to {largest} bytes")
}

/// What to say to a request that can't be understood.
fn complaint(error: &Error) -> (u16, String) {
    match error {
        Error::InvalidSenderAddress => (501, "5.1.7 That is no address".to_owned()),
        Error::InvalidRecipientAddress => (501, "5.1.3 That is no address".to_owned()),
        Error::SyntaxError { syntax } => (501, format!("5.5.4 The syntax is: {syntax}")),
        Error::InvalidParameter { param } => (501, format!("5.5.4 {param} has a value that is not understood")),
        Error::UnsupportedParameter { param } => (555, format!("5.5.4 {param} is not supported")),
        Error::ResponseTooLong => (500, "5.5.6 That line is too long".to_owned()),
        _ => (500, "5.5.1 Not understood".to_owned()),
    }
}
