//! A session with a relay: connect, encrypt, log in, deliver messages.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use mailrun_app::config::{Relay, RelayTls};
use smtp_proto::{EXT_8BIT_MIME, EXT_CHUNKING, EXT_PIPELINING, EXT_SIZE, EXT_SMTP_UTF8, EXT_START_TLS, EhloResponse};
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::{TlsConnector, rustls::pki_types::ServerName};
use tracing::warn;

use super::{
    super::message::ComposedMail,
    connect::{addresses, connect},
    dialogue::{Dialogue, Stream},
    limits::{Deadline, Limits},
    login::log_in,
    reply::Reply,
    verdict::{Cause, Failure, Stage},
};
use crate::attempt::Attempt;

/// How long to wait for the reply to QUIT. Best effort.
const QUIT_TIMEOUT: Duration = Duration::from_millis(500);
/// How long to wait for the reply to RSET.
const RESET_TIMEOUT: Duration = Duration::from_secs(30);

/// What a relay's connections have in common, learned from their conversations.
#[derive(Debug, Default)]
pub struct Manners {
    /// It mishandles commands that are sent together, although it offers that (RFC 2920).
    no_pipelining: AtomicBool,
    /// How many connections in a row broke while such commands were outstanding.
    broken: AtomicU32,
}

/// A relay that offers pipelining but closes this many connections in a row at pipelined commands gets one command at a time.
const BROKEN_IN_A_ROW: u32 = 3;

impl Manners {
    fn mishandled(&self, relay: &Relay, why: &Failure) {
        if !self.no_pipelining.swap(true, Ordering::Relaxed) {
            warn!(%relay, reason = %why, "relay mishandles commands that are sent together, sending one at a time from now on");
        }
    }

    /// Pipelined commands failed with something other than a proper reply.
    fn failed(&self, relay: &Relay, why: &Failure) {
        let mishandled = match &why.cause {
            Cause::TimedOut(_) | Cause::BadReply(_) => true,
            Cause::Lost(_) => self.broken.fetch_add(1, Ordering::Relaxed) + 1 >= BROKEN_IN_A_ROW,
            Cause::Refused(_) | Cause::Unsupported(_) | Cause::Withdrawn(_) => false,
        };
        if mishandled {
            self.mishandled(relay, why);
        }
    }
}

/// Commands whose replies are outstanding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Offered {
    /// RSET comes before them.
    reset: bool,
}

/// The server's capabilities from its EHLO reply, as bits of [`smtp_proto`].
#[derive(Clone, Copy, Debug, Default)]
struct Capabilities {
    extensions: u32,
    logins: u64,
}

impl Capabilities {
    fn read(reply: &Reply) -> Self {
        let mut capabilities = Self::default();
        // The first line is the server's name. Each line is parsed alone, so that an unusual line does not hide the others.
        for line in reply.lines.iter().skip(1) {
            if let Ok(read) = EhloResponse::parse(&mut format!("250-\n250 {line}\n").as_bytes().iter()) {
                capabilities.extensions |= read.capabilities;
                capabilities.logins |= read.auth_mechanisms;
            }
        }
        capabilities
    }

    fn has(self, extension: u32) -> bool {
        self.extensions & extension != 0
    }
}

/// A connection that is ready for mail.
pub struct Session {
    dialogue: Dialogue,
    relay: Relay,
    manners: Arc<Manners>,
    capabilities: Capabilities,
    /// How many mails were offered on this connection.
    mails: u32,
    /// A mail was refused, and the server may still know its sender or recipient.
    needs_reset: bool,
    /// The envelope of the next mail was sent with the message before it.
    offered: Option<Offered>,
    /// Replies to earlier commands are missing.
    is_lost: bool,
}

