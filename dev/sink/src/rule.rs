//! What a mail sink may be told to do other than accept: decided at each stage of each conversation.

use std::{net::SocketAddr, sync::Arc, time::Duration};

/// Where a conversation is when a rule is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage<'a> {
    /// A client has connected, and waits for the greeting.
    Connect,
    /// It has said who it is.
    Hello,
    /// It has logged in, and whether its credentials are right is not looked at yet.
    Auth,
    /// It has named the sender.
    Mail,
    /// It has named this recipient, who is not among those of the session yet.
    Rcpt(&'a str),
    /// It asks to hand over the message.
    Data,
    /// The message is here whole, and the client waits to hear whether it was accepted.
    Message,
}

/// What to do at a stage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// What the sink would do without a rule.
    GoOn,
    /// Refuses with this code and text; each line of the text becomes one of the reply. After 421 the connection is closed,
    /// as after any refusal at [`Stage::Connect`].
    Reply(u16, String),
    /// Goes on after so long.
    Wait(Duration),
    /// Closes the connection without an answer.
    Drop,
    /// Never answers; ends when the client goes, or the sink stops.
    Hang,
    /// At [`Stage::Message`], accepts the message and closes the connection without saying so. Elsewhere, as `Drop`.
    AcceptThenDrop,
}

/// Asked at each stage; it must not block.
pub type Rule = Arc<dyn Fn(Stage<'_>, &Session) -> Action + Send + Sync>;

/// One connection, as far as the conversation on it has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// Its number; the first since the sink started is 1.
    pub connection: u64,
    /// The client.
    pub peer: SocketAddr,
    /// Whether it is encrypted.
    pub tls: bool,
    /// The name from the client's greeting.
    pub hello: Option<String>,
    /// Who has logged in.
    pub user: Option<String>,
    /// The sender of the message under way; empty for none (`<>`).
    pub sender: Option<String>,
    /// The recipients of the message under way.
    pub recipients: Vec<String>,
    /// How many messages this connection has had accepted.
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

    /// Forgets the message under way.
    pub(super) fn reset(&mut self) {
        self.sender = None;
        self.recipients.clear();
    }

    /// What a client that has just encrypted the connection must say again.
    pub(super) fn encrypted(mut self) -> Self {
        self.reset();
        Self { tls: true, hello: None, user: None, ..self }
    }
}
