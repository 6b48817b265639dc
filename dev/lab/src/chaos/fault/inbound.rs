//! Faults of inbound reports: reports to the bounce hook that are forged, or prove nothing about a mailbox.

use std::time::Duration;

use anyhow::{Result, ensure};
use mailrun_core::{message_id::MessageIds, signed_id::Named};
use mailrun_ledger::signing;
use rand::{RngExt as _, rngs::StdRng};
use reqwest::Client;
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::{
    super::site::{HOOK_KEY, Site},
    Fault, some_seconds,
};

/// Between two reports.
const BETWEEN_MS: std::ops::Range<u64> = 0..100;
/// Recipients in a large report.
const MANY: usize = 5_000;

/// The faults of this file.
pub(super) const FAULTS: &[Fault] = &[Fault::new(
    "forged-bounces",
    "Post forged or inconclusive reports to the bounce hook for some seconds",
    |site, rng, _| {
        Box::pin(async move {
            let time = some_seconds(rng);
            forge(site, time, rng).await
        })
    },
)];

/// For some time, reports that people of the run do not exist or complained. None of the reports is evidence.
async fn forge(site: &Site<'_>, time: Duration, rng: &mut StdRng) -> Result<()> {
    let people: Vec<(i64, Uuid, String)> = sqlx::query_as(
        "SELECT i.id, i.run_id, u.email FROM run_items i JOIN users u ON u.id = i.user_id ORDER BY i.id",
    )
    .fetch_all(&site.pool)
    .await?;
    ensure!(!people.is_empty(), "no invitations yet");
    let ids = MessageIds::new(&signing::key(&mut *site.pool.acquire().await?).await?);
    let client = Client::builder().no_proxy().timeout(Duration::from_secs(5)).build()?;
    let end = Instant::now() + time;
    let mut posted = 0;
    while Instant::now() < end {
        let mut one = || &people[rng.random_range(0..people.len())];
        let ((item_id, run_id, email), (_, _, other)) = (one(), one());
        let real = ids.write(Named { run_id: *run_id, item_id: *item_id }, "mailrun.example");
        let report =
            report(rng, email, if other == email { "eve@example.net" } else { other }, &real, *item_id, *run_id);
        let answer =
            client.post(format!("{}/hooks/bounces", site.web_url())).bearer_auth(HOOK_KEY).body(report).send().await;
        // Another fault may have stopped the web server or its database.
        if let Ok(answer) = answer {
            ensure!(answer.status() != 401, "the hook refused its key");
            posted += usize::from(answer.status().is_success());
        }
        sleep(Duration::from_millis(rng.random_range(BETWEEN_MS))).await;
    }
    eprintln!("  {posted} reports without evidence accepted");
    Ok(())
}

/// A report that must suppress nobody. `real` is the Message-ID of the mail to `email`.
fn report(rng: &mut StdRng, email: &str, other: &str, real: &str, item_id: i64, run_id: Uuid) -> String {
    const GONE: &str = "Status: 5.1.1\nDiagnostic-Code: smtp; 550 5.1.1 no such user";
    let failed = |recipient: &str, why: &str| format!("Final-Recipient: rfc822; {recipient}\nAction: failed\n{why}\n");
    match rng.random_range(0..8) {
        // Names no message.
        0 => dsn(&failed(email, GONE), &format!("{}@mailrun.example", "a7".repeat(32))),
        1 => dsn(&failed(email, GONE), &format!("{item_id}.{}@mailrun.example", run_id.simple())),
        // Names another person's message.
        2 => dsn(&failed(other, GONE), real),
        3 => {
            let many: String =
                (0..MANY).map(|number| failed(&format!("guest-{number}@example.net"), GONE) + "\n").collect();
            dsn(&many, real)
        }
        // About the sender, or temporary.
        4 => dsn(&failed(email, "Status: 5.0.0\nDiagnostic-Code: smtp; 550 5.7.1 refused by local policy"), real),
        5 => dsn(&failed(email, "Status: 5.1.8\nDiagnostic-Code: smtp; 550 5.1.8 bad outbound sender"), real),
        6 => dsn(&format!("Final-Recipient: rfc822; {email}\nAction: delayed\nStatus: 4.4.1\n"), real),
        _ => format!(
            "From: feedback@provider.example\nMIME-Version: 1.0\n\
             Content-Type: multipart/report; report-type=feedback-report; boundary=b0\n\n\
             --b0\nContent-Type: message/feedback-report\n\nFeedback-Type: auth-failure\nOriginal-Rcpt-To: {email}\n\n\
             --b0\nContent-Type: text/rfc822-headers\n\nMessage-ID: <{real}>\nTo: {email}\n\n--b0--\n"
        ),
    }
}

fn dsn(recipients: &str, message_id: &str) -> String {
    format!(
        "Return-Path: <>\nFrom: MAILER-DAEMON@mx.example.net\nMIME-Version: 1.0\n\
         Content-Type: multipart/report; report-type=delivery-status; boundary=b0\n\n\
         --b0\nContent-Type: message/delivery-status\n\nReporting-MTA: dns; mx.example.net\n\n{recipients}\n\
         --b0\nContent-Type: text/rfc822-headers\n\nMessage-ID: <{message_id}>\n\n--b0--\n"
    )
}
