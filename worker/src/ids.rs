//! What a mail carries that leads back to its invitation: a `Message-ID` and an unsubscribe link, made from the ledger's key.

use mailrun_app::config::Config;
use mailrun_core::{
    message_id::MessageIds,
    public_url::PublicUrl,
    signed_id::{Named, SigningKey},
    unsubscribe::Signer,
};
use mailrun_ledger::{in_time, signing};
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;

use crate::until_answered::until_answered;

/// Makes both.
#[derive(Clone, Debug)]
pub struct Ids {
    messages: MessageIds,
    /// Behind the @ of a Message-ID.
    domain: String,
    links: Signer,
    /// Where others reach the pages; none: mails carry no link.
    public_url: Option<PublicUrl>,
}

impl Ids {
    /// Reads the key, however long PostgreSQL takes to answer. None: told to stop before that.
    pub async fn read(pool: &PgPool, config: &Config, stop: &CancellationToken) -> Option<Self> {
        let read = || in_time(config.database.answer_timeout, read_key(pool));
        let key = until_answered("the ledger's signing key can't be read", stop, read).await?;
        Some(Self {
            messages: MessageIds::new(&key),
            domain: config.message_id_domain(),
            links: Signer::new(&key),
            public_url: config.web.public_url.clone(),
        })
    }

    /// The `Message-ID` of an invitation, in angle brackets.
    #[must_use]
    pub fn message_id(&self, named: Named) -> String {
        format!("<{}>", self.messages.write(named, &self.domain))
    }

    /// The unsubscribe link of an invitation.
    #[must_use]
    pub fn link(&self, named: Named) -> Option<String> {
        self.public_url.as_ref().map(|public_url| self.links.link(public_url, named))
    }

    /// The link of a mail that invites nobody.
    #[must_use]
    pub fn test_link(&self) -> Option<String> {
        self.public_url.as_ref().map(|public_url| self.links.test_link(public_url))
    }

    /// What stands behind the @ of a Message-ID.
    #[must_use]
    pub fn domain(&self) -> &str {
        &self.domain
    }
}

async fn read_key(pool: &PgPool) -> sqlx::Result<SigningKey> {
    signing::key(&mut *pool.acquire().await?).await
}
