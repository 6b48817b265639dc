//! `mailrun relay`: shows stopped relays and answers whether the refusals were our fault.

use anyhow::Result;
use mailrun_ledger::relay_stops::{self, Fault};

use crate::ledger::Ledger;

/// Prints the stopped relays.
pub async fn show(ledger: &Ledger) -> Result<()> {
    let stops = relay_stops::recent(&mut *ledger.pool.acquire().await?).await?;
    let mut open = stops.iter().filter(|stop| stop.fault.is_none()).peekable();
    if open.peek().is_none() {
        println!("No relay is stopped.");
        return Ok(());
    }
    for stop in open {
        let since = stop.stopped_at.format("%Y-%m-%d %H:%M UTC");
        println!("{}  {}  stopped {since}, {} paused", stop.number, stop.relay, runs(stop.runs.len()));
        println!("    {}", stop.reason);
    }
    println!("Use `mailrun relay it-was-us` to retry the refused recipients, or");
    println!("`mailrun relay it-was-them` to fail them.");
    Ok(())
}

/// Answers relay stops. Workers act on it within a second.
pub async fn answer(ledger: &Ledger, number: Option<i64>, fault: Fault) -> Result<()> {
    let answered = relay_stops::answer(&mut *ledger.pool.acquire().await?, number, fault).await?;
    let then = match fault {
        Fault::Us => "the refused recipients are retried",
        Fault::Them => "the refused recipients fail",
    };
    match answered {
        0 => println!("No relay is stopped."),
        1 => println!("The relay and its runs resume; {then}."),
        count => println!("{count} relays and their runs resume; {then}."),
    }
    Ok(())
}

fn runs(count: usize) -> String {
    if count == 1 { "1 run".to_owned() } else { format!("{count} runs") }
}