impl Session {
    /// Connects, encrypts, sends EHLO and logs in.
    ///
    /// # Errors
    /// If one of these steps fails.
    pub async fn open(
        relay: &Relay,
        manners: &Arc<Manners>,
        tls: Option<&TlsConnector>,
        hello: Option<&str>,
        deadline: &Deadline,
    ) -> Result<Self, Failure> {
        let limits = deadline.limits;
        let found = addresses(&relay.host, relay.port, deadline.limit(Stage::Connect)).await;
        let mut addresses = found.map_err(|error| lost(Stage::Connect, &error))?;
        let mut last = None;
        let (mut dialogue, local) = loop {
            let connected = connect(&mut addresses, deadline.limit(Stage::Connect)).await;
            let stream = match (connected, last.take()) {
                (Ok(stream), _) => stream,
                // A reply is a better reason than the failure to connect to another address.
                (Err(_), Some(failure)) => return Err(failure),
                (Err(error), None) => return Err(lost(Stage::Connect, &error)),
            };
            let local = stream.local_addr().ok();
            match greeted(stream, relay, tls, deadline, limits.greeting(!addresses.is_empty())).await {
                Ok(dialogue) => break (dialogue, local),
                Err(failure) if addresses.is_empty() => return Err(failure),
                Err(failure) => last = Some(failure),
            }
        };
        let own = hello.map_or_else(|| literal(local), str::to_owned);
        let may_be_old = relay.tls == RelayTls::None && relay.login.is_none();
        let mut capabilities = say_hello(&mut dialogue, &own, deadline, may_be_old).await?;
        if let (RelayTls::StartTls, Some(tls)) = (relay.tls, tls) {
            let failed = |cause| Failure { stage: Stage::StartTls, cause };
            if !capabilities.has(EXT_START_TLS) {
                return Err(failed(Cause::Unsupported("the mail server does not offer encryption (STARTTLS)".into())));
            }
            let reply = dialogue.command(Stage::StartTls, "STARTTLS", deadline.limit(Stage::StartTls)).await?;
            positive(Stage::StartTls, reply)?;
            dialogue = encrypted(dialogue.into_stream().map_err(failed)?, relay, tls, limits).await?;
            // Capabilities announced before TLS could have been injected.
            capabilities = say_hello(&mut dialogue, &own, deadline, false).await?;
        }
        if let Some(login) = &relay.login {
            log_in(&mut dialogue, login, capabilities.logins, deadline.limit(Stage::Login)).await?;
        }
        Ok(Self {
            dialogue,
            relay: relay.clone(),
            manners: Arc::clone(manners),
            capabilities,
            mails: 0,
            needs_reset: false,
            offered: None,
            is_lost: false,
        })
    }

    /// Hands a mail to the server. With pipelining, `following` may name a mail whose envelope is sent right behind this message;
    /// the connection must then be given to that mail, whose own call continues the conversation.
    ///
    /// # Errors
    /// If the server did not confirm that it accepted the mail.
    pub async fn deliver(
        &mut self,
        composed: &ComposedMail,
        attempt: &Attempt,
        deadline: &Deadline,
        following: impl FnOnce(&Self) -> Option<Arc<ComposedMail>>,
    ) -> Result<(), Failure> {
        let limit = |stage| deadline.limit(stage);
        let given = self.offered.take();
        let offered = match given {
            Some(offered) => Some(offered),
            None => {
                attempt.may_proceed().await.map_err(|withdrawn| Failure::withdrawn(Stage::Mail, withdrawn))?;
                if self.sends_chunks() {
                    return self.deliver_chunk(composed, attempt, deadline).await;
                }
                self.offer(composed, deadline).await?
            }
        };
        if let Some(offered) = offered {
            self.answered_together(offered, deadline).await?;
        }
        // The last safe moment: without the content, the server has nothing to accept. An envelope that was sent with another message
        // may have waited for that one's reply for long: the run may be paused by now.
        let allowed = if given.is_some() { attempt.may_proceed().await } else { attempt.may_commit() };
        allowed.map_err(|withdrawn| Failure::withdrawn(Stage::Content, withdrawn))?;
        let next = if self.pipelines() { following(self) } else { None };
        let envelope = next.map_or_else(String::new, |next| self.envelope(&next));
        let reply = self.dialogue.message(&composed.bytes, envelope.as_bytes(), || limit(Stage::Content)).await?;
        self.offered = (!envelope.is_empty()).then_some(Offered { reset: false });
        positive(Stage::Content, reply)
    }

