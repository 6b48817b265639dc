//! What follows from what went wrong: whether it is about the relay, the mail, or the recipient. Pure functions.

use std::{fmt, time::Duration};

use mailrun_core::reply::{Classified, Concern, ReplyClass, classify};

pub use mailrun_core::reply::Stage;

use super::{super::Outcome, reply::Reply};
use mailrun_core::outcome::Withdrawn;

/// The classes of answers that are no refusals.
pub const ACCEPTED: &str = "accepted";
pub const NO_ANSWER: &str = "no_answer";

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

/// Why a relay is left alone, and for how long.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pause {
    /// Why, in the server's words.
    pub reason: String,
    /// As long as the server asks for.
    pub wait: Option<Duration>,
    /// Otherwise it is tried again sooner and then later, and at last after this time; none: after the usual time.
    pub longest: Option<Duration>,
}

impl Pause {
    /// For the usual time.
    pub fn new(reason: String) -> Self {
        Self { reason, ..Self::default() }
    }

    fn after(reason: String, reply: Classified) -> Self {
        use ReplyClass::{Authentication, BlockList, Helo, Limit, Relaying, Sender};
        let longest = match (reply.class, reply.period) {
            (Limit, Some(period)) => Some(limit_probe(period)),
            // A person has to act, or a reputation to recover: there is no hurry.
            (Limit | Sender | BlockList | Relaying | Authentication | Helo, _) => Some(Duration::from_secs(300)),
            _ => None,
        };
        Self { reason, wait: reply.wait, longest }
    }
}

/// How seldom a relay is tried at last whose limit holds for this period: its end is not known.
fn limit_probe(period: Duration) -> Duration {
    if period >= Duration::from_secs(24 * 3_600) {
        Duration::from_secs(3_600)
    } else if period >= Duration::from_secs(3_600) {
        Duration::from_secs(600)
    } else {
        Duration::from_secs(60)
    }
}

/// What follows from a failure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The relay takes no mail at present. The mail was certainly not sent.
    Away(Pause),
    /// The mail was refused with words that speak of us. It concerns the relay, unless only this recipient meets it again and again.
    Refused(Pause),
    /// The recipient was deferred with words that may speak of us. It concerns the relay only if recipients at several domains
    /// are.
    Deferred(Pause),
    /// The relay is well; this is what became of the mail.
    Mail(Outcome),
    /// The mail was refused for good, and it is not known whose fault that is. `alike`: the same for all refusals for this reason.
    Unexplained {
        /// The server's words.
        reason: String,
        /// What they have in common with others.
        alike: String,
    },
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

    /// What it is counted as; none: the server was not asked.
    pub fn class(&self) -> Option<&'static str> {
        match &self.trouble {
            Trouble::Refused(reply) => Some(classify(self.stage, reply.code, &reply.lines.join("\n")).class.name()),
            Trouble::Senseless(_) | Trouble::Lost(_) | Trouble::Slow(_) | Trouble::Unable(_) => Some(NO_ANSWER),
            Trouble::Withdrawn(_) => None,
        }
    }

    /// What follows.
    pub fn verdict(&self) -> Verdict {
        let reason = self.to_string();
        match &self.trouble {
            Trouble::Withdrawn(withdrawn) => Verdict::Withdrawn(*withdrawn),
            Trouble::Refused(reply) => refusal(self.stage, reply, reason),
            _ if self.stage.is_before_mail() => Verdict::Away(Pause::new(reason)),
            Trouble::Unable(_) => Verdict::Mail(Outcome::Failed { reason, flagged: false }),
            Trouble::Senseless(_) | Trouble::Lost(_) | Trouble::Slow(_) if self.stage == Stage::Content => {
                Verdict::Broken(Outcome::Unknown(reason))
            }
            Trouble::Senseless(_) | Trouble::Lost(_) | Trouble::Slow(_) => Verdict::Broken(Outcome::Retry(reason)),
        }
    }
}

/// What follows from a refusal.
fn refusal(stage: Stage, reply: &Reply, reason: String) -> Verdict {
    let classified = classify(stage, reply.code, &reply.lines.join("\n"));
    let failed = |reason, bad_address| Verdict::Mail(Outcome::Failed { reason, flagged: bad_address });
    if stage.is_before_mail() {
        return Verdict::Away(Pause::after(reason, classified));
    }
    match classified.concern() {
        // No recipient is named yet.
        Concern::Relay if stage == Stage::Mail => Verdict::Away(Pause::after(reason, classified)),
        Concern::Relay if stage == Stage::Rcpt && !classified.permanent => {
            Verdict::Deferred(Pause::after(reason, classified))
        }
        Concern::Relay => Verdict::Refused(Pause::after(reason, classified)),
        _ if !classified.permanent => Verdict::Mail(Outcome::Retry(reason)),
        // These pass, whatever the code says.
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
            (Mail, 451, "4.3.0 text"),
            (Mail, 452, "4.3.1 insufficient system storage"),
            (Mail, 550, "no"),
            (Mail, 553, "5.1.1 no such user"),
        ] {
            let verdict = refused(stage, code, text).verdict();
            assert!(
                matches!(&verdict, Verdict::Away(pause) if pause.reason.ends_with(text)),
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
    fn a_recipient_that_is_deferred_is_not_yet_the_relays_trouble() {
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
    fn what_may_pass_is_tried_again() {
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
    fn a_pause_is_as_long_as_the_server_asks_for() {
        let pause = |text| match refused(Stage::Mail, 452, text).verdict() {
            Verdict::Away(pause) => {
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
