//! A connection to a relay, from the first byte to the answer to a message.

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
    super::message::Letter,
    connect::{addresses, connect},
    dialogue::{Dialogue, Stream},
    limits::{Deadline, Limits},
    login::log_in,
    reply::Reply,
    verdict::{Failure, Stage, Trouble},
};
use crate::attempt::Attempt;

/// How long a farewell may take. It is a courtesy.
const FAREWELL: Duration = Duration::from_millis(500);
/// How long a server may take to forget a mail.
const RESET: Duration = Duration::from_secs(30);

/// What the server said that it can do, after EHLO: bits of [`smtp_proto`].
#[derive(Clone, Copy, Debug, Default)]
struct Abilities {
    extensions: u32,
    logins: u64,
}

impl Abilities {
    fn read(reply: &Reply) -> Self {
        let mut abilities = Self::default();
        // The first line is the server's name. Each line is parsed alone, so that an odd one costs no other.
        for line in reply.lines.iter().skip(1) {
            if let Ok(read) = EhloResponse::parse(&mut format!("250-\n250 {line}\n").as_bytes().iter()) {
                abilities.extensions |= read.capabilities;
                abilities.logins |= read.auth_mechanisms;
            }
        }
        abilities
    }

    fn has(self, extension: u32) -> bool {
        self.extensions & extension != 0
    }
}

/// A connection that is ready for mail.
pub struct Session {
    dialogue: Dialogue,
    abilities: Abilities,
    /// Mails it was used for.
    pub mails: u32,
}

impl Session {
    /// Connects, encrypts, says hello and logs in.
    ///
    /// # Errors
    /// At the first of these that does not succeed.
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
                // What a server said says more than that no other address answers.
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
        let mut abilities = say_hello(&mut dialogue, &own, deadline, may_be_old).await?;
        if let (RelayTls::StartTls, Some(tls)) = (relay.tls, tls) {
            let failed = |trouble| Failure { stage: Stage::StartTls, trouble };
            if !abilities.has(EXT_START_TLS) {
                return Err(failed(Trouble::Unable("the mail server offers no encryption (STARTTLS)".into())));
            }
            let reply = dialogue.command(Stage::StartTls, "STARTTLS", deadline.limit(Stage::StartTls)).await?;
            positive(Stage::StartTls, reply)?;
            dialogue = encrypted(dialogue.into_stream().map_err(failed)?, relay, tls, limits).await?;
            // What it said before could have been said by anybody.
            abilities = say_hello(&mut dialogue, &own, deadline, false).await?;
        }
        if let Some(login) = &relay.login {
            log_in(&mut dialogue, login, abilities.logins, deadline.limit(Stage::Login)).await?;
        }
        Ok(Self { dialogue, abilities, mails: 0 })
    }

    /// Hands a letter over.
    ///
    /// # Errors
    /// When the server did not say that it took it.
    pub async fn deliver(&mut self, letter: &Letter, attempt: &Attempt, deadline: &Deadline) -> Result<(), Failure> {
        attempt.may_proceed().await.map_err(|withdrawn| Failure::withdrawn(Stage::Mail, withdrawn))?;
        self.mails += 1;
        let mut mail = format!("MAIL FROM:<{}>", letter.from);
        if self.abilities.has(EXT_SIZE) {
            mail.push_str(&format!(" SIZE={}", letter.bytes.len()));
        }
        if letter.needs_utf8 {
            if !self.abilities.has(EXT_SMTP_UTF8) {
                let why = "the mail server can't write to an address with such letters before the @ sign (no SMTPUTF8)";
                return Err(Failure { stage: Stage::Mail, trouble: Trouble::Unable(why.into()) });
            }
            mail.push_str(if self.abilities.has(EXT_8BIT_MIME) { " BODY=8BITMIME SMTPUTF8" } else { " SMTPUTF8" });
        }
        let limit = |stage| deadline.limit(stage);
        positive(Stage::Mail, self.dialogue.command(Stage::Mail, &mail, limit(Stage::Mail)).await?)?;
        let rcpt = format!("RCPT TO:<{}>", letter.to);
        positive(Stage::Rcpt, self.dialogue.command(Stage::Rcpt, &rcpt, limit(Stage::Rcpt)).await?)?;
        match self.dialogue.command(Stage::Data, "DATA", limit(Stage::Data)).await? {
            reply if reply.code == 354 => {}
            reply if reply.code >= 400 => return Err(refused(Stage::Data, reply)),
            reply => return Err(senseless(Stage::Data, &reply)),
        }
        // The last moment: a server that gets no more than this has nothing to accept.
        attempt.may_commit().map_err(|withdrawn| Failure::withdrawn(Stage::Content, withdrawn))?;
        positive(Stage::Content, self.dialogue.message(&letter.bytes, || limit(Stage::Content)).await?)
    }

    /// Whether the connection may be used again: nothing is left unread on it.
    pub fn is_clean(&self) -> bool {
        self.dialogue.is_clean()
    }

    /// Forgets a mail that was refused. False: the connection is of no use any more.
    pub async fn reset(&mut self) -> bool {
        let reply = self.dialogue.command(Stage::Mail, "RSET", RESET).await;
        reply.is_ok_and(|reply| reply.is_positive()) && self.is_clean()
    }

    /// Says goodbye.
    pub async fn quit(mut self) {
        // Whatever the server says to it, the connection is closed.
        let _ = self.dialogue.command(Stage::Mail, "QUIT", FAREWELL).await;
    }
}

