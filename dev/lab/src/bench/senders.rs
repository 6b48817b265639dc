//! More senders, or fewer: Mailrun's rate by the number of its sending processes, with a mail server that answers at once and
//! with one that takes its time, so that one can read off what another sender is worth.

use std::{fmt, time::Duration};

use anyhow::Result;
use serde::Serialize;

use super::{Options, Settings, drain_rate, items_within, pipeline::Setup};
use mailrun_stack::Stack;

/// What the mail server takes for each mail: with the first the servers are the limit, with the second the permits.
const LATENCIES_MS: [u64; 2] = [0, 50];

/// Mailrun with a number of senders.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Senders {
    senders: usize,
    latency_ms: u64,
    recipients: usize,
    /// From the POST's answer on; a median.
    items_per_second: f64,
    /// What the permits of all of them allow; without latency nothing but the servers is a limit.
    bound_items_per_second: Option<f64>,
}

/// Measures with each number of senders that is asked for.
///
/// # Errors
/// When a server or a service does not start, or anything is lost on the way.
pub(super) async fn measure(stack: &Stack, settings: &Settings<'_>, options: &Options) -> Result<Vec<Senders>> {
    let mut all = Vec::new();
    for latency_ms in LATENCIES_MS {
        for senders in &options.senders {
            let setup = Setup { senders: usize::try_from(*senders)?, latency: Duration::from_millis(latency_ms) };
            let bound = (latency_ms > 0).then(|| setup.bound(settings.config));
            // Only a slow mail server makes a long list last too long.
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
        write!(f, "{senders} sender{plural}, {latency_ms} ms for each mail: {items_per_second:.0} items a second")?;
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
    fn a_line_names_the_bound_where_there_is_one() {
        let one = Senders {
            senders: 1,
            latency_ms: 0,
            recipients: 1_000,
            items_per_second: 9_000.0,
            bound_items_per_second: None,
        };
        assert_eq!(one.to_string(), "1 sender, 0 ms for each mail: 9000 items a second");
        let slow = Senders { senders: 2, latency_ms: 50, bound_items_per_second: Some(8_000.0), ..one };
        assert!(slow.to_string().ends_with("of 8000 that the permits allow"));
    }
}
