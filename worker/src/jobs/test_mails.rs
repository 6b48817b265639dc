//! Test mails: a person checks an invitation before sending it. The person waits for the result, so nothing is retried.

use std::sync::Arc;

use mailrun_core::{outcome::OnUnknown, template::Template};
use mailrun_ledger::test_mails::{self, TestMail};
use sqlx::PgConnection;
use uuid::Uuid;

use super::{Text, ids::Ids};
use crate::{
    attempt::Attempt,
    job::{Granted, Items, Job, JobError, Outcome, RetryPolicy, from_data},
    mailer::{Mail, Mailer},
};

/// The job.
pub(super) struct TestMails {
    mailer: Arc<dyn Mailer>,
    ids: Arc<Ids>,
}

impl TestMails {
    pub(super) fn new(mailer: Arc<dyn Mailer>, ids: Arc<Ids>) -> Self {
        Self { mailer, ids }
    }
}

impl Job for TestMails {
    const KIND: &'static str = test_mails::KIND;
    const HIDDEN: bool = true;
    type Run = Text;
    type Item = TestMail;

    async fn run(&self, ledger: &mut PgConnection, run_id: Uuid) -> Result<Text, JobError> {
        Text::load(ledger, run_id, &self.ids).await
    }

    async fn items(&self, _: &mut PgConnection, granted: &[Granted]) -> sqlx::Result<Items<TestMail>> {
        Ok(from_data(granted))
    }

    async fn process(&self, attempt: &Attempt, run: &Text, TestMail { email }: &TestMail) -> Outcome {
        let (test_id, link) = (attempt.key().run_id, self.ids.test_link(&run.signed));
        let mail = test_mail(test_id, self.ids.domain(), email.clone(), Arc::clone(&run.template), link);
        match self.mailer.send(&mail, attempt).await {
            // The item would wait for the relay, but the person waits for an answer.
            Outcome::Later(reason) => Outcome::failed(reason),
            // A test mail must not flag the address.
            Outcome::Failed { reason, .. } => Outcome::failed(reason),
            outcome => outcome,
        }
    }

    fn retry(&self, installation: &RetryPolicy) -> RetryPolicy {
        RetryPolicy { tries: Some(1), on_unknown: OnUnknown::Hold, ..installation.clone() }
    }
}

/// A mail that belongs to no run of invitations. `domain` is the part of its Message-ID behind the @.
#[must_use]
pub fn test_mail(
    test_id: Uuid,
    domain: &str,
    email: String,
    template: Arc<Template>,
    unsubscribe: Option<String>,
) -> Mail {
    Mail { message_id: format!("<test.{test_id}@{domain}>"), run_id: None, email, name: None, template, unsubscribe }
}
