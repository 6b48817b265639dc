//! The keys that verify our own ids, in unsubscribe links and in returned mails.

use mailrun_core::{message_id::MessageIds, unsubscribe::Signer};
use mailrun_ledger::signing;

use crate::App;

/// Derived from the ledger's key.
pub(crate) struct Ids {
    pub(crate) links: Signer,
    pub(crate) messages: MessageIds,
}

/// The ledger's key is read on first use, because the web process starts before PostgreSQL is available.
pub(crate) async fn ids(app: &App) -> sqlx::Result<&Ids> {
    let read = async || {
        let key = signing::key(&mut *app.pool.acquire().await?).await?;
        Ok(Ids { links: Signer::new(&key), messages: MessageIds::new(&key) })
    };
    app.ids.get_or_try_init(read).await
}
