//! A connection to a relay, from the first byte to the answer to a message.

use std::{io, time::Duration};

use mailrun_shared::config::{Relay, RelayTls, SmtpConfig};
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::{TlsConnector, rustls::pki_types::ServerName};

use super::{
    super::message::Letter,
    dialogue::{Dialogue, Stream},
    login::log_in,
    reply::Reply,
    verdict::{Failure, Stage, Trouble},
};
use crate::attempt::Attempt;

/// How long a farewell may take. It is a courtesy.
const FAREWELL: Duration = Duration::from_millis(500);

/// How long each step may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    connect: Duration,
    command: Duration,
    message: Duration,
}

impl Limits {
    /// As configured.
    pub fn new(config: &SmtpConfig) -> Self {
        Self {
            connect: Duration::from_millis(config.connect_timeout_ms),
            command: Duration::from_millis(config.command_timeout_ms),
            message: Duration::from_millis(config.message_timeout_ms),
        }
    }
}

/// What the server said that it can do, after EHLO.
#[derive(Clone, Debug, Default)]
struct Abilities {
    start_tls: bool,
    eight_bit: bool,
    utf8: bool,
    size: bool,
    logins: Vec<String>,
}

impl Abilities {
    fn read(reply: &Reply) -> Self {
        let mut abilities = Self::default();
        // The first line is the server's name.
        for line in reply.lines.iter().skip(1) {
            let line = line.to_ascii_uppercase();
            let mut words = line.split_ascii_whitespace();
            match words.next() {
                Some("STARTTLS") => abilities.start_tls = true,
                Some("8BITMIME") => abilities.eight_bit = true,
                Some("SMTPUTF8") => abilities.utf8 = true,
                Some("SIZE") => abilities.size = true,
                Some("AUTH") => abilities.logins.extend(words.map(str::to_owned)),
                _ => {}
            }
        }
        abilities
    }
}

/// A connection that is ready for mail.
pub struct Session {
    dialogue: Dialogue,
    abilities: Abilities,
    limits: Limits,
    /// Mails it was used for.
    pub mails: u32,
}

impl Session {
    /// Connects, encrypts, says hello and logs in.
    ///
    /// # Errors
    /// At the first of these that does not succeed.
    pub async fn open(relay: &Relay, tls: Option<&TlsConnector>, hello: &str, limits: Limits) -> Result<Self, Failure> {
        let connect = TcpStream::connect((relay.host.as_str(), relay.port));
        let stream = within(Stage::Connect, limits.connect, connect).await?;
        // An answer to one command is what the next one waits for: nothing is gained by gathering.
        let _ = stream.set_nodelay(true);
        let mut dialogue = match (relay.tls, tls) {
            (RelayTls::Implicit, Some(tls)) => encrypted(stream, relay, tls, limits).await?,
            _ => Dialogue::new(stream),
        };
        let greeting = dialogue.listen(Stage::Greeting, limits.command).await?;
        positive(Stage::Greeting, greeting)?;
        let mut abilities = say_hello(&mut dialogue, hello, limits).await?;
        if let (RelayTls::StartTls, Some(tls)) = (relay.tls, tls) {
            let failed = |trouble| Failure { stage: Stage::StartTls, trouble };
            if !abilities.start_tls {
                return Err(failed(Trouble::Unable("the mail server offers no encryption (STARTTLS)".into())));
            }
            let reply = dialogue.command(Stage::StartTls, "STARTTLS", limits.command).await?;
            positive(Stage::StartTls, reply)?;
            dialogue = encrypted(dialogue.into_stream().map_err(failed)?, relay, tls, limits).await?;
            // What it said before could have been said by anybody.
            abilities = say_hello(&mut dialogue, hello, limits).await?;
        }
        if let Some(login) = &relay.login {
            log_in(&mut dialogue, login, &abilities.logins, limits.command).await?;
        }
        Ok(Self { dialogue, abilities, limits, mails: 0 })
    }

    /// Hands a letter over.
    ///
    /// # Errors
    /// When the server did not say that it took it.
    pub async fn deliver(&mut self, letter: &Letter, attempt: &Attempt) -> Result<(), Failure> {
        attempt.may_begin().await.map_err(|withdrawn| Failure::withdrawn(Stage::Mail, withdrawn))?;
        self.mails += 1;
        let mut mail = format!("MAIL FROM:<{}>", letter.from);
        if self.abilities.size {
            mail.push_str(&format!(" SIZE={}", letter.bytes.len()));
        }
        if letter.needs_utf8 {
            if !self.abilities.utf8 {
                let why = "the mail server can't write to an address with such letters before the @ sign (no SMTPUTF8)";
                return Err(Failure { stage: Stage::Mail, trouble: Trouble::Unable(why.into()) });
            }
            mail.push_str(if self.abilities.eight_bit { " BODY=8BITMIME SMTPUTF8" } else { " SMTPUTF8" });
        }
        let limit = self.limits.command;
        positive(Stage::Mail, self.dialogue.command(Stage::Mail, &mail, limit).await?)?;
        let rcpt = format!("RCPT TO:<{}>", letter.to);
        positive(Stage::Rcpt, self.dialogue.command(Stage::Rcpt, &rcpt, limit).await?)?;
        match self.dialogue.command(Stage::Data, "DATA", limit).await? {
            reply if reply.code == 354 => {}
            reply if reply.code >= 400 => return Err(refused(Stage::Data, reply)),
            reply => return Err(senseless(Stage::Data, &reply)),
        }
        // The last moment: a server that gets no more than this has nothing to accept.
        attempt.may_commit().map_err(|withdrawn| Failure::withdrawn(Stage::Content, withdrawn))?;
        positive(Stage::Content, self.dialogue.message(&letter.bytes, self.limits.message).await?)
    }

    /// Forgets a mail that was refused. False: the connection is of no use any more.
    pub async fn reset(&mut self) -> bool {
        let reply = self.dialogue.command(Stage::Mail, "RSET", self.limits.command).await;
        reply.is_ok_and(|reply| reply.is_positive())
    }

    /// Says goodbye.
    pub async fn quit(mut self) {
        // Whatever the server says to it, the connection is closed.
        let _ = self.dialogue.command(Stage::Mail, "QUIT", self.limits.command.min(FAREWELL)).await;
    }
}

async fn say_hello(dialogue: &mut Dialogue, hello: &str, limits: Limits) -> Result<Abilities, Failure> {
    let reply = dialogue.command(Stage::Hello, &format!("EHLO {hello}"), limits.command).await?;
    let abilities = Abilities::read(&reply);
    positive(Stage::Hello, reply)?;
    Ok(abilities)
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
