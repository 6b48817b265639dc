//! Faults of the mail server.

use std::{future::pending, time::Duration};

use anyhow::Result;
use tokio::time::sleep;

use super::{
    super::{site::Site, smtp_faults::SmtpFault},
    Fault, Needs, some_seconds,
};

/// The faults of this file.
pub(super) const FAULTS: &[Fault] = &[
    Fault::new("mail-down", "The mail server is down for some seconds", |site, rng, _| {
        Box::pin(down(site, some_seconds(rng)))
    }),
    Fault::new(
        "mail-drops",
        "The mail server accepts 1 % of the messages and drops the connection before its reply",
        |site, rng, _| Box::pin(faulty(site, SmtpFault::Drops, some_seconds(rng))),
    ),
    Fault::new("mail-refuses-everyone", "The mail server defers all clients (421) for some seconds", |site, rng, _| {
        Box::pin(faulty(site, SmtpFault::Busy, some_seconds(rng)))
    }),
    Fault::new("refuse-sender", "The mail server denies relaying (550 to RCPT) for some seconds", |site, rng, _| {
        Box::pin(faulty(site, SmtpFault::Refuses, some_seconds(rng)))
    }),
    Fault::new(
        "mail-limit",
        "The mail server reports an exceeded daily limit (550 after the message) for some seconds",
        |site, rng, _| Box::pin(faulty(site, SmtpFault::Limits, some_seconds(rng))),
    ),
    Fault::new("mail-hangs", "The mail server stops responding on some connections", |site, _, _| {
        Box::pin(async move {
            site.smtp_faults.hang(HANGING);
            Ok(())
        })
    }),
    Fault::new(
        "mail-slow",
        "The mail server delays each reply to a message by two seconds, for some seconds",
        |site, rng, _| Box::pin(faulty(site, SmtpFault::Slow, some_seconds(rng))),
    ),
    Fault::new(
        "limited-deferrals",
        "A rate limit applies, and the mail server repeatedly defers every 7th recipient",
        |_, _, _| Box::pin(pending()),
    )
    .whole()
    .needs(Needs::RateLimit),
];

/// How many connections hang.
pub(super) const HANGING: u32 = 5;

/// Takes the mail server down for some time.
async fn down(site: &Site<'_>, time: Duration) -> Result<()> {
    site.sink.set_down(true).await?;
    sleep(time).await;
    Ok(site.sink.set_down(false).await?)
}

/// Applies this fault for some time.
async fn faulty(site: &Site<'_>, fault: SmtpFault, time: Duration) -> Result<()> {
    site.smtp_faults.apply(fault, time).await;
    Ok(())
}
