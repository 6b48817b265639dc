//! `mailrun unknown`: settles unknown invitations whose outcome has been established.

use anyhow::{Result, anyhow};
use mailrun_core::address::Address;
use mailrun_ledger::settle::{self, Found, Selection};
use uuid::Uuid;

use crate::ledger::Ledger;

/// Settles unknown invitations: those to the addresses, those of the run, or both; without either, all. If an address is invalid,
/// nothing is settled.
pub async fn settle(
    ledger: &Ledger,
    run_id: Option<Uuid>,
    addresses: &[String],
    found: Found,
    by: Option<String>,
) -> Result<()> {
    let emails = addresses
        .iter()
        .map(|text| match text.parse() {
            Ok(Address { email, .. }) => Ok(email),
            Err(_) => Err(anyhow!("{text} is not an email address; nothing was changed")),
        })
        .collect::<Result<Vec<String>>>()?;
    let by = by.or_else(|| std::env::var("USER").ok()).unwrap_or_else(|| "an operator".to_owned());
    let which = Selection { run_id, emails: (!emails.is_empty()).then_some(emails) };
    let settled = settle::settle(&mut *ledger.pool.acquire().await?, &which, found, &by).await?;
    let state = match found {
        Found::Arrived => "sent",
        Found::NotSent => "failed",
    };
    match settled {
        0 => println!("No invitations match; nothing was changed."),
        1 => println!("1 unknown invitation was settled as {state}."),
        count => println!("{count} unknown invitations were settled as {state}."),
    }
    Ok(())
}
