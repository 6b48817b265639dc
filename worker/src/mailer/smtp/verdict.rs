//! What follows from what went wrong: whether it is about the relay, the mail, or the address. Pure functions, with the replies
//! of real servers in mind.

use std::{fmt, time::Duration};

use super::{super::Outcome, reply::Reply};
use crate::attempt::Withdrawn;

/// How far a conversation had come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The connection itself.
    Connect,
    /// Its encryption.
    Tls,
    /// The server speaks first.
    Greeting,
    /// EHLO.
    Hello,
    /// STARTTLS.
    StartTls,
    /// AUTH.
    Login,
    /// MAIL.
    Mail,
    /// RCPT.
    Rcpt,
    /// DATA, until the server says go ahead. Nothing of the message is sent yet.
    Data,
    /// The message, from its first byte to the server's answer.
    Content,
}

impl Stage {
    /// No mail is spoken of yet: whatever goes wrong is the relay's trouble.
    fn is_before_mail(self) -> bool {
        !matches!(self, Self::Mail | Self::Rcpt | Self::Data | Self::Content)
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Connect => "the connection",
            Self::Tls => "the encryption",
            Self::Greeting => "the greeting",
            Self::Hello => "EHLO",
            Self::StartTls => "STARTTLS",
            Self::Login => "the login",
            Self::Mail => "MAIL",
            Self::Rcpt => "RCPT",
            Self::Data => "DATA",
            Self::Content => "the message",
        })
    }
}

/// What went wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// The server said no.
    Refused(Reply),
    /// The server said something that is no answer at this point.
    Senseless(String),
    /// The connection broke, or never came to be.
    Lost(String),
    /// No answer in this time.
    Slow(Duration),
    /// The server can't do what is needed.
    Unable(String),
    /// We broke it off: the attempt must not go on.
    Withdrawn(Withdrawn),
}

/// Trouble, and when.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// How far it had come.
    pub stage: Stage,
    /// What went wrong.
    pub trouble: Trouble,
}

/// What follows from a failure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The relay takes no mail at present. The mail was certainly not sent.
    Away(String),
    /// The relay is well; this is what became of the mail.
    Mail(Outcome),
    /// The conversation broke. It says nothing for sure about the relay; this is what became of the mail.
    Broken(Outcome),
    /// The attempt must not go on. It says nothing about the relay, and the mail was certainly not sent.
    Withdrawn(Withdrawn),
}

impl Failure {
    /// An attempt that is broken off before `stage`.
    pub fn withdrawn(stage: Stage, withdrawn: Withdrawn) -> Self {
        Self { stage, trouble: Trouble::Withdrawn(withdrawn) }
    }

    /// Whether a connection that was used before has only turned out to be dead: nothing is lost by trying a fresh one.
    pub fn is_stale(&self) -> bool {
        let dead = match &self.trouble {
            Trouble::Lost(_) | Trouble::Slow(_) => true,
            // "421 idle for too long" was said while nobody listened.
            Trouble::Refused(reply) => reply.code == 421,
            Trouble::Senseless(_) | Trouble::Unable(_) | Trouble::Withdrawn(_) => false,
        };
        dead && matches!(self.stage, Stage::Mail | Stage::Rcpt)
    }

    /// Whether the connection can go on after it.
    pub fn leaves_a_connection(&self) -> bool {
        match &self.trouble {
            Trouble::Refused(reply) => reply.code != 421 && !self.stage.is_before_mail(),
            Trouble::Unable(_) => !self.stage.is_before_mail(),
            // After DATA, anything that is said would be taken for the message.
            Trouble::Withdrawn(_) => self.stage == Stage::Mail,
            _ => false,
        }
    }

