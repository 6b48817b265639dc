//! What a failure means: whether it concerns the relay, the mail, or the recipient. Pure functions.

use std::{fmt, time::Duration};

use mailrun_core::reply::{Classified, Concern, ReplyClass, classify};

pub use mailrun_core::reply::Stage;

use super::{super::Outcome, reply::Reply};
use mailrun_core::outcome::Withdrawn;

/// Reply classes that are not refusals.
pub const ACCEPTED: &str = "accepted";
pub const NO_ANSWER: &str = "no_answer";

/// Why a conversation failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The server replied with a 4xx or 5xx code.
    Refused(Reply),
    /// The reply is malformed, or not valid at this point.
    BadReply(String),
    /// The connection broke or could not be opened.
    Lost(String),
    /// No reply within this time.
    TimedOut(Duration),
    /// The server lacks a capability that the mail needs, or our side is misconfigured.
    Unsupported(String),
    /// We stopped, because the attempt may not continue.
    Withdrawn(Withdrawn),
}

/// A failure and the stage it happened at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub stage: Stage,
    pub cause: Cause,
}

/// How long a relay is not used, and why.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pause {
    /// The server's reply.
    pub reason: String,
    /// The wait that the server asked for.
    pub wait: Option<Duration>,
    /// Without `wait`, the bound of the growing wait between probes. `None`: the default bound.
    pub longest: Option<Duration>,
}

impl Pause {
    /// A pause with the default waits.
    pub fn new(reason: String) -> Self {
        Self { reason, ..Self::default() }
    }

    fn after(reason: String, reply: Classified) -> Self {
        use ReplyClass::{Authentication, BlockList, Helo, Limit, Relaying, Sender};
        let longest = match (reply.class, reply.period) {
            (Limit, Some(period)) => Some(limit_probe(period)),
            // These need an operator or time for the sender's reputation to recover, so probing more often would not help.
            (Limit | Sender | BlockList | Relaying | Authentication | Helo, _) => Some(Duration::from_secs(300)),
            _ => None,
        };
        Self { reason, wait: reply.wait, longest }
    }
}

/// The bound of the wait between probes of a relay whose limit covers `period`. When the period ends is not known.
fn limit_probe(period: Duration) -> Duration {
    if period >= Duration::from_secs(24 * 3_600) {
        Duration::from_secs(3_600)
    } else if period >= Duration::from_secs(3_600) {
        Duration::from_secs(600)
    } else {
        Duration::from_secs(60)
    }
}

/// What a failure means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The relay accepts no mail at present. The mail was certainly not sent.
    Unavailable(Pause),
    /// The mail was refused with a reply that is about us. It concerns the relay, unless only this recipient keeps getting it.
    Refused(Pause),
    /// The recipient was deferred with a reply that may be about us. It concerns the relay only if recipients at several domains
    /// are deferred.
    Deferred(Pause),
    /// The relay works; the failure is about this mail.
    Mail(Outcome),
    /// The mail was refused permanently, for an unknown reason.
    Unexplained {
        /// The server's reply.
        reason: String,
        /// The normalized reply, equal for refusals with the same reason.
        alike: String,
    },
    /// The conversation broke. That proves nothing about the relay; this is the mail's outcome.
    Broken(Outcome),
    /// The attempt may not continue. This says nothing about the relay. The mail was certainly not sent.
    Withdrawn(Withdrawn),
}

impl Failure {
    /// An attempt that stops before `stage`.
    pub fn withdrawn(stage: Stage, withdrawn: Withdrawn) -> Self {
        Self { stage, cause: Cause::Withdrawn(withdrawn) }
    }

    /// Whether an idle connection turned out to be dead before anything was handed over: the mail can be sent on a new one.
    pub fn is_stale(&self) -> bool {
        let dead = match &self.cause {
            Cause::Lost(_) | Cause::TimedOut(_) => true,
            // For example "421 idle for too long", sent while the connection was idle.
            Cause::Refused(reply) => reply.code == 421,
            Cause::BadReply(_) | Cause::Unsupported(_) | Cause::Withdrawn(_) => false,
        };
        dead && matches!(self.stage, Stage::Mail | Stage::Rcpt)
    }

    /// Whether the connection can be reused after this failure.
    pub fn leaves_a_connection(&self) -> bool {
        match &self.cause {
            Cause::Refused(reply) => reply.code != 421 && !self.stage.is_before_mail(),
            Cause::Unsupported(_) => !self.stage.is_before_mail(),
            // After DATA, the server would take anything we send as part of the message.
            Cause::Withdrawn(_) => self.stage == Stage::Mail,
            _ => false,
        }
    }

