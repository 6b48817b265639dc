//! `mailrun test-send`: one mail through the configured mailer, without a queue, to see whether it sends.

use std::sync::Arc;

use anyhow::{Result, bail};
use mailrun_app::config::{Config, MailerKind};
use mailrun_core::{
    address::{Address, Invalid},
    template::Template,
};
use mailrun_worker::{
    attempt::Attempt,
    mailer::{self, Outcome},
    test_send::test_mail,
};
use uuid::Uuid;

/// Sends the configured invitation to one address, and says what became of it. Nobody counts as invited by it.
///
/// # Errors
/// When it was not sent, or nobody knows; in the mail server's words.
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
            println!("The simulated mailer took it: no mail left this machine. Set mailer.kind to send real mail.");
            Ok(())
        }
        Outcome::Sent => {
            println!("Sent: the mail server accepted it for {}. Its Message-ID is {}.", mail.email, mail.message_id);
            Ok(())
        }
        Outcome::Retry(reason) | Outcome::Later(reason) => {
            bail!("not sent, for a reason that may pass: {reason}")
        }
        Outcome::Failed { reason, bad_address: true } => bail!("not sent, the address is refused for good: {reason}"),
        Outcome::Failed { reason, bad_address: false } => bail!("not sent, and it would not be later: {reason}"),
        Outcome::Withdrawn(why) => bail!("not sent: {why:?}"),
        Outcome::Unknown(reason) => {
            bail!("nobody knows whether it went out, the mail server never answered: {reason}. Look into the inbox")
        }
    }
}
