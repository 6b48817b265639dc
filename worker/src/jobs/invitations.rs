//! Invitations: one mail to each person of a list.

use std::sync::Arc;

use mailrun_core::signed_id::Named;
use mailrun_ledger::{
    invitations::{self, Recipient, recipients},
    settings::SuppressionsConfig,
};
use sqlx::PgConnection;
use uuid::Uuid;

use super::{Text, ids::Ids};
use crate::{
    attempt::Attempt,
    gate::Gate,
    job::{Granted, Items, Job, JobError, Loaded, Outcome, RetryPolicy, Settled},
    mailer::{Mail, Mailer},
};

/// The job.
pub(super) struct Invitations {
    mailer: Arc<dyn Mailer>,
    ids: Arc<Ids>,
    suppressions: SuppressionsConfig,
}

impl Invitations {
    pub(super) fn new(mailer: Arc<dyn Mailer>, ids: Arc<Ids>, suppressions: SuppressionsConfig) -> Self {
        Self { mailer, ids, suppressions }
    }
}

impl Job for Invitations {
    const KIND: &'static str = invitations::KIND;
    const WITHHELD: &'static [(u8, &'static str)] = invitations::WITHHELD;
    type Run = Text;
    type Item = Recipient;

    async fn run(&self, ledger: &mut PgConnection, run_id: Uuid) -> Result<Text, JobError> {
        Text::load(ledger, run_id, &self.ids).await
    }

    async fn items(&self, ledger: &mut PgConnection, granted: &[Granted]) -> sqlx::Result<Items<Recipient>> {
        let ids: Vec<i64> = granted.iter().map(|granted| granted.key.item_id).collect();
        let recipients = recipients(ledger, &ids).await?.into_iter();
        Ok(recipients.map(|(id, recipient)| (id, recipient.map_or_else(Loaded::Withheld, Loaded::Item))).collect())
    }

    async fn process(&self, attempt: &Attempt, run: &Text, recipient: &Recipient) -> Outcome {
        let key = attempt.key();
        let named = Named { run_id: key.run_id, item_id: key.item_id };
        let mail = Mail {
            message_id: self.ids.message_id(&run.signed, named),
            run_id: Some(key.run_id),
            email: recipient.email.clone(),
            name: recipient.name.clone(),
            template: Arc::clone(&run.template),
            unsubscribe: self.mailer.writes_mail().then(|| self.ids.link(&run.signed, named)).flatten(),
        };
        self.mailer.send(&mail, attempt).await
    }

    async fn settled(&self, ledger: &mut PgConnection, settled: &[Settled]) -> sqlx::Result<()> {
        invitations::settled(ledger, &self.suppressions, settled).await
    }

    fn gate(&self) -> Gate {
        self.mailer.gate()
    }

    fn retry(&self, installation: &RetryPolicy) -> RetryPolicy {
        RetryPolicy { repeats_at_once: self.mailer.allows_immediate_retry(), ..installation.clone() }
    }
}
