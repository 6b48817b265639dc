//! Time limits: for each step of a conversation (RFC 5321, 4.5.3.2), and for a whole attempt.

use std::time::Duration;

use mailrun_app::config::SmtpConfig;
use tokio::time::Instant;

use super::verdict::Stage;

/// The longest that an attempt takes. RabbitMQ requeues a delivery that is not acknowledged within 30 minutes.
pub const LONGEST_ATTEMPT: Duration = Duration::from_secs(20 * 60);
/// Reserved for sending the message, in addition to the time limit of its reply.
const HAND_OVER: Duration = Duration::from_secs(60);
/// If the relay has another address, one that does not greet within this time is skipped.
const GREETING_IF_OTHERS: Duration = Duration::from_secs(30);

/// The time limit of each step.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// For connecting to one address, and for the TLS handshake.
    pub connect: Duration,
    greeting: Duration,
    command: Duration,
    data: Duration,
    message: Duration,
}

impl Limits {
    pub fn new(config: &SmtpConfig) -> Self {
        Self {
            connect: config.connect_timeout,
            greeting: config.greeting_timeout(),
            command: config.command_timeout,
            data: config.data_timeout(),
            message: config.message_timeout,
        }
    }

    /// The deadline of an attempt that begins now.
    pub fn begin(self) -> Deadline {
        self.begin_at(Instant::now())
    }

    fn begin_at(self, now: Instant) -> Deadline {
        let end = now + LONGEST_ATTEMPT;
        Deadline { limits: self, before_message: end - HAND_OVER - self.message, end }
    }

    /// The limit of the greeting, depending on whether the relay has other addresses.
    pub fn greeting(&self, has_others: bool) -> Duration {
        if has_others { self.greeting.min(GREETING_IF_OTHERS) } else { self.greeting }
    }
}

/// The time left to an attempt.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    pub limits: Limits,
    /// The latest time to begin the message, so that its reply has its full time limit.
    before_message: Instant,
    end: Instant,
}

impl Deadline {
    /// The time limit of a step that begins now.
    pub fn limit(&self, stage: Stage) -> Duration {
        self.limit_at(stage, Instant::now())
    }

    fn limit_at(&self, stage: Stage, now: Instant) -> Duration {
        let limit = match stage {
            Stage::Connect | Stage::Tls => self.limits.connect,
            Stage::Greeting => self.limits.greeting,
            Stage::Hello | Stage::StartTls | Stage::Login | Stage::Mail | Stage::Rcpt => self.limits.command,
            Stage::Data => self.limits.data,
            Stage::Content => self.limits.message,
        };
        let until = if stage == Stage::Content { self.end } else { self.before_message };
        limit.min(until.saturating_duration_since(now))
    }

    /// When an attempt that has not begun its message is abandoned.
    pub fn before_message(&self) -> Instant {
        self.before_message
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attempt_ends_within_its_deadline() {
        let begin = Instant::now();
        let deadline = Limits::new(&SmtpConfig::default()).begin_at(begin);
        let seconds = |stage, after| deadline.limit_at(stage, begin + Duration::from_secs(after)).as_secs();
        let stages = [Stage::Greeting, Stage::Mail, Stage::Rcpt, Stage::Data, Stage::Content];
        assert_eq!(stages.map(|stage| seconds(stage, 0)), [300, 300, 300, 120, 600]);
        // The reply to the message keeps its full time limit.
        assert_eq!([Stage::Rcpt, Stage::Content].map(|stage| seconds(stage, 8 * 60)), [60, 600]);
        assert_eq!(seconds(Stage::Data, 9 * 60), 0);
        assert_eq!(seconds(Stage::Content, 15 * 60), 300);
        assert_eq!(seconds(Stage::Content, 20 * 60), 0);
    }
}
