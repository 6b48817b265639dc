//! Rules that make a mail sink misbehave: decided at each stage of each SMTP session.

use std::{net::SocketAddr, sync::Arc, time::Duration};

/// The stage of a session at which a rule is evaluated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage<'a> {
    /// A client has connected and waits for the greeting.
    Connect,
    /// It has sent EHLO or HELO.
    Hello,
    /// It has sent credentials, which are not checked yet.
    Auth,
    /// It has named the sender.
    Mail,
    /// It has named this recipient, who is not in the session yet.
    Rcpt(&'a str),
    /// It wants to send the message.
    Data,
    /// The message is complete, and the client waits for the reply.
    Message,
}

/// What to do at a stage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Continue as without a rule.
    GoOn,
    /// Refuse with this code and text; each line of the text becomes a line of the reply. After 421, and after any refusal at
    /// [`Stage::Connect`], the connection is closed.
    Reply(u16, String),
    /// Continue after this time.
    Wait(Duration),
    /// Close the connection without a reply.
    Drop,
    /// Never reply, until the client disconnects or the sink stops.
    Hang,
    /// At [`Stage::Message`], accept the message and close the connection without a reply. Elsewhere, like `Drop`.
    AcceptThenDrop,
}

/// Evaluated at each stage; it must not block.
pub type Rule = Arc<dyn Fn(Stage<'_>, &Session) -> Action + Send + Sync>;

/// The state of one connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// Its number since the sink started, from 1.
    pub connection: u64,
    /// The client's address.
    pub peer: SocketAddr,
    /// Whether it uses TLS.
    pub tls: bool,
    /// The name in the client's EHLO or HELO.
    pub hello: Option<String>,
    /// The user who has logged in.
    pub user: Option<String>,
    /// The sender of the current message; empty for none (`<>`).
    pub sender: Option<String>,
    /// The recipients of the current message.
    pub recipients: Vec<String>,
    /// How many messages were accepted on this connection.
    pub accepted: u64,
}

impl Session {
    pub(super) fn new(connection: u64, peer: SocketAddr) -> Self {
        Self {
            connection,
            peer,
            tls: false,
            hello: None,
            user: None,
            sender: None,
            recipients: Vec::new(),
            accepted: 0,
        }
    }

    /// Discards the current message.
    pub(super) fn reset(&mut self) {
        self.sender = None;
        self.recipients.clear();
    }

    /// The session after STARTTLS, which the client must begin again.
    pub(super) fn encrypted(mut self) -> Self {
        self.reset();
        Self { tls: true, hello: None, user: None, ..self }
    }
}
