//! The links with which recipients can say that this is enough: made here, from the ledger's key, for each mail.

use mailrun_shared::{
    config::Config,
    public_url::PublicUrl,
    store::{in_time, suppressions},
    unsubscribe::{Signer, TEST_ITEM},
};
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;

use crate::until_answered;

/// Makes the links, if the installation has an address that others can reach.
#[derive(Clone, Debug, Default)]
pub struct Links(Option<(Signer, PublicUrl)>);

impl Links {
    /// Reads the key, however long PostgreSQL takes to answer. None: told to stop before that.
    pub async fn read(pool: &PgPool, config: &Config, stop: &CancellationToken) -> Option<Self> {
        let Some(public_url) = config.web.public_url.clone() else { return Some(Self(None)) };
        let read = || in_time(config.database.answer_timeout(), read_key(pool));
        let key = until_answered("the key of unsubscribe links can't be read", stop, read).await?;
        Some(Self(Some((Signer::new(&key), public_url))))
    }

    /// The link of an invitation.
    #[must_use]
    pub fn of(&self, item_id: i64) -> Option<String> {
        self.0.as_ref().map(|(signer, public_url)| signer.link(public_url, item_id))
    }

    /// The link of a mail that invites nobody.
    #[must_use]
    pub fn of_test(&self) -> Option<String> {
        self.of(TEST_ITEM)
    }
}

async fn read_key(pool: &PgPool) -> sqlx::Result<Vec<u8>> {
    suppressions::signing_key(&mut *pool.acquire().await?).await
}
