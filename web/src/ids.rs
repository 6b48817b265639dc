//! What ids of ours are verified with.

use mailrun_shared::{store::signing, unsubscribe::Signer};

use crate::App;

/// Made from the ledger's key.
pub(crate) struct Ids {
    pub(crate) links: Signer,
}

/// The ledger's key is read when it is first needed: the pages are served before PostgreSQL answers.
pub(crate) async fn ids(app: &App) -> sqlx::Result<&Ids> {
    let read = async || {
        let key = signing::key(&mut *app.pool.acquire().await?).await?;
        Ok(Ids { links: Signer::new(&key) })
    };
    app.ids.get_or_try_init(read).await
}