    /// Whether the server can be given this mail.
    pub fn takes(&self, composed: &ComposedMail) -> bool {
        !composed.needs_utf8 || self.capabilities.has(EXT_SMTP_UTF8)
    }

    /// How many mails were offered on this connection.
    pub fn mails(&self) -> u32 {
        self.mails
    }

    fn pipelines(&self) -> bool {
        self.relay.pipelining
            && self.capabilities.has(EXT_PIPELINING)
            && !self.manners.no_pipelining.load(Ordering::Relaxed)
    }

    fn sends_chunks(&self) -> bool {
        self.relay.chunking && self.capabilities.has(EXT_CHUNKING) && self.pipelines()
    }

    fn mail_command(&self, composed: &ComposedMail) -> String {
        let mut mail = format!("MAIL FROM:<{}>", composed.from);
        if self.capabilities.has(EXT_SIZE) {
            mail.push_str(&format!(" SIZE={}", composed.bytes.len()));
        }
        if composed.needs_utf8 {
            mail.push_str(if self.capabilities.has(EXT_8BIT_MIME) { " BODY=8BITMIME SMTPUTF8" } else { " SMTPUTF8" });
        }
        mail
    }

    /// The commands of a mail that may be sent together (RFC 2920, 3.1).
    fn envelope(&mut self, composed: &ComposedMail) -> String {
        self.mails += 1;
        format!("{}\r\nRCPT TO:<{}>\r\nDATA\r\n", self.mail_command(composed), composed.to)
    }

    /// Offers a mail: sends its envelope, together or one command at a time. Returns what is not yet answered.
    async fn offer(&mut self, composed: &ComposedMail, deadline: &Deadline) -> Result<Option<Offered>, Failure> {
        if !self.takes(composed) {
            let why = "the mail server does not support non-ASCII characters before the @ sign (no SMTPUTF8)";
            return Err(Failure { stage: Stage::Mail, cause: Cause::Unsupported(why.into()) });
        }
        let limit = |stage| deadline.limit(stage);
        let offered = Offered { reset: self.needs_reset };
        if self.pipelines() {
            let reset = if offered.reset { "RSET\r\n" } else { "" };
            let commands = format!("{reset}{}", self.envelope(composed));
            self.dialogue.send(Stage::Mail, commands.as_bytes(), limit(Stage::Mail)).await?;
            return Ok(Some(offered));
        }
        if offered.reset {
            let reply = self.dialogue.command(Stage::Mail, "RSET", RESET_TIMEOUT.min(limit(Stage::Mail))).await?;
            self.was_reset(&reply)?;
        }
        self.mails += 1;
        self.needs_reset = true;
        let mail = self.mail_command(composed);
        positive(Stage::Mail, self.dialogue.command(Stage::Mail, &mail, limit(Stage::Mail)).await?)?;
        let rcpt = format!("RCPT TO:<{}>", composed.to);
        positive(Stage::Rcpt, self.dialogue.command(Stage::Rcpt, &rcpt, limit(Stage::Rcpt)).await?)?;
        go_ahead(self.dialogue.command(Stage::Data, "DATA", limit(Stage::Data)).await?)?;
        // The message ends the transaction, whatever the reply.
        self.needs_reset = false;
        Ok(None)
    }

    /// A server that refuses RSET cannot take another mail on this connection.
    fn was_reset(&mut self, reply: &Reply) -> Result<(), Failure> {
        self.needs_reset = !reply.is_positive();
        if self.needs_reset {
            let cause = Cause::Lost(format!("RSET was refused: {reply}"));
            return Err(Failure { stage: Stage::Mail, cause });
        }
        Ok(())
    }

