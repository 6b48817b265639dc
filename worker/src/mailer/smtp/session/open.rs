//! Opens a session: connects, encrypts, introduces us and logs in.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use mailrun_app::config::{Relay, RelayTls};
use smtp_proto::EXT_START_TLS;
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::{TlsConnector, rustls::pki_types::ServerName};

use super::{
    super::{
        connect::{addresses, connect},
        dialogue::{Dialogue, Stream},
        limits::{Deadline, Limits},
        login::log_in,
        verdict::{Cause, Failure, Stage},
    },
    Capabilities, Manners, Session, positive, refused,
};

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
            manners: Arc::clone(manners),
            capabilities,
            mails: 0,
            needs_reset: false,
            is_offered: false,
            is_lost: false,
        })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_without_a_full_name_uses_an_address_literal() {
        let literal = |address: &str| literal(Some(address.parse().unwrap()));
        assert_eq!(literal("192.0.2.1:1"), "[192.0.2.1]");
        assert_eq!(literal("[2001:db8::1]:1"), "[IPv6:2001:db8::1]");
        assert_eq!(literal("[::ffff:192.0.2.1]:1"), "[192.0.2.1]");
    }
}
