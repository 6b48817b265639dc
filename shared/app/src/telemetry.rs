//! Logs to standard error. Ids are fields; addresses, secrets and message bodies are never logged.

use std::io::IsTerminal as _;

use tracing::warn;
use tracing_subscriber::{EnvFilter, fmt, layer::SubscriberExt, util::SubscriberInitExt};

use crate::config::Config;

/// lapin logs the bodies of returned messages. They stay off, whatever the filter says.
const BODIES: [&str; 1] = ["lapin::returned_messages=off"];

/// Installs the process-wide logger. `RUST_LOG` overrides the configured filter.
///
/// # Panics
/// If called twice.
pub fn init(config: &Config) {
    let Config { log: config, ignored, .. } = config;
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(&config.filter));
    let filter = BODIES.into_iter().filter_map(|silent| silent.parse().ok()).fold(filter, EnvFilter::add_directive);
    let registry = tracing_subscriber::registry().with(filter);
    if config.json {
        registry.with(fmt::layer().json().with_writer(std::io::stderr)).init();
    } else {
        registry
            .with(
                fmt::layer().with_ansi(std::io::stderr().is_terminal()).with_target(false).with_writer(std::io::stderr),
            )
            .init();
    }
    for setting in ignored {
        warn!(
            setting,
            "this setting was removed and has no effect: delete it, the next version refuses to start with it"
        );
    }
}