    /// Reads the replies to an envelope that was sent at once: all of them, whatever the first one says (RFC 2920, 3.1).
    async fn answered_together(&mut self, offered: Offered, deadline: &Deadline) -> Result<(), Failure> {
        let result = self.read_together(offered, deadline).await;
        if let Err(failure) = &result {
            self.manners.failed(&self.relay, failure);
        } else {
            self.manners.broken.store(0, Ordering::Relaxed);
        }
        result
    }

    async fn read_together(&mut self, offered: Offered, deadline: &Deadline) -> Result<(), Failure> {
        if offered.reset {
            let reply = self.dialogue.listen(Stage::Mail, RESET_TIMEOUT.min(deadline.limit(Stage::Mail))).await?;
            self.was_reset(&reply)?;
        }
        let mut refusal = None;
        for stage in [Stage::Mail, Stage::Rcpt, Stage::Data] {
            let reply = self.dialogue.listen(stage, deadline.limit(stage)).await;
            let reply = match (reply, refusal) {
                (Ok(reply), before) => {
                    refusal = before;
                    reply
                }
                // The refusal is the better reason.
                (Err(_), Some(refusal)) => {
                    self.is_lost = true;
                    return Err(refusal);
                }
                (Err(failure), None) => return Err(failure),
            };
            if is_out_of_step(&reply) {
                return Err(bad_reply(stage, &reply));
            }
            let is_last = reply.code == 421;
            if refusal.is_some() && stage == Stage::Data && reply.code == 354 {
                self.end_empty_message(deadline).await?;
                self.needs_reset = false;
                break;
            }
            let judged = if stage == Stage::Data { go_ahead(reply) } else { positive(stage, reply) };
            if let Err(failure) = judged {
                self.needs_reset = true;
                if refusal.is_none() {
                    if is_last || !matches!(failure.cause, Cause::Refused(_)) {
                        return Err(failure);
                    }
                    refusal = Some(failure);
                }
            }
        }
        refusal.map_or(Ok(()), Err)
    }

    /// The server wants the message of a mail without a recipient: it gets an empty one, which it has to refuse (RFC 2920, 3.1).
    async fn end_empty_message(&mut self, deadline: &Deadline) -> Result<(), Failure> {
        // A failure here is one of the connection, before anything was accepted.
        self.dialogue.command(Stage::Data, ".", deadline.limit(Stage::Data)).await.map(drop)
    }

    /// Sends a mail in one go, and then reads all replies.
    async fn deliver_chunk(
        &mut self,
        composed: &ComposedMail,
        attempt: &Attempt,
        deadline: &Deadline,
    ) -> Result<(), Failure> {
        if !self.takes(composed) {
            return self.offer(composed, deadline).await.map(drop);
        }
        attempt.may_commit().map_err(|withdrawn| Failure::withdrawn(Stage::Mail, withdrawn))?;
        self.mails += 1;
        let reset = self.needs_reset;
        let mut bytes = format!(
            "{}{}\r\nRCPT TO:<{}>\r\nBDAT {} LAST\r\n",
            if reset { "RSET\r\n" } else { "" },
            self.mail_command(composed),
            composed.to,
            composed.bytes.len()
        )
        .into_bytes();
        bytes.extend_from_slice(&composed.bytes);
        self.needs_reset = true;
        self.dialogue.send(Stage::Content, &bytes, deadline.limit(Stage::Content)).await?;
        // From here on the server has all it needs, so a lost connection leaves the outcome unknown.
        let content = |failure: Failure| Failure { stage: Stage::Content, ..failure };
        if reset {
            let reply = self.dialogue.listen(Stage::Content, deadline.limit(Stage::Content)).await?;
            self.was_reset(&reply).map_err(content)?;
            self.needs_reset = true;
        }
        let mut refusal = None;
        for stage in [Stage::Mail, Stage::Rcpt, Stage::Content] {
            let reply = match (self.dialogue.listen(Stage::Content, deadline.limit(Stage::Content)).await, refusal) {
                (Ok(reply), before) => {
                    refusal = before;
                    reply
                }
                (Err(_), Some(refusal)) => {
                    self.is_lost = true;
                    return Err(refusal);
                }
                (Err(failure), None) => return Err(failure),
            };
            let is_last = reply.code == 421;
            if let Err(failure) = positive(stage, reply)
                && refusal.is_none()
            {
                match failure.cause {
                    Cause::Refused(_) if is_last => return Err(failure),
                    Cause::Refused(_) => refusal = Some(failure),
                    _ => return Err(content(failure)),
                }
            }
        }
        self.needs_reset = refusal.is_some();
        refusal.map_or(Ok(()), Err)
    }

