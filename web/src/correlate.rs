//! Compares a returned mail with the messages that it names. A claim counts only for the recipient of a message that was sent
//! from here: anyone can write to the bounce address, but only those who have a message know its id.

use std::collections::BTreeMap;

use mailrun_core::signed_id::Named;
use mailrun_ledger::suppressions;

use crate::{
    App,
    ids::ids,
    report::{ReportedAddress, Returned},
};

/// Maximum number of messages that one mail may be about, which also bounds how many people it can suppress. A message has one
/// recipient, and a mail server reports each message separately.
const MAX_MESSAGES: usize = 10;

/// The claims about the recipient of one of our messages, with the address from the ledger.
pub(crate) async fn confirmed(app: &App, returned: &Returned) -> sqlx::Result<Vec<ReportedAddress>> {
    if returned.claims.is_empty() {
        return Ok(Vec::new());
    }
    let ids = ids(app).await?;
    let mut named = ids.messages.find(&returned.quoted);
    // Some relays replace the Message-ID; the unsubscribe link remains.
    named.extend(ids.links.find(&returned.quoted));
    named.sort_unstable();
    named.dedup();
    named.truncate(MAX_MESSAGES);
    let mut conn = app.pool.acquire().await?;
    let mut confirmed = BTreeMap::new();
    for Named { run_id, item_id } in named {
        let Some(invited) = suppressions::invited(&mut conn, Some(run_id), item_id).await? else { continue };
        if let Some(claim) = returned.claims.iter().find(|claim| claim.is_about(&invited.email)) {
            let reported = ReportedAddress {
                email: invited.email.clone(),
                reason: claim.reason,
                detail: claim.detail.clone(),
                run_id: Some(run_id),
            };
            confirmed.insert(invited.email, reported);
        }
    }
    Ok(confirmed.into_values().collect())
}