/// Encrypts, if that comes first, and reads the greeting.
async fn greeted(
    stream: TcpStream,
    relay: &Relay,
    tls: Option<&TlsConnector>,
    deadline: &Deadline,
    limit: Duration,
) -> Result<Dialogue, Failure> {
    // An answer to one command is what the next one waits for: nothing is gained by gathering.
    let _ = stream.set_nodelay(true);
    let mut dialogue = match (relay.tls, tls) {
        (RelayTls::Implicit, Some(tls)) => encrypted(stream, relay, tls, deadline.limits).await?,
        _ => Dialogue::new(stream),
    };
    let greeting = dialogue.listen(Stage::Greeting, limit.min(deadline.limit(Stage::Greeting))).await?;
    positive(Stage::Greeting, greeting)?;
    Ok(dialogue)
}

/// Says EHLO or, to a server that does not know it and need not encrypt or log in, HELO.
async fn say_hello(
    dialogue: &mut Dialogue,
    hello: &str,
    deadline: &Deadline,
    may_be_old: bool,
) -> Result<Abilities, Failure> {
    let reply = dialogue.command(Stage::Hello, &format!("EHLO {hello}"), deadline.limit(Stage::Hello)).await?;
    if may_be_old && reply.code >= 400 && reply.code != 421 {
        let old = dialogue.command(Stage::Hello, &format!("HELO {hello}"), deadline.limit(Stage::Hello)).await;
        return match old {
            Ok(old) => positive(Stage::Hello, old).map(|()| Abilities::default()),
            // It has closed the connection after its refusal, which says more.
            Err(_) => Err(refused(Stage::Hello, reply)),
        };
    }
    let abilities = Abilities::read(&reply);
    positive(Stage::Hello, reply)?;
    Ok(abilities)
}

/// Our address as a name (RFC 5321, 4.1.3), for hosts whose own name is not fully qualified.
fn literal(local: Option<SocketAddr>) -> String {
    match local.map(|local| local.ip().to_canonical()) {
        Some(IpAddr::V4(address)) => format!("[{address}]"),
        Some(IpAddr::V6(address)) => format!("[IPv6:{address}]"),
        None => "[127.0.0.1]".into(),
    }
}

fn lost(stage: Stage, error: &io::Error) -> Failure {
    Failure { stage, trouble: Trouble::Lost(error.to_string()) }
}

async fn encrypted(
    stream: impl Stream + 'static,
    relay: &Relay,
    tls: &TlsConnector,
    limits: Limits,
) -> Result<Dialogue, Failure> {
    let name = ServerName::try_from(relay.host.clone()).map_err(|_| Failure {
        stage: Stage::Tls,
        trouble: Trouble::Unable(format!("{} is no name that a certificate could have", relay.host)),
    })?;
    within(Stage::Tls, limits.connect, tls.connect(name, stream)).await.map(Dialogue::new)
}

async fn within<T>(stage: Stage, limit: Duration, step: impl Future<Output = io::Result<T>>) -> Result<T, Failure> {
    let trouble = match timeout(limit, step).await {
        Ok(Ok(done)) => return Ok(done),
        Ok(Err(error)) => Trouble::Lost(error.to_string()),
        Err(_) => Trouble::Slow(limit),
    };
    Err(Failure { stage, trouble })
}

fn positive(stage: Stage, reply: Reply) -> Result<(), Failure> {
    match reply.code {
        200..300 => Ok(()),
        300..400 => Err(senseless(stage, &reply)),
        _ => Err(refused(stage, reply)),
    }
}

fn refused(stage: Stage, reply: Reply) -> Failure {
    Failure { stage, trouble: Trouble::Refused(reply) }
}

fn senseless(stage: Stage, reply: &Reply) -> Failure {
    Failure { stage, trouble: Trouble::Senseless(reply.to_string()) }
}

#[cfg(test)]
mod tests {
    use smtp_proto::{AUTH_LOGIN, AUTH_PLAIN};

    use super::*;

    #[test]
    fn a_host_without_a_full_name_is_called_by_its_address() {
        let literal = |address: &str| literal(Some(address.parse().unwrap()));
        assert_eq!(literal("192.0.2.1:1"), "[192.0.2.1]");
        assert_eq!(literal("[2001:db8::1]:1"), "[IPv6:2001:db8::1]");
        assert_eq!(literal("[::ffff:192.0.2.1]:1"), "[192.0.2.1]");
    }

    #[test]
    fn what_a_server_can_do_is_read_as_servers_write_it() {
        let read = |line: &str| {
            Abilities::read(&Reply { code: 250, lines: vec!["8BITMIME SIZE".into(), line.into(), "STARTTLS".into()] })
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
        fn any_line_can_be_said_after_ehlo(line in "(AUTH|SIZE|FUTURERELEASE|MT-PRIORITY|NO-SOLICITING|[A-Z0-9=-]{0,9})[ =\\PC\r\t]{0,40}") {
            let reply = Reply { code: 250, lines: vec!["hi".into(), line, "STARTTLS".into()] };
            let abilities = Abilities::read(&reply);
            proptest::prop_assert!(abilities.has(EXT_START_TLS));
        }
    }
}