    /// Whether the connection may be given to another mail: no unread bytes are left, unless they reply to its envelope.
    pub fn is_clean(&self) -> bool {
        !self.is_lost && (self.offered.is_some() || self.dialogue.is_clean())
    }

    /// Sends QUIT and closes the connection, whatever the reply.
    pub async fn quit(mut self) {
        let _ = self.dialogue.command(Stage::Mail, "QUIT", QUIT_TIMEOUT).await;
    }
}

/// Encrypts first, with implicit TLS, and reads the greeting.
async fn greeted(
    stream: TcpStream,
    relay: &Relay,
    tls: Option<&TlsConnector>,
    deadline: &Deadline,
    limit: Duration,
) -> Result<Dialogue, Failure> {
    // Each command waits for the reply to the previous one, so Nagle's algorithm would only add delay.
    let _ = stream.set_nodelay(true);
    let mut dialogue = match (relay.tls, tls) {
        (RelayTls::Implicit, Some(tls)) => encrypted(stream, relay, tls, deadline.limits).await?,
        _ => Dialogue::new(stream),
    };
    let greeting = dialogue.listen(Stage::Greeting, limit.min(deadline.limit(Stage::Greeting))).await?;
    positive(Stage::Greeting, greeting)?;
    Ok(dialogue)
}

/// Sends EHLO, or HELO to a server that does not know EHLO and need not encrypt or log in.
async fn say_hello(
    dialogue: &mut Dialogue,
    hello: &str,
    deadline: &Deadline,
    may_be_old: bool,
) -> Result<Capabilities, Failure> {
    let reply = dialogue.command(Stage::Hello, &format!("EHLO {hello}"), deadline.limit(Stage::Hello)).await?;
    if may_be_old && reply.code >= 400 && reply.code != 421 {
        let old = dialogue.command(Stage::Hello, &format!("HELO {hello}"), deadline.limit(Stage::Hello)).await;
        return match old {
            Ok(old) => positive(Stage::Hello, old).map(|()| Capabilities::default()),
            // The server closed the connection after refusing EHLO; the refusal is the better reason.
            Err(_) => Err(refused(Stage::Hello, reply)),
        };
    }
    let capabilities = Capabilities::read(&reply);
    positive(Stage::Hello, reply)?;
    Ok(capabilities)
}

/// Our address as an address literal (RFC 5321, 4.1.3), for hosts without a fully qualified name.
fn literal(local: Option<SocketAddr>) -> String {
    match local.map(|local| local.ip().to_canonical()) {
        Some(IpAddr::V4(address)) => format!("[{address}]"),
        Some(IpAddr::V6(address)) => format!("[IPv6:{address}]"),
        None => "[127.0.0.1]".into(),
    }
}

fn lost(stage: Stage, error: &io::Error) -> Failure {
    Failure { stage, cause: Cause::Lost(error.to_string()) }
}

async fn encrypted(
    stream: impl Stream + 'static,
    relay: &Relay,
    tls: &TlsConnector,
    limits: Limits,
) -> Result<Dialogue, Failure> {
    let name = ServerName::try_from(relay.host.clone()).map_err(|_| Failure {
        stage: Stage::Tls,
        cause: Cause::Unsupported(format!("{} is not a valid name for a certificate", relay.host)),
    })?;
    within(Stage::Tls, limits.connect, tls.connect(name, stream)).await.map(Dialogue::new)
}

