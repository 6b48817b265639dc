//! The ids in a mail that lead back to its item: a `Message-ID` and an unsubscribe link, signed with the ledger's key.

use mailrun_core::{message_id::MessageIds, public_url::PublicUrl, signed_id::Named, unsubscribe::Signer};
use mailrun_ledger::signing;
use sqlx::PgConnection;
use tokio::sync::OnceCell;

/// Creates both. The key is read when the first mail needs it.
#[derive(Debug)]
pub struct Ids {
    /// The part of a Message-ID behind the @.
    domain: String,
    /// The public address of the pages. `None`: mails carry no link.
    public_url: Option<PublicUrl>,
    signed: OnceCell<Signed>,
}

/// What is derived from the key.
#[derive(Clone, Debug)]
pub struct Signed {
    messages: MessageIds,
    links: Signer,
}

impl Ids {
    /// Ids of this domain, and links to these pages.
    #[must_use]
    pub fn new(domain: String, public_url: Option<PublicUrl>) -> Self {
        Self { domain, public_url, signed: OnceCell::new() }
    }

    /// Reads the key on first use.
    pub async fn signed(&self, conn: &mut PgConnection) -> sqlx::Result<Signed> {
        let read = async || {
            let key = signing::key(conn).await?;
            Ok(Signed { messages: MessageIds::new(&key), links: Signer::new(&key) })
        };
        self.signed.get_or_try_init(read).await.cloned()
    }

    /// The `Message-ID` of an invitation, in angle brackets.
    #[must_use]
    pub fn message_id(&self, signed: &Signed, named: Named) -> String {
        format!("<{}>", signed.messages.write(named, &self.domain))
    }

    /// The unsubscribe link of an invitation.
    #[must_use]
    pub fn link(&self, signed: &Signed, named: Named) -> Option<String> {
        self.public_url.as_ref().map(|public_url| signed.links.link(public_url, named))
    }

    /// The part of a Message-ID behind the @.
    #[must_use]
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// The unsubscribe link of a test mail, which shows the page without unsubscribing anyone.
    #[must_use]
    pub fn test_link(&self, signed: &Signed) -> Option<String> {
        self.public_url.as_ref().map(|public_url| signed.links.test_link(public_url))
    }
}
