//! The default mailer: sends nothing and fails on schedule, so that every path of the pipeline can be seen.
//!
//! Whether a send fails depends only on the email's position in its run, its tries and its replays. Tests and the demo rely on
//! that.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use mailrun_app::config::SimulatedConfig;
use tokio::time::sleep;

use super::{Mail, Mailer, Outcome};
use crate::attempt::Attempt;

/// Lasts until a person replays the email.
const DOWN: &str = "Internet Down";
/// Succeeds on the next try.
const FLAKY: &str = "Connection Reset";

/// The journal is not usable.
#[derive(Debug, thiserror::Error)]
#[error("can't open the mailer's journal {path} for appending: {error}")]
pub struct SimulatedError {
    path: PathBuf,
    error: io::Error,
}

/// A mailer that only waits, fails on schedule and writes a journal.
#[derive(Clone, Debug)]
pub struct Simulated {
    latency: Duration,
    down_every: i32,
    flaky_every: i32,
    journal: Option<Arc<File>>,
}

impl Simulated {
    /// # Errors
    /// If the journal cannot be opened.
    pub fn new(config: &SimulatedConfig) -> Result<Self, SimulatedError> {
        let open = |path: &PathBuf| {
            let file = OpenOptions::new().create(true).append(true).open(path);
            file.map(Arc::new).map_err(|error| SimulatedError { path: path.clone(), error })
        };
        Ok(Self {
            latency: config.latency,
            down_every: config.down_every,
            flaky_every: config.flaky_every,
            journal: config.journal.as_ref().map(open).transpose()?,
        })
    }

    /// The error of this send, if it fails.
    fn failure(&self, attempt: &Attempt) -> Option<&'static str> {
        let every = |n: i32| n > 0 && attempt.position() % n == 0;
        if attempt.replays() > 0 {
            None
        } else if every(self.down_every) {
            Some(DOWN)
        } else if every(self.flaky_every) && attempt.tries() == 1 {
            Some(FLAKY)
        } else {
            None
        }
    }
}

#[async_trait]
impl Mailer for Simulated {
    async fn send(&self, mail: &Mail, attempt: &Attempt) -> Outcome {
        if let Err(withdrawn) = attempt.may_proceed().await {
            return Outcome::Withdrawn(withdrawn);
        }
        if !self.latency.is_zero() {
            // Tokio's timers have a resolution of 1 ms and fire 1 ms late on average.
            sleep(self.latency.saturating_sub(Duration::from_millis(1))).await;
        }
        if let Some(error) = self.failure(attempt) {
            return Outcome::Retry(error.into());
        }
        if let Err(withdrawn) = attempt.may_commit() {
            return Outcome::Withdrawn(withdrawn);
        }
        if let Some(mut journal) = self.journal.as_deref() {
            // A single write per line, because several processes append to the same file.
            if let Err(error) = journal.write_all(format!("{}\n", mail.message_id).as_bytes()) {
                return Outcome::Retry(format!("can't write the journal: {error}"));
            }
        }
        tracing::trace!(message_id = mail.message_id, "sent");
        Outcome::Sent
    }

    fn writes_mail(&self) -> bool {
        false
    }

    fn allows_immediate_retry(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use mailrun_core::template::Template;

    use super::*;

    async fn send(session: &Simulated, position: i32, tries: i16, replays: i16) -> Outcome {
        let mail = Mail {
            message_id: "<1@mailrun>".into(),
            run_id: None,
            email: "ann@example.org".into(),
            name: None,
            template: Arc::new(Template::new("Hello", "").unwrap()),
            unsubscribe: None,
        };
        session.send(&mail, &Attempt::unchecked_at(position, tries, replays)).await
    }

    #[tokio::test]
    async fn every_hundredth_email_fails_until_it_is_replayed() {
        let session = Simulated::new(&SimulatedConfig::default()).unwrap();
        let down = Outcome::Retry(DOWN.into());
        assert_eq!(send(&session, 99, 1, 0).await, Outcome::Sent);
        assert_eq!(send(&session, 100, 1, 0).await, down);
        assert_eq!(send(&session, 100, 4, 0).await, down);
        assert_eq!(send(&session, 100, 1, 1).await, Outcome::Sent);
    }

    #[tokio::test]
    async fn some_emails_fail_only_on_the_first_try() {
        let session = Simulated::new(&SimulatedConfig::default()).unwrap();
        assert_eq!(send(&session, 150, 1, 0).await, Outcome::Retry(FLAKY.into()));
        assert_eq!(send(&session, 150, 2, 0).await, Outcome::Sent);
    }
}
