//! Compares what a returned mail claims with the messages that it names: a claim counts only for the recipient of a message that
//! was sent from here. Anybody can write to the bounce address, but only those who have a message know its id.

use std::collections::BTreeMap;

use mailrun_core::signed_id::Named;
use mailrun_ledger::suppressions;

use crate::{
    App,
    ids::ids,
    report::{Returned, Verdict},
};

/// Messages that one mail may be about, and so the people that it can suppress. A message has one recipient, and a mail server reports
/// each message by itself.
const MAX_MESSAGES: usize = 10;

/// The claims that are about the recipient of a message of ours, by the address in the ledger.
///
/// # Errors
/// The database's.
pub(crate) async fn confirmed(app: &App, returned: &Returned) -> sqlx::Result<Vec<Verdict>> {
    if returned.claims.is_empty() {
        return Ok(Vec::new());
    }
    let ids = ids(app).await?;
    let mut named = ids.messages.find(&returned.quoted);
    // Some relays replace the Message-ID; the link to unsubscribe stays.
    named.extend(ids.links.find(&returned.quoted));
    named.sort_unstable();
    named.dedup();
    named.truncate(MAX_MESSAGES);
    let mut conn = app.pool.acquire().await?;
    let mut confirmed = BTreeMap::new();
    for Named { run_id, item_id } in named {
        let Some(invited) = suppressions::invited(&mut conn, Some(run_id), item_id).await? else { continue };
        if let Some(claim) = returned.claims.iter().find(|claim| claim.is_about(&invited.email)) {
            let verdict = Verdict {
                email: invited.email.clone(),
                reason: claim.reason,
                detail: claim.detail.clone(),
                run_id: Some(run_id),
            };
            confirmed.insert(invited.email, verdict);
        }
    }
    Ok(confirmed.into_values().collect())
}
