//! How long each step of a conversation may take (RFC 5321, 4.5.3.2), and all of them together.

use std::time::Duration;

use mailrun_app::config::SmtpConfig;
use tokio::time::Instant;

use super::verdict::Stage;

/// An attempt ends within this time. A delivery that was taken has to be acknowledged within 30 minutes, or RabbitMQ takes it
/// back.
pub const LONGEST_ATTEMPT: Duration = Duration::from_secs(20 * 60);
/// Kept free for handing the message over, beside what its answer may take.
const HAND_OVER: Duration = Duration::from_secs(60);
/// While a relay has another address, one that does not greet within this time is passed over.
const GREETING_IF_OTHERS: Duration = Duration::from_secs(30);

/// How long each step may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// To connect to one address, and to agree on encryption.
    pub connect: Duration,
    greeting: Duration,
    command: Duration,
    data: Duration,
    message: Duration,
}

impl Limits {
    /// As configured.
    pub fn new(config: &SmtpConfig) -> Self {
        Self {
            connect: config.connect_timeout,
            greeting: config.greeting_timeout(),
            command: config.command_timeout,
            data: config.data_timeout(),
            message: config.message_timeout,
        }
    }

    /// The time of an attempt that begins now.
    pub fn begin(self) -> Deadline {
        self.begin_at(Instant::now())
    }

    fn begin_at(self, now: Instant) -> Deadline {
        let end = now + LONGEST_ATTEMPT;
        Deadline { limits: self, before_message: end - HAND_OVER - self.message, end }
    }

    /// To greet, while the relay has other addresses or not.
    pub fn greeting(&self, has_others: bool) -> Duration {
        if has_others { self.greeting.min(GREETING_IF_OTHERS) } else { self.greeting }
    }
}

/// The time that an attempt has left.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    /// What each step may take.
    pub limits: Limits,
    /// The message is begun until then, so that its answer has its time.
    before_message: Instant,
    end: Instant,
}

impl Deadline {
    /// How long a step may take that begins now.
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

    /// When an attempt that has not begun its message is given up.
    pub fn before_message(&self) -> Instant {
        self.before_message
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attempt_ends_within_its_time() {
        let begin = Instant::now();
        let deadline = Limits::new(&SmtpConfig::default()).begin_at(begin);
        let seconds = |stage, after| deadline.limit_at(stage, begin + Duration::from_secs(after)).as_secs();
        let stages = [Stage::Greeting, Stage::Mail, Stage::Rcpt, Stage::Data, Stage::Content];
        assert_eq!(stages.map(|stage| seconds(stage, 0)), [300, 300, 300, 120, 600]);
        // The answer to the message keeps its time.
        assert_eq!([Stage::Rcpt, Stage::Content].map(|stage| seconds(stage, 8 * 60)), [60, 600]);
        assert_eq!(seconds(Stage::Data, 9 * 60), 0);
        assert_eq!(seconds(Stage::Content, 15 * 60), 300);
        assert_eq!(seconds(Stage::Content, 20 * 60), 0);
    }
}