    /// The reply class to count. `None`: the server was not asked.
    pub fn class(&self) -> Option<&'static str> {
        match &self.cause {
            Cause::Refused(reply) => Some(classify(self.stage, reply.code, &reply.lines.join("\n")).class.name()),
            Cause::BadReply(_) | Cause::Lost(_) | Cause::TimedOut(_) | Cause::Unsupported(_) => Some(NO_ANSWER),
            Cause::Withdrawn(_) => None,
        }
    }

    pub fn verdict(&self) -> Verdict {
        let reason = self.to_string();
        match &self.cause {
            Cause::Withdrawn(withdrawn) => Verdict::Withdrawn(*withdrawn),
            Cause::Refused(reply) => refusal(self.stage, reply, reason),
            _ if self.stage.is_before_mail() => Verdict::Unavailable(Pause::new(reason)),
            Cause::Unsupported(_) => Verdict::Mail(Outcome::Failed { reason, flagged: false }),
            Cause::BadReply(_) | Cause::Lost(_) | Cause::TimedOut(_) if self.stage == Stage::Content => {
                Verdict::Broken(Outcome::Unknown(reason))
            }
            Cause::BadReply(_) | Cause::Lost(_) | Cause::TimedOut(_) => Verdict::Broken(Outcome::Retry(reason)),
        }
    }
}

