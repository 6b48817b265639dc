//! Ending in good order: the first signal asks every part to finish, the second one ends the process at once.

use std::{io, process};

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// The exit code of a process that was told twice.
const EXIT_IMPATIENT: i32 = 130;

/// A token that is cancelled by the first SIGINT or SIGTERM. A second one ends the process.
///
/// # Errors
/// When the signals can't be caught.
pub fn on_signal() -> io::Result<CancellationToken> {
    let token = CancellationToken::new();
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stop = token.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        info!("stopping: finishing what is in flight; a second signal ends it at once");
        stop.cancel();
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        warn!("told to stop a second time: ending at once");
        process::exit(EXIT_IMPATIENT);
    });
    Ok(token)
}
