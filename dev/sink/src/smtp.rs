//! One SMTP session: RFC 5321, parsed by `smtp-proto`. Accepted messages go into the mailbox.

use std::{io, net::SocketAddr};

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
    wire::{End, IDLE, Wire},
};

/// More than the minimum of RFC 5321 (4.5.3.1.8).
const MAX_RECIPIENTS: usize = 1000;
const CLOSING: u16 = 421;

/// Serves a client until either side ends the session.
pub(super) async fn serve(stream: TcpStream, peer: SocketAddr, connection: OpenConnection) {
    let session = Session::new(connection.number, peer);
    // An error here only means that the client has disconnected.
    let _ = converse(stream, session, &connection).await;
}

async fn converse(stream: TcpStream, session: Session, connection: &OpenConnection) -> io::Result<()> {
    // Replies are small and the client waits for them.
    stream.set_nodelay(true)?;
    match &connection.shared.options.tls {
        Some(tls) if tls.implicit => {
            let stream = encrypt(stream, tls).await?;
            Conversation::new(stream, session.encrypted(), connection).begin().await?;
        }
        tls => {
            let asked = Conversation::new(stream, session, connection).begin().await?;
            if let (Some((stream, session)), Some(tls)) = (asked, tls) {
                // Input after STARTTLS without waiting is discarded with the old session: it came unencrypted.
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
    /// The current message may have addresses beyond ASCII.
    utf8: bool,
}

/// The result of a rule.
#[derive(PartialEq, Eq)]
enum Decision {
    GoOn,
    /// The refusal was sent.
    Refused,
    AcceptThenDrop,
}

impl<'a, S: AsyncRead + AsyncWrite + Unpin> Conversation<'a, S> {
    fn new(stream: S, session: Session, connection: &'a OpenConnection) -> Self {
        Self { wire: Wire::new(stream), session, connection, shared: &connection.shared, utf8: false }
    }

    /// Sends the greeting and continues.
    async fn begin(mut self) -> io::Result<Option<(S, Session)>> {
        let greeted = match self.apply_rule(Stage::Connect).await {
            Ok(Decision::GoOn) => {
                self.wire.reply(220, "localhost ESMTP Mailrun mail sink");
                return self.go_on().await;
            }
            Ok(_) => End::Closed,
            Err(end) => end,
        };
        self.end(greeted).await
    }

    /// Serves the session until its end, or until the client sends STARTTLS.
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

    /// Handles one request.
    async fn next(&mut self) -> Result<(), End> {
        let request = match self.request().await? {
            Ok(request) => request,
            Err(error) => {
                let (code, text) = error_reply(&error);
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
                self.wire.reply(250, "2.0.0 Reset");
            }
            Request::Noop { .. } => self.wire.reply(250, "2.0.0 OK"),
            Request::Vrfy { .. } => self.wire.reply(252, "2.1.5 All recipients are accepted"),
            Request::Help { .. } => self.wire.reply(214, "2.0.0 Mail is accepted and shown, but not delivered"),
            Request::Quit => {
                // Before the reply, because the client may then open its next connection.
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
        if self.apply_rule(Stage::Hello).await? != Decision::GoOn {
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
        let why = if self.session.tls { "5.5.1 TLS already active" } else { "5.5.1 TLS not available" };
        self.wire.reply(if self.session.tls { 503 } else { 502 }, why);
        Ok(())
    }

    async fn auth(&mut self, mechanism: u64, initial: &str) -> Result<(), End> {
        if !self.greeted() {
            return Ok(());
        }
        if self.session.user.is_some() || self.session.sender.is_some() {
            self.wire.reply(503, "5.5.1 Bad sequence of commands");
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
            self.wire.reply(501, "5.5.2 Cannot decode credentials");
            return Ok(());
        };
        self.session.user = Some(login.user.clone());
        if self.apply_rule(Stage::Auth).await? != Decision::GoOn {
            self.session.user = None;
        } else if self.shared.options.login.as_ref().is_some_and(|wanted| *wanted != login) {
            self.session.user = None;
            self.wire.reply(535, "5.7.8 Authentication failed");
        } else {
            self.wire.reply(235, "2.7.0 Authentication succeeded");
        }
        Ok(())
    }

    /// One response of a login, requested unless it came with the command. `None`: unreadable, or cancelled by the client.
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
        // An empty initial response is written as an equals sign.
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
            self.wire.reply(530, "5.7.0 Authentication required");
        } else if self.session.sender.is_some() {
            self.wire.reply(503, "5.5.1 Nested MAIL command");
        } else if from.size > options.largest {
            self.wire.reply(552, &too_large(options.largest));
        } else if self.readable(&from.address, utf8) {
            self.utf8 = utf8;
            self.session.sender = Some(from.address);
            if self.apply_rule(Stage::Mail).await? == Decision::GoOn {
                self.wire.reply(250, "2.1.0 Sender OK");
            } else {
                self.session.sender = None;
            }
        }
        Ok(())
    }

    async fn rcpt(&mut self, address: String) -> Result<(), End> {
        if self.session.sender.is_none() {
            self.wire.reply(503, "5.5.1 Send MAIL first");
        } else if address.is_empty() {
            self.wire.reply(501, "5.1.3 Invalid address");
        } else if self.session.recipients.len() >= MAX_RECIPIENTS {
            self.wire.reply(452, "4.5.3 Too many recipients");
        } else if self.readable(&address, self.utf8) && self.apply_rule(Stage::Rcpt(&address)).await? == Decision::GoOn
        {
            self.session.recipients.push(address);
            self.wire.reply(250, "2.1.5 Recipient OK");
        }
        Ok(())
    }

    /// Whether an address is allowed with or without SMTPUTF8; if not, replies so.
    fn readable(&mut self, address: &str, utf8: bool) -> bool {
        let readable = utf8 || address.is_ascii();
        if !readable {
            self.wire.reply(553, "5.6.7 Non-ASCII addresses require SMTPUTF8");
        }
        readable
    }

    async fn data(&mut self) -> Result<(), End> {
        if self.session.recipients.is_empty() {
            self.wire.reply(503, "5.5.1 Send RCPT first");
            return Ok(());
        }
        if self.apply_rule(Stage::Data).await? != Decision::GoOn {
            return Ok(());
        }
        self.wire.reply(354, "End data with <CR><LF>.<CR><LF>");
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
        let verdict = self.apply_rule(Stage::Message).await?;
        if verdict != Decision::Refused {
            let sender = self.session.sender.as_deref().unwrap_or_default();
            self.shared.mailbox.accept(sender, &self.session.recipients, message);
            self.session.accepted += 1;
        }
        self.session.reset();
        match verdict {
            Decision::Refused => {}
            Decision::GoOn => self.wire.reply(250, "2.0.0 Accepted"),
            Decision::AcceptThenDrop => return Err(End::Dropped),
        }
        Ok(())
    }

    /// Reads a message up to its final dot; `None` if it is too large.
    async fn message(&mut self) -> Result<Option<Vec<u8>>, End> {
        let mut message = Vec::new();
        let mut receiver = DataReceiver::new();
        // The line before the message has ended: a dot may follow at once.
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

    /// Whether the client has sent EHLO or HELO; if not, replies so.
    fn greeted(&mut self) -> bool {
        let greeted = self.session.hello.is_some();
        if !greeted {
            self.wire.reply(503, "5.5.1 Send EHLO first");
        }
        greeted
    }

    /// Evaluates the rule and carries it out.
    async fn apply_rule(&mut self, stage: Stage<'_>) -> Result<Decision, End> {
        match self.shared.action(stage, &self.session) {
            Action::GoOn => Ok(Decision::GoOn),
            Action::Wait(time) => {
                sleep(time).await;
                Ok(Decision::GoOn)
            }
            Action::Reply(code, text) => {
                self.wire.reply(code, &text);
                if code == CLOSING { Err(End::Closed) } else { Ok(Decision::Refused) }
            }
            Action::AcceptThenDrop if stage == Stage::Message => Ok(Decision::AcceptThenDrop),
            Action::Drop | Action::AcceptThenDrop => {
                // Replies to earlier requests are sent first.
                self.wire.flush().await?;
                Err(End::Dropped)
            }
            Action::Hang => Err(self.wire.hang().await),
        }
    }
}

fn too_large(largest: usize) -> String {
    format!("5.3.4 Messages are limited to {largest} bytes")
}

/// The reply to a malformed request.
fn error_reply(error: &Error) -> (u16, String) {
    match error {
        Error::InvalidSenderAddress => (501, "5.1.7 Invalid address".to_owned()),
        Error::InvalidRecipientAddress => (501, "5.1.3 Invalid address".to_owned()),
        Error::SyntaxError { syntax } => (501, format!("5.5.4 Syntax: {syntax}")),
        Error::InvalidParameter { param } => (501, format!("5.5.4 Invalid value of {param}")),
        Error::UnsupportedParameter { param } => (555, format!("5.5.4 {param} is not supported")),
        Error::ResponseTooLong => (500, "5.5.6 Line too long".to_owned()),
        _ => (500, "5.5.1 Command not recognised".to_owned()),
    }
}
