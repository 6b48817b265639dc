//! Mailrun's rate by the number of sending processes, with a relay that replies immediately and with a slow one, which shows the effect
//! of another sender.

use std::{fmt, time::Duration};

use anyhow::Result;
use serde::Serialize;

use super::{Options, Settings, drain_rate, items_within, pipeline::Setup};
use mailrun_stack::Stack;

/// The relay's latency per mail: with the first, the servers are the limit; with the second, the permits.
const LATENCIES_MS: [u64; 2] = [0, 50];

/// Mailrun with a number of senders.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Senders {
    senders: usize,
    latency_ms: u64,
    recipients: usize,
    /// After the response to the POST; a median.
    items_per_second: f64,
    /// What the permits of all senders allow; none without latency, when only the servers limit the rate.
    bound_items_per_second: Option<f64>,
}

/// Measures with each requested number of senders.
pub(super) async fn measure(stack: &Stack, settings: &Settings<'_>, options: &Options) -> Result<Vec<Senders>> {
    let mut all = Vec::new();
    for latency_ms in LATENCIES_MS {
        for senders in &options.senders {
            let latency = Duration::from_millis(latency_ms);
            let setup = Setup { senders: usize::try_from(*senders)?, latency, relay: None };
            let bound = (latency_ms > 0).then(|| setup.bound(settings.config));
            // Only with a slow relay does a long list take too long.
            let recipients = items_within(bound.unwrap_or(f64::INFINITY), options);
            let measured = Senders {
                senders: setup.senders,
                latency_ms,
                recipients,
                items_per_second: drain_rate(stack, settings, options, recipients, setup).await?,
                bound_items_per_second: bound,
            };
            eprintln!("{measured}");
            all.push(measured);
        }
    }
    Ok(all)
}

impl fmt::Display for Senders {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { senders, latency_ms, items_per_second, .. } = self;
        let plural = if *senders == 1 { "" } else { "s" };
        write!(f, "{senders} sender{plural}, {latency_ms} ms per mail: {items_per_second:.0} items per second")?;
        match self.bound_items_per_second {
            Some(bound) => write!(f, ", of {bound:.0} that the permits allow"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_contains_the_bound_if_any() {
        let one = Senders {
            senders: 1,
            latency_ms: 0,
            recipients: 1_000,
            items_per_second: 9_000.0,
            bound_items_per_second: None,
        };
        assert_eq!(one.to_string(), "1 sender, 0 ms per mail: 9000 items per second");
        let slow = Senders { senders: 2, latency_ms: 50, bound_items_per_second: Some(8_000.0), ..one };
        assert!(slow.to_string().ends_with("of 8000 that the permits allow"));
    }
}