fn refusal(stage: Stage, reply: &Reply, reason: String) -> Verdict {
    let classified = classify(stage, reply.code, &reply.lines.join("\n"));
    let failed = |reason, bad_address| Verdict::Mail(Outcome::Failed { reason, flagged: bad_address });
    if stage.is_before_mail() {
        return Verdict::Unavailable(Pause::after(reason, classified));
    }
    match classified.concern() {
        // No recipient was named yet, so the refusal cannot be about one.
        Concern::Relay if stage == Stage::Mail => Verdict::Unavailable(Pause::after(reason, classified)),
        Concern::Relay if stage == Stage::Rcpt && !classified.permanent => {
            Verdict::Deferred(Pause::after(reason, classified))
        }
        Concern::Relay => Verdict::Refused(Pause::after(reason, classified)),
        _ if !classified.permanent => Verdict::Mail(Outcome::Retry(reason)),
        // Greylisting and recipient limits are temporary, whatever the code says.
        Concern::Recipient if matches!(classified.class, ReplyClass::Greylisted | ReplyClass::RecipientLimit) => {
            Verdict::Mail(Outcome::Retry(reason))
        }
        Concern::Recipient => failed(reason, classified.suppresses()),
        Concern::Message | Concern::Unknown => Verdict::Unexplained { reason, alike: reply.alike() },
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stage = self.stage;
        match &self.cause {
            Cause::Refused(reply) if stage.is_before_mail() => write!(f, "{stage} was refused: {reply}"),
            Cause::Refused(reply) => write!(f, "{reply}"),
            Cause::BadReply(said) => write!(f, "invalid reply to {stage}: {said}"),
            Cause::Lost(why) if stage == Stage::Connect => write!(f, "the mail server can't be reached: {why}"),
            Cause::Lost(why) => write!(f, "the connection was lost at {stage}: {why}"),
            Cause::TimedOut(limit) => write!(f, "no answer to {stage} within {limit:?}"),
            Cause::Unsupported(why) => f.write_str(why),
            Cause::Withdrawn(_) => write!(f, "stopped before {stage}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(stage: Stage, code: u16, text: &str) -> Failure {
        Failure { stage, cause: Cause::Refused(Reply { code, lines: vec![text.into()] }) }
    }

    #[test]
    fn relay_refusals_fail_no_mail() {
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
            (Mail, 451, "4.3.0 text"),
            (Mail, 452, "4.3.1 insufficient system storage"),
            (Mail, 550, "no"),
            (Mail, 553, "5.1.1 no such user"),
        ] {
            let verdict = refused(stage, code, text).verdict();
            assert!(
                matches!(&verdict, Verdict::Unavailable(pause) if pause.reason.ends_with(text)),
                "{code} {text}: {verdict:?}"
            );
        }
        for (stage, code, text) in [
            (Data, 454, "Throttling failure: Maximum sending rate exceeded."),
            (Data, 452, "4.4.5 insufficient disk space"),
            (Content, 451, "4.3.2 please try again later"),
            (Content, 421, "4.3.0 shutting down"),
            (Content, 450, "4.7.1 Error: too much mail from 192.0.2.1"),
            (Rcpt, 550, "relay not permitted"),
            (Rcpt, 550, "Please turn on SMTP Authentication in your mail client"),
            (Rcpt, 550, "5.1.8 sender rejected"),
            (Rcpt, 504, "5.5.2 <w>: Helo command rejected: need fully-qualified hostname"),
            (Content, 550, "5.4.5 Daily user sending limit exceeded"),
            (Content, 554, "5.2.0 SubmissionQuotaExceeded"),
        ] {
            let verdict = refused(stage, code, text).verdict();
            assert!(
                matches!(&verdict, Verdict::Refused(pause) if pause.reason.ends_with(text)),
                "{code} {text}: {verdict:?}"
            );
        }
    }

    #[test]
    fn one_deferred_recipient_does_not_yet_concern_the_relay() {
        for (code, text) in [
            (421, "4.7.28 rate limit"),
            (450, "4.7.28 our system has detected an unusual rate"),
            (451, "4.7.500 server busy"),
            (451, "4.7.650 temporarily rate limited"),
            (452, "4.5.3 too many recipients"),
            (450, "too many connections from your address"),
            (454, "4.7.1 Relay access denied"),
            (450, "4.1.8 sender domain not found"),
        ] {
            let verdict = refused(Stage::Rcpt, code, text).verdict();
            assert!(matches!(&verdict, Verdict::Deferred(_)), "{code} {text}: {verdict:?}");
        }
    }

    #[test]
    fn temporary_refusals_are_retried() {
        use Stage::*;
        for (stage, code, text) in [
            (Rcpt, 450, "4.7.1 Greylisted, please try again in 300 seconds"),
            (Rcpt, 451, "4.7.1 Please try again later"),
            (Rcpt, 450, "4.7.1 <x>: Recipient address rejected: Greylisting in effect: too many tries"),
            (Rcpt, 450, "4.2.1 The user is receiving mail at a rate that is too high; too many"),
            (Rcpt, 550, "5.2.1 The user is receiving mail at a rate that is too high"),
            (Rcpt, 452, "4.2.2 mailbox full, quota exceeded"),
            (Rcpt, 452, "too many messages for this recipient"),
            (Rcpt, 451, "Temporary local problem - please try later"),
            (Data, 451, "local error"),
            (Content, 451, "4.7.1 content scanner not available, try again later"),
        ] {
            let verdict = refused(stage, code, text).verdict();
            assert_eq!(verdict, Verdict::Mail(Outcome::Retry(format!("{code} {text}"))));
        }
    }

    #[test]
    fn an_address_is_flagged_only_if_the_server_says_so() {
        use Stage::*;
        for (stage, code, text, bad) in [
            (Rcpt, 550, "5.1.1 no such user", true),
            (Rcpt, 550, "5.1.2 no such host", true),
            (Rcpt, 553, "5.1.3 bad syntax", true),
            (Rcpt, 551, "5.1.6 moved", true),
            (Rcpt, 556, "5.1.10 null MX", true),
            (Content, 550, "5.1.1 no such user", true),
            (Rcpt, 550, "no such user", true),
            (Rcpt, 551, "user not local", false),
            (Rcpt, 550, "5.2.1 disabled", true),
            (Rcpt, 552, "over quota", false),
        ] {
            let failed = Outcome::Failed { reason: format!("{code} {text}"), flagged: bad };
            assert_eq!(refused(stage, code, text).verdict(), Verdict::Mail(failed));
        }
        for (stage, code, text) in [
            (Rcpt, 553, "not allowed"),
            (Rcpt, 550, "no"),
            (Rcpt, 554, "no"),
            (Rcpt, 503, "5.5.1 bad sequence"),
            (Content, 550, "spam"),
            (Content, 554, "5.7.1 spam"),
            (Rcpt, 550, "#5.7.1 rejected"),
        ] {
            let verdict = refused(stage, code, text).verdict();
            assert!(matches!(&verdict, Verdict::Unexplained { .. }), "{code} {text}: {verdict:?}");
        }
    }

    #[test]
    fn a_pause_lasts_as_long_as_the_server_asks() {
        let pause = |text| match refused(Stage::Mail, 452, text).verdict() {
            Verdict::Unavailable(pause) => {
                (pause.wait.map(|wait| wait.as_secs()), pause.longest.map(|longest| longest.as_secs()))
            }
            other => panic!("{other:?}"),
        };
        assert_eq!(pause("rate limit, try again in 90 seconds"), (Some(90), Some(300)));
        assert_eq!(pause("4.7.0 Daily limit exceeded"), (None, Some(3_600)));
        assert_eq!(pause("hourly limit"), (None, Some(600)));
        assert_eq!(pause("4.3.1 disk full"), (None, None));
    }

    #[test]
    fn an_outcome_is_unknown_only_once_the_content_was_begun() {
        let causes = [Cause::Lost("x".into()), Cause::TimedOut(Duration::ZERO), Cause::BadReply("x".into())];
        for cause in causes {
            let verdict = |stage| Failure { stage, cause: cause.clone() }.verdict();
            for stage in [Stage::Connect, Stage::Tls, Stage::Greeting, Stage::Hello, Stage::StartTls, Stage::Login] {
                assert!(matches!(verdict(stage), Verdict::Unavailable(_)));
            }
            for stage in [Stage::Mail, Stage::Rcpt, Stage::Data] {
                assert!(matches!(verdict(stage), Verdict::Broken(Outcome::Retry(_))));
            }
            assert!(matches!(verdict(Stage::Content), Verdict::Broken(Outcome::Unknown(_))));
        }
    }

    #[test]
    fn a_dead_connection_is_distinguished_from_a_refusal() {
        let lost = |stage| Failure { stage, cause: Cause::Lost("x".into()) };
        assert!(lost(Stage::Mail).is_stale() && lost(Stage::Rcpt).is_stale());
        assert!(!lost(Stage::Data).is_stale() && !lost(Stage::Content).is_stale());
        assert!(refused(Stage::Mail, 421, "idle").is_stale() && !refused(Stage::Mail, 451, "x").is_stale());
        assert!(refused(Stage::Rcpt, 550, "x").leaves_a_connection());
        assert!(!refused(Stage::Rcpt, 421, "x").leaves_a_connection() && !lost(Stage::Mail).leaves_a_connection());
    }
}
