//! A session with a relay: connect, encrypt, log in (`open`), deliver mails (`deliver`).

mod deliver;
mod manners;
mod open;

use std::{sync::Arc, time::Duration};

use smtp_proto::{EXT_SMTP_UTF8, EhloResponse};

use super::{
    super::message::ComposedMail,
    dialogue::Dialogue,
    reply::Reply,
    verdict::{Cause, Failure, Stage},
};

pub use manners::Manners;

/// How long to wait for the reply to QUIT. Best effort.
const QUIT_TIMEOUT: Duration = Duration::from_millis(500);

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
    manners: Arc<Manners>,
    capabilities: Capabilities,
    /// How many mails were offered on this connection.
    mails: u32,
    /// A mail was refused, and the server may still know its sender or recipient. RSET goes before the next envelope.
    needs_reset: bool,
    /// The envelope of the next mail was sent behind the message of the last one.
    is_offered: bool,
    /// Replies to earlier commands are missing.
    is_lost: bool,
}

impl Session {
    /// Whether the server can be given this mail.
    pub fn takes(&self, composed: &ComposedMail) -> bool {
        !composed.needs_utf8 || self.capabilities.has(EXT_SMTP_UTF8)
    }

    /// How many mails were offered on this connection.
    pub fn mails(&self) -> u32 {
        self.mails
    }

    /// Whether the connection may be given to another mail: no unread bytes are left, unless they reply to its envelope.
    pub fn is_clean(&self) -> bool {
        !self.is_lost && (self.is_offered || self.dialogue.is_clean())
    }

    /// Sends QUIT and closes the connection, whatever the reply.
    pub async fn quit(mut self) {
        let _ = self.dialogue.command(Stage::Mail, "QUIT", QUIT_TIMEOUT).await;
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
    use smtp_proto::{AUTH_LOGIN, AUTH_PLAIN, EXT_8BIT_MIME, EXT_SIZE, EXT_START_TLS};

    use super::*;

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
