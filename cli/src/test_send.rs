//! `mailrun test-send`: sends one mail through the configured mailer, without a queue.

use std::sync::Arc;

use anyhow::{Result, bail};
use mailrun_app::config::{Config, MailerKind};
use mailrun_core::{
    address::{Address, Invalid},
    template::Template,
};
use mailrun_worker::{
    attempt::Attempt,
    jobs::test_mail,
    mailer::{self, Outcome},
};
use uuid::Uuid;

/// Sends the configured invitation to one address and prints the result. It does not count as an invitation.
pub async fn run(config: &Config, address: &str) -> Result<()> {
    let email = match address.parse() {
        Ok(Address { email, .. }) => email,
        Err(Invalid { text, reason }) => bail!("{text} {reason}"),
    };
    let template = Arc::new(Template::new(&config.web.subject, &config.web.body)?);
    let mailer = mailer::mailer(&config.mailer)?;
    let mail = test_mail(Uuid::new_v4(), &config.message_id_domain(), email, template, None);
    match mailer.send(&mail, &Attempt::unchecked()).await {
        Outcome::Sent if config.mailer.kind == MailerKind::Simulated => {
            println!("The simulated mailer accepted it: no mail left this machine. Set mailer.kind to send real mail.");
            Ok(())
        }
        Outcome::Sent => {
            println!("Sent: the relay accepted it for {}. Message-ID: {}.", mail.email, mail.message_id);
            Ok(())
        }
        Outcome::Retry(reason) | Outcome::Later(reason) => {
            bail!("not sent, temporary failure: {reason}")
        }
        Outcome::Failed { reason, flagged: true } => bail!("not sent, the relay refused the address: {reason}"),
        Outcome::Failed { reason, flagged: false } => bail!("not sent, permanent failure: {reason}"),
        Outcome::Withdrawn(why) => bail!("not sent: {why:?}"),
        Outcome::Unknown(reason) => {
            bail!("unknown whether it was sent, the relay did not reply: {reason}. Check the inbox")
        }
    }
}