async fn within<T>(stage: Stage, limit: Duration, step: impl Future<Output = io::Result<T>>) -> Result<T, Failure> {
    let cause = match timeout(limit, step).await {
        Ok(Ok(done)) => return Ok(done),
        Ok(Err(error)) => Cause::Lost(error.to_string()),
        Err(_) => Cause::TimedOut(limit),
    };
    Err(Failure { stage, cause })
}

/// Whether a reply is about the order of the commands: the server does not follow the pipelining that it offers.
fn is_out_of_step(reply: &Reply) -> bool {
    let text = reply.lines.join(" ").to_lowercase();
    reply.code >= 500 && (text.contains("pipelin") || text.contains("synchroni"))
}

/// The reply to DATA.
fn go_ahead(reply: Reply) -> Result<(), Failure> {
    match reply.code {
        354 => Ok(()),
        400.. => Err(refused(Stage::Data, reply)),
        _ => Err(bad_reply(Stage::Data, &reply)),
    }
}

fn positive(stage: Stage, reply: Reply) -> Result<(), Failure> {
    match reply.code {
        200..300 => Ok(()),
        300..400 => Err(bad_reply(stage, &reply)),
        _ => Err(refused(stage, reply)),
    }
}

fn refused(stage: Stage, reply: Reply) -> Failure {
    Failure { stage, cause: Cause::Refused(reply) }
}

fn bad_reply(stage: Stage, reply: &Reply) -> Failure {
    Failure { stage, cause: Cause::BadReply(reply.to_string()) }
}

#[cfg(test)]
mod tests {
    use smtp_proto::{AUTH_LOGIN, AUTH_PLAIN};

    use super::*;

    #[test]
    fn a_host_without_a_full_name_uses_an_address_literal() {
        let literal = |address: &str| literal(Some(address.parse().unwrap()));
        assert_eq!(literal("192.0.2.1:1"), "[192.0.2.1]");
        assert_eq!(literal("[2001:db8::1]:1"), "[IPv6:2001:db8::1]");
        assert_eq!(literal("[::ffff:192.0.2.1]:1"), "[192.0.2.1]");
    }

    #[test]
    fn capabilities_are_read_in_every_form_that_servers_use() {
        let read = |line: &str| {
            Capabilities::read(&Reply {
                code: 250,
                lines: vec!["8BITMIME SIZE".into(), line.into(), "STARTTLS".into()],
            })
        };
        let logins = |line: &str| {
            assert!(read(line).has(EXT_START_TLS), "{line:?} costs another line");
            read(line).logins
        };
        assert_eq!(logins("AUTH PLAIN LOGIN"), AUTH_PLAIN | AUTH_LOGIN);
        assert_eq!(logins("AUTH=PLAIN LOGIN"), AUTH_PLAIN | AUTH_LOGIN);
        assert_eq!(logins("auth=login"), AUTH_LOGIN);
        assert_eq!(logins("AUTH X-OWN PLAIN"), AUTH_PLAIN);
        for none in
            ["AUTHX PLAIN", "AUTH", "", "ENHANCEDSTATUSCOD", "FUTURERELEASE 1 x", "\u{fffd}\r \0", "X\r250 AUTH PLAIN"]
        {
            assert_eq!(logins(none), 0, "{none:?}");
        }
        assert!(read("size 5").has(EXT_SIZE) && read("SIZE").has(EXT_SIZE) && read("SIZE 10M").has(EXT_SIZE));
        assert!(!read("X").has(EXT_8BIT_MIME | EXT_SIZE), "the first line is a name");
    }

    proptest::proptest! {
        #[test]
        fn any_ehlo_line_leaves_the_others_readable(line in "(AUTH|SIZE|FUTURERELEASE|MT-PRIORITY|NO-SOLICITING|[A-Z0-9=-]{0,9})[ =\\PC\r\t]{0,40}") {
            let reply = Reply { code: 250, lines: vec!["hi".into(), line, "STARTTLS".into()] };
            let capabilities = Capabilities::read(&reply);
            proptest::prop_assert!(capabilities.has(EXT_START_TLS));
        }
    }
}