    /// What follows.
    pub fn verdict(&self) -> Verdict {
        let reason = self.to_string();
        if self.stage.is_before_mail() {
            return Verdict::Away(reason);
        }
        match &self.trouble {
            Trouble::Refused(reply) if concerns_relay(self.stage, reply) => Verdict::Away(reason),
            Trouble::Refused(reply) if reply.code < 500 => Verdict::Mail(Outcome::Retry(reason)),
            Trouble::Refused(reply) => {
                Verdict::Mail(Outcome::Failed { reason, bad_address: is_bad_address(self.stage, reply) })
            }
            Trouble::Unable(_) => Verdict::Mail(Outcome::Failed { reason, bad_address: false }),
            Trouble::Withdrawn(withdrawn) => Verdict::Withdrawn(*withdrawn),
            Trouble::Senseless(_) | Trouble::Lost(_) | Trouble::Slow(_) if self.stage == Stage::Content => {
                Verdict::Broken(Outcome::Unknown(reason))
            }
            Trouble::Senseless(_) | Trouble::Lost(_) | Trouble::Slow(_) => Verdict::Broken(Outcome::Retry(reason)),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stage = self.stage;
        match &self.trouble {
            Trouble::Refused(reply) if stage.is_before_mail() => write!(f, "{stage} was refused: {reply}"),
            Trouble::Refused(reply) => write!(f, "{reply}"),
            Trouble::Senseless(said) => write!(f, "{stage} was answered with what is no answer: {said}"),
            Trouble::Lost(why) if stage == Stage::Connect => write!(f, "the mail server can't be reached: {why}"),
            Trouble::Lost(why) => write!(f, "the connection was lost at {stage}: {why}"),
            Trouble::Slow(limit) => write!(f, "no answer to {stage} within {limit:?}"),
            Trouble::Unable(why) => f.write_str(why),
            Trouble::Withdrawn(_) => write!(f, "broken off before {stage}"),
        }
    }
}

/// Whether a refusal is about the relay, or about all that we send, and not about this mail.
pub fn concerns_relay(stage: Stage, reply: &Reply) -> bool {
    match reply.code {
        // "Closing the channel", whatever the reason; "temporary authentication failure", which some send for throttling.
        421 | 454 => true,
        // Authentication is required, too weak, wrong, or needs encryption: the next mail would fare no better.
        530 | 534 | 535 | 538 => true,
        400..500 => is_throttling(stage, reply),
        _ => false,
    }
}

/// Whether a 4xx asks for less mail, or for mail at another time, whoever it is for.
///
/// At RCPT, "try again later" alone means this recipient: it is how greylisting is put. Before a recipient is named it can only
/// mean us.
fn is_throttling(stage: Stage, reply: &Reply) -> bool {
    let text = reply.lines.join(" ").to_lowercase();
    let says = |phrases: &[&str]| phrases.iter().any(|phrase| text.contains(phrase));
    if says(&["greylist", "graylist", "grey-list", "gray-list", "grey list"]) {
        return false;
    }
    match reply.detail() {
        // A full or busy mailbox: it says "rate" and "too many" as well, and means its own.
        Some((1 | 2, _)) => return false,
        // The system is full or takes no mail; congestion; too many recipients, though we named one.
        Some((3, 1 | 2) | (4, 5) | (5, 3)) => return true,
        // The limits of two large providers: too much from this address, server busy.
        Some((7, 28 | 500..700)) => return true,
        _ => {}
    }
    says(&[
        "too many",
        "too much mail",
        "too fast",
        "throttl",
        "rate limit",
        "rate-limit",
        "ratelimit",
        "rate exceeded",
        "sending rate",
        "limit exceeded",
        "exceeded the rate",
        "quota exceeded",
        "server busy",
        "server too busy",
        "system busy",
    ]) || (stage == Stage::Mail && says(&["try again later", "try later", "come back later", "retry later"]))
}

/// Whether a 5xx says that there is no such address.
pub fn is_bad_address(stage: Stage, reply: &Reply) -> bool {
    match (stage, reply.detail()) {
        // No mailbox, no domain, bad syntax, moved without a new address, a domain that takes no mail.
        (Stage::Rcpt | Stage::Content, Some(detail)) => matches!(detail, (1, 1 | 2 | 3 | 6 | 10)),
        (Stage::Rcpt, None) => matches!(reply.code, 550 | 551 | 553),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(stage: Stage, code: u16, text: &str) -> Failure {
        Failure { stage, trouble: Trouble::Refused(Reply { code, lines: vec![text.into()] }) }
    }

    #[test]
    fn what_is_the_relays_trouble_is_no_mails_fault() {
        use Stage::*;
        for (stage, code, text) in [
            (Greeting, 554, "5.7.1 no service for you"),
            (Greeting, 421, "busy"),
            (Hello, 550, "who are you"),
            (StartTls, 454, "4.7.0 TLS not available"),
            (Login, 535, "5.7.8 bad password"),
            (Login, 451, "4.3.0 later"),
            (Mail, 421, "4.7.0 try again later"),
            (Mail, 530, "5.7.0 must issue STARTTLS first"),
            (Mail, 451, "try again later"),
            (Mail, 452, "4.3.1 insufficient system storage"),
            (Rcpt, 421, "4.7.28 rate limit"),
            (Rcpt, 450, "4.7.28 our system has detected an unusual rate"),
            (Rcpt, 451, "4.7.500 server busy"),
            (Rcpt, 451, "4.7.650 temporarily rate limited"),
            (Rcpt, 452, "4.5.3 too many recipients"),
            (Rcpt, 450, "too many connections from your address"),
            (Data, 454, "Throttling failure: Maximum sending rate exceeded."),
            (Data, 452, "4.4.5 insufficient disk space"),
            (Content, 451, "4.3.2 please try again later"),
            (Content, 421, "4.3.0 shutting down"),
            (Content, 450, "4.7.1 Error: too much mail from 192.0.2.1"),
        ] {
            let verdict = refused(stage, code, text).verdict();
            assert!(matches!(&verdict, Verdict::Away(reason) if reason.ends_with(text)), "{code} {text}: {verdict:?}");
        }
    }

    #[test]
    fn what_may_pass_is_tried_again() {
        use Stage::*;
        for (stage, code, text) in [
            (Mail, 451, "4.3.0 text"),
            (Rcpt, 450, "4.7.1 Greylisted, please try again in 300 seconds"),
            (Rcpt, 451, "4.7.1 Please try again later"),
            (Rcpt, 450, "4.7.1 <x>: Recipient address rejected: Greylisting in effect: too many tries"),
            (Rcpt, 450, "4.2.1 The user is receiving mail at a rate that is too high; too many"),
            (Rcpt, 452, "4.2.2 mailbox full, quota exceeded"),
            (Rcpt, 451, "Temporary local problem - please try later"),
            (Rcpt, 450, "4.1.8 sender domain not found"),
            (Data, 451, "local error"),
            (Content, 451, "4.7.1 content scanner not available, try again later"),
        ] {
            let verdict = refused(stage, code, text).verdict();
            assert_eq!(verdict, Verdict::Mail(Outcome::Retry(format!("{code} {text}"))));
        }
    }

    #[test]
    fn an_address_is_bad_only_if_the_server_says_so() {
        use Stage::*;
        for (stage, code, text, bad) in [
            (Rcpt, 550, "5.1.1 no such user", true),
            (Rcpt, 550, "5.1.2 no such host", true),
            (Rcpt, 553, "5.1.3 bad syntax", true),
            (Rcpt, 551, "5.1.6 moved", true),
            (Rcpt, 556, "5.1.10 null MX", true),
            (Content, 550, "5.1.1 no such user", true),
            (Rcpt, 550, "no such user", true),
            (Rcpt, 551, "user not local", true),
            (Rcpt, 553, "not allowed", true),
            (Rcpt, 550, "5.7.1 blocked", false),
            (Rcpt, 550, "5.2.1 disabled", false),
            (Rcpt, 550, "5.1.8 sender rejected", false),
            (Rcpt, 552, "over quota", false),
            (Rcpt, 554, "no", false),
            (Rcpt, 503, "5.5.1 bad sequence", false),
            (Content, 550, "spam", false),
            (Content, 554, "5.7.1 spam", false),
            (Mail, 550, "5.1.1 your sender", false),
            (Mail, 553, "sender", false),
            (Data, 554, "no valid recipients", false),
        ] {
            let failed = Outcome::Failed { reason: format!("{code} {text}"), bad_address: bad };
            assert_eq!(refused(stage, code, text).verdict(), Verdict::Mail(failed));
        }
    }

    #[test]
    fn only_a_message_that_was_begun_may_have_gone_out() {
        let troubles = [Trouble::Lost("x".into()), Trouble::Slow(Duration::ZERO), Trouble::Senseless("x".into())];
        for trouble in troubles {
            let verdict = |stage| Failure { stage, trouble: trouble.clone() }.verdict();
            for stage in [Stage::Connect, Stage::Tls, Stage::Greeting, Stage::Hello, Stage::StartTls, Stage::Login] {
                assert!(matches!(verdict(stage), Verdict::Away(_)));
            }
            for stage in [Stage::Mail, Stage::Rcpt, Stage::Data] {
                assert!(matches!(verdict(stage), Verdict::Broken(Outcome::Retry(_))));
            }
            assert!(matches!(verdict(Stage::Content), Verdict::Broken(Outcome::Unknown(_))));
        }
    }

    #[test]
    fn a_dead_connection_is_told_from_a_refusal() {
        let lost = |stage| Failure { stage, trouble: Trouble::Lost("x".into()) };
        assert!(lost(Stage::Mail).is_stale() && lost(Stage::Rcpt).is_stale());
        assert!(!lost(Stage::Data).is_stale() && !lost(Stage::Content).is_stale());
        assert!(refused(Stage::Mail, 421, "idle").is_stale() && !refused(Stage::Mail, 451, "x").is_stale());
        assert!(refused(Stage::Rcpt, 550, "x").leaves_a_connection());
        assert!(!refused(Stage::Rcpt, 421, "x").leaves_a_connection() && !lost(Stage::Mail).leaves_a_connection());
    }
}
