//! `mailrun suppressions`: the addresses that nobody writes to any more.

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

/// Addresses read at once.
const PAGE: i64 = 1_000;

/// Prints all of them, newest first, one a line: since when, why, which.
///
/// # Errors
/// The database's, or when nobody reads what is printed.
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
        0 => writeln!(out, "Nobody is on the list.")?,
        1 => writeln!(out, "One address is not written to.")?,
        count => writeln!(out, "{count} addresses are not written to.")?,
    }
    Ok(())
}

/// Keeps addresses from being written to.
///
/// # Errors
/// When one of them is no address, and then none is added; or the database's.
pub async fn add(ledger: &Ledger, addresses: &[String]) -> Result<()> {
    let emails = read(addresses)?;
    let mut tx = ledger.pool.begin().await?;
    let mut new = 0;
    for email in &emails {
        new += usize::from(suppressions::suppress(&mut tx, email, Reason::Asked, None).await?);
    }
    tx.commit().await?;
    println!("{} not written to any more{}.", are(new), rest(emails.len() - new, "on the list before"));
    Ok(())
}

/// Lets addresses be written to again.
///
/// # Errors
/// When one of them is no address, and then none is removed; or the database's.
pub async fn remove(ledger: &Ledger, addresses: &[String]) -> Result<()> {
    let emails = read(addresses)?;
    let mut tx = ledger.pool.begin().await?;
    let mut removed = 0;
    for email in &emails {
        removed += usize::from(suppressions::remove(&mut tx, email).await?);
    }
    tx.commit().await?;
    println!("{} off the list, and can be invited again{}.", are(removed), rest(emails.len() - removed, "not on it"));
    Ok(())
}

/// Lets all addresses be written to again that were suppressed for `reason` since then.
///
/// # Errors
/// When `since` is no moment, or the database's.
pub async fn remove_since(ledger: &Ledger, reason: Reason, since: &str) -> Result<()> {
    let moment = since::parse(since, Utc::now()).with_context(|| {
        format!(
            "{since:?} is no moment: write 2026-11-28, 2026-11-28T14:30 (UTC), or 90m, 2h or 3d; nothing is changed"
        )
    })?;
    let removed = suppressions::remove_since(&mut *ledger.pool.acquire().await?, reason, moment).await?;
    println!("{} off the list, and can be invited again.", are(usize::try_from(removed)?));
    Ok(())
}

/// Prints the runs whose suppressions are held.
///
/// # Errors
/// The database's.
pub async fn held(ledger: &Ledger) -> Result<()> {
    let reviews = held_suppressions::open_reviews(&mut *ledger.pool.acquire().await?).await?;
    if reviews.is_empty() {
        println!("No suppressions are held for review.");
    }
    for review in reviews {
        let since = review.held_at.format("%Y-%m-%d %H:%M UTC");
        println!("{}  {} addresses, held since {since}", review.run_id, review.addresses);
        println!("    most often: {}", review.detail.unwrap_or_default());
    }
    Ok(())
}

/// Decides what becomes of the suppressions of a run.
///
/// # Errors
/// When nothing of it is held, or the database's.
pub async fn review(ledger: &Ledger, run_id: Uuid, accept: bool) -> Result<()> {
    let decided = held_suppressions::decide(&mut *ledger.pool.acquire().await?, run_id, accept).await?;
    let Some(count) = decided else { bail!("no suppressions of run {run_id} are held for review") };
    println!("{} {}.", are(count), if accept { "suppressed" } else { "not suppressed, and receive mail" });
    Ok(())
}

/// Each once, in the order in which everybody locks them.
fn read(addresses: &[String]) -> Result<Vec<String>> {
    let mut emails = Vec::with_capacity(addresses.len());
    for text in addresses {
        match text.parse() {
            Ok(Address { email, .. }) => emails.push(email),
            Err(Invalid { text, reason }) => bail!("{text} {reason}; nothing is changed"),
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
    fn addresses_are_read_once_or_not_at_all() {
        let read = |list: &[&str]| read(&list.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>());
        assert_eq!(read(&["B@x.org", "Ann <a@x.org>", "b@X.org"]).unwrap(), ["a@x.org", "b@x.org"]);
        assert_eq!(read(&["a@x.org", "nobody"]).unwrap_err().to_string(), "nobody has no @ sign; nothing is changed");
    }

    #[test]
    fn what_was_done_is_told_in_words() {
        assert_eq!(format!("{}{}", are(1), rest(2, "not on it")), "1 address is; 2 were not on it");
        assert_eq!(format!("{}{}", are(0), rest(0, "not on it")), "0 addresses are");
    }
}
