//! Mailrun's own jobs, one file for each kind. Both send mail, through the same mailer.

mod ids;
mod invitations;
mod relay_stops;
mod test_mails;

use std::{panic::resume_unwind, sync::Arc};

use mailrun_app::config::Config;
use mailrun_core::template::Template;
use mailrun_ledger::runs;
use sqlx::PgConnection;
use tokio::task::spawn_blocking;
use uuid::Uuid;

use crate::{
    job::JobError,
    kinds::Jobs,
    mailer::{self, Mailer, MailerError},
};

use self::{
    ids::{Ids, Signed},
    invitations::Invitations,
    test_mails::TestMails,
};

pub(crate) use self::relay_stops::watch as watch_relay_stops;
pub use self::test_mails::test_mail;

/// Adds the jobs that send mail. A process that does not send gets them without a mailer: it needs their reasons and their
/// changes in the ledger.
///
/// # Errors
/// If the mailer's configuration is not usable.
pub fn with_mail(jobs: Jobs, config: &Config, sends: bool) -> Result<(Jobs, Arc<dyn Mailer>), MailerError> {
    let mailer = if sends { mailer::mailer(&config.mailer)? } else { mailer::none() };
    let ids = Arc::new(Ids::new(config.message_id_domain(), config.web.public_url.clone()));
    let invitations = Invitations::new(Arc::clone(&mailer), Arc::clone(&ids), config.suppressions);
    let jobs = jobs.with_own(invitations).with_own(TestMails::new(Arc::clone(&mailer), ids));
    Ok((jobs, mailer))
}

/// What the mails of a run share.
struct Text {
    template: Arc<Template>,
    signed: Signed,
}

impl Text {
    async fn load(conn: &mut PgConnection, run_id: Uuid, ids: &Ids) -> Result<Self, JobError> {
        Ok(Self { template: template(conn, run_id).await?, signed: ids.signed(conn).await? })
    }
}

/// The text of a run's mails.
async fn template(conn: &mut PgConnection, run_id: Uuid) -> Result<Arc<Template>, JobError> {
    let (subject, body) = runs::text(conn, run_id).await?;
    // Parsing a long text takes as long as composing some mails.
    match spawn_blocking(move || Template::new(&subject, &body)).await {
        // The form validates templates, so this one was written by an earlier version or by hand.
        Ok(template) => template.map(Arc::new).map_err(|error| JobError::Unusable(error.to_string())),
        Err(error) if error.is_panic() => resume_unwind(error.into_panic()),
        Err(_) => Err(sqlx::Error::WorkerCrashed.into()),
    }
}
