//! `mailrun suppressions`: shows and changes the suppression list.

use std::io::{self, Write as _};

use anyhow::{Context as _, Result, bail};
use chrono::Utc;
use mailrun_core::{
    address::{Address, Invalid, shown},
    since,
};
use mailrun_ledger::{
    held_suppressions,
    suppressions::{self, Reason},
};
use uuid::Uuid;

use crate::ledger::Ledger;

/// Addresses per query.
const PAGE: i64 = 1_000;

/// Prints all addresses, newest first, one per line: date, reason, address.
pub async fn list(ledger: &Ledger) -> Result<()> {
    let mut out = io::stdout().lock();
    let mut before = None;
    let mut count = 0;
    loop {
        let page = suppressions::list(&ledger.pool, before, PAGE).await?;
        let Some(last) = page.last() else { break };
        before = Some(last.number);
        count += page.len();
        for row in &page {
            writeln!(
                out,
                "{}  {:<20}  {}",
                row.created_at.format("%Y-%m-%d"),
                Reason::words_of(&row.reason),
                shown(&row.email)
            )?;
        }
    }
    match count {
        0 => writeln!(out, "The suppression list is empty.")?,
        1 => writeln!(out, "1 address is suppressed.")?,
        count => writeln!(out, "{count} addresses are suppressed.")?,
    }
    Ok(())
}

/// Suppresses addresses. If one of them is invalid, none is added.
pub async fn add(ledger: &Ledger, addresses: &[String]) -> Result<()> {
    let emails = read(addresses)?;
    let mut tx = ledger.pool.begin().await?;
    let mut new = 0;
    for email in &emails {
        new += usize::from(suppressions::suppress(&mut tx, email, Reason::Asked, None).await?);
    }
    tx.commit().await?;
    println!("{} suppressed{}.", are(new), rest(emails.len() - new, "suppressed before"));
    Ok(())
}

/// Removes addresses from the list. If one of them is invalid, none is removed.
pub async fn remove(ledger: &Ledger, addresses: &[String]) -> Result<()> {
    let emails = read(addresses)?;
    let mut tx = ledger.pool.begin().await?;
    let mut removed = 0;
    for email in &emails {
        removed += usize::from(suppressions::remove(&mut tx, email).await?);
    }
    tx.commit().await?;
    println!(
        "{} removed from the list and can be invited again{}.",
        are(removed),
        rest(emails.len() - removed, "not on the list")
    );
    Ok(())
}

/// Removes all addresses suppressed for `reason` since a time.
pub async fn remove_since(ledger: &Ledger, reason: Reason, since: &str) -> Result<()> {
    let moment = since::parse(since, Utc::now()).with_context(|| {
        format!("{since:?} is not a time: use 2026-11-28, 2026-11-28T14:30 (UTC), 90m, 2h or 3d; nothing was changed")
    })?;
    let removed = suppressions::remove_since(&mut *ledger.pool.acquire().await?, reason, moment).await?;
    println!("{} removed from the list and can be invited again.", are(usize::try_from(removed)?));
    Ok(())
}

/// Prints the runs whose suppressions are held for review.
pub async fn held(ledger: &Ledger) -> Result<()> {
    let reviews = held_suppressions::open_reviews(&mut *ledger.pool.acquire().await?).await?;
    if reviews.is_empty() {
        println!("No suppressions are held for review.");
    }
    for review in reviews {
        let since = review.held_at.format("%Y-%m-%d %H:%M UTC");
        println!("{}  {} addresses, held since {since}", review.run_id, review.addresses);
        println!("    most frequent reply: {}", review.detail.unwrap_or_default());
    }
    Ok(())
}

/// Accepts or rejects the held suppressions of a run.
pub async fn review(ledger: &Ledger, run_id: Uuid, accept: bool) -> Result<()> {
    let decided = held_suppressions::decide(&mut *ledger.pool.acquire().await?, run_id, accept).await?;
    let Some(count) = decided else { bail!("no suppressions of run {run_id} are held for review") };
    println!("{} {}.", are(count), if accept { "suppressed" } else { "not suppressed" });
    Ok(())
}

/// Parses the addresses, without duplicates, in the order in which everything locks them.
fn read(addresses: &[String]) -> Result<Vec<String>> {
    let mut emails = Vec::with_capacity(addresses.len());
    for text in addresses {
        match text.parse() {
            Ok(Address { email, .. }) => emails.push(email),
            Err(Invalid { text, reason }) => bail!("{text} {reason}; nothing was changed"),
        }
    }
    emails.sort_unstable();
    emails.dedup();
    Ok(emails)
}

fn are(count: usize) -> String {
    if count == 1 { "1 address is".to_owned() } else { format!("{count} addresses are") }
}

fn rest(count: usize, what: &str) -> String {
    match count {
        0 => String::new(),
        1 => format!("; 1 was {what}"),
        count => format!("; {count} were {what}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_all_addresses_or_none() {
        let read = |list: &[&str]| read(&list.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>());
        assert_eq!(read(&["B@x.org", "Ann <a@x.org>", "b@X.org"]).unwrap(), ["a@x.org", "b@x.org"]);
        assert_eq!(read(&["a@x.org", "nobody"]).unwrap_err().to_string(), "nobody has no @ sign; nothing was changed");
    }

    #[test]
    fn formats_the_result() {
        assert_eq!(format!("{}{}", are(1), rest(2, "not on the list")), "1 address is; 2 were not on the list");
        assert_eq!(format!("{}{}", are(0), rest(0, "not on the list")), "0 addresses are");
    }
}
