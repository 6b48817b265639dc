//! Faults of the network between our processes and one server.

use std::time::Duration;

use anyhow::Result;
use rand::{RngExt as _, rngs::StdRng};
use tokio::time::{Instant, sleep};

use super::{
    super::site::{ANSWER, HEARTBEAT},
    Fault, Recovery, some_seconds,
};
use crate::proxy::Proxy;

/// The faults of this file.
pub(super) const FAULTS: &[Fault] = &[
    Fault::new("cut-broker", "Cut connections to RabbitMQ, repeatedly for some seconds", |site, rng, _| {
        Box::pin(async move {
            let time = some_seconds(rng);
            cut(&site.to_broker, time, rng).await
        })
    }),
    Fault::new("cut-database", "Cut connections to PostgreSQL, repeatedly for some seconds", |site, rng, _| {
        Box::pin(async move {
            let time = some_seconds(rng);
            cut(&site.to_database, time, rng).await
        })
    }),
    Fault::new("cut-mail", "Cut connections to the mail server, repeatedly for some seconds", |site, rng, _| {
        Box::pin(async move {
            let time = some_seconds(rng);
            cut(&site.to_mail, time, rng).await
        })
    }),
    Fault::new(
        "delay-broker",
        "Delay traffic with RabbitMQ by 200 to 500 ms each way, for some seconds",
        |site, rng, _| {
            Box::pin(async move {
                let time = some_seconds(rng);
                delay(&site.to_broker, time, rng).await
            })
        },
    ),
    Fault::new(
        "delay-database",
        "Delay traffic with PostgreSQL by 200 to 500 ms each way, for some seconds",
        |site, rng, _| {
            Box::pin(async move {
                let time = some_seconds(rng);
                delay(&site.to_database, time, rng).await
            })
        },
    ),
    Fault::new(
        "delay-mail",
        "Delay traffic with the mail server by 200 to 500 ms each way, for some seconds",
        |site, rng, _| {
            Box::pin(async move {
                let time = some_seconds(rng);
                delay(&site.to_mail, time, rng).await
            })
        },
    ),
    Fault::new(
        "hole-broker",
        "Silently drop traffic with RabbitMQ for longer than its heartbeat timeout",
        |site, rng, _| Box::pin(hole(&site.to_broker, some_seconds(rng))),
    )
    .heavy()
    .recovers(Recovery::Heartbeats),
    Fault::new(
        "hole-database",
        "Silently drop traffic with PostgreSQL for longer than its answer timeout",
        |site, rng, _| Box::pin(hole(&site.to_database, some_seconds(rng))),
    )
    .heavy()
    .recovers(Recovery::Answers),
    Fault::new(
        "hole-mail",
        "Silently drop traffic with the mail server for longer than its answer timeout",
        |site, rng, _| Box::pin(hole(&site.to_mail, some_seconds(rng))),
    )
    .heavy()
    .recovers(Recovery::Answers),
];

/// Cuts all connections, repeatedly for some time.
async fn cut(proxy: &Proxy, time: Duration, rng: &mut StdRng) -> Result<()> {
    let end = Instant::now() + time;
    while Instant::now() < end {
        proxy.cut();
        sleep(Duration::from_millis(rng.random_range(100..800))).await;
    }
    Ok(())
}

/// Delays traffic for some time.
async fn delay(proxy: &Proxy, time: Duration, rng: &mut StdRng) -> Result<()> {
    proxy.slow(Duration::from_millis(rng.random_range(200..500)), time).await;
    Ok(())
}

/// Drops all traffic, for `more` than the longest timeout.
async fn hole(proxy: &Proxy, more: Duration) -> Result<()> {
    proxy.hole(ANSWER.max(2 * HEARTBEAT) + more).await;
    Ok(())
}
