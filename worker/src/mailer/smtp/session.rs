//! A session with a relay: connect, encrypt, log in, deliver messages.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use mailrun_app::config::{Relay, RelayTls};
use smtp_proto::{EXT_8BIT_MIME, EXT_SIZE, EXT_SMTP_UTF8, EXT_START_TLS, EhloResponse};
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::{TlsConnector, rustls::pki_types::ServerName};

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
    capabilities: Capabilities,
    /// How many mails were offered on this connection.
    pub mails: u32,
}

impl Session {
    /// Connects, encrypts, sends EHLO and logs in.
    ///
    /// # Errors
    /// If one of these steps fails.
    pub async fn open(
        relay: &Relay,
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
        Ok(Self { dialogue, capabilities, mails: 0 })
    }

    /// Hands a mail to the server.
    ///
    /// # Errors
    /// If the server did not confirm that it accepted the mail.
    pub async fn deliver(
        &mut self,
        composed: &ComposedMail,
        attempt: &Attempt,
        deadline: &Deadline,
    ) -> Result<(), Failure> {
        attempt.may_proceed().await.map_err(|withdrawn| Failure::withdrawn(Stage::Mail, withdrawn))?;
        self.mails += 1;
        let mut mail = format!("MAIL FROM:<{}>", composed.from);
        if self.capabilities.has(EXT_SIZE) {
            mail.push_str(&format!(" SIZE={}", composed.bytes.len()));
        }
        if composed.needs_utf8 {
            if !self.capabilities.has(EXT_SMTP_UTF8) {
                let why = "the mail server does not support non-ASCII characters before the @ sign (no SMTPUTF8)";
                return Err(Failure { stage: Stage::Mail, cause: Cause::Unsupported(why.into()) });
            }
            mail.push_str(if self.capabilities.has(EXT_8BIT_MIME) { " BODY=8BITMIME SMTPUTF8" } else { " SMTPUTF8" });
        }
        let limit = |stage| deadline.limit(stage);
        positive(Stage::Mail, self.dialogue.command(Stage::Mail, &mail, limit(Stage::Mail)).await?)?;
        let rcpt = format!("RCPT TO:<{}>", composed.to);
        positive(Stage::Rcpt, self.dialogue.command(Stage::Rcpt, &rcpt, limit(Stage::Rcpt)).await?)?;
        match self.dialogue.command(Stage::Data, "DATA", limit(Stage::Data)).await? {
            reply if reply.code == 354 => {}
            reply if reply.code >= 400 => return Err(refused(Stage::Data, reply)),
            reply => return Err(bad_reply(Stage::Data, &reply)),
        }
        // The last safe moment: without the content, the server has nothing to accept.
        attempt.may_commit().map_err(|withdrawn| Failure::withdrawn(Stage::Content, withdrawn))?;
        positive(Stage::Content, self.dialogue.message(&composed.bytes, || limit(Stage::Content)).await?)
    }

    /// Whether the connection may be reused: no unread bytes are left.
    pub fn is_clean(&self) -> bool {
        self.dialogue.is_clean()
    }

    /// Resets the server's state after a refused mail. Returns whether the connection can be reused.
    pub async fn reset(&mut self) -> bool {
        let reply = self.dialogue.command(Stage::Mail, "RSET", RESET_TIMEOUT).await;
        reply.is_ok_and(|reply| reply.is_positive()) && self.is_clean()
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
