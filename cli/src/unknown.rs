//! `mailrun unknown`: invitations of which nobody could know whether they arrived, and what somebody has found out since.

use anyhow::{Result, anyhow};
use mailrun_core::address::Address;
use mailrun_ledger::settle::{self, Found, Selection};
use uuid::Uuid;

use crate::ledger::Ledger;

/// Settles unknown invitations: those of the addresses, of the run, or of both; without either, all of them.
///
/// # Errors
/// When one of them is no address, and then nothing is settled; or the database's.
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
            Err(_) => Err(anyhow!("{text} is not an email address; nothing is changed")),
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
        0 => println!("Nothing matches: no invitation is changed."),
        1 => println!("1 unknown invitation is settled as {state}."),
        count => println!("{count} unknown invitations are settled as {state}."),
    }
    Ok(())
}
